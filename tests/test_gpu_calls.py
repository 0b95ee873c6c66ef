"""What only a GPU has around the kernels, CUDA graphs, streams, several devices, and the CUDA
library's own operators. The bodies run on a CPU too, as those of tests/test_gpu.py do: a graph is
the function itself then, a stream is none.
"""

import contextlib

import pytest
import test_gpu
import torch
from test_gpu import BOTH, DEVICE, REHEARSAL, size

import fused_rnn
from benchmarks.cases import Case, Job
from benchmarks.providers import find
from benchmarks.session import run_job
from fused_rnn import library, plan
from fused_rnn.cuda import planning

pytestmark = [pytest.mark.gpu, test_gpu.pytestmark[1]]
backend = test_gpu.backend


def module_of(cell: str, hidden: int, dtype=torch.float32, device=DEVICE):
    """A bidirectional module of two layers, seeded."""
    torch.manual_seed(0)
    kind = {"lstm": fused_rnn.LSTM, "gru": fused_rnn.GRU, "rnn": fused_rnn.RNN}[cell]
    if REHEARSAL and hidden > 64:
        pytest.skip("the rehearsal's sizes are all alike")
    hidden, layers = size(hidden, 9), size(2, 1)
    return kind(16, hidden, layers, bidirectional=True, device=device, dtype=dtype)


def input_of(module, steps=20, seed=1):
    """x [T, B, I] and dy [T, B, 2H] for a module."""
    torch.manual_seed(seed)
    steps, rows = size(steps, 2), size(12, 2)
    weight = module.weight_ih_l0
    x = torch.randn(steps, rows, module.input_size).to(weight)
    return x, torch.randn(steps, rows, 2 * module.hidden_size).to(weight)


def train(module, x, dy, **given):
    """Output, final state and all gradients of a call, as one list."""
    leaf = x.detach().requires_grad_()
    y, state = module(leaf, **given)
    grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy)
    return [y.detach(), *(s.detach() for s in flat(state)), *grads]


def infer(module, x, dy, **given):
    """Output and final state of a call, as one list."""
    with torch.no_grad():
        y, state = module(x, **given)
    return [y, *flat(state)]


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


def capture(function):
    """(outputs, replay) of a CUDA graph of function(), whose tensors stay where they are."""
    if DEVICE != "cuda":
        outputs = function()

        def replay():
            for old, new in zip(outputs, function(), strict=True):
                old.copy_(new)

        return outputs, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return outputs, graph.replay


@pytest.mark.parametrize("flags", BOTH, ids=["full", "flags"])
@pytest.mark.parametrize("call", [infer, train])
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
@pytest.mark.parametrize("hidden", (64, 256))
def test_captured_graph(hidden, cell, call, flags, backend):
    """A captured call gives the bits of an eager one, on other values than it was captured with."""
    module = module_of(cell, hidden, torch.bfloat16)
    x, dy = input_of(module)
    given = {}
    if flags:
        given["lengths"] = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
        given["reset"] = torch.rand(x.shape[:2], device=DEVICE) < 0.2
    with fused_rnn.use_backend(backend):
        outputs, replay = capture(lambda: call(module, x, dy, **given))
        for seed in range(2, size(4, 3)):
            new_x, new_dy = input_of(module, seed=seed)
            wanted = call(module, new_x, new_dy, **given)
            x.copy_(new_x)
            dy.copy_(new_dy)
            replay()
            for ours, eager in zip(outputs, wanted, strict=True):
                assert torch.equal(ours, eager)


@pytest.mark.parametrize("call", [infer, train])
@pytest.mark.parametrize("hidden", (64, 256))
def test_two_streams(hidden, call, backend):
    """Calls on two streams at once give what each gives alone."""
    modules = [module_of("lstm", hidden), module_of("gru", hidden)]
    inputs = [input_of(module, steps=200) for module in modules]
    with fused_rnn.use_backend(backend):
        alone = [call(module, *given) for module, given in zip(modules, inputs, strict=True)]
        if DEVICE == "cuda":
            streams = [torch.cuda.Stream() for _ in modules]
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
            contexts = [torch.cuda.stream(stream) for stream in streams]
        else:
            streams, contexts = [], [contextlib.nullcontext() for _ in modules]
        together = [[], []]
        for _ in range(size(5, 1)):
            for k, context in enumerate(contexts):
                with context:
                    together[k].append(call(modules[k], *inputs[k]))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for wanted, results in zip(alone, together, strict=True):
        for result in results:
            for ours, other in zip(result, wanted, strict=True):
                assert torch.equal(ours, other)


def delayed(stream, copies) -> None:
    """Copies (to, from) on a stream, after it has been kept waiting."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        for to, source in copies:
            to.copy_(source, non_blocking=True)


@pytest.mark.parametrize("outside", BOTH, ids=["backward_inside", "backward_outside"])
@pytest.mark.parametrize("hidden", (64, 256))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_kernels_go_to_the_current_stream(cell, hidden, outside, backend):
    """Forward and backward read what has just been written on a stream that is current but not the
    default one; also where backward is called when another is current."""
    module = module_of(cell, hidden)
    x, dy = input_of(module)
    late_x, late_dy = torch.zeros_like(x).requires_grad_(), torch.zeros_like(dy)
    leaves = [late_x, *module.parameters()]
    with fused_rnn.use_backend(backend):
        wanted = train(module, x, dy)
        if DEVICE == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            delayed(stream, [(late_x.detach(), x), (late_dy, dy)])
            context = torch.cuda.stream(stream)
        else:
            late_x.detach().copy_(x)
            late_dy.copy_(dy)
            context = contextlib.nullcontext()
        with context:
            y, state = module(late_x)
            if not outside:
                grads = torch.autograd.grad(y, leaves, late_dy)
        if outside:
            grads = torch.autograd.grad(y, leaves, dy)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    found = [y.detach(), *(s.detach() for s in flat(state)), *grads]
    for ours, other in zip(found, wanted, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("own_stream", BOTH, ids=["default_stream", "own_stream"])
@pytest.mark.parametrize("hidden", (64, 256))
def test_another_device_than_the_current_one(hidden, own_stream, backend):
    if DEVICE != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        module = module_of("lstm", hidden, device=device)
        given = input_of(module)
        stream = torch.cuda.Stream(device) if own_stream else torch.cuda.default_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with (
            torch.cuda.stream(stream),  # current on its device,
            torch.cuda.device("cuda:0"),  # while the current device is the first
            fused_rnn.use_backend(backend),
        ):
            results.append(train(module, *given))
        torch.cuda.synchronize(device)
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second.to(first.device), first)


# The CUDA library's own operators, which fused_rnn.cuda calls with a kernel and a stream.

cuda_only = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def lstm_arguments(hidden):
    """Those of a bfloat16 scan of three steps and nine rows, up to the kernel."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)

    state = normal(1, 9, hidden), normal(1, 9, hidden)
    w_hh = normal(1, 4 * hidden, hidden) * hidden**-0.5
    return normal(3, 9, 1, 4 * hidden), w_hh, None, *state, None, [False]


def lstm_scan(arguments, kernel, stream=0):
    """y, h_n and c_n by the kernel 0 (steps), 1 (a block scan) or 2 (a grid scan), 8 rows each."""
    rows = 8 if kernel else 0
    return torch.ops.fused_rnn.cuda_scan_lstm_inference(*arguments, kernel, rows, 0, stream)


@cuda_only
@pytest.mark.parametrize("kernel", (1, 2))
def test_a_scan_goes_to_the_stream_it_is_given(kernel, backend):
    gates_x, *others = lstm_arguments(size(64, 9))
    wanted = lstm_scan((gates_x, *others), kernel)
    late, stream = torch.zeros_like(gates_x), 0
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        delayed(side, [(late, gates_x)])
        stream = side.cuda_stream
    else:
        late.copy_(gates_x)
    found = lstm_scan((late, *others), kernel, stream)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for ours, other in zip(found, wanted, strict=True):
        assert torch.equal(ours, other)


@cuda_only
@pytest.mark.parametrize("what", ("no_block_scan", "no_shared_memory"))
def test_a_refused_launch_spoils_nothing(what, backend):
    """It is a RuntimeError, and later calls give what earlier ones gave."""
    hidden, message = 300, "there is no block scan for H = 300"
    if what == "no_shared_memory":
        hidden, message = 192, "does not have the shared memory"
        if DEVICE != "cuda":
            pytest.skip("an emulated block has as much shared memory as it asks for")
        block = planning.block_kernel(plan.Shape("lstm", 1, 8, hidden, torch.bfloat16))
        if block.shared <= plan.device_of(torch.cuda.current_device()).shared:
            pytest.skip("this GPU has shared memory for every block scan")
    small, large = lstm_arguments(16), lstm_arguments(hidden)
    before = [lstm_scan(small, kernel) for kernel in (0, 1)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            lstm_scan(large, 1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        after = [lstm_scan(small, kernel) for kernel in (0, 1)]
        for ours, other in zip(sum(after, ()), sum(before, ()), strict=True):
            assert torch.equal(ours, other)
    assert lstm_scan(large, 0)[0].isfinite().all(), "the step path takes any size"


@contextlib.contextmanager
def no_synchronisation():
    """Raise where torch would wait for the GPU."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tape", ("keep", "recompute"))
@pytest.mark.parametrize("hidden", (64, 256))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_no_host_synchronisation(cell, hidden, tape, backend):
    """Forward and backward with lengths and resets on the device wait for nothing."""
    module = module_of(cell, hidden)
    module.tape = tape
    x, dy = input_of(module)
    lengths = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
    reset = torch.rand(x.shape[:2], device=DEVICE) < 0.2
    with fused_rnn.use_backend(backend):
        wanted = train(module, x, dy, lengths=lengths, reset=reset)  # compiles
        with no_synchronisation():
            found = train(module, x, dy, lengths=lengths, reset=reset)
    for ours, other in zip(found, wanted, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_compiled_without_a_graph_break(cell, compiler, backend):
    if REHEARSAL and compiler == "inductor":
        pytest.skip("tests/test_compile.py has it on a CPU")
    torch._dynamo.reset()
    module = module_of(cell, 64)
    x, dy = input_of(module)
    lengths = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
    with fused_rnn.use_backend(backend):
        wanted = train(module, x, dy, lengths=lengths)
        compiled = torch.compile(module, fullgraph=True, backend=compiler)
        leaf = x.detach().requires_grad_()
        y, state = compiled(leaf, lengths=lengths)
        grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy)
    found = [y.detach(), *(s.detach() for s in flat(state)), *grads]
    for ours, eager in zip(found, wanted, strict=True):
        # The compiler may sum bias gradients in another order.
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.skipif(REHEARSAL, reason="cuDNN is asked, and graphs are captured")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("training", [False, True])
def test_short_calls_go_to_torchs_own_path(cell, training, monkeypatch):
    """Where cuDNN is predicted to be faster a whole model goes there: its bits, its one copy of
    the weights, and second derivatives that it has not."""
    called, call = [], library.call
    monkeypatch.setattr(library, "call", lambda *a: called.append(1) or call(*a))
    theirs = getattr(torch.nn, cell)(64, 64, 2, device=DEVICE)
    ours = getattr(fused_rnn, cell)(64, 64, 2, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    assert len({w.untyped_storage().data_ptr() for w in ours.parameters()}) == 1
    results = []
    x = torch.randn(6, 16, 64, device=DEVICE, requires_grad=training)
    for module in (ours, theirs):
        with torch.set_grad_enabled(training):
            y, state = module(x)
        results.append([y, *flat(state)])
        if training:
            results[-1] += torch.autograd.grad(y.cos().sum(), [x, *module.parameters()])
    assert called == [1]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    if training:
        twice = []
        for backend in ("auto", "reference"):
            with fused_rnn.use_backend(backend):
                y, _ = ours(x)
            assert (y.grad_fn.name() == "CudnnRnnBackward0") == (backend == "auto")
            (dx,) = torch.autograd.grad(y.cos().sum(), x, create_graph=True)
            twice.append(torch.autograd.grad(dx.square().sum(), [x, *ours.parameters()]))
        for a, b in zip(*twice, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm()  # cuDNN's forward is in TF32


@pytest.mark.skipif(REHEARSAL, reason="graphs are captured")
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_replayed_benchmarks(mode):
    job = Job(Case("test", "graph", 8, 16, 64, 64), "LSTM", mode)
    rows = run_job(job, find(["torch", "ours:cuda"]), 0.01, DEVICE, graph=True)
    for row in rows:
        assert row["status"] == "ok" and row["median_us_per_step"] > 0, row["reason"]
        assert row["backend"].endswith("replayed") and row["peak_memory"] is None

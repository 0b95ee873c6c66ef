"""The Triton kernels on a GPU at the sizes they are for, and what only a GPU has: CUDA graphs,
streams, several devices, tensors of gigabytes.

FUSED_RNN_GPU_REHEARSAL=1 runs the same bodies on a CPU, in Triton's interpreter and at sizes of a
few units, so that the first run on a GPU is not the first run at all.
"""

import contextlib
import dataclasses
import functools
import os
from typing import NamedTuple

import pytest
import torch

import fused_rnn
from fused_rnn import plan, testing
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case

REHEARSAL = os.environ.get("FUSED_RNN_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKEND = "triton"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (REHEARSAL or torch.cuda.is_available()),
        reason="no GPU that torch can use (FUSED_RNN_GPU_REHEARSAL=1 runs this on a CPU, tiny)",
    ),
]
BOTH = (False, True)


def size(real: int, rehearsed: int) -> int:
    """A size on a GPU, and what stands for it in a rehearsal."""
    return rehearsed if REHEARSAL else real


class Number(NamedTuple):
    """How numbers are held and multiplied: a dtype, and for float32 the precision of products."""

    dtype: torch.dtype
    precision: str | None = None

    def __str__(self):
        return f"{str(self.dtype)[6:]}{f'-{self.precision}' if self.precision else ''}"


NUMBERS = [
    *(Number(torch.float32, precision) for precision in plan.PRECISIONS),
    *(Number(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]

CELLS = {
    "lstm": {"cells": True},
    "lstm-proj": {"cell": "lstm"},
    "gru": {},
    "gru-before": {"cell": "gru", "reset_after": False},
    "rnn-tanh": {"cell": "rnn"},
    "rnn-relu": {"cell": "rnn", "relu": True},
}

FLAGS = {"lengths": True, "reset": True, "reverse": BOTH}
SIZES = {
    "H64-B32": {"hidden": 64, "rows": 32, "steps": 50, "inputs": 48},
    "H64-B7-flags": {"hidden": 64, "rows": 7, "steps": 33, "inputs": 64, **FLAGS},
    "H128-B1": {"hidden": 128, "rows": 1, "steps": 60, "inputs": 128},
    "H128-B16-flags": {"hidden": 128, "rows": 16, "steps": 24, "inputs": 128, **FLAGS},
    "H100-B33-flags": {"hidden": 100, "rows": 33, "steps": 20, "inputs": 50, **FLAGS},
    "H256-B64-flags": {"hidden": 256, "rows": 64, "steps": 16, "inputs": 256, **FLAGS},
    "H512-B128": {"hidden": 512, "rows": 128, "steps": 12, "inputs": 512},
    "H1024-B8-reversed": {"hidden": 1024, "rows": 8, "steps": 10, "inputs": 80, "reverse": (True,)},
}


def case_of(cell: str, **fields) -> Case:
    """A case of a cell; projected to a quarter where the cell is, and small in a rehearsal."""
    fields = {"cell": cell, **CELLS[cell], **fields}
    if REHEARSAL:
        most = {"hidden": 10, "rows": 2, "steps": 2, "inputs": 5}
        fields |= {name: min(fields.get(name, limit), limit) for name, limit in most.items()}
    if cell == "lstm-proj":
        fields["proj"] = max(1, fields["hidden"] // 4)
    return Case(**fields)


# The error budget. testing.yardsticks computes on the CPU; at these sizes and with TF32 it has to
# be the device itself.


@contextlib.contextmanager
def plain_tf32(allowed: bool):
    """Plain PyTorch's float32 products by TF32, or not, whatever torch's default is."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.lru_cache(maxsize=8)  # the precisions of a case share it
def yardsticks(case: Case, tf32: bool, draws: int):
    """(exact, plain_errors) as ``testing.yardsticks``, taken on DEVICE: float64, and the largest
    error of plain PyTorch over some draws."""
    low = torch.float32 if case.dtype == torch.float64 else case.dtype
    if tf32 and REHEARSAL:
        low = torch.float16  # a CPU has no TF32; float16 has as many digits
    errors: dict[str, float] = {}
    for draw in reversed(range(draws)):
        drawn = dataclasses.replace(case, seed=case.seed + 1000 * draw)
        with plain_tf32(tf32):
            exact = testing.evaluate(drawn, "plain", DEVICE, dtype=torch.float64)
            plain = testing.evaluate(drawn, "plain", DEVICE, dtype=low)
        for name in exact:
            errors[name] = max(errors.get(name, 0.0), testing.error(plain[name], exact[name]))
    return exact, errors


def assert_holds(case: Case, number: Number, note=lambda name, value: None) -> None:
    """Every output and gradient of a case, on memory full of NaN, within the budget: plain
    PyTorch's error in that dtype times one (16 bits), two (float32; TF32 against TF32) or four
    (tf32x3, whose operands are cut to two parts of 11 bits each, against float32), plus the
    grain."""
    with testing.poisoned_memory(), fp32_precision(number.precision):
        got = testing.evaluate(case, BACKEND, DEVICE)
    scale = 2 if number.precision == "tf32x3" else 1  # and twice that by ``testing.budget``
    for draws in (size(3, 2), 12):  # more only where fewer would not do
        exact, errors = yardsticks(case, number.precision == "tf32", draws)
        verdicts = [
            testing.compare(name, got[name], exact[name], scale * errors[name], case.dtype)
            for name in exact
        ]
        if not any(verdict.fault for verdict in verdicts):
            break
    worst = max(verdicts, key=lambda v: v.error / v.budget if v.budget else v.error)
    note("worst", f"{worst.name}: {worst.error:.2e} of {worst.budget:.2e}")
    faults = [f"{v.name}: {v.fault} ({v.error:.2e} of {v.budget:.2e})" for v in verdicts if v.fault]
    assert not faults, f"{case} {number}\n" + "\n".join(faults)


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_numerics(cell, shape, number, record_property):
    case = case_of(cell, dtype=number.dtype, **SIZES[shape])
    if REHEARSAL and shape != "H64-B7-flags":
        pytest.skip("the rehearsal's sizes are all alike")
    assert_holds(case, number, record_property)


# Every kind of plan. The plan itself chooses by predicted time; here each is made to run.


@contextlib.contextmanager
def forced(kind: str):
    """Make every scan run by plans of one kind; skips the test where a scan has none such here."""
    before = plan.choose

    def choose(device, shape):
        for prediction in plan.choices(device, shape):
            if prediction.plan.kind == kind:
                return prediction.plan
        pytest.skip(f"{device.name} has no {kind} plan for {shape}")

    plan.choose = choose
    try:
        yield
    finally:
        plan.choose = before


KINDS = ("block", "streamed", "step")


@pytest.mark.parametrize("number", [NUMBERS[1], NUMBERS[3]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plan(kind, cell, number):
    hidden = 128 if number.dtype == torch.bfloat16 else 64  # what a block scan can hold
    with forced(kind):
        case = case_of(
            cell, dtype=number.dtype, hidden=hidden, rows=40, steps=19, inputs=32, **FLAGS
        )
        assert_holds(case, number)


@pytest.mark.parametrize("kind", ("streamed", "step"))
def test_large_weights_of_every_kind(kind):
    with forced(kind):
        case = case_of("lstm", dtype=torch.bfloat16, hidden=768, rows=24, steps=9, inputs=64)
        assert_holds(case, Number(torch.bfloat16))


# The same bits again.

REPEATED = [
    pytest.param(kind, cell, hidden, dtype, id=f"{kind}-{cell}-H{hidden}-{str(dtype)[6:]}")
    for kind, hidden, dtype in (
        ("block", 128, torch.bfloat16),
        ("streamed", 96, torch.float16),
        ("step", 256, torch.float32),
    )
    for cell in CELLS
]


def assert_same(ours, other, what="") -> None:
    """The same bits. In a rehearsal nearly: NumPy's products, which the interpreter takes, give a
    row other bits in another place of a tile (seen with float32 at 64 x 16 x 64)."""
    if REHEARSAL:
        torch.testing.assert_close(ours, other)
    else:
        assert torch.equal(ours, other), what


@pytest.mark.parametrize(("kind", "cell", "hidden", "dtype"), REPEATED)
def test_deterministic(kind, cell, hidden, dtype):
    """Outputs and every gradient, twice."""
    case = case_of(cell, dtype=dtype, hidden=hidden, rows=50, steps=30, inputs=64, **FLAGS)
    with forced(kind):
        first = testing.evaluate(case, BACKEND, DEVICE)
        second = testing.evaluate(case, BACKEND, DEVICE)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows_of(case: Case, tensors: dict, rows: list[int]) -> dict:
    """Outputs and input gradients of some rows of a case, computed without the others."""
    given = {
        name: value.to(case.dtype) if value is not None and value.is_floating_point() else value
        for name, value in tensors.items()
    }
    for name in ("input", "dy", "h0", "c0", "reset"):
        if given[name] is not None:
            given[name] = given[name][:, rows]
    given["lengths"] = given["lengths"][rows]
    given["input"] = given["input"].detach().requires_grad_()
    y, *states = testing.run(case, given, BACKEND)
    states = states[:2] if case.cell == "lstm" else states[:1]
    (dx,) = torch.autograd.grad(y, given["input"], given["dy"])
    results = {"y": y, "dx": dx} | dict(zip(("h_n", "c_n"), states, strict=False))
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize(("kind", "cell", "hidden", "dtype"), REPEATED)
def test_a_row_does_not_depend_on_its_batch(kind, cell, hidden, dtype):
    """A row alone, or among any others and in any place, has the same bits."""
    case = case_of(cell, dtype=dtype, hidden=hidden, rows=70, steps=20, inputs=64, **FLAGS)
    tensors = testing.make_inputs(case, DEVICE)
    every = list(range(case.rows))
    with forced(kind):
        whole = rows_of(case, tensors, every)
        for rows in ([0], every[-1:], every[: case.rows // 2], every[::-1]):
            for name, part in rows_of(case, tensors, rows).items():
                assert_same(whole[name][:, rows], part, name)


# Long sequences and large tensors.


@pytest.mark.parametrize("kind", ("block", "step"))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_long_sequence(cell, kind):
    """More steps than a grid has blocks along one axis, against the same in pieces that hand on
    their state forwards and its gradient backwards."""
    steps, piece = size(70_000, 8), size(17_500, 4)
    case = Case(cell, steps=steps, rows=2, inputs=3, hidden=16)
    # Sums of more terms than these bits hold: their rounding errors add up like a random walk.
    slack = (steps * case.rows) ** 0.5 * torch.finfo(torch.float32).eps
    tensors = {
        name: value if value is None else value.float()
        for name, value in testing.make_inputs(case, DEVICE).items()
    }
    weights = ("w_ih", "w_hh", "b_ih", "b_hh")
    states = ("h0", "c0") if cell == "lstm" else ("h0",)

    def forward(first, last, initial):
        """Leaves by name and outputs of steps first to last."""
        leaves = {name: tensors[name].clone().requires_grad_() for name in weights}
        leaves["input"] = tensors["input"][first:last].clone().requires_grad_()
        for name, value in zip(states, initial, strict=True):
            leaves[name] = value.detach().clone().requires_grad_()
        part = dataclasses.replace(case, steps=last - first)
        return leaves, testing.run(part, tensors | leaves, BACKEND)

    def backward(leaves, outputs, cotangents):
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return dict(zip(leaves, found, strict=True))

    last = [tensors[f"d{name}"] for name in ("h_n", "c_n")][: len(states)]
    with forced(kind), fp32_precision("ieee"):
        leaves, whole = forward(0, steps, [tensors[name] for name in states])
        grads = backward(leaves, whole, (tensors["dy"], *last))
        parts, state = [], [tensors[name] for name in states]
        for first in range(0, steps, piece):
            parts.append(forward(first, first + piece, state))
            state = parts[-1][1][1:]
        pieces = [torch.cat([outputs[0] for _, outputs in parts]), *state]
        for ours, theirs in zip(whole, pieces, strict=True):
            assert_same(ours, theirs)
        sums = {name: torch.zeros_like(tensors[name], dtype=torch.float64) for name in weights}
        handed = last
        for number, (leaves, outputs) in reversed(list(enumerate(parts))):
            steps_here = slice(number * piece, (number + 1) * piece)
            found = backward(leaves, outputs, (tensors["dy"][steps_here], *handed))
            handed = [found[name] for name in states]
            assert_near(grads["input"][steps_here], found["input"], slack)
            for name in weights:
                sums[name] += found[name]
    for name in states:
        assert_near(grads[name], dict(zip(states, handed, strict=True))[name], slack)
    for name in weights:
        assert_near(grads[name], sums[name], slack)


def assert_near(got, wanted, slack):
    difference = (got.double() - wanted.double()).norm()
    assert float(difference) <= slack * float(wanted.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_a_tensor_of_more_than_2_31_elements(cell, kind):
    """The last rows, whose offsets do not fit 32 bits, against a run of those rows alone."""
    hidden, rows, steps = size(64, 16), size(16_384, 20), size(700, 2)
    width = {"lstm": 4, "gru": 3}[cell] * hidden
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("less than 40 GiB of GPU memory are free")
        assert steps * rows * width > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    gates_x, w_hh = normal(steps, rows, width), normal(width, hidden) * hidden**-0.5
    h0, c0 = normal(rows, hidden), normal(rows, hidden)

    def run(chosen):
        x = gates_x[:, chosen]
        hx = (h0[chosen], c0[chosen]) if cell == "lstm" else h0[chosen]
        y, state = getattr(fused_rnn, cell)(x, hx, None, w_hh, backend=BACKEND)
        return y, *(state if cell == "lstm" else (state,))

    with forced(kind), torch.inference_mode():
        whole = run(slice(None))
        for chosen in (slice(0, 3), slice(rows - 19, None)):
            y, *state = run(chosen)
            assert_same(whole[0][:, chosen], y)
            for ours, alone in zip(whole[1:], state, strict=True):
                assert_same(ours[chosen], alone)


# CUDA graphs, streams, devices, synchronisation. In a rehearsal a graph is the function itself, a
# stream is none, and the rest of the body runs as it will.


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
def test_cuda_graph(hidden, cell, call, flags):
    """A captured call gives the bits of an eager one, on other values than it was captured with."""
    module = module_of(cell, hidden, torch.bfloat16)
    x, dy = input_of(module)
    given = {}
    if flags:
        given["lengths"] = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
        given["reset"] = torch.rand(x.shape[:2], device=DEVICE) < 0.2
    with fused_rnn.use_backend(BACKEND):
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
def test_two_streams(hidden, call):
    """Calls on two streams at once give what each gives alone."""
    modules = [module_of("lstm", hidden), module_of("gru", hidden)]
    inputs = [input_of(module, steps=200) for module in modules]
    with fused_rnn.use_backend(BACKEND):
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


def test_another_device_than_the_current_one():
    if DEVICE != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):  # the current device is the first
        module = module_of("lstm", 64, device=device)
        with fused_rnn.use_backend(BACKEND):
            results.append(train(module, *input_of(module)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second.to(first.device), first)


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
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_no_host_synchronisation(cell, tape):
    """Forward and backward with lengths and resets on the device wait for nothing."""
    module = module_of(cell, 64)
    module.tape = tape
    x, dy = input_of(module)
    lengths = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
    reset = torch.rand(x.shape[:2], device=DEVICE) < 0.2
    with fused_rnn.use_backend(BACKEND):
        wanted = train(module, x, dy, lengths=lengths, reset=reset)  # compiles
        with no_synchronisation():
            found = train(module, x, dy, lengths=lengths, reset=reset)
    for ours, other in zip(found, wanted, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_compiled_without_a_graph_break(cell, compiler):
    if REHEARSAL and compiler == "inductor":
        pytest.skip("tests/test_compile.py has it on a CPU")
    torch._dynamo.reset()
    module = module_of(cell, 64)
    x, dy = input_of(module)
    lengths = torch.randint(0, x.shape[0] + 1, x.shape[1:2], device=DEVICE)
    with fused_rnn.use_backend(BACKEND):
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

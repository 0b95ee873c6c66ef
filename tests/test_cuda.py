"""The CUDA C++ kernels beyond what every backend is tested for: each size of block scan, products,
several blocks and seeds of the scheduler, the step path forced, refusals. Without a GPU the kernels
run in the emulator, which checks every access."""

import dataclasses

import gpu_budget
import pytest
import torch
from conftest import UNDER_TEST
from test_imports import run_python
from test_numerics import BOTH, CELLS, assert_holds, assert_precise, case_of

import fused_rnn
from fused_rnn import backends, plan
from fused_rnn.cuda import library, planning
from fused_rnn.plan import Shape
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case, evaluate, make_inputs, run

DEVICE = UNDER_TEST["cuda"]
EMULATED = DEVICE == "cpu"
FLAGS = {"reverse": BOTH, "lengths": True, "reset": True}
BLOCK_CELLS = ("lstm", "gru", "rnn", "rnn-relu")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The library's own operators are there."""
    assert library.why_unavailable() is None


def with_rows(monkeypatch, rows):
    """Every block scan from now on with so many rows a block, of which the plan has four for all
    batches but those of many hundred; a row's bits are the same."""
    before = planning.choose

    def choose(device, shape):
        found = before(device, shape)
        return dataclasses.replace(found, rows=rows) if found.kind == "block" else found

    monkeypatch.setattr(planning, "choose", choose)


@pytest.fixture(params=[4, 8])
def block_rows(request, monkeypatch):
    """Rows of a block scan's block, each in turn."""
    with_rows(monkeypatch, request.param)
    return request.param


def by_steps(monkeypatch):
    """Every scan from now on by the step path."""
    monkeypatch.setattr(planning, "choose", lambda device, shape: planning.Step())


@pytest.fixture
def schedule():
    """Sets the emulator's seed and how many blocks run side by side; nothing to set on a GPU."""

    def set_to(seed, resident=2):
        if EMULATED:
            torch.ops.fused_rnn.cuda_emulate(seed, resident)

    yield set_to
    set_to(0)


# Sizes on both sides of every size of kernel there is: 64; 96, 112, 128; up to 256.
@pytest.mark.parametrize("hidden", [16, 23, 63, 65, 96, 100, 121, 129, 150, 177, 190, 208, 250])
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_block_scans_of_16_bits(cell, hidden, block_rows):
    """Several blocks of rows, both directions, flags; the two dtypes in turn."""
    dtype = HALVES[(hidden + BLOCK_CELLS.index(cell)) % 2]
    case = case_of(cell, rows=19, hidden=hidden, steps=3, dtype=dtype, **FLAGS)
    assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("hidden", [17, 64, 90, 111, 127, 190])
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_block_scans_of_float32(cell, hidden, block_rows):
    case = case_of(cell, rows=11, hidden=hidden, steps=3, dtype=torch.float32, **FLAGS)
    with fp32_precision("ieee"):
        assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_step_path(cell, dtype, monkeypatch):
    """Several blocks of threads, of every cell and option, whatever the plan would rather have."""
    by_steps(monkeypatch)
    case = case_of(cell, rows=7, hidden=37, steps=4, dtype=dtype, **FLAGS)
    if case.proj:
        case = dataclasses.replace(case, proj=21)
    with fp32_precision("ieee"):
        assert_holds(case, "cuda", DEVICE)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("hidden", [24, 64, 100, 128, 150])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_scans_in_tf32(cell, hidden, precision):
    case = case_of(cell, rows=9, hidden=hidden, steps=4, dtype=torch.float32)
    assert_precise(case, precision, "cuda", DEVICE)


@pytest.mark.parametrize("hidden", [64, 120, 190])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_3xtf32_has_no_long_chains(cell, hidden):
    """Errors near float32's, whatever the size; see gpu_budget.assert_holds."""
    case = case_of(cell, rows=9, hidden=hidden, steps=12, dtype=torch.float32)
    gpu_budget.assert_holds(case, "cuda", DEVICE, gpu_budget.Number(torch.float32, "tf32x3"))


def assert_sums_not_cut(hidden):
    """Where all products have one sign, and so every cut makes a sum less, a step's sums in 3xTF32,
    forward and backward, lack about 2^-24 of their value, or 2^-23, on average. (As one chain 6
    times 2^-24 with 384 units, 17 with 1024.)"""
    case = Case("rnn", 1, 3, 1, hidden, relu=True, bias=False)
    tensors = inputs_in(case)
    for name in ("w_hh", "h0"):
        tensors[name] = tensors[name].abs()
    tensors["input"].zero_()
    h0, w = tensors["h0"].requires_grad_(), tensors["w_hh"]
    with fp32_precision("tf32x3"):
        h_n = run(case, tensors, "cuda")[1]
        dh_n = torch.rand_like(h_n)
        h_n.backward(dh_n)
    exact = h0.detach().double() @ w.double().mT, dh_n.double() @ w.double()
    for got, wanted in zip((h_n.detach(), h0.grad), exact):
        assert float((1 - got / wanted).mean()) < 2**-22


@pytest.mark.parametrize("hidden", [64, 190])
def test_sums_in_3xtf32_are_not_cut(hidden):
    assert_sums_not_cut(hidden)


def shape_of(cell, hidden, precision="ieee", dtype=torch.float32, backward=False):
    return Shape(cell, 1, 8, hidden, dtype, precision=precision, backward=backward)


@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_schedules(cell, seed, schedule, monkeypatch):
    """Other orders of lanes, warps and blocks, up to 40 steps; the same bits."""
    with_rows(monkeypatch, 4 + seed % 2 * 4)
    dtype = (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
    case = case_of(cell, rows=17, hidden=41, steps=40, dtype=dtype, **FLAGS)
    results = []
    for number, resident in ((seed, 3), (seed + 100, 1)):
        schedule(number, resident)
        with fp32_precision(plan.PRECISIONS[seed // 2 % 3]):
            results.append(evaluate(case, "cuda", DEVICE))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_kernels_agree(cell, monkeypatch):
    """Block scan and step path are one function."""
    case = case_of(cell, rows=5, hidden=20, steps=4, dtype=torch.float32, **FLAGS)
    with fp32_precision("ieee"):
        block = evaluate(case, "cuda", DEVICE)
        by_steps(monkeypatch)
        step = evaluate(case, "cuda", DEVICE)
    for name, value in block.items():
        torch.testing.assert_close(step[name], value, rtol=1e-4, atol=1e-5)


def inputs_in(case):
    """A case's inputs, in its dtype."""
    return {
        k: t.to(case.dtype) if t is not None and t.is_floating_point() else t
        for k, t in make_inputs(case, DEVICE).items()
    }


def outputs_of_rows(cell, rows):
    """A function that gives the output of some rows of a case without the others."""
    case = case_of(cell, rows=rows, hidden=33, steps=5, dtype=torch.bfloat16, lengths=True)
    tensors = inputs_in(case)

    def outputs(chosen):
        given = dict(tensors)
        for name in ("input", "h0", "c0"):
            if given[name] is not None:
                given[name] = given[name][:, chosen]
        given["lengths"] = given["lengths"][chosen]
        return run(dataclasses.replace(case, rows=len(chosen)), given, "cuda")[0]

    return outputs


@pytest.mark.parametrize("cell", BLOCK_CELLS)
def test_companions(cell):
    """A row alone, and among others in any place, has the same bits from a block scan."""
    outputs = outputs_of_rows(cell, 13)
    whole = outputs(list(range(13)))
    for rows in ([5], [12, 0, 5], [9, 8, 7, 6, 5, 4, 3, 2, 1]):
        assert torch.equal(outputs(rows), whole[:, rows])


def test_more_entries_than_one_launch_takes():
    """1,030 stack entries in directions without a pattern."""
    generator = torch.Generator().manual_seed(1)
    reverse = tuple((torch.rand(1030, generator=generator) < 0.5).tolist())
    for cell in ("rnn", "gru"):
        case = Case(cell, steps=2, rows=2, hidden=2, reverse=reverse, dtype=torch.float32)
        with fp32_precision("ieee"):
            wanted, got = evaluate(case, "reference"), evaluate(case, "cuda", DEVICE)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name].cpu(), value, rtol=1e-4, atol=1e-5)


def test_rows_far_apart_are_copied():
    """A sequence whose rows lie beyond a lane's 32-bit offsets is made contiguous first."""
    far = torch.empty_strided((2, 2, 1, 16), (16, 2**27 + 16, 16, 1), device=DEVICE)
    far.copy_(torch.randn(2, 2, 1, 16))
    w_hh = torch.randn(1, 16, 4, device=DEVICE)
    state = torch.zeros(1, 2, 4, device=DEVICE)
    op = torch.ops.fused_rnn.cuda_lstm_inference
    rest = (w_hh, None, state, state, None, [False])
    for ours, theirs in zip(op(far, *rest), op(far.contiguous(), *rest), strict=True):
        assert torch.equal(ours, theirs)


def assert_infinities_spread(cell, hidden):
    """Infinities and NaN in the initial state reach what they reach in plain PyTorch."""
    case = case_of(cell, rows=3, hidden=hidden, steps=3, dtype=torch.float32)
    tensors = inputs_in(case)
    tensors["h0"][0, 1, 3] = float("inf")
    # The GPU's own NaN, which rounded to TF32 would become a zero.
    tensors["h0"][0, 2, 4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    wanted = run(case, tensors, "reference")[0]
    for precision in plan.PRECISIONS:
        with fp32_precision(precision):
            got = run(case, tensors, "cuda")[0]
        assert torch.equal(got.isnan(), wanted.isnan()), precision


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_infinite_states(cell):
    assert_infinities_spread(cell, 9)


# The plan and the kernels know the same sizes.


@pytest.mark.parametrize("product", planning.PRODUCTS)
@pytest.mark.parametrize("cell", planning.CELLS)
def test_the_plan_accounts_for_the_kernels(cell, product):
    """Threads and shared memory of every H, forward and backward, as the library counts them."""
    half = product in ("bfloat16", "float16")
    for hidden in range(1, 300):
        for backward in (False, True):
            shape = shape_of(
                cell,
                hidden,
                "ieee" if half else product,
                getattr(torch, product) if half else torch.float32,
                backward,
            )
            block = planning.block_kernel(shape)
            wanted = (block.threads, block.shared) if block else (0, 0)
            number = planning.CELLS.index(cell), planning.PRODUCTS.index(product)
            assert torch.ops.fused_rnn.cuda_block_needs(*number, hidden, backward) == wanted


# Choice and refusals.


def test_it_is_not_chosen_on_a_cpu():
    request = backends.Request("lstm", "cpu", torch.float32)
    assert backends.choose(request) == "cpu"
    if EMULATED:
        assert "emulated" in backends.BACKENDS["cuda"].yields(request)


def test_without_the_library_it_is_refused(tmp_path):
    """From use_backend, from a call, and from the operator itself, with the remedy."""
    status, out, err = run_python(
        """
    import torch, fused_rnn
    x, w_ih, w_hh = torch.randn(2, 1, 3), torch.randn(8, 3), torch.randn(8, 2)
    state = torch.zeros(1, 1, 2)
    calls = (
        lambda: fused_rnn.use_backend("cuda"),
        lambda: fused_rnn.lstm(x, None, w_ih, w_hh, backend="cuda"),
        lambda: torch.ops.fused_rnn.cuda_rnn_forward(
            x[..., :2].unsqueeze(2), w_hh[None, :2], state, None, [False], False
        ),
    )
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            print(str(error).splitlines()[0])
    """,
        FUSED_RNN_CUDA_LIBRARY=str(tmp_path / "libmissing.so"),
    )
    assert status == 0, err
    lines = out.strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "there is no libmissing.so" in line and "FUSED_RNN_CUDA=1 pip install" in line
    assert "What would: cpu, " in lines[1]


def test_a_broken_library_is_reported(tmp_path):
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")
    status, out, err = run_python(
        "import fused_rnn; print(fused_rnn.available_backends()['cuda'])",
        FUSED_RNN_CUDA_LIBRARY=str(broken),
    )
    assert status == 0, err
    assert "libbroken.so could not be loaded" in out


def scan(
    name="lstm_inference", kernel=1, rows=8, precision=0, dtype=torch.float32, hidden=4, **changes
):
    """One of the library's own operators, called as only fused_rnn.cuda does."""
    given = {
        "gates_x": torch.zeros(2, 1, 1, 4 * hidden, dtype=dtype, device=DEVICE),
        "w_hh": torch.zeros(1, 4 * hidden, hidden, dtype=dtype, device=DEVICE),
        "w_hr": None,
        "h0": torch.zeros(1, 1, hidden, dtype=dtype, device=DEVICE),
        "c0": torch.zeros(1, 1, hidden, dtype=dtype, device=DEVICE),
        "flags": None,
        "reverse": [False],
    } | changes
    op = getattr(torch.ops.fused_rnn, f"cuda_scan_{name}")
    return op(*given.values(), kernel, rows, precision, 0)


def test_block_scans_refuse_what_they_cannot_take():
    with pytest.raises(RuntimeError, match=r"no float64 and no projection; kernel 0 has"):
        scan(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no block scan for H = 97; kernel 0 has any size"):
        scan(hidden=97)
    with pytest.raises(RuntimeError, match=r"kernel must be 0, 1, 2 or 3, got 4"):
        scan(kernel=4)
    with pytest.raises(RuntimeError, match=r"rows must be 4 or 8, got 16"):
        scan(rows=16)
    with pytest.raises(RuntimeError, match=r"precision must be 0, 1 or 2, got 3"):
        scan(precision=3)
    with pytest.raises(RuntimeError, match=r"reverse must have S = 1 values, got 2"):
        scan(reverse=[False, True])


def test_the_step_path_takes_any_size():
    for outputs in (scan(kernel=0, hidden=97), scan(kernel=0, dtype=torch.float64)):
        assert outputs[0].shape[:3] == (2, 1, 1)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_compiled_without_a_graph_break(cell):
    """The choice of a backend asks the library, which the compiler cannot trace."""
    torch._dynamo.reset()
    module = getattr(fused_rnn, cell)(3, 5, 2, bidirectional=True).to(DEVICE)
    x = torch.randn(4, 2, 3, device=DEVICE, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with fused_rnn.use_backend("cuda"):
        wanted, got = module(x)[0], compiled(x)[0]
    assert torch.equal(got, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), [x, *module.parameters()]),
        torch.autograd.grad(wanted.sum(), [x, *module.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_library_says_what_it_is():
    assert library.is_emulated() == EMULATED
    assert fused_rnn.available_backends()["cuda"] is None

"""The Triton kernels beyond what every backend is tested for: each kernel family forced, precision
of products, direction patterns, addressing, refusals. Without a GPU they run in the interpreter."""

import dataclasses

import pytest
import torch
from conftest import UNDER_TEST, interpreted
from test_imports import run_python
from test_numerics import BOTH, CELLS, assert_holds, assert_precise, case_of

import fused_rnn
from fused_rnn import backends, ops, plan
from fused_rnn.precision import current_fp32_precision, fp32_precision
from fused_rnn.testing import Case, error, evaluate, make_inputs, run

DEVICE = UNDER_TEST["triton"]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=["step", "streamed"])
def forced(request, monkeypatch):
    """Every scan by tile kernels, on tiles so small that there are several of them."""
    streamed = request.param == "streamed"

    def choose(device, shape):
        return plan.TilePlan(16, 16, 16, 4, 1, streamed and not shape.two_phases)

    monkeypatch.setattr(plan, "choose", choose)
    return request.param


FORCED = {
    "plain": {},
    "reversed": {"reverse": (True,), "reset": True},
    "flags": {"reverse": BOTH, "lengths": True, "reset": True},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.mark.parametrize("option", FORCED)
@pytest.mark.parametrize("cell", CELLS)
def test_tile_kernels(cell, option, forced):
    """Several tiles of units and of rows, odd sizes; all dtypes over the matrix."""
    number = list(CELLS).index(cell) + list(FORCED).index(option) + (forced == "step")
    dtype = DTYPES[number % len(DTYPES)]
    case = case_of(cell, rows=19, hidden=21, steps=3, dtype=dtype, **FORCED[option])
    if case.proj:
        case = dataclasses.replace(case, proj=18)
    assert_holds(case, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_and_one_row(cell, dtype, forced):
    for steps, rows in ((1, 3), (2, 1)):
        case = case_of(cell, rows=rows, hidden=5, steps=steps, dtype=dtype, **FORCED["flags"])
        assert_holds(case, "triton", DEVICE)


@pytest.mark.parametrize("cell", CELLS)
def test_block_scan_of_several_tiles(cell):
    """Rows beyond one tile, and units that fill none."""
    for hidden, dtype in ((33, torch.bfloat16), (16, torch.float32)):
        case = case_of(cell, rows=37, hidden=hidden, steps=3, dtype=dtype, **FORCED["flags"])
        assert_holds(case, "triton", DEVICE)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru-before", "rnn"])
def test_kernels_agree(cell, monkeypatch):
    """Block scan, streamed scan and step path are one function."""
    case = case_of(cell, rows=5, hidden=20, steps=4, dtype=torch.float64, **FORCED["flags"])
    case = dataclasses.replace(case, dtype=torch.float32)
    results = []
    for chosen in (
        plan.BlockPlan(32, 16, 4),
        plan.TilePlan(16, 16, 32, 4, 1),
        plan.TilePlan(32, 16, 16, 4, 1, streamed=True),
    ):
        if cell == "gru-before" and getattr(chosen, "streamed", False):
            continue
        monkeypatch.setattr(plan, "choose", lambda device, shape, chosen=chosen: chosen)
        with fp32_precision("ieee"):
            results.append(evaluate(case, "triton", DEVICE))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=2e-6)


# Products.


def multiply(a, b, precision):
    """a @ b by the backend's matrix product."""
    with fp32_precision(precision):
        return ops.family("triton")["matmul"](a.to(DEVICE), b.to(DEVICE), None).cpu()


def test_bfloat16_products_are_not_of_raw_bits():
    """Triton's interpreter multiplies the raw bits of bfloat16; ``product`` widens operands there,
    for as long as this fails without."""
    a, b = torch.randn(1, 32, 64).bfloat16(), torch.randn(1, 64, 32).bfloat16()
    exact = a.double() @ b.double()
    assert error(multiply(a, b, "ieee"), exact) <= 64 * 2e-7 * float(exact.abs().max())


def test_precisions_of_float32_products():
    """Each precision has the error it should have, and no less: they are not mistaken for one
    another."""
    a, b = torch.randn(1, 40, 96), torch.randn(1, 96, 24)
    exact = a.double() @ b.double()
    size = float((a.double().abs() @ b.double().abs()).max())
    errors = {p: error(multiply(a, b, p), exact) for p in plan.PRECISIONS}
    assert errors["ieee"] <= 2**-22 * size
    assert 2**-16 * size < errors["tf32"] <= 2**-10 * size
    assert errors["tf32x3"] <= 2**-19 * size


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_long_sums_of_float32(precision):
    """A chain of all terms would have the error of thousands of roundings, and on tensor cores, of
    truncations, all to one side: terms of one sign show it."""
    a, b = torch.rand(1, 8, 6000), torch.rand(1, 6000, 24)
    exact = a.double() @ b.double()
    chain = torch.zeros(1, 8, 24)
    for k in range(a.shape[2]):
        chain += a[:, :, k : k + 1] * b[:, k : k + 1]
    plain = error(a @ b, exact)
    got = error(multiply(a, b, precision), exact)
    assert got <= 2 * max(plain, 2**-23 * float(exact.max()))
    assert got < error(chain, exact) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(300, 96, 80), (70, 5000, 33), (65, 200, 16)])
def test_rows_of_a_product_do_not_know_one_another(sizes, dtype):
    """A row alone, read where it lies or from a copy, and in the batch: the same bits."""
    rows, k, n = sizes
    a, b = torch.randn(1, rows, k).to(dtype), torch.randn(1, k, n).to(dtype)
    for precision in plan.PRECISIONS if dtype == torch.float32 else ("ieee",):
        whole = multiply(a, b, precision)
        for some in (slice(0, 1), slice(rows - 1, rows), slice(3, 67)):
            found = multiply(a[:, some], b, precision)
            if interpreted("triton"):  # NumPy's products, which have an order of their own
                torch.testing.assert_close(found, whole[:, some], rtol=1e-5, atol=1e-4)
            else:
                assert torch.equal(found, whole[:, some])
        columns = multiply(a.mT.contiguous().mT, b, precision)
        if not interpreted("triton"):
            assert torch.equal(columns, whole)


def test_tf32_rounds_to_nearest():
    """Ties and neighbours of a TF32 number, infinities, NaN, the largest float."""
    one = torch.ones(1, 1, 1)
    ulp = 2.0**-10
    for value, wanted in (
        (1 + 0.49 * ulp, 1.0),
        (1 + 0.51 * ulp, 1 + ulp),
        (-1 - 0.51 * ulp, -1 - ulp),
        (3.0e-39, 3.0e-39),
        (float("inf"), float("inf")),
    ):
        got = float(multiply(torch.full((1, 1, 1), value), one, "tf32"))
        assert got == wanted or abs(got - wanted) < 1e-41
    assert multiply(torch.full((1, 1, 1), float("nan")), one, "tf32").isnan()


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_scans_in_tf32(cell, precision):
    case = case_of(cell, rows=3, hidden=24, steps=6, dtype=torch.float32)
    assert_precise(case, precision, "triton", DEVICE)


def test_the_precision_follows_torch():
    before = torch.backends.cudnn.rnn.fp32_precision
    try:
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
        assert current_fp32_precision() == "ieee"
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        assert current_fp32_precision() == "tf32"
        assert current_fp32_precision("cpu") == "ieee"
        with fp32_precision("tf32x3"):
            assert current_fp32_precision() == "tf32x3"
        assert current_fp32_precision() == "tf32"
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before
    with pytest.raises(ValueError, match=r"value must be one of \['ieee', 'tf32', 'tf32x3'\]"):
        fp32_precision("tf16")


# Addressing.


@pytest.mark.parametrize("pattern", ["period", "none"])
def test_more_entries_than_an_integer_has_bits(pattern):
    """70 stack entries, whose directions repeat after two entries or never."""
    reverse = (False, True) * 35
    if pattern == "none":
        generator = torch.Generator().manual_seed(1)
        reverse = tuple((torch.rand(70, generator=generator) < 0.5).tolist())
    case = Case("rnn", steps=2, rows=2, hidden=2, reverse=reverse, dtype=torch.float64)
    wanted, got = evaluate(case, "reference"), evaluate(case, "triton", DEVICE)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name].cpu(), value)


def test_addresses_beyond_31_bits():
    """A batch-first input whose rows lie further apart than a tile's offsets of 32 bits reach is
    copied first. (Strides such as no small tensor has.)"""
    from fused_rnn.triton import arguments

    sequence, weights = torch.empty(2, 3, 1, 4), torch.empty(1, 4, 1)
    layer = arguments.layer_of("x", sequence, weights, 4, True, None, [False])
    layer = layer._replace(device=torch.device("meta"))
    far = torch.empty_strided((2, 3, 1, 4), (4, 2**27, 4, 1), device="meta")
    assert arguments.sequence_of(layer, "x", far, 4, "[T, B, S, n]")[1:] == (3, 1)
    near = torch.empty_strided((2, 3, 1, 4), (4, 8, 4, 1), device="meta")
    assert arguments.sequence_of(layer, "x", near, 4, "[T, B, S, n]")[1:] == (1, 2)


def test_garbage_around_a_view_is_not_read():
    """Inputs that are views into NaN: nothing beside a tensor's own elements reaches a result."""
    case = case_of("lstm", rows=3, hidden=7, steps=3, dtype=torch.float64, lengths=True)
    tensors = make_inputs(case, DEVICE)
    clean = run(case, tensors, "triton")

    def inside(t):
        if t is None or not t.is_floating_point():
            return t
        outer = torch.full([n + 2 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
        view = outer[tuple(slice(1, -1) for _ in t.shape)]
        return view.copy_(t)

    for ours, theirs in zip(run(case, {k: inside(t) for k, t in tensors.items()}, "triton"), clean):
        assert torch.equal(ours, theirs)


# Choice and refusals.


def test_it_is_not_chosen_on_a_cpu():
    request = backends.Request("lstm", "cpu", torch.float32)
    assert backends.choose(request) == "cpu"
    assert "interpreted" in backends.BACKENDS["triton"].yields(request)


def test_without_the_interpreter_cpu_tensors_are_refused():
    """With what would work, from use_backend, from a call, and from the operator itself."""
    status, out, err = run_python(
        """
    import torch, fused_rnn
    x, w_ih, w_hh = torch.randn(2, 1, 3), torch.randn(8, 3), torch.randn(8, 2)
    calls = (
        lambda: fused_rnn.use_backend("triton"),
        lambda: fused_rnn.lstm(x, None, w_ih, w_hh, backend="triton"),
        lambda: torch.ops.fused_rnn.triton_matmul(x, x.mT.contiguous(), None),
    )
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            print(error)
    print(fused_rnn.available_backends()["triton"])
    """,
        TRITON_INTERPRET="0",
        FUSED_RNN_CUDA_LIBRARY="",
    )
    assert status == 0, err
    first, second, third, row = out.strip().splitlines()
    if not torch.cuda.is_available():
        assert "there is no GPU that torch can use" in first and "TRITON_INTERPRET=1" in row
    assert "What would: cpu, torch, reference" in second
    assert "runs on GPU tensors, got cpu" in third


def test_an_explicit_choice_of_a_wrong_dtype_is_refused():
    with pytest.raises((RuntimeError, ValueError), match=r"float32.*float64.*bfloat16.*float16"):
        fused_rnn.rnn(
            torch.ones(2, 1, 2).int(),
            None,
            torch.ones(2, 2).int(),
            torch.ones(2, 2).int(),
            backend="triton",
        )


def test_interpretation_is_what_the_tests_think():
    assert interpreted("triton") != torch.cuda.is_available()
    assert not interpreted("cpu")


# What only a GPU would otherwise show.


def test_later_steps_go_to_the_compiled_kernel(monkeypatch):
    """The step path's fast launch: the compiled kernel as Triton has it, its driver call replaced.
    Every step is launched once, in order, with a grid of three numbers."""
    from triton.compiler.compiler import CompiledKernel

    from fused_rnn.triton import launch

    launches = []
    compiled = object.__new__(CompiledKernel)
    compiled.module, compiled.function, compiled.packed_metadata = 1, None, None
    compiled.launch_metadata = lambda *args: None
    compiled._run = lambda *args: launches.append((args[:3], args[-4:]))

    class Kernel:
        def __getitem__(self, grid):
            def first(*args, **options):
                launches.append((grid, args))
                return compiled

            return first

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream)
    steps = launch.Steps(Kernel(), (2, 3, 1), ("a", 0, 1), ("c",), 1, {})
    for step in range(3):
        steps(step)
    assert launches == [((2, 3, 1), ("a", step, 1, "c")) for step in range(3)]


def test_grids_have_three_axes(forced, monkeypatch):
    """As the fast launch needs them, for every tile kernel."""
    from fused_rnn.triton import launch

    grids = []
    init = launch.Steps.__init__

    def record(self, kernel, grid, *rest):
        grids.append(grid)
        init(self, kernel, grid, *rest)

    monkeypatch.setattr(launch.Steps, "__init__", record)
    for cell in CELLS:
        evaluate(case_of(cell, rows=2, hidden=3, steps=2), "triton", DEVICE)
    assert len(grids) >= 12 and all(len(grid) == 3 for grid in grids)


@pytest.mark.parametrize("cell", CELLS)
def test_no_stack_entries(cell):
    """S = 0 gives empty results."""
    case = dataclasses.replace(case_of(cell), reverse=())
    tensors = {
        k: None if t is None else t.to(torch.float32) if t.is_floating_point() else t
        for k, t in make_inputs(case, DEVICE).items()
    }
    assert run(case, tensors, "triton")[0].shape == (5, 3, 0, case.proj or 7)


@pytest.mark.parametrize("stack", [31, 32, 62, 63])
def test_direction_of_the_last_entry(stack):
    """Only the last entry reversed, around the number of bits of an integer."""
    reverse = (False,) * (stack - 1) + (True,)
    case = Case("rnn", steps=2, rows=1, inputs=1, hidden=1, reverse=reverse, dtype=torch.float64)
    ours, theirs = (
        evaluate(case, b, d, False) for b, d in (("triton", DEVICE), ("reference", "cpu"))
    )
    torch.testing.assert_close(ours["y"].cpu(), theirs["y"])


@pytest.mark.parametrize("precision", plan.PRECISIONS)
def test_infinite_states_do_not_become_nan(precision):
    """A relu that doubles its state until it is infinite, and an infinite initial state: padding
    and the parts of split operands are zeros, which must not meet the infinity."""
    x, w = torch.ones(140, 1, 1, device=DEVICE), torch.full((1, 1), 2.0, device=DEVICE)
    with fp32_precision(precision):
        y, _ = fused_rnn.rnn(x, None, w, w, nonlinearity="relu", backend="triton")
        assert not y.isnan().any() and y[-1].isinf().all()
        w_ih, w_hh = torch.ones(4, 1, device=DEVICE), torch.ones(4, 1, device=DEVICE)
        h0 = torch.full((1, 1), float("inf"), device=DEVICE)
        c0 = torch.zeros(1, 1, device=DEVICE)
        y, _ = fused_rnn.lstm(x[:4], (h0, c0), w_ih, w_hh, backend="triton")
        wanted, _ = fused_rnn.lstm(x[:4], (h0, c0), w_ih, w_hh, backend="reference")
    torch.testing.assert_close(y, wanted, rtol=2e-3, atol=2e-3)

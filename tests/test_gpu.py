"""The Triton and the CUDA kernels on a GPU at the sizes they are for, tensors of gigabytes among
them; tests/test_gpu_calls.py has graphs, streams and devices.

FUSED_RNN_GPU_REHEARSAL=1 runs the same bodies on a CPU, in Triton's interpreter and with the
emulated library that FUSED_RNN_CUDA_LIBRARY names, at sizes of a few units, so that the first run
on a GPU is not the first run at all.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
from gpu_budget import NUMBERS, Number, assert_holds

import fused_rnn
from fused_rnn import backends, plan, testing
from fused_rnn.cuda import library, planning
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case

REHEARSAL = os.environ.get("FUSED_RNN_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = ("triton", "cuda")
# Poisoned memory asks torch for deterministic algorithms, which cuBLAS, taking the products of the
# CUDA backend's steps, has with this setting only. torch reads it at the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


def nvcc() -> str | None:
    """The compiler that the CUDA library would be built with."""
    path = Path(__file__).resolve().parents[1] / "tools" / "build_cuda.py"
    spec = importlib.util.spec_from_file_location("build_cuda", path)
    build_cuda = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_cuda)
    return build_cuda.find_nvcc(os.environ)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of each backend that has kernels for a GPU; a missing one is a failure, except for a
    CUDA library that nothing here could build."""
    name = request.param
    reason = backends.available_backends()[name]
    if name == "cuda" and reason:
        if REHEARSAL and not os.environ.get("FUSED_RNN_CUDA_LIBRARY"):
            pytest.skip("FUSED_RNN_CUDA_LIBRARY names no emulated library")
        if not REHEARSAL and torch.version.hip:
            pytest.skip("its kernels are for NVIDIA's GPUs")
        if not REHEARSAL and not library.path().is_file() and nvcc() is None:
            pytest.skip(f"no nvcc, and {reason}")
    assert reason is None
    return name


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


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def numerics():
    """Parametrizes a test by cell, shape, number and backend.

    A Triton kernel is compiled, for a second or more, for each cell, number and power of two of a
    size. Of each pair of shapes every number has one there, in turn with the other; the CUDA
    kernels, which are compiled already, have all."""
    values = []
    for (c, cell), (s, shape) in itertools.product(enumerate(CELLS), enumerate(SIZES)):
        for (n, number), backend in itertools.product(enumerate(NUMBERS), BACKENDS):
            turn = backend == "cuda" or (c + n + s) % 2 == 0
            if shape != "H64-B7-flags" if REHEARSAL else not turn:  # a rehearsal's are all alike
                continue
            name = f"{backend}-{cell}-{shape}-{number}"
            values.append(pytest.param(cell, shape, number, backend, id=name))
    names = ("cell", "shape", "number", "backend")
    return pytest.mark.parametrize(names, values, indirect=["backend"])


@numerics()
def test_numerics(cell, shape, number, backend, record_property):
    case = case_of(cell, dtype=number.dtype, **SIZES[shape])
    assert_holds(case, backend, DEVICE, number, record_property)


# Every kind of plan. The plan itself chooses by predicted time; here each is made to run.


@contextlib.contextmanager
def forced(backend: str, kind: str):
    """Make every scan of a backend run by plans of one kind; skips the test where a scan has none
    such here."""
    planner = {"triton": plan, "cuda": planning}[backend]
    before = planner.choose

    def choose(device, shape):
        for prediction in planner.choices(device, shape):
            if prediction.plan.kind == kind:
                return prediction.plan
        pytest.skip(f"{device.name} has no {kind} plan for {shape}")

    planner.choose = choose
    try:
        yield
    finally:
        planner.choose = before


KINDS = {"triton": ("block", "streamed", "step"), "cuda": ("block", "grid", "step")}


def every_kind(*kinds: str):
    """Parametrizes a test by backend and kind of plan: by those of the kinds a backend has."""
    pairs = [(b, kind) for b in BACKENDS for kind in KINDS[b] if not kinds or kind in kinds]
    return pytest.mark.parametrize(("backend", "kind"), pairs, indirect=["backend"])


@pytest.mark.parametrize("number", [NUMBERS[1], NUMBERS[3]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@every_kind()
def test_every_kind_of_plan(backend, kind, cell, number):
    hidden = 128 if number.dtype == torch.bfloat16 else 64  # what a block scan can hold
    with forced(backend, kind):
        case = case_of(
            cell, dtype=number.dtype, hidden=hidden, rows=40, steps=19, inputs=32, **FLAGS
        )
        assert_holds(case, backend, DEVICE, number)


@every_kind("streamed", "grid", "step")
def test_large_weights_of_every_kind(backend, kind):
    with forced(backend, kind):
        case = case_of("lstm", dtype=torch.bfloat16, hidden=768, rows=24, steps=9, inputs=64)
        assert_holds(case, backend, DEVICE, Number(torch.bfloat16))


# The same bits again.


def repeated(*plans):
    """Parametrizes a test by (backend, kind, hidden, dtype), and by the cell."""
    values = []
    for backend, kind, hidden, dtype in plans:
        for cell in CELLS:
            name = f"{backend}-{kind}-{cell}-H{hidden}-{str(dtype)[6:]}"
            values.append(pytest.param(backend, kind, hidden, dtype, cell, id=name))
    names = ("backend", "kind", "hidden", "dtype", "cell")
    return pytest.mark.parametrize(names, values, indirect=["backend"])


KEEPING_BITS = (
    ("triton", "block", 128, torch.bfloat16),
    ("triton", "streamed", 96, torch.float16),
    ("triton", "step", 256, torch.float32),
    ("cuda", "block", 128, torch.bfloat16),
    ("cuda", "block", 60, torch.float32),
    ("cuda", "grid", 256, torch.bfloat16),
    ("cuda", "grid", 200, torch.float32),
)
# Its products are cuBLAS's, which may take another kernel for another number of rows.
BITS_BY_BATCH = ("cuda", "step")


def assert_same(backend, kind, ours, other, what="") -> None:
    """The same bits. Nearly those where a library multiplies: by the CUDA backend's steps, and in a
    rehearsal by Triton's interpreter, where NumPy's products give a row other bits in another place
    of a tile (seen with float32 at 64 x 16 x 64)."""
    if (backend, kind) == BITS_BY_BATCH:
        # States of size one; a bit of the sums may be one of the rounded state, and carries on.
        slack = 8 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, other, rtol=slack, atol=slack)
    elif REHEARSAL and backend == "triton":
        torch.testing.assert_close(ours, other)
    else:
        assert torch.equal(ours, other), what


@repeated(*KEEPING_BITS, (*BITS_BY_BATCH, 256, torch.float32))
def test_deterministic(backend, kind, hidden, dtype, cell):
    """Outputs and every gradient, twice."""
    case = case_of(cell, dtype=dtype, hidden=hidden, rows=50, steps=30, inputs=64, **FLAGS)
    with forced(backend, kind):
        first = testing.evaluate(case, backend, DEVICE)
        second = testing.evaluate(case, backend, DEVICE)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows_of(case: Case, tensors: dict, rows: list[int], backend: str) -> dict:
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
    y, *states = testing.run(case, given, backend)
    states = states[:2] if case.cell == "lstm" else states[:1]
    (dx,) = torch.autograd.grad(y, given["input"], given["dy"])
    results = {"y": y, "dx": dx} | dict(zip(("h_n", "c_n"), states, strict=False))
    return {name: value.detach() for name, value in results.items()}


@repeated(*KEEPING_BITS)
def test_a_row_does_not_depend_on_its_batch(backend, kind, hidden, dtype, cell):
    """A row alone, or among any others and in any place, has the same bits."""
    case = case_of(cell, dtype=dtype, hidden=hidden, rows=70, steps=20, inputs=64, **FLAGS)
    tensors = testing.make_inputs(case, DEVICE)
    every = list(range(case.rows))
    with forced(backend, kind):
        whole = rows_of(case, tensors, every, backend)
        for rows in ([0], every[-1:], every[: case.rows // 2], every[::-1]):
            for name, part in rows_of(case, tensors, rows, backend).items():
                assert_same(backend, kind, whole[name][:, rows], part, name)


# Long sequences and large tensors.


@every_kind("block", "grid", "step")
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_long_sequence(cell, backend, kind):
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
        return leaves, testing.run(part, tensors | leaves, backend)

    def backward(leaves, outputs, cotangents):
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return dict(zip(leaves, found, strict=True))

    last = [tensors[f"d{name}"] for name in ("h_n", "c_n")][: len(states)]
    with forced(backend, kind), fp32_precision("ieee"):
        leaves, whole = forward(0, steps, [tensors[name] for name in states])
        grads = backward(leaves, whole, (tensors["dy"], *last))
        parts, state = [], [tensors[name] for name in states]
        for first in range(0, steps, piece):
            parts.append(forward(first, first + piece, state))
            state = parts[-1][1][1:]
        pieces = [torch.cat([outputs[0] for _, outputs in parts]), *state]
        for ours, theirs in zip(whole, pieces, strict=True):
            assert_same(backend, kind, ours, theirs)
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


@every_kind()
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_a_tensor_of_more_than_2_31_elements(cell, backend, kind):
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
        y, state = getattr(fused_rnn, cell)(x, hx, None, w_hh, backend=backend)
        return y, *(state if cell == "lstm" else (state,))

    with forced(backend, kind), torch.inference_mode():
        whole = run(slice(None))
        for chosen in (slice(0, 3), slice(rows - 19, None)):
            y, *state = run(chosen)
            assert_same(backend, kind, whole[0][:, chosen], y)
            for ours, alone in zip(whole[1:], state, strict=True):
                assert_same(backend, kind, ours[chosen], alone)

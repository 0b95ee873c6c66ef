"""Every backend against float64 within the computed error budget: cells, options, sizes, dtypes."""

import dataclasses

import pytest
import torch
from conftest import UNDER_TEST, each_backend, interpreted

from fused_rnn import testing
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case, check, compare, error, evaluate, poisoned_memory

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BOTH = (False, True)

CELLS = {
    "lstm": {},
    "lstm-proj": {"cell": "lstm", "proj": 3},
    "gru": {},
    "gru-before": {"cell": "gru", "reset_after": False},
    "rnn": {},
    "rnn-relu": {"cell": "rnn", "relu": True},
}

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "both": {"reverse": BOTH},
    "reversed": {"reverse": (True,)},
    "stack": {"reverse": (True, False, False, True)},
    "lengths": {"lengths": True, "reverse": BOTH},
    "reset": {"reset": True, "reverse": BOTH},
    "lengths-reset": {"lengths": True, "reset": True, "reverse": BOTH},
    "recompute": {"tape": "recompute"},
    "recompute-flags": {"tape": "recompute", "lengths": True, "reset": True, "reverse": BOTH},
    "strided": {"strided": True, "reverse": BOTH, "lengths": True},
}

SIZES = {
    "H1": {"hidden": 1, "inputs": 1},
    "H57": {"hidden": 57, "rows": 5},
    "H100": {"hidden": 100, "rows": 2},
    "B1": {"rows": 1, "hidden": 33},
    "B33": {"rows": 33, "steps": 4},
    "T1": {"steps": 1},
    "T70": {"steps": 70, "hidden": 16},
    "I0": {"inputs": 0},
    "I300": {"inputs": 300, "hidden": 20},
}


def case_of(cell: str, **fields) -> Case:
    fields = {"cell": cell, **CELLS[cell], **fields}
    if fields.get("proj"):
        fields["proj"] = min(fields["proj"], fields.get("hidden", 7))
    if fields["cell"] == "lstm" and fields.get("lengths"):
        fields["cells"] = True
    return Case(**fields)


def assert_holds(case: Case, backend: str, device: str) -> None:
    with poisoned_memory():
        verdicts = check(case, backend, device)
    faults = [f"{v.name}: {v.fault} ({v.error:.2e} of {v.budget:.2e})" for v in verdicts if v.fault]
    assert not faults, f"{case}\n" + "\n".join(faults)


def assert_precise(case: Case, precision: str, backend: str, device: str) -> None:
    """A float32 scan in TF32 or 3xTF32, against float64: errors of the size of the rounding of the
    operands, and above those of ieee in TF32 alone."""
    exact = evaluate(case, "plain", "cpu", True, torch.float64)
    found = {}
    for p in ("ieee", precision):
        with fp32_precision(p):
            found[p] = evaluate(case, backend, device)
    for name in exact:
        scale = float(exact[name].abs().max())
        low, high = (error(found[p][name].cpu(), exact[name]) for p in ("ieee", precision))
        assert high <= (2**-7 if precision == "tf32" else 2**-17) * scale, name
        if precision == "tf32":
            assert high > low, name


@pytest.mark.parametrize(
    ("backend", "cell", "option", "dtype"),
    each_backend([*CELLS], [*OPTIONS], DTYPES),
    indirect=["backend"],
    ids=str,
)
def test_options(cell, option, dtype, backend, device):
    assert_holds(case_of(cell, dtype=dtype, **OPTIONS[option]), backend, device)


@pytest.mark.parametrize(
    ("backend", "cell", "size", "dtype"),
    each_backend([*CELLS], [*SIZES], DTYPES[:3]),
    indirect=["backend"],
    ids=str,
)
def test_sizes(cell, size, dtype, backend, device):
    assert_holds(case_of(cell, dtype=dtype, **SIZES[size]), backend, device)


@pytest.mark.parametrize(
    ("backend", "seed"),
    [(name, seed) for name in UNDER_TEST for seed in range(0, 40, 4 if interpreted(name) else 1)],
    indirect=["backend"],
)
def test_random_configurations(seed, backend, device):
    """Sizes and options drawn at random, wider than the named ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    cell = draw(*CELLS)
    case = case_of(
        cell,
        steps=draw(1, 2, 3, 8, 19),
        rows=draw(1, 2, 6, 7, 13, 40),
        inputs=draw(1, 3, 17, 64),
        hidden=draw(2, 5, 8, 15, 16, 17, 31, 48, 65, 130),
        reverse=draw((False,), (True,), BOTH, (True, True, False)),
        dtype=draw(*DTYPES),
        bias=draw(True, False),
        lengths=draw(True, False),
        reset=draw(True, False),
        tape=draw("keep", "recompute"),
        strided=draw(True, False),
        seed=seed,
    )
    assert_holds(case, backend, device)


@pytest.mark.parametrize("cell", CELLS)
def test_no_rows(cell, backend, device):
    """B = 0 runs forward and backward, and the gradients of the weights are zero."""
    case = case_of(cell, rows=0, reverse=BOTH, lengths=True)
    results = evaluate(case, backend, device)
    assert results["y"].shape == (5, 0, 2, case.proj or case.hidden)
    assert results["dw_hh"].abs().max() == 0
    assert results["dinput"].shape == (5, 0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
@pytest.mark.parametrize("cell", CELLS)
def test_extreme_input(cell, value, backend, device):
    """NaN reaches exactly what it reaches in plain PyTorch; infinities saturate the gates."""
    case = case_of(cell, rows=2, dtype=torch.float32, hidden=19)
    tensors = testing.make_inputs(case, device)
    tensors = {
        k: t.float() if t is not None and t.is_floating_point() else t for k, t in tensors.items()
    }
    tensors["input"][2, 1, 0] = value
    got = testing.run(case, tensors, backend)
    wanted = testing.run(case, tensors, "reference")
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_garbage_in_the_padding_is_never_read(cell, backend, device, monkeypatch):
    """NaN in the padded steps of the input changes neither outputs nor gradients."""
    case = case_of(cell, lengths=True, reverse=BOTH, dtype=torch.float64)
    for tape in ("keep", "recompute"):
        case = dataclasses.replace(case, tape=tape)
        clean = evaluate(case, backend, device)
        original = testing.make_inputs

        def poisoned(case, device="cpu", original=original):
            tensors = original(case, device)
            ended = torch.arange(case.steps, device=device).unsqueeze(1) >= tensors["lengths"]
            tensors["input"] = tensors["input"].masked_fill(ended.unsqueeze(-1), float("nan"))
            return tensors

        monkeypatch.setattr(testing, "make_inputs", poisoned)
        dirty = evaluate(case, backend, device)
        monkeypatch.undo()
        for name in clean:
            assert torch.equal(clean[name], dirty[name]), name


def test_the_checks_see_faults():
    """The comparison catches a wrong value, a missing gradient and a NaN."""
    exact = torch.linspace(-1, 1, 100, dtype=torch.float64)
    off = error(exact.float(), exact)
    assert not compare("y", exact.float(), exact, off, torch.float32).fault
    wrong = exact.float()
    wrong[3] += 1e-6
    assert compare("y", wrong, exact, off, torch.float32).fault
    assert compare("dw", torch.zeros(100), exact, off, torch.float32).fault
    small = torch.full((100,), 2e-7, dtype=torch.float64)
    small[0] = 1.0
    cut = small.float()
    cut[1:] = 0  # each element is within a bound of twice the grain
    assert not compare("dw", small.float(), small, 1e-7, torch.float32).fault
    assert compare("dw", cut, small, 1e-8, torch.float32).fault
    assert error(torch.tensor([float("nan")]), torch.zeros(1, dtype=torch.float64)) == float("inf")


def test_long_sums():
    """Weight gradients of many rows and steps, whose sums have 100,000 terms."""
    case = Case("rnn", steps=700, rows=150, hidden=9, inputs=3, relu=True)
    assert_holds(case, "cpu", "cpu")

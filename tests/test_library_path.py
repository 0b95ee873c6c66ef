"""The automatic choice of torch.nn's own path: the same results, and derivatives it has not."""

import dataclasses

import pytest
import torch

from fused_rnn import backends
from fused_rnn.testing import Case, evaluate, make_inputs, run

CASES = {
    "lstm": Case("lstm", cells=False),
    "lstm-both": Case("lstm", reverse=(False, True)),
    "gru": Case("gru"),
    "rnn": Case("rnn", relu=True),
}
CASES = {
    n: dataclasses.replace(c, steps=3, rows=2, inputs=2, hidden=3, dtype=torch.float64)
    for n, c in CASES.items()
}


@pytest.fixture
def prefers_torch(monkeypatch):
    """Every backend of ours leaves the automatic choice to torch.nn's path."""
    for name in ("cpu", "triton"):
        row = dataclasses.replace(backends.BACKENDS[name], yields=lambda request: "as a test")
        monkeypatch.setitem(backends.BACKENDS, name, row)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, prefers_torch):
    ours, theirs = evaluate(CASES[name], "reference"), evaluate(CASES[name], None)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, prefers_torch):
    case = CASES[name]
    tensors = make_inputs(case)
    names = [n for n in ("input", "h0", "w_ih", "w_hh", "b_ih") if tensors[n] is not None]
    leaves = [tensors[n].clone().requires_grad_() for n in names]

    def function(*values):
        return run(case, tensors | dict(zip(names, values, strict=True)), None)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_backward_twice_and_in_place_changes(prefers_torch):
    """retain_graph works; a weight changed in place before the backward pass is an error."""
    case = CASES["lstm"]
    tensors = make_inputs(case)
    weight = tensors["w_hh"].clone().requires_grad_()
    y = run(case, tensors | {"w_hh": weight}, None)[0]
    first = torch.autograd.grad(y.sum(), weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), weight, retain_graph=True)[0])
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), weight)


def test_an_explicit_choice_is_the_library_itself():
    """use_backend("torch") is torch.nn's path with nothing around it."""
    case = CASES["lstm"]
    tensors = make_inputs(case)
    tensors["input"].requires_grad_()
    y = run(case, tensors, "torch")[0]
    assert "LibraryLayer" not in type(y.grad_fn.next_functions[0][0]).__name__

"""vmap over inputs and weights, per-sample gradients, Hessians: each equal to the plain loop."""

import dataclasses

import pytest
import torch

import fused_rnn
from fused_rnn.testing import PARAMETERS, Case, make_inputs, run

BOTH = (False, True)
N = 3
CASES = {
    "lstm": Case("lstm", reverse=BOTH, cells=True),
    "lstm-proj": Case("lstm", proj=2, lengths=True, cells=True),
    "gru": Case("gru", reset=True),
    "gru-before": Case("gru", reset_after=False, reverse=BOTH),
    "rnn": Case("rnn", lengths=True),
}
CASES = {k: dataclasses.replace(c, hidden=5, dtype=torch.float64) for k, c in CASES.items()}
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
MAPPED = {
    "input": ("input",),
    "input-state": ("input", "h0", "c0"),
    "weights": WEIGHTS,
    "everything": PARAMETERS,
    "h0": ("h0",),
    "w_hh": ("w_hh",),
}


def batches(case, mapped, device):
    """Tensors of a case, those named in ``mapped`` with a leading axis of N different draws."""
    draws = [make_inputs(dataclasses.replace(case, seed=k), device) for k in range(N)]
    tensors = dict(draws[0])
    for name in mapped:
        if tensors[name] is not None:
            tensors[name] = torch.stack([d[name] for d in draws])
    return tensors


def call(case, tensors, backend, mapped):
    """(function of the mapped tensors, their batched values, their names)."""
    names = [n for n in mapped if tensors[n] is not None]

    def function(*values):
        return run(case, tensors | dict(zip(names, values, strict=True)), backend)

    return function, [tensors[n] for n in names]


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("name", CASES)
def test_vmap(name, mapped, backend, device):
    function, values = call(
        CASES[name], batches(CASES[name], MAPPED[mapped], device), backend, MAPPED[mapped]
    )
    found = torch.vmap(function)(*values)
    loop = [function(*(v[k] for v in values)) for k in range(N)]
    for ours, parts in zip(found, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(parts), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mapped", ["input", "weights", "everything"])
@pytest.mark.parametrize("name", CASES)
def test_vmap_of_grad(name, mapped, backend, device):
    """Per-sample gradients and gradients of an ensemble, every parameter at once."""
    case = CASES[name]
    tensors = batches(case, MAPPED[mapped], device)
    names = [n for n in PARAMETERS if tensors[n] is not None]
    dims = tuple(0 if n in MAPPED[mapped] else None for n in names)

    def loss(*values):
        outputs = run(case, tensors | dict(zip(names, values, strict=True)), backend)
        return sum(o.sin().sum() for o in outputs)

    gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))
    values = [tensors[n] for n in names]
    found = torch.vmap(gradient, dims)(*values)
    for k in range(N):
        wanted = gradient(*(v if d is None else v[k] for v, d in zip(values, dims, strict=True)))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[k], theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("both", [False, True])
def test_vmap_over_lengths_and_reset(both, backend, device):
    """Flags that differ between samples, with weights mapped besides or not."""
    case = dataclasses.replace(CASES["lstm"], lengths=True, reset=True)
    mapped = ("input", *(WEIGHTS if both else ()))
    tensors = batches(case, mapped, device)
    reset = torch.rand(N, case.steps, case.rows) < 0.3
    names = [n for n in mapped if tensors[n] is not None]

    def function(reset, *values):
        given = tensors | dict(zip(names, values, strict=True)) | {"reset": reset}
        return run(case, given, backend)

    values = [tensors[n] for n in names]
    found = torch.vmap(function)(reset, *values)
    loop = [function(reset[k], *(v[k] for v in values)) for k in range(N)]
    for ours, parts in zip(found, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(parts))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_hessian(name, backend, device):
    """Forward over reverse equals reverse over reverse."""
    case = dataclasses.replace(CASES[name], steps=2, rows=1, inputs=2, hidden=2)
    tensors = make_inputs(case, device)

    def loss(x):
        return sum(o.sin().sum() for o in run(case, tensors | {"input": x}, backend))

    forward = torch.func.jacfwd(torch.func.grad(loss))(tensors["input"])
    reverse = torch.func.jacrev(torch.func.grad(loss))(tensors["input"])
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_vmap_over_gradients(name, recwarn):
    """Rows of a Jacobian at once, of a graph that was made without a transform."""
    module = getattr(fused_rnn, name)(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y = module(x)[0]
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)

    def pull(cotangent):
        given = (x, *module.parameters())
        return torch.autograd.grad(y, given, cotangent, retain_graph=True)

    found = torch.func.vmap(pull)(cotangents)
    for k, cotangent in enumerate(cotangents):
        for got, expected in zip(found, pull(cotangent), strict=True):
            torch.testing.assert_close(got[k], expected)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]

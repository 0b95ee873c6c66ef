"""First, second and forward-mode derivatives, and no work for what needs none."""

import dataclasses

import pytest
import torch
from conftest import interpreted

from fused_rnn import autograd, functional, ops
from fused_rnn.testing import PARAMETERS, Case, evaluate, make_inputs, run

BOTH = (False, True)

CASES = {
    "lstm": Case("lstm"),
    "lstm-flags": Case("lstm", reverse=BOTH, lengths=True, reset=True, cells=True),
    "lstm-proj": Case("lstm", proj=2, lengths=True),
    "gru": Case("gru"),
    "gru-flags": Case("gru", reverse=BOTH, lengths=True, reset=True),
    "gru-before": Case("gru", reset_after=False, reset=True, reverse=(True,)),
    "rnn": Case("rnn", lengths=True, reverse=BOTH),
    "rnn-relu": Case("rnn", relu=True),
}
CASES = {
    name: dataclasses.replace(
        case, steps=3, rows=2, inputs=2, hidden=3, dtype=torch.float64, cells=case.cell == "lstm"
    )
    for name, case in CASES.items()
}


# What is checked with many calls where calls are slow: the derivatives of a backend are its
# backward operators', which test_numerics holds against float64 one by one.
SOME = ("lstm-flags", "lstm-proj", "gru-flags", "gru-before")


def skip_where_slow(backend, name, some=SOME):
    if interpreted(backend) and name not in some:
        pytest.skip("interpreted: " + ", ".join(some) + " alone")


def as_function(case, backend, device):
    """The case as a function of its differentiable tensors, and those tensors."""
    tensors = make_inputs(case, device)
    names = [n for n in PARAMETERS if tensors[n] is not None]
    leaves = [tensors[n].clone().requires_grad_() for n in names]

    def function(*values):
        return run(case, tensors | dict(zip(names, values, strict=True)), backend)

    return function, leaves


@pytest.mark.parametrize("tape", functional.TAPES)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, tape, backend, device):
    skip_where_slow(backend, name)
    function, leaves = as_function(dataclasses.replace(CASES[name], tape=tape), backend, device)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted(backend))


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name, backend, device):
    skip_where_slow(backend, name, SOME[:1])
    case = CASES[name]
    if interpreted(backend):
        case = dataclasses.replace(case, steps=2)
    function, leaves = as_function(case, backend, device)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=interpreted(backend))


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, backend, device):
    """jvp equals reverse mode's Jacobian times the tangent; forward over reverse too."""
    skip_where_slow(backend, name, SOME[2:3])
    function, leaves = as_function(CASES[name], backend, device)
    values = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.randn_like(v) for v in values)
    _, found = torch.func.jvp(function, values, tangents)
    jacobians = torch.func.jacrev(function, argnums=tuple(range(len(values))))(*values)
    for out, rows in zip(found, jacobians, strict=True):
        wanted = sum(
            torch.tensordot(j, t, dims=t.dim()) for j, t in zip(rows, tangents, strict=True)
        )
        torch.testing.assert_close(out, wanted)

    def loss(*v):
        return sum(o.sin().sum() for o in function(*v))

    gradient = torch.func.grad(loss, argnums=tuple(range(len(values))))
    _, over = torch.func.jvp(gradient, values, tangents)
    wanted = torch.autograd.grad(
        sum(
            (g * t).sum()
            for g, t in zip(
                torch.autograd.grad(loss(*leaves), leaves, create_graph=True), tangents, strict=True
            )
        ),
        leaves,
    )
    for ours, theirs in zip(over, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_recompute_is_keep(name, backend, device):
    """The rebuilt tape gives the same gradients as the kept one, to rounding."""
    keep = evaluate(CASES[name], backend, device)
    rebuilt = evaluate(dataclasses.replace(CASES[name], tape="recompute"), backend, device)
    for key, value in keep.items():
        torch.testing.assert_close(rebuilt[key], value)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_alone(name, backend, device):
    """Asking for one gradient gives that gradient, and needs no other."""
    case = CASES[name]
    function, leaves = as_function(case, backend, device)
    everything = torch.autograd.grad(sum(o.sum() for o in function(*leaves)), leaves)
    for k, wanted in enumerate(everything):
        values = [leaf.detach() for leaf in leaves]
        values[k].requires_grad_()
        (alone,) = torch.autograd.grad(sum(o.sum() for o in function(*values)), values[k])
        torch.testing.assert_close(alone, wanted)


@pytest.mark.parametrize("name", CASES)
def test_each_output_alone(name, backend, device):
    """Gradients through one output equal those with zero cotangents for the others."""
    function, leaves = as_function(CASES[name], backend, device)
    for k in range(len(function(*leaves))):
        outputs = function(*leaves)
        zeros = [torch.ones_like(o) * (j == k) for j, o in enumerate(outputs)]
        wanted = torch.autograd.grad(outputs, leaves, zeros, allow_unused=True)
        found = torch.autograd.grad(function(*leaves)[k].sum(), leaves, allow_unused=True)
        for ours, theirs in zip(found, wanted, strict=True):
            if ours is None:
                assert theirs is None or theirs.abs().max() == 0
            else:
                torch.testing.assert_close(ours, theirs)


class _Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the waist's operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACE:
            self.names.append(func._schema.name.split("_", 2)[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_no_work_for_what_needs_none(name):
    """Without gradients the inference scan runs; with them only the wanted products are taken."""
    case = dataclasses.replace(CASES[name], cells=False)
    function, leaves = as_function(case, "cpu", "cpu")
    cell = case.cell
    with torch.no_grad(), _Calls() as calls:
        function(*leaves)
    forward = "forward" if cell == "rnn" else "inference"
    assert calls.names == ["matmul", f"{cell}_{forward}"]

    names = [n for n in PARAMETERS if make_inputs(case)[n] is not None]
    products = {"input": 1, "h0": 0, "w_ih": 1, "w_hh": 2 if cell == "gru" else 1, "b_ih": 0}
    for wanted, count in products.items():
        values = [leaf.detach() for leaf in leaves]
        values[names.index(wanted)].requires_grad_()
        with _Calls() as calls:
            function(*values)[0].sum().backward()
        forwards = ["matmul", f"{cell}_forward"]
        assert calls.names == [*forwards, f"{cell}_backward", *["matmul"] * count], wanted


def test_saved_memory(monkeypatch):
    """What a training step holds for its backward pass: the tape, or without it a third."""
    case = Case("lstm", steps=50, rows=4, inputs=16, hidden=16)
    held = {}
    for tape in functional.TAPES:
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        function, leaves = as_function(dataclasses.replace(case, tape=tape), "cpu", "cpu")
        leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = function(*leaves)
        held[tape] = sum(sizes.values())
        del outputs
    tape_bytes = 50 * 4 * 4 * 16 * 4
    assert held["keep"] - held["recompute"] == tape_bytes


def test_third_derivative(backend, device):
    function, leaves = as_function(CASES["lstm"], backend, device)

    def along(x):
        return function(x, *(leaf.detach() for leaf in leaves[1:]))[0].sin().sum()

    def nested(f, x, times):
        x = x.detach().requires_grad_()
        value = f(x)
        for _ in range(times):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * torch.ones_like(grad)).sum()
        return value

    if backend != "reference":
        reference, _ = as_function(CASES["lstm"], "reference", device)

        def wanted(x):
            return reference(x, *(leaf.detach() for leaf in leaves[1:]))[0].sin().sum()

        torch.testing.assert_close(nested(along, leaves[0], 3), nested(wanted, leaves[0], 3))


def test_inputs_of_the_function_match_the_waist():
    assert autograd.LayerInputs._fields[:8] == (
        "x",
        "w_ih",
        "w_hh",
        "b_ih",
        "b_hh",
        "w_hr",
        "h0",
        "c0",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_share_no_memory(name, dtype):
    """Each gradient is a tensor of its own: clipping changes them in place."""
    case = dataclasses.replace(CASES[name], dtype=dtype)
    gradients = [v for k, v in evaluate(case, "cpu").items() if k.startswith("d")]
    before = [g.clone() for g in gradients]
    for gradient in gradients:
        gradient.mul_(0.5)
    for gradient, value in zip(gradients, before, strict=True):
        assert torch.equal(gradient, value * 0.5)

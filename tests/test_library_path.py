"""The automatic choice of torch.nn's own path: the same results, and derivatives it has not."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

import fused_rnn
from fused_rnn import backends, library, models
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


MODELS = {
    "two-layers": {"num_layers": 2},
    "both-ways": {"bidirectional": True, "num_layers": 2, "bias": False},
    "projected": {"proj_size": 3},
    "batch-first": {"batch_first": True},
}


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("state", [False, True])
def test_a_whole_model(cell, options, state, prefers_torch, monkeypatch):
    """All layers by one call: torch.nn's bits, without gradients and with; second derivatives."""
    if "proj_size" in options and cell != "LSTM":
        options = {"num_layers": 3}
    monkeypatch.setattr(models, "is_plain", lambda x: False)
    calls, call = [], library.call
    monkeypatch.setattr(library, "call", lambda *args: calls.append(1) or call(*args))
    theirs = getattr(torch.nn, cell)(3, 4, dtype=torch.float64, **options)
    ours = getattr(fused_rnn, cell)(3, 4, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    hx = None
    if state:
        rows = 2 if options.get("batch_first") else 5
        entries = ours.num_layers * (2 if ours.bidirectional else 1)
        sizes = (ours.proj_size or 4, 4)[: 2 if cell == "LSTM" else 1]
        hx = tuple(torch.randn(entries, rows, n, dtype=torch.float64) for n in sizes)

    def flat(module, x, *hx):
        states = None if not hx else hx if cell == "LSTM" else hx[0]
        y, found = module(x, states)
        return (y, *(found if cell == "LSTM" else (found,)))

    with torch.no_grad():
        for a, b in zip(flat(ours, x, *(hx or ())), flat(theirs, x, *(hx or ())), strict=True):
            assert torch.equal(a, b)
    assert len(calls) == 1
    given = [t.clone().requires_grad_() for t in (x, *(hx or ()))]
    results = []
    for module in (ours, theirs):
        outputs = flat(module, *given)
        total = sum((out * out.detach().cos()).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(total, [*given, *module.parameters()])])
    assert len(calls) == 2
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda *t: flat(ours, *t), given)
    assert torch.autograd.gradgradcheck(lambda *t: flat(ours, *t), given)


def test_a_model_of_mixed_dtypes_is_refused(prefers_torch, monkeypatch):
    """As torch.nn refuses it, or as a layer by itself does."""
    monkeypatch.setattr(models, "is_plain", lambda x: False)
    module, x = fused_rnn.GRU(3, 4, 2), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="RNN input dtype .* does not match weight dtype"):
        module(x.double())
    with pytest.raises(RuntimeError, match="one dtype: hx is torch.float64"):
        module(x, torch.zeros(2, 5, 4, dtype=torch.float64))
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises(RuntimeError, match="one dtype"):
        module(x)


def test_an_explicit_choice_is_the_library_itself():
    """use_backend("torch") is torch.nn's path with nothing around it."""
    case = CASES["lstm"]
    tensors = make_inputs(case)
    tensors["input"].requires_grad_()
    y = run(case, tensors, "torch")[0]
    assert "LibraryCall" not in type(y.grad_fn.next_functions[0][0]).__name__


class OneNode(torch.autograd.Function):
    """A GRU as cuDNN's node is one: inputs x, weights, hx and no cx, outputs beyond y and h_n, and
    no second derivative."""

    @staticmethod
    def forward(ctx, options, x, *tensors):
        ctx.save_for_backward(x, *tensors)
        ctx.options = options
        y, h_n = GRU(x, tensors[-2], tensors[:-2], *options)
        return y, h_n, *(x.new_zeros(0) for _ in range(3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_n, *_):
        leaves = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = GRU(leaves[0], leaves[-2], leaves[1:-2], *ctx.options)
        return None, *torch.autograd.grad(outputs, leaves[:-1], (dy, dh_n)), None


GRU = torch._VF.gru


@pytest.fixture
def one_node(monkeypatch):
    def gru(x, hx, weights, *options):
        return OneNode.apply(options, x, *weights, hx, None)[:2]

    monkeypatch.setattr(torch._VF, "gru", gru)
    monkeypatch.setattr(library, "NODES", ("OneNodeBackward",))
    monkeypatch.setattr(models, "is_plain", lambda x: False)


@pytest.mark.parametrize("frozen", [(), (0, 2), (3,)])
def test_a_librarys_node_is_differentiated_again(frozen, one_node, prefers_torch):
    """As cuDNN's, whose node knows first derivatives only: those that are taken again are made by
    the reference, for the inputs that want them."""
    module = fused_rnn.GRU(3, 4, 2, batch_first=True, dtype=torch.float64)
    x, h0 = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    given = [x, h0, *module.parameters()]
    for k, t in enumerate(given):
        t.requires_grad_(k not in frozen)
    leaves = [t for t in given if t.requires_grad]
    grads = {}
    for backend in ("auto", "reference"):
        with fused_rnn.use_backend(backend):
            y, h_n = module(x, h0)
        node = type(y.grad_fn.next_functions[0][0]).__name__
        assert (node == "OneNodeBackward") == (backend == "auto")
        first = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)  # h_n without one
        again = torch.autograd.grad((y.sin().sum() + h_n.cos().sum()), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
        grads[backend] = [*first, *again, *second]
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_librarys_node_keeps_its_inputs_no_longer_than_it_needs_them(one_node, prefers_torch):
    module = fused_rnn.GRU(3, 4, dtype=torch.float64)
    leaf = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    alive = TensorWeakRef(x)
    y, _ = module(x)
    del x
    assert alive() is not None
    (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    torch.autograd.grad(dx.square().sum(), leaf, retain_graph=True)
    y.sum().backward()
    del dx
    assert alive() is None


@pytest.mark.parametrize("given", [False, True])
def test_second_derivatives_where_hooks_take_what_is_saved(given, one_node, prefers_torch):
    """Checkpointing, and hooks that keep copies: a node would be left without its inputs."""
    module = fused_rnn.GRU(3, 4, dtype=torch.float64)
    leaf = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(1, 5, 4, dtype=torch.float64) if given else None

    def plain():
        return module(leaf * 1, h0)[0]

    def packed():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return plain()

    def checkpointed():
        return checkpoint(plain, use_reentrant=False)

    found = []
    for way in (plain, packed, checkpointed):
        (dx,) = torch.autograd.grad(way().sin().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [leaf, *module.parameters()]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_without_a_nodes_inputs(one_node, prefers_torch):
    """Where hooks are put on a node's own saved tensors, what is wrong is said."""
    module = fused_rnn.GRU(3, 4, dtype=torch.float64)
    leaf = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y, _ = module(leaf * 1)
    node = y.grad_fn
    assert node.name() in library.NODES
    node._raw_saved_tensors[0].register_hooks(lambda t: t.clone(), lambda t: t)
    torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="given hooks afterwards"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)

"""Under torch.autocast: torch.nn's output dtypes, values within its error, float32 gradients."""

import copy
import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from twins import CELLS, LAYERS, SIZES, both, draw, redrawn, results, states, tensors_of, twins
from twins import FLAVOURS as LAYER_FLAVOURS

from fused_rnn.testing import compare, error

LOW = (torch.bfloat16, torch.float16)
FLAVOURS = LAYER_FLAVOURS | {name: (name, {}) for name in CELLS}
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
lows = pytest.mark.parametrize("low", LOW, ids=str)


def flavour_twins(flavour, **options):
    name, more = FLAVOURS[flavour]
    return twins(name, *SIZES, **more, **({} if name in CELLS else options))


def input_of(module, dtype=torch.float32, seed=2):
    shape = (6, 3, 4) if isinstance(module, torch.nn.RNNBase) else (3, 4)
    return draw(*shape, dtype=torch.bfloat16, seed=seed).to(dtype)


def states_of(module, dtype):
    if isinstance(module, torch.nn.RNNBase):
        hx = states(module, 3, dtype=torch.bfloat16)
    else:
        hx = draw(3, 5, dtype=torch.bfloat16, seed=5), draw(3, 5, dtype=torch.bfloat16, seed=6)
        hx = hx if module.weight_ih.shape[0] == 20 else hx[0]
    return tuple(h.to(dtype) for h in hx) if isinstance(hx, tuple) else hx.to(dtype)


def refused_by_onednn(flavour, low, grad, *dtypes):
    """torch.nn's LSTM in float16 with gradients, and on some processors without, and on some in
    bfloat16: an error or float32, as oneDNN has no such."""
    if flavour != "LSTM" or torch.float32 not in dtypes:
        return False
    if low == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return grad or not torch.ops.mkldnn._is_mkldnn_fp16_supported()


@flavours
@lows
@pytest.mark.parametrize("grad", [True, False], ids=["", "no grad"])
def test_output_dtypes(flavour, low, grad):
    """For every dtype of weights, input and states that torch.nn takes."""
    pair = flavour_twins(flavour, num_layers=2)
    kinds = (torch.float32, low)
    combinations = [*itertools.product(kinds, kinds, (None, *kinds))]
    combinations += [(torch.float64, torch.float64, hx) for hx in (None, torch.float64)]
    taken = 0
    for weights, x, hx in combinations:
        found = []
        for module in (copy.deepcopy(m).to(weights) for m in pair):
            args = (input_of(module, x), *([] if hx is None else [states_of(module, hx)]))
            try:
                with torch.set_grad_enabled(grad), torch.autocast("cpu", low):
                    found.append([t.dtype for t in tensors_of(module(*args))])
            except RuntimeError:
                found.append(None)
        ours, theirs = found
        if theirs is None or refused_by_onednn(flavour, low, grad, weights, x, hx):
            continue
        taken += 1
        assert ours == theirs, (weights, x, hx)
    assert taken >= 2  # float64 at least; processors differ in what oneDNN has of float16


@flavours
@lows
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_values_and_gradients(flavour, low, with_hx):
    """Error against float64 at most torch.nn's own under autocast; float32 gradients."""
    ours, theirs = (
        m.to(torch.bfloat16).float() for m in flavour_twins(flavour, num_layers=2, bias=True)
    )
    exact_module = copy.deepcopy(theirs).double()
    cast = torch.autocast("cpu", low)
    refused = low == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if flavour == "LSTM" and refused:  # by oneDNN: without autocast
        theirs, cast = theirs.to(low), torch.autocast("cpu", enabled=False)

    def arguments(dtype, number):
        args = (input_of(ours, dtype),)
        args += (states_of(ours, dtype),) if with_hx else ()
        if number:
            generator = torch.Generator().manual_seed(number)
            args = cast_all(redrawn(args, torch.bfloat16, generator), dtype)
        return leaves(args)

    with torch.autocast("cpu", low):
        got = results(ours, *arguments(torch.float32, 0))
    for name, value in got.items():
        if not name.startswith("output"):
            assert value.dtype == torch.float32, name
    target = exact = results(exact_module, *arguments(torch.float64, 0))
    errors = dict.fromkeys(target, 0.0)
    low_weights = next(theirs.parameters()).dtype
    for number in range(9):
        with cast:
            plain = results(theirs, *arguments(low_weights, number), seed=1 + number)
        exact = results(exact_module, *arguments(torch.float64, number), seed=1 + number)
        errors = {n: max(e, error(plain[n], exact[n])) for n, e in errors.items()}
        verdicts = [compare(n, got[n], target[n], errors[n], low) for n in target]
        if not (faults := [v for v in verdicts if v.fault]):
            return
    raise AssertionError("\n".join(map(str, faults)))


def cast_all(value, dtype):
    return (
        value.to(dtype)
        if isinstance(value, torch.Tensor)
        else tuple(cast_all(v, dtype) for v in value)
    )


def leaves(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_()
    return tuple(map(leaves, value))


@flavours
@lows
def test_disabled_inside(flavour, low):
    ours, _ = flavour_twins(flavour)
    x = input_of(ours)
    expected = tensors_of(ours(x))
    with torch.autocast("cpu", low), torch.autocast("cpu", enabled=False):
        inside = tensors_of(ours(x))
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    with torch.autocast("cpu", low):
        with torch.autocast("cpu", enabled=False):
            pass
        again = tensors_of(ours(x))
    assert any(not torch.equal(a.float(), b) for a, b in zip(again, expected, strict=True))


@flavours
def test_nested_dtypes(flavour):
    ours, theirs = flavour_twins(flavour)
    outer, inner = (torch.autocast("cpu", low) for low in LOW)
    with torch.no_grad(), outer, inner:
        found = [t.dtype for t in tensors_of(ours(input_of(ours)))]
        try:
            wanted = [t.dtype for t in tensors_of(theirs(input_of(theirs)))]
        except RuntimeError as error:  # oneDNN has a float16 LSTM on some processors only
            assert "primitive descriptor" in str(error)
            wanted = [LOW[1]] * len(found)
    assert found == wanted


@pytest.mark.parametrize("name", LAYERS)
@lows
def test_backward_outside_of_the_context(name, low):
    """The forward's casts decide; the context at the backward does not matter."""
    grads = []
    for inside in (True, False):
        module = twins(name, *SIZES, num_layers=2)[0]
        x = input_of(module).requires_grad_()
        with torch.autocast("cpu", low):
            total = module(x)[0].float().square().sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
        assert {g.dtype for g in grads[-1]} == {torch.float32}
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_mismatched_input_is_taken_under_autocast_only(name):
    ours, theirs = twins(name, *SIZES)
    x = input_of(ours, torch.bfloat16)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="RNN input dtype"):
            module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in tensors_of(ours(x))] == [t.dtype for t in tensors_of(theirs(x))]


@pytest.mark.parametrize("name", LAYERS)
@lows
def test_packed(name, low):
    found = []
    for module in twins(name, *SIZES, num_layers=2):
        packed = pack_padded_sequence(input_of(module), [2, 6, 4], enforce_sorted=False)
        with torch.no_grad(), torch.autocast("cpu", low):
            found.append(tensors_of(module(packed)))
    ours, theirs = found
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * torch.finfo(low).eps)


@pytest.mark.parametrize("name", LAYERS)
@lows
def test_lengths_and_cells(name, low):
    module = both(name)[0](*SIZES, 2, bidirectional=True)
    x, lengths = input_of(module), torch.tensor([6, 0, 3])
    more = {"return_cells": True} if name == "LSTM" else {}
    with torch.autocast("cpu", low):
        outputs = module(x, lengths=lengths, **more)
        plain = module(x)
    assert [t.dtype for t in tensors_of(outputs[:2])] == [t.dtype for t in tensors_of(plain)]
    assert outputs[0][:, 1].abs().max() == 0
    sum(t.float().sum() for t in tensors_of(outputs)).backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_model_trains_under_autocast():
    torch.manual_seed(0)
    model = torch.nn.ModuleList(
        [torch.nn.Linear(4, 4), both("GRU")[0](4, 8), torch.nn.Linear(8, 1)]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = draw(6, 16, 4).float()
    target, losses = x.sum((0, 2), keepdim=False).tanh().unsqueeze(1), []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = model[1](model[0](x))
            loss = (model[2](y[-1]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]

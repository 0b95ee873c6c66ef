"""Weights that are not plain parameters: parametrized, pruned, tied, dropped, replaced."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import (
    CELLS,
    LAYERS,
    assert_same_results,
    both,
    draw,
    f64_twins,
    input_of,
    tensors_of,
    twins,
    weight_of,
)

names = pytest.mark.parametrize("name", LAYERS)
all_names = pytest.mark.parametrize("name", LAYERS + CELLS)


@all_names
@pytest.mark.parametrize(
    "apply",
    [
        lambda m, at: parametrizations.weight_norm(m, at),
        lambda m, at: parametrizations.spectral_norm(m, at),
        lambda m, at: prune.l1_unstructured(m, at, amount=0.4),
        lambda m, at: prune.random_structured(m, at, amount=2, dim=0),
    ],
    ids=["weight_norm", "spectral_norm", "l1_unstructured", "random_structured"],
)
def test_reparametrized(name, apply):
    ours, theirs = f64_twins(name)
    for module in (ours, theirs):
        for which in ("ih", "hh"):
            torch.manual_seed(3)
            apply(module, weight_of(name, which))
    # In training every reading of a spectrally normed weight is one more power iteration, and
    # torch.nn's layers read theirs several times.
    spectral = "_SpectralNorm" in str(ours)
    for training in (False,) if spectral else (True, False):
        assert_same_results(ours.train(training), theirs.train(training))
    steps = []
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            tensors_of(module(input_of(module)))[0].square().sum().backward()
            optimizer.step()
        steps.append(tensors_of(module(input_of(module))))
    torch.testing.assert_close(*steps)


@all_names
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("function", ["weight_norm", "spectral_norm"])
def test_reparametrized_by_the_old_hooks(name, function):
    ours, theirs = f64_twins(name)
    for module in (ours, theirs):
        torch.manual_seed(3)
        getattr(nn.utils, function)(module, weight_of(name))
    assert_same_results(ours, theirs)
    for module in (ours, theirs):
        getattr(nn.utils, f"remove_{function}")(module, weight_of(name))
    assert_same_results(ours, theirs)


class Symmetric(nn.Module):
    readings = 0

    def forward(self, weight):
        self.readings += 1
        return weight.tanh()


@all_names
def test_parametrized_weights_are_computed_once_a_call(name):
    ours, _ = f64_twins(name)
    for which in ("ih", "hh"):
        counter = Symmetric()
        parametrize.register_parametrization(ours, weight_of(name, which), counter)
        counter.readings = 0
        ours(input_of(ours))
        assert counter.readings == 1


@all_names
def test_parametrization_comes_and_goes(name):
    ours, theirs = f64_twins(name)
    for module in (ours, theirs):
        parametrize.register_parametrization(module, weight_of(name), Symmetric())
    assert isinstance(ours, both(name)[0])
    assert_same_results(ours, theirs)
    with parametrize.cached():
        assert_same_results(ours, theirs)
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, weight_of(name))
    assert type(ours) is both(name)[0]
    assert_same_results(ours, theirs)


@all_names
def test_copying_while_parametrized(name):
    ours, _ = f64_twins(name)
    parametrize.register_parametrization(ours, weight_of(name), Symmetric())
    x = input_of(ours)
    expected = tensors_of(ours(x))
    sum(t.sum() for t in expected).backward()
    copied = copy.deepcopy(ours)
    torch.testing.assert_close(tensors_of(copied(x)), expected)
    with torch.no_grad():
        copied.parametrizations[weight_of(name)].original.zero_()
    torch.testing.assert_close(tensors_of(ours(x)), expected)


@all_names
def test_pruning_can_be_made_permanent(name):
    ours, theirs = f64_twins(name)
    for module in (ours, theirs):
        prune.l1_unstructured(module, weight_of(name), amount=0.5)
        prune.remove(module, weight_of(name))
    assert_same_results(ours, theirs)
    assert int((getattr(ours, weight_of(name)) == 0).sum()) > 0


@all_names
def test_tied_weights(name):
    """Two modules share a weight: one parameter, one gradient, the sum of both."""
    pairs = []
    for kind in both(name):
        torch.manual_seed(0)
        pair = nn.ModuleList([kind(4, 4, dtype=torch.float64) for _ in range(2)])
        setattr(pair[1], weight_of(name), getattr(pair[0], weight_of(name)))
        x = input_of(pair[0])
        sum(tensors_of(m(x))[0].square().sum() for m in pair).backward()
        pairs.append([p.grad for p in pair.parameters()])
    assert len(pairs[0]) == 7
    torch.testing.assert_close(*pairs)


def test_weights_tied_inside_a_module():
    grads = []
    for module in twins("LSTM", 5, 5, num_layers=2, dtype=torch.float64):
        module.weight_hh_l1 = module.weight_hh_l0
        module(draw(4, 3, 5))[0].square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert len(grads[0]) == 7
    torch.testing.assert_close(*grads)


@names
def test_weight_drop(name):
    """A plain tensor in the parameter's place, as fastai and AWD-LSTM set it before each call."""
    found = []
    for module in f64_twins(name, num_layers=2):
        raw = {}
        for at in ("weight_hh_l0", "weight_hh_l1"):
            raw[at] = module._parameters.pop(at)
            module.register_parameter(f"{at}_raw", raw[at])
        outputs = []
        for seed in range(2):
            torch.manual_seed(seed)
            for at, weight in raw.items():
                setattr(module, at, nn.functional.dropout(weight, 0.5))
            with warnings.catch_warnings(action="error"):
                outputs.append(module(input_of(module))[0])
        total = sum(y.square().sum() for y in outputs)
        found.append((outputs, torch.autograd.grad(total, list(module.parameters()))))
    assert not torch.equal(*found[0][0])
    torch.testing.assert_close(*found)


@all_names
def test_a_missing_weight_is_named(name):
    ours, _ = f64_twins(name)
    del ours._parameters[weight_of(name)]
    with pytest.raises(AttributeError, match=weight_of(name)):
        ours(input_of(ours))

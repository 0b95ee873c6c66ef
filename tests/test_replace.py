"""replace_rnn and restore_rnn: the same parameters, names, modes and hooks under other classes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from twins import CELLS, LAYERS, SIZES, both, draw

import fused_rnn
from fused_rnn import replace_rnn, restore_rnn

ALL = LAYERS + CELLS


def ours(name):
    return both(name)[0]


def theirs(name):
    return both(name)[1]


@pytest.mark.parametrize("name", ALL)
def test_the_module_itself(name):
    module = theirs(name)(*SIZES, bias=False, dtype=torch.float64).eval()
    x = draw(3, 4)
    expected = module(x)
    new = replace_rnn(module)
    assert type(new) is ours(name) and new is not module
    assert not new.training and repr(new) == repr(module)
    torch.testing.assert_close(new(x), expected)
    assert type(module) is theirs(name)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    back = restore_rnn(new)
    assert type(back) is theirs(name)
    torch.testing.assert_close(back(x), expected, rtol=0, atol=0)
    for a, b, c in zip(module.parameters(), new.parameters(), back.parameters(), strict=True):
        assert a is b and b is c


class Model(nn.Module):
    """One of each, nested in the ways modules nest."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 5, 2, bidirectional=True, dropout=0.5)
        self.stack = nn.ModuleList([nn.GRU(10, 5), nn.Sequential(nn.Identity(), nn.RNN(5, 5))])
        self.cells = nn.ModuleDict({n: theirs(n)(5, 5) for n in CELLS})
        self.nothing = None
        self.register_module("absent", None)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens):
        x, _ = self.lstm(self.embed(tokens))
        for layer in (self.stack[0], self.stack[1][1]):
            x, _ = layer(x)
        h = x[-1]
        for name, cell in self.cells.items():
            h = cell(h)[0] if name == "LSTMCell" else cell(h)
        return h * self.scale


def recurrent(model):
    return {n: type(m) for n, m in model.named_modules() if "RNN" in str(type(m).__mro__)}


def test_nested_model():
    torch.manual_seed(0)
    model = Model().eval()
    tokens = torch.randint(10, (6, 3))
    expected = model(tokens)
    names = [n for n, _ in model.named_modules()], list(model.state_dict())
    before = recurrent(model)
    parameters = list(model.parameters())

    assert replace_rnn(model) is model
    assert all(kind.__module__ == "fused_rnn.modules" for kind in recurrent(model).values())
    assert len(recurrent(model)) == 6
    assert ([n for n, _ in model.named_modules()], list(model.state_dict())) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(tokens), expected)
    assert model.lstm is model._modules["lstm"] and not model.lstm.training

    once = recurrent(model)
    assert replace_rnn(model) is model and recurrent(model) == once

    assert restore_rnn(model) is model
    assert recurrent(model) == before
    assert all(kind.__module__ == "torch.nn.modules.rnn" for kind in before.values())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)
    assert recurrent(restore_rnn(model)) == before


def test_every_constructor_option_survives():
    options = {
        "num_layers": 3, "bias": False, "batch_first": True, "dropout": 0.25,
        "bidirectional": True, "proj_size": 2,
    }  # fmt: skip
    new = replace_rnn(nn.LSTM(*SIZES, **options))
    for name, value in options.items():
        assert getattr(new, name) == value
    assert new.tape == "keep"
    relu = replace_rnn(nn.RNN(*SIZES, nonlinearity="relu"))
    assert (relu.mode, relu.nonlinearity) == ("RNN_RELU", "relu")
    assert type(restore_rnn(relu)) is nn.RNN


def test_tape_setting_survives_a_round_trip():
    module = replace_rnn(restore_rnn(fused_rnn.GRU(*SIZES, tape="recompute")))
    assert module.tape == "recompute"


def test_a_module_used_twice_stays_one():
    shared = nn.LSTM(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.LSTM(4, 4)})
    replace_rnn(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is fused_rnn.LSTM
    assert model["c"] is not model["a"]
    assert len(list(model.parameters())) == 8
    restore_rnn(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.LSTM


@pytest.mark.parametrize("name", LAYERS)
def test_tied_weights_stay_tied(name):
    a, b = theirs(name)(4, 4), theirs(name)(4, 4)
    b.weight_hh_l0 = a.weight_hh_l0
    model = replace_rnn(nn.ModuleList([a, b]))
    assert model[0].weight_hh_l0 is model[1].weight_hh_l0
    assert model[1]._flat_weights[1] is model[0].weight_hh_l0
    x = draw(3, 2, 4).float()
    (model[0](x)[0].sum() + model[1](x)[0].sum()).backward()
    assert model[0].weight_hh_l0.grad is not None


class Subclassed(nn.LSTM):
    def forward(self, input, hx=None):
        y, hx = super().forward(input, hx)
        return y * 2, hx


def test_subclasses_are_left_alone():
    model = nn.Sequential(Subclassed(4, 5))
    x = draw(3, 2, 4).float()
    expected = model(x)
    assert type(replace_rnn(model)[0]) is Subclassed
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)

    class Ours(fused_rnn.LSTM):
        pass

    assert type(restore_rnn(nn.Sequential(Ours(4, 5)))[0]) is Ours


class Scale(nn.Module):
    def forward(self, weight):
        return weight * 0.5


@pytest.mark.parametrize("name", ALL)
def test_parametrized(name):
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    module = theirs(name)(*SIZES, dtype=torch.float64)
    parametrize.register_parametrization(module, weight, Scale())
    parametrizations.weight_norm(module, weight.replace("hh", "ih"))
    model = nn.Sequential(module)
    x = draw(3, 2, 4) if name in LAYERS else draw(3, 4)
    expected = model(x)
    names = list(model.state_dict())
    replace_rnn(model)
    assert isinstance(model[0], ours(name)) and parametrize.is_parametrized(model[0], weight)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    once = model[0]
    assert replace_rnn(model)[0] is once
    restore_rnn(model)
    assert isinstance(model[0], theirs(name)) and not isinstance(model[0], ours(name))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    parametrize.remove_parametrizations(model[0], weight)
    assert type(replace_rnn(model)[0]) is not theirs(name)
    torch.testing.assert_close(model(x), expected)


def test_parametrizations_removed_after_replacing():
    model = nn.Sequential(nn.GRU(*SIZES))
    parametrize.register_parametrization(model[0], "weight_hh_l0", Scale())
    x = draw(3, 2, 4).float()
    expected = model(x)
    parametrize.remove_parametrizations(replace_rnn(model)[0], "weight_hh_l0")
    assert type(model[0]) is fused_rnn.GRU
    torch.testing.assert_close(model(x), expected)


def test_hooks_are_kept():
    module, calls = nn.LSTM(*SIZES), []
    module.register_forward_pre_hook(lambda m, a: calls.append(("pre", type(m).__module__)))
    module.register_forward_hook(lambda m, a, o: calls.append(("forward", type(m).__module__)))
    module.register_full_backward_hook(lambda m, i, o: calls.append(("backward", len(o))))
    module.register_state_dict_post_hook(lambda m, s, p, meta: calls.append(("state", p)))
    module = replace_rnn(module)
    module(draw(3, 2, 4).float())[0].sum().backward()
    module.state_dict()
    ours_at = "fused_rnn.modules"
    assert calls == [("pre", ours_at), ("forward", ours_at), ("backward", 2), ("state", "")]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizer_made_before_goes_on(make):
    x, models = draw(5, 3, 4).float(), []
    for replaced in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.LSTM(4, 5, 2), nn.GRUCell(5, 5)])
        optimizer = make(model.parameters(), lr=0.1)
        for step in range(4):
            if replaced and step == 2:
                replace_rnn(model)
            if replaced and step == 3:
                restore_rnn(model)
            optimizer.zero_grad()
            model[1](model[0](x)[0][-1]).square().sum().backward()
            optimizer.step()
        models.append(model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_checkpoints_go_both_ways():
    torch.manual_seed(0)
    model = Model().eval()
    saved, tokens = copy.deepcopy(model.state_dict()), torch.randint(10, (6, 3))
    expected = model(tokens)
    torch.manual_seed(1)
    other = replace_rnn(Model()).eval()
    assert str(other.load_state_dict(saved)) == "<All keys matched successfully>"
    torch.testing.assert_close(other(tokens), expected)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=0)


def test_old_module_and_new_share_no_bookkeeping():
    old = nn.LSTM(*SIZES)
    new = replace_rnn(old)
    assert new._flat_weights is not old._flat_weights
    new.weight_ih_l0 = nn.Parameter(torch.zeros(20, 4))
    assert torch.equal(new._flat_weights[0], torch.zeros(20, 4))
    assert not torch.equal(old._flat_weights[0], torch.zeros(20, 4))


def test_conversions_after_replacing():
    model = replace_rnn(nn.Sequential(nn.GRU(*SIZES))).double()
    x = draw(3, 2, 4)
    expected = restore_rnn(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x), expected)
    assert all(w.dtype == torch.float64 for w in model[0]._flat_weights)


def test_frozen_parameters_and_gradients_are_kept():
    module = nn.GRU(*SIZES)
    module.bias_hh_l0.requires_grad_(False)
    module(draw(3, 2, 4).float())[0].sum().backward()
    new = replace_rnn(module)
    assert not new.bias_hh_l0.requires_grad
    assert new.weight_ih_l0.grad is module.weight_ih_l0.grad is not None


@pytest.mark.parametrize("wrong", [None, 3, nn.LSTM, [nn.LSTM(2, 3)]])
@pytest.mark.parametrize("function", [replace_rnn, restore_rnn])
def test_only_modules(wrong, function):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got"):
        function(wrong)

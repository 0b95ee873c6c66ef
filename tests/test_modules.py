"""LSTM, GRU, RNN and their cells against torch.nn's: construction, results, every gradient."""

import copy
import inspect
import itertools
import warnings

import pytest
import torch
from twins import (
    CELLS,
    FLAVOURS,
    LAYERS,
    SIZES,
    both,
    check_twins,
    draw,
    flavours,
    layer_twins,
    results,
    rounded,
    states,
    twins,
)

import fused_rnn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Positional arguments after the sizes, in torch.nn's order, each set off from its default.
POSITIONAL = {
    "LSTM": (2, False, True, 0.5, True, 3, "cpu", torch.float64),
    "GRU": (2, False, True, 0.5, True, 0, "cpu", torch.float64),
    "RNN": (2, "relu", False, True, 0.5, True, 0, "cpu", torch.float64),
    "LSTMCell": (False, "cpu", torch.float64),
    "GRUCell": (False, "cpu", torch.float64),
    "RNNCell": (False, "relu", "cpu", torch.float64),
}
KEYWORDS = {
    "LSTM": {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5,
             "bidirectional": True, "proj_size": 3, "device": "cpu", "dtype": torch.float64},
    "GRU": {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5,
            "bidirectional": True, "device": "cpu", "dtype": torch.float64},
    "RNN": {"num_layers": 2, "nonlinearity": "relu", "bias": False, "batch_first": True,
            "dropout": 0.5, "bidirectional": True, "device": "cpu", "dtype": torch.float64},
    "LSTMCell": {"bias": False, "device": "cpu", "dtype": torch.float64},
    "GRUCell": {"bias": False, "device": "cpu", "dtype": torch.float64},
    "RNNCell": {"bias": False, "nonlinearity": "relu", "device": "cpu", "dtype": torch.float64},
}  # fmt: skip


def public_attributes(module):
    hidden = {"_flat_weight_refs", "_flat_weights", "_parameters", "tape"}
    return {k: v for k, v in module.__dict__.items() if k not in hidden}


def assert_same_construction(ours, theirs):
    assert public_attributes(ours) == public_attributes(theirs)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, p), (other, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other and p.dtype == q.dtype and torch.equal(p, q), name


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("count", range(9))
def test_positional_arguments(name, count):
    assert_same_construction(*twins(name, 4, 5, *POSITIONAL[name][:count]))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_keyword_arguments(name):
    assert_same_construction(*twins(name, input_size=4, hidden_size=5, **KEYWORDS[name]))
    for key, value in KEYWORDS[name].items():
        with warnings.catch_warnings(action="ignore"):  # dropout with one layer
            assert_same_construction(*twins(name, 4, 5, **{key: value}))


@pytest.mark.parametrize("name", CELLS)
def test_cell_signatures(name):
    ours, theirs = (inspect.signature(kind) for kind in both(name))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_and_names_of_every_layer_and_direction(name):
    assert_same_construction(*twins(name, 4, 5, num_layers=3, bidirectional=True))


def test_default_dtype_is_obeyed():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert fused_rnn.LSTM(2, 3).weight_ih_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", LAYERS)
def test_tape_is_shown_and_kept(name):
    module = both(name)[0](4, 5, tape="recompute")
    assert module.tape == "recompute" and "tape='recompute'" in repr(module)
    assert copy.deepcopy(module).tape == "recompute"
    assert "tape" not in repr(both(name)[0](4, 5))


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_one_layer_warns_as_torch_does(name):
    seen = []
    for kind in both(name):
        with pytest.warns(UserWarning) as caught:
            kind(4, 5, dropout=0.5)
        seen.append(str(caught[0].message))
    assert seen[0] == seen[1]


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "three layers, both directions": {"num_layers": 3, "bidirectional": True},
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "batch first, both directions, no bias": {
        "batch_first": True, "bidirectional": True, "bias": False,
    },
    "two layers, both directions, batch first": {
        "num_layers": 2, "bidirectional": True, "batch_first": True,
    },
}  # fmt: skip


def input_for(module, steps, rows, dtype=torch.float64):
    """Random input: rows None for unbatched."""
    x = draw(*((steps,) if rows is None else (steps, rows)), module.input_size, dtype=dtype)
    return x.transpose(0, 1).contiguous() if module.batch_first and rows is not None else x


@flavours
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_results_and_gradients(flavour, options, with_hx):
    for dtype in DTYPES:
        ours, theirs = layer_twins(flavour, dtype, **options)
        args = (input_for(ours, 6, 3, dtype),)
        args += (states(ours, 3, dtype=dtype),) if with_hx else ()
        check_twins(ours, theirs, args, dtype)


@flavours
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unbatched(flavour, options):
    ours, theirs = layer_twins(flavour, torch.float32, **options)
    x = input_for(ours, 4, None, torch.float32)
    check_twins(ours, theirs, (x,), torch.float32)
    check_twins(ours, theirs, (x, states(ours, dtype=torch.float32)), torch.float32)


@flavours
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 3), (4, 0), (1, 0), (7, 1), (2, 5)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sizes_and_modes(flavour, steps, rows, training):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    ours, theirs = (m.train(training) for m in layer_twins(flavour, torch.float32, **options))
    args = (input_for(ours, steps, rows, torch.float32), states(ours, rows, dtype=torch.float32))
    check_twins(ours, theirs, args, torch.float32)


def strided(tensor):
    """The same values, no axis contiguous."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


@flavours
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed", "sliced"])
def test_non_contiguous_input_and_states(flavour, batch_first, layout):
    ours, theirs = layer_twins(flavour, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, hx = input_for(ours, 4, 3), states(ours, 3)
    change = {
        "strided": strided,
        "expanded": lambda t: t[..., :1, :].expand_as(t),
        "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        "sliced": lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1, 1, 1))[1:-1, 1:-1, 1:-1],
    }[layout]

    def arrange(x, hx):
        return change(x), tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)

    check_twins(ours, theirs, (x, hx), torch.float64, arrange)


@flavours
def test_sizes_around_the_vector_width(flavour):
    name, more = FLAVOURS[flavour]
    for inputs, hidden in ((1, 4), (3, 17), (33, 8), (16, 57)):
        ours, theirs = (rounded(m, torch.float32) for m in twins(name, inputs, hidden, **more))
        x = draw(5, 2, inputs, dtype=torch.float32)
        check_twins(ours, theirs, (x,), torch.float32)


@flavours
@pytest.mark.parametrize("tape", ["keep", "recompute"])
def test_tapes_give_the_same(flavour, tape):
    ours, theirs = layer_twins(flavour, torch.float32, num_layers=2, bidirectional=True)
    ours.tape = tape
    args = (input_for(ours, 5, 3, torch.float32), states(ours, 3, dtype=torch.float32))
    check_twins(ours, theirs, args, torch.float32)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad_of", ["input", "hx", "weight_hh_l0", "bias_hh_l0"])
def test_gradient_of_one_argument_alone(name, grad_of):
    grads = []
    for module in twins(name, *SIZES, dtype=torch.float64):
        module.requires_grad_(False)
        x, hx = draw(4, 3, 4), states(module, 3)
        leaf = {"input": x, "hx": hx[0] if name == "LSTM" else hx}.get(grad_of)
        leaf = getattr(module, grad_of) if leaf is None else leaf
        leaf.requires_grad_()
        module(x, hx)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", ["output", "states"])
def test_gradient_through_one_output_alone(name, which):
    grads = []
    for module in twins(name, *SIZES, num_layers=2, bidirectional=True, dtype=torch.float64):
        y, hn = module(draw(4, 3, 4))
        out = y if which == "output" else (hn[1] if name == "LSTM" else hn)
        grads.append(
            torch.autograd.grad(
                out.sin().sum(),
                list(module.parameters()),
                allow_unused=True,
                materialize_grads=True,
            )
        )
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", LAYERS)
def test_no_grad_and_inference_mode(name):
    ours, theirs = twins(name, *SIZES, num_layers=2, bidirectional=True)
    x = draw(4, 3, 4).float()
    expected = theirs(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = ours(x)
        assert not got[0].requires_grad
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_own_their_memory(name):
    module = twins(name, *SIZES)[0]
    x = draw(4, 3, 4).float()
    hx = states(module, 3)
    hx = tuple(h.float() for h in hx) if isinstance(hx, tuple) else hx.float()
    before = copy.deepcopy((x, hx))
    with torch.no_grad():
        y, _ = module(x, hx)
        again = module(x, hx)[0].clone()
        y.add_(1)
        torch.testing.assert_close(module(x, hx)[0], again, rtol=0, atol=0)
    torch.testing.assert_close((x, hx), before, rtol=0, atol=0)


# Dropout between layers draws the same numbers as torch.nn's.


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_what_torch_draws(name, batch_first, p):
    options = {"num_layers": 3, "dropout": p, "bidirectional": True, "batch_first": batch_first}
    found = []
    for module in twins(name, *SIZES, dtype=torch.float64, **options):
        x = input_for(module, 5, 3).requires_grad_()
        torch.manual_seed(7)
        found.append(results(module, x))
        found[-1]["random state"] = torch.get_rng_state()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_off_in_eval_and_can_be_changed(name):
    ours, theirs = twins(name, *SIZES, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = draw(5, 3, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours(x), ours(x), rtol=0, atol=0)
    for module in (ours, theirs):
        module.train().dropout = 0.0
    torch.testing.assert_close(ours(x), theirs(x))


# Cells.

CELL_FLAVOURS = {
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "tanh": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("flavour", CELL_FLAVOURS)
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
@pytest.mark.parametrize("batch", [(3,), (), (0,), (1,)], ids=["batched", "unbatched", "N0", "N1"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_cells(flavour, bias, batch, with_hx):
    name, more = CELL_FLAVOURS[flavour]
    for dtype in DTYPES:
        ours, theirs = (rounded(m, dtype) for m in twins(name, *SIZES, bias=bias, **more))
        args = (draw(*batch, 4, dtype=dtype),)
        if with_hx:
            hx = tuple(draw(*batch, 5, dtype=dtype, seed=s) for s in (5, 6))
            args += (hx if name == "LSTMCell" else hx[0],)
        check_twins(ours, theirs, args, dtype)


@pytest.mark.parametrize("flavour", CELL_FLAVOURS)
def test_cell_loop_equals_the_layer(flavour):
    name, more = CELL_FLAVOURS[flavour]
    cell = both(name)[0](*SIZES, dtype=torch.float64, **more)
    layer = both(name.removesuffix("Cell"))[0](*SIZES, dtype=torch.float64, **more)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    x, hx, outputs = draw(6, 3, 4), None, []
    for step in x:
        hx = cell(step, hx)
        outputs.append(hx[0] if name == "LSTMCell" else hx)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])


@pytest.mark.parametrize("name", CELLS)
def test_cells_non_contiguous(name):
    ours, theirs = twins(name, *SIZES, dtype=torch.float64)
    hx = draw(5, 3), draw(5, 3)

    def arrange(x, hx):
        return x.t(), tuple(h.t() for h in hx) if isinstance(hx, tuple) else hx.t()

    args = (draw(4, 3), hx if name == "LSTMCell" else hx[0])
    check_twins(ours, theirs, args, torch.float64, arrange)


# The promised error in 16 bits.


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_hidden_error_in_bfloat16(name):
    """At most 2.4e-4 (root mean square) between the states the layer carries and float64: it
    rounds only what it stores."""
    ours, theirs = (rounded(m, torch.bfloat16) for m in twins(name, 64, 64))
    x = draw(50, 8, 64, dtype=torch.bfloat16)
    exact = theirs(x)[0]
    got = ours.bfloat16()(x.bfloat16())[0]
    off = (got.double() - exact).square().mean().sqrt()
    rounding = (exact.bfloat16().double() - exact).square().mean().sqrt()
    assert off <= 1.1 * rounding + 2.4e-4


def test_every_combination_runs():
    """All constructor switches together, forward and backward, against torch.nn."""
    switches = itertools.product(LAYERS, (1, 2), *[(False, True)] * 3)
    for name, layers, bias, batch_first, bidirectional in switches:
        ours, theirs = twins(
            name, 3, 4, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional,
            dtype=torch.float64,
        )  # fmt: skip
        x = draw(3, 2, 3)
        torch.testing.assert_close(results(ours, x), results(theirs, x))

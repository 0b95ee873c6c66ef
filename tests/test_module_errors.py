"""What is refused, and in which words: torch.nn's own for its arguments, ours for our own."""

import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import CELLS, LAYERS, both, twins

STEPS, ROWS, INPUTS, HIDDEN = 5, 3, 4, 6


def raised(call):
    """(type, message) of what a call raises, or None."""
    try:
        with warnings.catch_warnings(action="ignore"):
            call()
    except Exception as error:
        return type(error), str(error)
    return None


def assert_same(call, module_pair, *args):
    """Both modules raise the same, and do raise."""
    ours, theirs = (raised(lambda m=m: call(m, *args)) for m in module_pair)
    assert theirs is not None
    assert ours == theirs


def test_raised_sees_what_is_not_raised():
    assert raised(lambda: None) is None


# Constructors.

BAD_ARGUMENTS = [
    {"input_size": 0}, {"input_size": -1}, {"input_size": 2.0}, {"input_size": "2"},
    {"input_size": None}, {"hidden_size": 0}, {"hidden_size": -3}, {"hidden_size": 3.0},
    {"hidden_size": torch.tensor(3)}, {"num_layers": 0}, {"num_layers": -1}, {"bias": 1},
    {"bias": "True"}, {"bias": None}, {"batch_first": 0}, {"batch_first": "False"},
    {"dropout": -0.1}, {"dropout": 1.1}, {"dropout": True}, {"dropout": "half"},
    {"dropout": None}, {"dropout": float("nan")}, {"proj_size": -1}, {"proj_size": 6},
    {"proj_size": 7}, {"proj_size": 0}, {"nonlinearity": "sigmoid"}, {"nonlinearity": None},
    {"dtype": torch.int64}, {"device": "nowhere"}, {"unknown": 1},]  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=str)
def test_bad_layer_arguments(name, bad):
    arguments = {"input_size": INPUTS, "hidden_size": HIDDEN, **bad}
    ours, theirs = (raised(lambda k=k: k(**arguments)) for k in both(name))
    assert ours == theirs
    if not (name == "LSTM" and bad == {"proj_size": 0}):
        assert theirs is not None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("args", [(), (1,), (4, 6, 1, True, False, 0.0, False, 0, None, None, 1)])
def test_wrong_number_of_layer_arguments(name, args):
    ours, theirs = (raised(lambda k=k: k(*args)) for k in both(name))
    assert theirs is not None and ours == theirs


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    "bad",
    [{"input_size": -1}, {"hidden_size": -1}, {"input_size": 2.0}, {"hidden_size": "3"},
     {"dtype": torch.int64}, {"device": "nowhere"}, {"unknown": 1}, {"nonlinearity": 3}],
    ids=str,
)  # fmt: skip
def test_bad_cell_arguments(name, bad):
    arguments = {"input_size": INPUTS, "hidden_size": HIDDEN, **bad}
    ours, theirs = (raised(lambda k=k: k(**arguments)) for k in both(name))
    assert ours == theirs


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tape", ["forget", None, 1])
def test_bad_tape(name, tape):
    with pytest.raises(ValueError, match=r"tape must be one of \('keep', 'recompute'\), got"):
        both(name)[0](INPUTS, HIDDEN, tape=tape)


# Inputs of layers.

LAYER_OPTIONS = {
    "one": {},
    "batch first, both directions, two layers": {
        "batch_first": True, "bidirectional": True, "num_layers": 2,
    },
}  # fmt: skip
options = pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)

BAD_INPUTS = {
    "0-D": lambda: torch.randn(()),
    "1-D": lambda: torch.randn(INPUTS),
    "4-D": lambda: torch.randn(1, STEPS, ROWS, INPUTS),
    "input size": lambda: torch.randn(STEPS, ROWS, INPUTS + 1),
    "input size, unbatched": lambda: torch.randn(STEPS, INPUTS + 1),
    "float64": lambda: torch.randn(STEPS, ROWS, INPUTS).double(),
    "bfloat16": lambda: torch.randn(STEPS, ROWS, INPUTS).bfloat16(),
    "int64": lambda: torch.ones(STEPS, ROWS, INPUTS, dtype=torch.int64),
    "int64 and input size": lambda: torch.ones(STEPS, ROWS, INPUTS + 1, dtype=torch.int64),
    "complex": lambda: torch.ones(STEPS, ROWS, INPUTS, dtype=torch.complex64),
    "no features": lambda: torch.randn(STEPS, ROWS, 0),
    "list": lambda: [[[0.0] * INPUTS] * ROWS] * STEPS,
    "None": lambda: None,
}


@pytest.mark.parametrize("name", LAYERS)
@options
@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bad_layer_input(name, options, bad, training):
    pair = [m.train(training) for m in twins(name, INPUTS, HIDDEN, **options)]
    assert_same(lambda m: m(BAD_INPUTS[bad]()), pair)


@pytest.mark.parametrize("name", LAYERS)
@options
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_no_steps(name, options, unbatched):
    shape = [ROWS, 0, INPUTS] if options.get("batch_first") else [0, ROWS, INPUTS]
    x = torch.randn([0, INPUTS] if unbatched else shape)
    assert_same(lambda m: m(x), twins(name, INPUTS, HIDDEN, **options))


BAD_STATES = {
    "one dimension too few": lambda *shape: torch.randn(shape[1:]),
    "one dimension too many": lambda *shape: torch.randn(1, *shape),
    "layers": lambda n, *rest: torch.randn(n + 1, *rest),
    "rows": lambda *shape: torch.randn(*shape[:-2], shape[-2] + 1, shape[-1]),
    "units": lambda *shape: torch.randn(*shape[:-1], shape[-1] + 1),
    "empty": lambda *shape: torch.randn(*shape[:-1], 0),
}


@pytest.mark.parametrize("name", [*LAYERS, "projected LSTM"])
@options
@pytest.mark.parametrize("bad", BAD_STATES)
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_bad_states(name, options, bad, unbatched):
    more = {"proj_size": 2} if name == "projected LSTM" else {}
    name = name.removeprefix("projected ")
    pair = twins(name, INPUTS, HIDDEN, **options, **more)
    count = 4 if options else 1
    shape = [count, HIDDEN] if unbatched else [count, ROWS, HIDDEN]
    h_shape = [*shape[:-1], 2] if more else shape
    lead = [STEPS] if unbatched else [ROWS, STEPS] if options else [STEPS, ROWS]
    x = torch.randn(*lead, INPUTS)
    wrong = BAD_STATES[bad]
    if name != "LSTM":
        assert_same(lambda m: m(x, wrong(*shape)), pair)
        return
    good_h, good_c = torch.randn(h_shape), torch.randn(shape)
    assert_same(lambda m: m(x, (wrong(*h_shape), good_c)), pair)
    assert_same(lambda m: m(x, (good_h, wrong(*shape))), pair)
    assert_same(lambda m: m(x, (wrong(*h_shape), wrong(*shape))), pair)


def assert_packed_is_checked(name, packed, hx=None):
    """As torch.nn's own check says it, which its LSTM does not call for a PackedSequence (and
    reads out of bounds)."""
    ours, theirs = twins(name, INPUTS, HIDDEN)
    zeros = torch.zeros(1, ROWS, HIDDEN)
    hidden = ((zeros, zeros) if name == "LSTM" else zeros) if hx is None else hx
    expected = raised(lambda: theirs.check_forward_args(packed.data, hidden, packed.batch_sizes))
    assert expected is not None
    assert raised(lambda: ours(packed, hx)) == expected
    if name != "LSTM":
        assert raised(lambda: theirs(packed, hx)) == expected


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", list(BAD_STATES)[2:])
def test_bad_states_with_packed_input(name, bad):
    packed = pack_padded_sequence(torch.randn(STEPS, ROWS, INPUTS), [5, 3, 2])
    wrong, good = BAD_STATES[bad](1, ROWS, HIDDEN), torch.randn(1, ROWS, HIDDEN)
    for hx in [(wrong, good), (good, wrong)] if name == "LSTM" else [wrong]:
        assert_packed_is_checked(name, packed, hx)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bad", ["input size", "dtype", "3-D data"])
def test_bad_packed_input(name, bad):
    x = torch.randn(STEPS, ROWS, INPUTS + (bad == "input size"))
    packed = pack_padded_sequence(x.double() if bad == "dtype" else x, [5, 3, 2])
    if bad == "3-D data":
        packed = PackedSequence(packed.data.unsqueeze(1), packed.batch_sizes)
    assert_packed_is_checked(name, packed)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", ["input", "hx", "weights"])
def test_mixed_devices(name, which):
    pair = [m.to("meta" if which == "weights" else "cpu") for m in twins(name, INPUTS, HIDDEN)]
    x = torch.randn(STEPS, ROWS, INPUTS, device="meta" if which == "input" else "cpu")
    state = torch.randn(1, ROWS, HIDDEN, device="meta" if which == "hx" else "cpu")
    hx = (state, state) if name == "LSTM" else state
    ours, theirs = (raised(lambda m=m: m(x, hx)) for m in pair)
    assert ours is not None and ours[0] is RuntimeError
    assert "are not at the same device" in ours[1]
    if theirs is not None and "are not at the same device" in theirs[1]:
        assert ours == theirs


@pytest.mark.parametrize("name", LAYERS)
def test_states_in_another_dtype(name):
    """torch.nn's words for it depend on the path taken; ours name the argument."""
    for module in twins(name, INPUTS, HIDDEN):
        state = torch.randn(1, ROWS, HIDDEN).double()
        hx = (state, state) if name == "LSTM" else state
        found = raised(lambda m=module, hx=hx: m(torch.randn(STEPS, ROWS, INPUTS), hx))
        assert found is not None and issubclass(found[0], (RuntimeError, ValueError))
    ours = twins(name, INPUTS, HIDDEN)[0]
    with pytest.raises(RuntimeError, match="hx is torch.float64, weights are torch.float32"):
        ours(torch.randn(STEPS, ROWS, INPUTS), hx)


def test_wrong_number_of_states():
    lstm, state = both("LSTM")[0](INPUTS, HIDDEN), torch.randn(1, ROWS, HIDDEN)
    x = torch.randn(STEPS, ROWS, INPUTS)
    for hx in ((state,), (state, state, state), [], state):
        with pytest.raises(ValueError, match=r"hx must be a pair \(h0, c0\), got \d values?"):
            lstm(x, hx)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_pair_of_states_where_one_is_wanted(name):
    state = torch.randn(1, ROWS, HIDDEN)
    pair = twins(name, INPUTS, HIDDEN)
    assert_same(lambda m: m(torch.randn(STEPS, ROWS, INPUTS), (state, state)), pair)


# Inputs of cells.

BAD_CELL_INPUTS = {
    "0-D": lambda: torch.randn(()),
    "3-D": lambda: torch.randn(1, ROWS, INPUTS),
    "input size": lambda: torch.randn(ROWS, INPUTS + 1),
    "input size, unbatched": lambda: torch.randn(INPUTS + 1),
    "list": lambda: [0.0] * INPUTS,
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bad", BAD_CELL_INPUTS)
def test_bad_cell_input(name, bad):
    assert_same(lambda m: m(BAD_CELL_INPUTS[bad]()), twins(name, INPUTS, HIDDEN))


BAD_CELL_STATES = {
    "0-D": lambda: torch.randn(()),
    "3-D": lambda: torch.randn(1, ROWS, HIDDEN),
    "rows": lambda: torch.randn(ROWS + 2, HIDDEN),
    "units": lambda: torch.randn(ROWS, HIDDEN + 1),
    "one row": lambda: torch.randn(1, HIDDEN),
    "one unit": lambda: torch.randn(ROWS, 1),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bad", BAD_CELL_STATES)
def test_bad_cell_states(name, bad):
    pair, x = twins(name, INPUTS, HIDDEN), torch.randn(ROWS, INPUTS)
    wrong, good = BAD_CELL_STATES[bad](), torch.randn(ROWS, HIDDEN)
    if name != "LSTMCell":
        assert_same(lambda m: m(x, wrong), pair)
    else:
        assert_same(lambda m: m(x, (wrong, good)), pair)
        assert_same(lambda m: m(x, (good, wrong)), pair)


@pytest.mark.parametrize("name", CELLS)
def test_unbatched_cell_with_wrong_states(name):
    pair, x = twins(name, INPUTS, HIDDEN), torch.randn(INPUTS)
    for shape in ((HIDDEN + 1,), (2, HIDDEN)):
        state = torch.randn(shape)
        hx = (state, state) if name == "LSTMCell" else state
        ours, theirs = (raised(lambda m=m, hx=hx: m(x, hx)) for m in pair)
        assert theirs is not None and ours is not None and ours[0] is theirs[0]


def test_nonlinearity_of_a_cell_is_looked_at_when_it_runs():
    pair = twins("RNNCell", INPUTS, HIDDEN, nonlinearity="sigmoid")
    assert_same(lambda m: m(torch.randn(ROWS, INPUTS)), pair)


@pytest.mark.parametrize("name", CELLS)
def test_cell_dtypes(name):
    for module in twins(name, INPUTS, HIDDEN):
        with pytest.raises(RuntimeError):
            module(torch.randn(ROWS, INPUTS).double())


# Our own arguments: the argument, what was got, what it wants.

X = torch.randn(STEPS, ROWS, INPUTS)
OWN = [
    ({"lengths": [1, 2, 3]}, TypeError, r"lengths must be an integer tensor \[B\], got list"),
    ({"lengths": torch.ones(3)}, TypeError, "lengths must have an integer dtype, got torch.float"),
    ({"lengths": torch.ones(3).bool()}, TypeError, "integer dtype, got torch.bool"),
    ({"lengths": torch.ones(2).long()}, ValueError, r"shape \[B\] = \[3\], got \[2\]"),
    ({"lengths": torch.ones(3, 1).long()}, ValueError, r"= \[3\], got \[3, 1\]"),
    ({"lengths": torch.tensor(3)}, ValueError, r"= \[3\], got \[\]"),
    ({"lengths": torch.tensor([0, -1, 5])}, ValueError, "between 0 and T = 5, got -1 to 5"),
    ({"lengths": torch.tensor([0, 6, 5])}, ValueError, "between 0 and T = 5, got 0 to 6"),
    ({"reset": [[False]]}, TypeError, r"reset must be a bool tensor \[T, B\], got list"),
    ({"reset": torch.zeros(5, 3)}, TypeError, "dtype torch.bool, got torch.float32; use reset"),
    ({"reset": torch.zeros(3, 5).bool()}, ValueError, r"\[T, B\] = \[5, 3\], got \[3, 5\]"),
    ({"reset": torch.zeros(5).bool()}, ValueError, r"\[T, B\] = \[5, 3\], got \[5\]"),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("arguments", "kind", "message"), OWN, ids=range(len(OWN)))
def test_bad_lengths_and_reset(name, arguments, kind, message):
    with pytest.raises(kind, match=message):
        both(name)[0](INPUTS, HIDDEN)(X, **arguments)


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_are_named(name):
    module = both(name)[0](INPUTS, HIDDEN, batch_first=True)
    with pytest.raises(
        ValueError, match=r"reset must have shape \[B, T\] = \[5, 3\], got \[3, 5\]"
    ):
        module(X, reset=torch.zeros(3, 5).bool())
    with pytest.raises(ValueError, match=r"lengths must have shape \[B\] = \[5\], got \[3\]"):
        module(X, lengths=torch.ones(3).long())
    packed = pack_padded_sequence(X, [5, 3, 2])
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        module(packed, lengths=torch.tensor([5, 3, 2]))
    with pytest.raises(
        ValueError, match=r"reset must have shape \[B, T\] = \[3, 5\], got \[5, 3\]"
    ):
        module(packed, reset=torch.zeros(5, 3).bool())


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_only_the_lstm_returns_cells(name):
    with pytest.raises(TypeError, match="return_cells"):
        both(name)[0](INPUTS, HIDDEN)(X, return_cells=True)


@pytest.mark.parametrize("name", LAYERS)
def test_own_arguments_are_keyword_only(name):
    with pytest.raises(TypeError, match="positional"):
        both(name)[0](INPUTS, HIDDEN)(X, None, torch.ones(3).long())


def test_unknown_dtype():
    lstm = both("LSTM")[0](INPUTS, HIDDEN).to(torch.complex64)
    with pytest.raises(RuntimeError, match="complex64 is not one of"):
        lstm(X.to(torch.complex64))

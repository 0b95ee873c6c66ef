"""The public functions: what they take, what they refuse, and the words they refuse it with."""

import pytest
import torch

import fused_rnn

T, B, I, H = 5, 3, 4, 6


def arguments(cell="lstm", stack=None):
    g = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
    lead = () if stack is None else (stack,)
    hx = torch.randn(*lead, B, H)
    return {
        "input": torch.randn(T, B, I),
        "hx": (hx, torch.randn(*lead, B, H)) if cell == "lstm" else hx,
        "w_ih": torch.randn(*lead, g * H, I),
        "w_hh": torch.randn(*lead, g * H, H),
        "b_ih": torch.randn(*lead, g * H),
        "b_hh": torch.randn(*lead, g * H),
    }


def call(cell, given):
    return getattr(fused_rnn, cell)(**given)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_single_and_stacked(cell):
    """A stack of one is the single layer; a stack is its entries one by one."""
    given = arguments(cell, stack=3)
    y, state = call(cell, given | {"reverse": [False, True, False]})
    states = state if cell == "lstm" else (state,)
    for s, reverse in enumerate((False, True, False)):
        one = {k: v[s] if k[0] in "wb" else v for k, v in given.items()}
        one["hx"] = tuple(h[s] for h in given["hx"]) if cell == "lstm" else given["hx"][s]
        y_one, state_one = call(cell, one | {"reverse": reverse})
        assert torch.equal(y[:, :, s], y_one)
        for ours, theirs in zip(states, state_one if cell == "lstm" else (state_one,), strict=True):
            assert torch.equal(ours[s], theirs)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_projected_input_and_batch_first(cell):
    given = arguments(cell)
    y, _ = call(cell, given)
    first, _ = call(cell, given | {"input": given["input"].transpose(0, 1), "batch_first": True})
    assert torch.equal(first.transpose(0, 1), y)
    projected = torch.nn.functional.linear(given["input"], given["w_ih"])
    alone, _ = call(cell, given | {"input": projected, "w_ih": None})
    torch.testing.assert_close(alone, y)


def test_default_state_is_zero():
    given = arguments()
    zeros = torch.zeros(B, H)
    assert torch.equal(
        fused_rnn.lstm(**given | {"hx": None})[0],
        fused_rnn.lstm(**given | {"hx": (zeros, zeros)})[0],
    )


BAD = [
    ({"input": torch.randn(T, B)}, ValueError, r"input must have shape \[T, B, I\], got \[5, 3\]"),
    ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    ({"input": torch.randn(0, B, I)}, RuntimeError, "sequence length to be larger than 0"),
    ({"input": torch.randn(T, B, I).double()}, RuntimeError, "input is torch.float64, weights are"),
    ({"input": torch.randn(T, B, I, device="meta")}, RuntimeError, "not at the same device"),
    ({"w_ih": torch.randn(24, 3)}, ValueError, r"w_ih must have shape \[4\*H, I\] = \[24, 4\]"),
    ({"w_ih": 3}, TypeError, "w_ih must be a tensor, got int"),
    ({"w_hh": torch.randn(24)}, ValueError, r"w_hh must have shape"),
    ({"w_hh": torch.randn(24, 5)}, ValueError, r"w_hh must have shape \[4\*H, H\]"),
    ({"w_hh": torch.randn(23, 6)}, ValueError, r"w_hh must have shape"),
    ({"w_hh": torch.randn(24, 6).int()}, ValueError, "w_hh must be one of .* got torch.int32"),
    ({"b_ih": torch.randn(23)}, ValueError, r"b_ih must have shape \[4\*H\] = \[24\], got \[23\]"),
    ({"b_hh": torch.randn(1, 24)}, ValueError, r"b_hh must have shape"),
    ({"w_hr": torch.randn(6, 5)}, ValueError, r"w_hr must have shape \[P, H\] = \[6, 6\]"),
    ({"hx": torch.randn(3)}, ValueError, r"hx must be a pair"),
    ({"hx": (torch.randn(B, H), 3)}, TypeError, "c0 must be a tensor, got int"),
    ({"hx": (torch.randn(2, H), torch.randn(B, H))}, ValueError, r"h0 must have shape \[B, P\]"),
    ({"lengths": [1, 2, 3]}, TypeError, "lengths must be an integer tensor .*, got list"),
    (
        {"lengths": torch.ones(B)},
        TypeError,
        "lengths must have an integer dtype, got torch.float32",
    ),
    ({"lengths": torch.ones(B).bool()}, TypeError, "lengths must have an integer dtype"),
    ({"lengths": torch.ones(2).long()}, ValueError, r"lengths must have shape \[B\] = \[3\]"),
    ({"lengths": torch.tensor([1, 6, 2])}, ValueError, "between 0 and T = 5, got 1 to 6"),
    ({"lengths": torch.tensor([1, -1, 2])}, ValueError, "between 0 and T = 5, got -1 to 2"),
    (
        {"reset": torch.zeros(T, B)},
        TypeError,
        "reset must have dtype torch.bool, got torch.float32",
    ),
    ({"reset": [[True]]}, TypeError, "reset must be a bool tensor .*, got list"),
    ({"reset": torch.zeros(B, T).bool()}, ValueError, r"\[T, B\] = \[5, 3\], got \[3, 5\]"),
    ({"reverse": (True, False)}, ValueError, "reverse must be a bool or 1 bools"),
    ({"tape": "none"}, ValueError, "tape must be one of .* got 'none'"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of .* got 'cudnn'"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), BAD, ids=[w for _, _, w in BAD])
def test_bad_input(wrong, kind, words):
    with pytest.raises(kind, match=words):
        fused_rnn.lstm(**arguments() | wrong)


def test_bad_options_of_the_others():
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        fused_rnn.rnn(**arguments("rnn"), nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"w_hh must have shape \[3\*H, H\]"):
        fused_rnn.gru(**arguments("lstm") | {"hx": None, "w_hh": torch.randn(24, 6)})


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("which", ["b_ih", "b_hh"])
def test_one_bias_alone(name, which):
    """Is as good as the other being zero, with gradients and without."""
    torch.manual_seed(0)
    width = {"lstm": 4, "gru": 3, "rnn": 1}[name] * 5
    x, w_ih, w_hh = torch.randn(4, 2, 3), torch.randn(width, 3), torch.randn(width, 5)
    bias = torch.randn(width, requires_grad=True)
    layer = getattr(fused_rnn, name)
    other = "b_hh" if which == "b_ih" else "b_ih"
    one = layer(x, None, w_ih, w_hh, **{which: bias})[0]
    both = layer(x, None, w_ih, w_hh, **{which: bias, other: torch.zeros(width)})[0]
    assert torch.equal(one, both)
    found, expected = (torch.autograd.grad(y.sum(), bias)[0] for y in (one, both))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(layer(x, None, w_ih, w_hh, **{which: bias})[0], both)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_inputs_in_any_layout(cell, backend, device):
    """Features that lie across, rows cut from wider ones, negative views: the bits of contiguous
    ones, forward and backward."""
    torch.manual_seed(0)
    gates = fused_rnn.ops.GATES[cell]
    w_ih, w_hh = torch.randn(gates * 4, 5, device=device), torch.randn(gates * 4, 4, device=device)
    layouts = {
        "features across": torch.randn(2, 5, 3, device=device).permute(2, 0, 1),
        "steps last": torch.randn(5, 3, 2, device=device).permute(1, 2, 0),
        "cut": torch.randn(3, 2, 8, device=device)[..., 2:7],
        "negative": torch.randn(3, 2, 5, dtype=torch.complex64, device=device).conj().imag,
    }
    for name, x in layouts.items():
        found = []
        for each in (x, x.resolve_neg().contiguous()):
            leaf, w = each.detach().requires_grad_(), w_ih.clone().requires_grad_()
            y = getattr(fused_rnn, cell)(leaf, None, w, w_hh, backend=backend)[0]
            found.append((y, *torch.autograd.grad(y.sum(), (leaf, w))))
        for ours, plain in zip(*found, strict=True):
            if backend == "reference":
                torch.testing.assert_close(ours, plain)
            else:
                assert torch.equal(ours, plain), name

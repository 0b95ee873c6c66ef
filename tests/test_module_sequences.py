"""lengths, reset and return_cells on the modules, in every layout, against torch.nn run row by row
and segment by segment."""

import pytest
import torch
from torch import Tensor
from twins import LAYERS, SIZES, both, draw, flavours, layer_twins, states, tensors_of, twins

STEPS, ROWS = 7, 5
LENGTHS = torch.tensor([7, 0, 3, 1, 5])
LAYOUTS = {
    "one": {},
    "both directions": {"bidirectional": True},
    "batch first, two layers": {"batch_first": True, "num_layers": 2},
    "batch first, both directions, three layers": {
        "batch_first": True, "bidirectional": True, "num_layers": 3,
    },
}  # fmt: skip
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
hxs = pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])


def reset_mask(seed=0, steps=STEPS, rows=ROWS):
    """bool [T, B]; row 0 has none, row 1 one at its first step."""
    mask = torch.rand(steps, rows, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[:, 0] = False
    mask[0, 1:2] = True
    return mask


def each(hx, f):
    return tuple(map(f, hx)) if isinstance(hx, tuple) else f(hx)


def stacked(parts):
    """Row results [L*D, size], single or in pairs, as [L*D, B, size]."""
    if isinstance(parts[0], tuple):
        return tuple(torch.stack(p, 1) for p in zip(*parts, strict=True))
    return torch.stack(parts, 1)


def single_layers(theirs):
    """torch.nn's layers of one layer and one direction each, sharing the module's weights:
    [layer][direction]."""
    found = []
    for layer in range(theirs.num_layers):
        found.append([])
        for suffix in ("", "_reverse")[: 2 if theirs.bidirectional else 1]:
            size = theirs.input_size if layer == 0 else (
                (theirs.proj_size or theirs.hidden_size) * (2 if theirs.bidirectional else 1)
            )  # fmt: skip
            more = {"proj_size": theirs.proj_size} if theirs.mode == "LSTM" else {}
            more |= {"nonlinearity": theirs.nonlinearity} if "RNN" in theirs.mode else {}
            one = type(theirs)(size, theirs.hidden_size, dtype=torch.float64, **more)
            for name in list(one._flat_weights_names):
                weight = getattr(theirs, name.replace("_l0", f"_l{layer}") + suffix)
                one._parameters[name] = weight
            found[-1].append(one)
    return found


def by_segments(theirs, x: Tensor, hx, length: int, reset: Tensor):
    """One row [T, I] with hx [L*D, size] by torch.nn on each segment: y [T, D*P] zero from
    ``length`` on, and the final states [L*D, size]."""
    directions = single_layers(theirs)
    starts = sorted({0, *(t for t in range(length) if reset[t])})
    bounds = list(zip(starts, [*starts[1:], length], strict=True)) if length else []
    finals, index = [], 0
    for layer in directions:
        outputs = []
        for backward, one in enumerate(layer):
            h0 = each(hx, lambda h, k=index: h[k : k + 1])
            index += 1
            pieces: list[Tensor | None] = [None] * len(bounds)
            state = h0
            order = range(len(bounds))
            for n in reversed(order) if backward else order:
                start, end = bounds[n]
                # Forward, a mark at the start clears the state; backward, what leaves a marked
                # step does not reach the step before.
                cleared = reset[start] if not backward else n < len(bounds) - 1
                state = each(state, torch.zeros_like) if cleared else state
                piece = x[start:end].flip(0) if backward else x[start:end]
                y, state = one(piece, state)
                pieces[n] = y.flip(0) if backward else y
            size = theirs.proj_size or theirs.hidden_size
            rest = x.new_zeros(len(x) - length, size)
            outputs.append(torch.cat([*pieces, rest]))
            finals.append(each(state, lambda h: h[0]))
        x = torch.cat(outputs, 1)
    if isinstance(finals[0], tuple):
        return x, tuple(torch.stack(f) for f in zip(*finals, strict=True))
    return x, torch.stack(finals)


def expected_of(theirs, x, hx, lengths, reset):
    """The whole batch x [T, B, I] row by row: y [T, B, D*P], states [L*D, B, size]."""
    rows = [
        by_segments(theirs, x[:, b], each(hx, lambda h, b=b: h[:, b]), int(lengths[b]), reset[:, b])
        for b in range(x.shape[1])
    ]
    return torch.stack([y for y, _ in rows], 1), stacked([s for _, s in rows])


def assert_equal_with_gradients(ours, theirs, x, hx, call, lengths, reset):
    """Outputs and every gradient of our one call against torch.nn's many."""
    found = []
    for module, run in ((ours, call), (theirs, expected_of)):
        leaf = x.clone().requires_grad_()
        state = each(hx, lambda h: h.clone().requires_grad_())
        arguments = (leaf, state) if run is call else (module, leaf, state, lengths, reset)
        outputs = tensors_of(run(*arguments))
        generator = torch.Generator().manual_seed(9)
        total = sum(
            (o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs
        )
        inputs = [leaf, *tensors_of(state), *module.parameters()]
        found.append((outputs, torch.autograd.grad(total, inputs, materialize_grads=True)))
    torch.testing.assert_close(*found)


@flavours
@layouts
@pytest.mark.parametrize("which", ["lengths", "reset", "both"])
@hxs
def test_against_torch_row_by_row(flavour, layout, which, with_hx):
    ours, theirs = layer_twins(flavour, **layout)
    x, hx = draw(STEPS, ROWS, 4), states(ours, ROWS)
    if not with_hx:
        hx = each(hx, torch.zeros_like)
    lengths = LENGTHS if which != "reset" else torch.full((ROWS,), STEPS)
    reset = reset_mask() if which != "lengths" else torch.zeros(STEPS, ROWS, dtype=torch.bool)
    first = ours.batch_first
    options = {}
    if which != "reset":
        options["lengths"] = lengths
    if which != "lengths":
        options["reset"] = reset.t() if first else reset

    def call(x, hx):
        y, hn = ours(x.transpose(0, 1) if first else x, hx if with_hx else None, **options)
        return y.transpose(0, 1) if first else y, hn

    if with_hx:
        assert_equal_with_gradients(ours, theirs, x, hx, call, lengths, reset)
    else:
        got = tensors_of(call(x, hx))
        expected = tensors_of(expected_of(theirs, x, hx, lengths, reset))
        torch.testing.assert_close(got, expected)


@flavours
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(flavour, batch_first):
    ours, theirs = layer_twins(flavour, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, hx, reset = draw(STEPS, 4), states(ours), reset_mask()[:, 2]
    for length in (0, 1, 5, STEPS):
        got = ours(x, hx, lengths=torch.tensor(length), reset=reset)
        torch.testing.assert_close(got, by_segments(theirs, x, hx, length, reset))


@flavours
def test_lengths_of_every_integer_dtype(flavour):
    ours, _ = layer_twins(flavour, bidirectional=True)
    x = draw(STEPS, ROWS, 4)
    expected = ours(x, lengths=LENGTHS)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        got = ours(x, lengths=LENGTHS.to(dtype))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@flavours
@layouts
def test_full_lengths_and_no_reset_change_nothing(flavour, layout):
    ours, theirs = layer_twins(flavour, **layout)
    x, hx = draw(STEPS, STEPS, 4), states(ours, STEPS)
    full, none = torch.full((STEPS,), STEPS), torch.zeros(STEPS, STEPS, dtype=torch.bool)
    got = ours(x, hx, lengths=full, reset=none)
    torch.testing.assert_close(got, theirs(x, hx))


@flavours
def test_zero_lengths_return_the_initial_states(flavour):
    ours, _ = layer_twins(flavour, num_layers=2, bidirectional=True)
    x, hx = draw(STEPS, ROWS, 4), states(ours, ROWS)
    y, hn = ours(x, hx, lengths=torch.zeros(ROWS, dtype=torch.int64))
    assert y.abs().max() == 0
    torch.testing.assert_close(hn, hx, rtol=0, atol=0)


@flavours
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("tape", ["keep", "recompute"])
def test_padding_is_never_read(flavour, poison, tape):
    """Whatever lies behind a row's end reaches no output and no gradient."""
    ours, _ = layer_twins(flavour, num_layers=2, bidirectional=True)
    ours.tape = tape
    clean = draw(STEPS, ROWS, 4)
    found = []
    for filling in (0.0, poison):
        behind = torch.arange(STEPS).unsqueeze(1) >= LENGTHS
        x = clean.masked_fill(behind.unsqueeze(-1), filling).requires_grad_()
        y, hn = ours(x, lengths=LENGTHS)
        leaves = [x, *ours.parameters()]
        total = y.square().sum() + sum(h.sum() for h in tensors_of(hn))
        found.append((y, hn, torch.autograd.grad(total, leaves)))
    assert found[1][2][0].masked_select(behind.unsqueeze(-1)).abs().max() == 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


@flavours
def test_reset_everywhere_makes_single_steps(flavour):
    ours, theirs = layer_twins(flavour)
    x, hx = draw(STEPS, ROWS, 4), states(ours, ROWS)
    got, _ = ours(x, hx, reset=torch.ones(STEPS, ROWS, dtype=torch.bool))
    expected, _ = theirs(x.reshape(1, STEPS * ROWS, 4))
    torch.testing.assert_close(got, expected.view_as(got))


# All cell states.


@layouts
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("batch", [(ROWS,), ()], ids=["batched", "unbatched"])
def test_return_cells(layout, proj_size, batch):
    """c_t by torch.nn run to every t; its last step is c_n; the other results stay the same."""
    ours, theirs = twins("LSTM", *SIZES, dtype=torch.float64, proj_size=proj_size, **layout)
    x, hx = draw(STEPS, *batch, 4), states(ours, *batch)
    swap = ours.batch_first and bool(batch)
    y, (h_n, c_n), cells = ours(x.transpose(0, 1) if swap else x, hx, return_cells=True)
    torch.testing.assert_close((y, (h_n, c_n)), theirs(x.transpose(0, 1) if swap else x, hx))
    directions = 2 if ours.bidirectional else 1
    assert isinstance(cells, tuple) and len(cells) == ours.num_layers
    for layer, c in enumerate(cells):
        assert c.shape == (*y.shape[:-1], directions * 5) and c.dtype == y.dtype
        c = c.transpose(0, 1) if swap else c
        ends = [c[-1, ..., :5], c[0, ..., 5:]][:directions]
        for d, end in enumerate(ends):
            torch.testing.assert_close(end, c_n[layer * directions + d], rtol=0, atol=0)
    forward = ours.num_layers == 1 and directions == 1
    for t in range(STEPS if forward else 0):
        _, (_, c_t) = theirs(x[: t + 1], hx)
        torch.testing.assert_close(cells[0][t], c_t[0])


def test_cells_with_lengths_and_reset():
    ours, theirs = twins("LSTM", *SIZES, dtype=torch.float64)
    x, reset = draw(STEPS, ROWS, 4), reset_mask()
    _, (_, c_n), (cells,) = ours(x, lengths=LENGTHS, reset=reset, return_cells=True)
    for b, length in enumerate(LENGTHS):
        assert cells[length:, b].abs().sum() == 0
        if length:
            torch.testing.assert_close(cells[length - 1, b], c_n[0, b], rtol=0, atol=0)
    single = twins("LSTM", *SIZES, dtype=torch.float64)[1]
    for b, length in enumerate(LENGTHS.tolist()):
        zero = torch.zeros(1, 5, dtype=torch.float64)
        for t in range(length):
            _, (_, c_t) = by_segments(single, x[: t + 1, b], (zero, zero), t + 1, reset[:, b])
            torch.testing.assert_close(cells[t, b], c_t[0])


def test_gradients_of_cells():
    """sum of c_t is what a loop of torch.nn's cells gives, with every gradient."""
    ours, theirs = twins("LSTM", *SIZES, dtype=torch.float64)
    cell = torch.nn.LSTMCell(*SIZES, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        cell._parameters[name] = getattr(theirs, f"{name}_l0")
    found = []
    for module in (ours, theirs):
        x = draw(STEPS, ROWS, 4).requires_grad_()
        hx = tuple(h.requires_grad_() for h in states(module, ROWS))
        if module is ours:
            cells = ours(x, hx, return_cells=True)[2][0]
        else:
            h, c, collected = hx[0][0], hx[1][0], []
            for step in x:
                h, c = cell(step, (h, c))
                collected.append(c)
            cells = torch.stack(collected)
        leaves = [x, *hx, *module.parameters()]
        found.append((cells, torch.autograd.grad(cells.sin().sum(), leaves)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_two_calls_continue_one(name):
    """h_n of the first half as hx of the second is the whole, with resets and lengths."""
    module = both(name)[0](*SIZES, 2, dtype=torch.float64)
    x, reset = draw(STEPS, ROWS, 4), reset_mask()
    whole, hn = module(x, reset=reset, lengths=LENGTHS)
    a, half = module(x[:3], reset=reset[:3], lengths=LENGTHS.clamp(max=3))
    b, end = module(x[3:], half, reset=reset[3:], lengths=(LENGTHS - 3).clamp(min=0))
    torch.testing.assert_close((torch.cat((a, b)), end), (whole, hn))

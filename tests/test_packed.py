"""PackedSequence in and out against torch.nn's, and against lengths= on the padded input."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from twins import (
    LAYERS,
    SIZES,
    both,
    check_twins,
    draw,
    flavours,
    layer_twins,
    results,
    states,
    tensors_of,
    twins,
)

STEPS, ROWS = 6, 4
LENGTHS = {"sorted": [6, 4, 4, 1], "unsorted": [4, 1, 6, 4], "full": [6, 6, 6, 6]}
OPTIONS = {
    "one": {},
    "both directions": {"bidirectional": True},
    "batch first, both directions, two layers": {
        "batch_first": True, "bidirectional": True, "num_layers": 2, "bias": False,
    },
}  # fmt: skip
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
orders = pytest.mark.parametrize("order", LENGTHS)


def pack(x, order):
    return pack_padded_sequence(x, LENGTHS[order], enforce_sorted=order != "unsorted")


def permuted(hx, f):
    return tuple(map(f, hx)) if isinstance(hx, tuple) else f(hx)


@flavours
@options
@orders
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_against_torch(flavour, options, order, with_hx):
    for dtype in (torch.float32, torch.float64):
        ours, theirs = layer_twins(flavour, dtype, **options)
        packed = pack(draw(STEPS, ROWS, 4, dtype=dtype), order)
        args = (packed, states(ours, ROWS, dtype=dtype)) if with_hx else (packed,)
        check_twins(ours, theirs, args, dtype)


@pytest.mark.parametrize("name", LAYERS)
@orders
def test_indices_are_the_inputs(name, order):
    ours, theirs = twins(name, *SIZES)
    packed = pack(torch.randn(STEPS, ROWS, 4), order)
    (got, _), (expected, _) = ours(packed), theirs(packed)
    assert type(got) is PackedSequence
    assert got.batch_sizes is packed.batch_sizes
    assert got.sorted_indices is packed.sorted_indices
    assert got.unsorted_indices is packed.unsorted_indices
    assert got.data.shape == expected.data.shape


@flavours
@options
@orders
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_equals_lengths_on_the_padded_input(flavour, options, order, with_hx):
    ours, _ = layer_twins(flavour, **options)
    x, lengths = draw(STEPS, ROWS, 4), torch.tensor(LENGTHS[order])
    hx = states(ours, ROWS) if with_hx else None
    y, hn = ours(pack(x, order), hx)
    first = ours.batch_first
    expected, expected_hn = ours(x.transpose(0, 1) if first else x, hx, lengths=lengths)
    expected = expected.transpose(0, 1) if first else expected
    padded, given = torch.nn.utils.rnn.pad_packed_sequence(y)
    assert torch.equal(given, lengths)
    torch.testing.assert_close(padded, expected)
    torch.testing.assert_close(hn, expected_hn)


@pytest.mark.parametrize("name", LAYERS)
@orders
def test_reset(name, order):
    """reset is in the order of the caller's rows, whatever the packing's."""
    for first in (False, True):
        ours = both(name)[0](*SIZES, 2, bidirectional=True, batch_first=first).double()
        x, lengths = draw(STEPS, ROWS, 4), torch.tensor(LENGTHS[order])
        reset = torch.rand(STEPS, ROWS, generator=torch.Generator().manual_seed(1)) < 0.4
        given = reset.t() if first else reset
        hx = states(ours, ROWS)
        y, hn = ours(pack(x, order), hx, reset=given)
        expected, expected_hn = ours(
            x.transpose(0, 1) if first else x, hx, lengths=lengths, reset=given
        )
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=first)
        torch.testing.assert_close((padded, hn), (expected, expected_hn))


@orders
@pytest.mark.parametrize("proj_size", [0, 3])
def test_return_cells(order, proj_size):
    ours = both("LSTM")[0](*SIZES, 2, bidirectional=True, proj_size=proj_size).double()
    x, lengths = draw(STEPS, ROWS, 4), torch.tensor(LENGTHS[order])
    packed = pack(x, order)
    y, hn, cells = ours(packed, return_cells=True)
    torch.testing.assert_close(tensors_of((y, hn)), tensors_of(ours(packed)))
    expected = ours(x, lengths=lengths, return_cells=True)[2]
    assert len(cells) == 2
    for layer, padded in zip(cells, expected, strict=True):
        assert type(layer) is PackedSequence and layer.sorted_indices is packed.sorted_indices
        got, _ = torch.nn.utils.rnn.pad_packed_sequence(layer)
        torch.testing.assert_close(got, padded)
    last = cells[1].data.sum() + cells[0].data.sum()
    grads = torch.autograd.grad(last, ours.parameters(), materialize_grads=True)
    expected = torch.autograd.grad(
        sum(layer.sum() for layer in expected), ours.parameters(), materialize_grads=True
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("name", LAYERS)
@orders
def test_one_row_by_one(name, order):
    """Every row alone gives what it gives within the packed batch."""
    ours = both(name)[0](*SIZES, 2, bidirectional=True).double()
    rows = [draw(n, 4, seed=s) for s, n in enumerate(LENGTHS[order])]
    y, hn = ours(pack_sequence(rows, enforce_sorted=order != "unsorted"))
    for b, (row, got) in enumerate(zip(rows, torch.nn.utils.rnn.unpack_sequence(y), strict=True)):
        expected, expected_hn = ours(row)
        torch.testing.assert_close(got, expected)
        got_hn = permuted(hn, lambda h, b=b: h[:, b])
        torch.testing.assert_close(got_hn, expected_hn)


@pytest.mark.parametrize("name", LAYERS)
@orders
def test_second_derivatives(name, order):
    ours, theirs = twins(name, 2, 3, bidirectional=True, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        x = draw(STEPS, ROWS, 2).requires_grad_()
        hx = permuted(states(module, ROWS), lambda h: h.requires_grad_())
        outputs = tensors_of(module(pack(x, order), hx))
        leaves = [x, *tensors_of(hx), *module.parameters()]
        first = torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAYERS)
@orders
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_draws_what_torch_draws(name, order, p):
    found = []
    for module in twins(name, *SIZES, 3, dropout=p, bidirectional=True, dtype=torch.float64):
        torch.manual_seed(7)
        x = pack(draw(STEPS, ROWS, 4), order)
        x.data.requires_grad_()
        found.append(results(module, x))
        found[-1]["random state"] = torch.get_rng_state()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_never_read(name):
    """The elements of a PackedSequence are all there is: no gradient or value from elsewhere."""
    ours, theirs = twins(name, *SIZES, dtype=torch.float64)
    data = draw(7, 4)
    data[3] = float("nan")  # belongs to the second row
    packed = PackedSequence(data, torch.tensor([2, 2, 1, 1, 1]))
    got = tensors_of(ours(packed))
    expected = tensors_of(theirs(packed))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got[0][[0, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(name, dtype):
    ours, theirs = layer_twins("tanh" if name == "RNN" else name, dtype, num_layers=2)
    packed = pack(draw(STEPS, ROWS, 4, dtype=dtype), "unsorted")
    check_twins(ours, theirs, (packed,), dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_one_row_and_one_step(name):
    ours, theirs = twins(name, *SIZES, dtype=torch.float64)
    for shape, sizes in (((1, 4), [1]), ((3, 4), [3]), ((3, 4), [1, 1, 1])):
        packed = PackedSequence(draw(*shape), torch.tensor(sizes))
        check_twins(ours, theirs, (packed,), torch.float64)

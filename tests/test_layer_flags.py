"""Layers with gradients, by one operator each way on a CPU, of which rows end early, and are then
computed in another order and without what lies beyond their ends, or segments start inside."""

import pytest
import torch
from conftest import UNDER_TEST  # noqa: F401  (the environment it sets)
from test_layer_operators import in_parts, layer, spec_of

import fused_rnn
from fused_rnn import whole
from fused_rnn.functional import make_flags
from fused_rnn.ops import ACC_DTYPE, GATES
from fused_rnn.testing import Case, check, poisoned_memory

cells = pytest.mark.parametrize("cell", list(GATES))
BOTH = (False, True)
SIZES = {  # gradients inside the scan, in one chunk, two, eight; then in products of their own
    "H5 B6": {"steps": 40, "rows": 6, "hidden": 5},
    "H20 B13": {"steps": 30, "rows": 13, "hidden": 20},
    "H16 B100": {"steps": 20, "rows": 100, "hidden": 16},
    "H40 B3": {"steps": 9, "rows": 3, "hidden": 40},
    "H150 B2": {"steps": 5, "rows": 2, "hidden": 150},
    "H90 B40": {"steps": 7, "rows": 40, "hidden": 90, "inputs": 60},
    "H24 I520": {"steps": 6, "rows": 17, "hidden": 24, "inputs": 520},
    "B1": {"steps": 6, "rows": 1, "hidden": 7},
    "T1": {"steps": 1, "rows": 9, "hidden": 7},
}


def lengths_of(steps: int, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, steps + 1, (rows,), generator=torch.Generator().manual_seed(seed))


def ragged(cell, lengths, dtype=torch.float32, stack=2, resets=True, ends=True, **sizes):
    """A layer's inputs with flags, and its spec."""
    steps, rows = int(lengths.max()) + 2, len(lengths)
    inputs = layer(cell, dtype, steps=steps, rows=rows, stack=stack, **sizes)
    reset = torch.rand(steps, rows, generator=torch.Generator().manual_seed(7)) < 0.2
    given = lengths if ends else None, reset if resets else None
    flags = make_flags(steps, torch.device("cpu"), *given)
    return inputs._replace(flags=flags), spec_of(cell, stack)._replace(ragged=ends)


def outcomes(inputs, spec, used=(True,) * 3):
    """Outputs, and gradients of what has any, of a sum of those outputs that are `used`."""
    outputs = whole.run(spec, inputs, cells=False)[: 3 if spec.cell == "lstm" else 2]
    generator, total = torch.Generator().manual_seed(3), 0
    for out, use in zip(outputs, used, strict=False):
        weight = torch.randn(out.shape, generator=generator).to(out.dtype)
        total = total + (out * weight).sum() if use else total
    given = [t for t in inputs if t is not None and t.requires_grad]
    return [o.detach() for o in outputs], torch.autograd.grad(total, given, materialize_grads=True)


def assert_near(got, expected):
    """Sums of the same terms in another order."""
    for a, b in zip(got, expected, strict=True):
        grain = max(torch.finfo(a.dtype).eps, 1e-7) if a.dtype != torch.float64 else 1e-14
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= 50 * grain * b.abs().max()


@pytest.mark.parametrize("number, size", list(enumerate(SIZES)))
@cells
def test_within_the_budget(cell, number, size):
    """In the four dtypes in turn, one for each cell and size."""
    dtype = list(ACC_DTYPE)[(list(GATES).index(cell) + number) % 4]
    for lengths, reset in ((True, False), (number % 2 == 0, True)):
        flags = {"lengths": lengths, "reset": reset}
        case = Case(cell=cell, reverse=BOTH, dtype=dtype, **flags, **SIZES[size])
        with poisoned_memory():
            faults = [v for v in check(case, "cpu") if v.fault]
        assert not faults, case


@cells
@pytest.mark.parametrize("dtype", list(ACC_DTYPE))
@pytest.mark.parametrize("rows, hidden, size", [(5, 21, 6), (40, 70, 9), (30, 180, 40)])
def test_same_as_its_parts(cell, dtype, rows, hidden, size):
    """To the bit, but for sums over rows and steps, which are added up in another order."""
    for reverse, (ends, resets) in zip(BOTH * 3, (BOTH, BOTH[::-1], (True, True)) * 2):
        flags, lengths = {"ends": ends, "resets": resets}, lengths_of(12, rows)
        inputs, spec = ragged(cell, lengths, dtype, 1, **flags, hidden=hidden, size=size)
        spec = spec._replace(reverse=(reverse,))
        assert whole.is_whole(spec, inputs, cells=False)
        outputs, grads = outcomes(inputs, spec)
        with pytest.MonkeyPatch.context() as patch:
            in_parts(patch)
            expected_outputs, expected = outcomes(inputs, spec)
        for a, b in zip(outputs, expected_outputs, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        given = [t for t in inputs if t is not None and t.requires_grad]
        assert_near(grads, expected)
        for tensor, a, b in zip(given, grads, expected, strict=True):
            if any(tensor is t for t in (inputs.x, inputs.h0, inputs.c0)):
                assert torch.equal(a, b)


@cells
@pytest.mark.parametrize("rows, hidden", [(4, 300), (13, 20), (60, 40), (50, 257)])
def test_any_number_of_threads(cell, rows, hidden):
    one_long = torch.tensor([25] + [1] * (rows - 1))
    for lengths in (lengths_of(25, rows, 1), one_long):
        inputs, spec = ragged(cell, lengths, hidden=hidden, size=30)
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs, grads = outcomes(inputs, spec)
            found.append((*outputs, *grads))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b)


@cells
@pytest.mark.parametrize("hidden", [21, 300])
def test_what_lies_beyond_the_ends(cell, hidden):
    """Infinities there are not seen, results and gradients there are zero, and rows have the bits
    they have in another batch."""
    lengths = lengths_of(10, 14)
    inputs, spec = ragged(cell, lengths, hidden=hidden)
    ended = (inputs.flags & 1 != 0).unsqueeze(2)
    bad = torch.where(ended, float("nan"), inputs.x.detach()).requires_grad_()
    outputs, grads = outcomes(inputs, spec)
    again, same = outcomes(inputs._replace(x=bad), spec)
    for a, b in zip((*outputs, *grads), (*again, *same), strict=True):
        assert torch.equal(a, b)
    assert not (outputs[0] * ended).any() and not (grads[0] * ended).any()
    few = slice(3, 8)
    part = inputs._replace(
        x=inputs.x[:, few], h0=inputs.h0[:, few], flags=inputs.flags[:, few].contiguous()
    )
    part = part._replace(c0=None if inputs.c0 is None else inputs.c0[:, few])
    y = whole.run(spec, part, cells=False)[0]
    assert torch.equal(y, outputs[0][:, few])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    all_dy = torch.zeros_like(outputs[0])
    all_dy[:, few] = dy
    (expected,) = torch.autograd.grad(whole.run(spec, inputs, cells=False)[0], inputs.x, all_dy)
    (found,) = torch.autograd.grad(y, inputs.x, dy)
    assert torch.equal(found, expected)


@cells
@pytest.mark.parametrize("rows", [2, 20])
def test_no_steps_at_all(cell, rows):
    inputs, spec = ragged(cell, torch.zeros(rows, dtype=torch.int64), resets=False)
    outputs, grads = outcomes(inputs, spec)
    assert not outputs[0].any() and torch.equal(outputs[1], inputs.h0)
    states = [(inputs.h0, outputs[1])]
    if cell == "lstm":
        assert torch.equal(outputs[2], inputs.c0)
        states.append((inputs.c0, outputs[2]))
    given = [t for t in inputs if t is not None and t.requires_grad]
    for tensor, grad in zip(given, grads, strict=True):
        state = any(tensor is s for s, _ in states)
        assert grad.abs().sum() > 0 if state else not grad.any()


@cells
@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
def test_outputs_that_are_not_used(monkeypatch, cell, used):
    if cell != "lstm" and used[2]:
        used = (True, True)
    inputs, spec = ragged(cell, lengths_of(9, 8))
    _, grads = outcomes(inputs, spec, used)
    in_parts(monkeypatch)
    assert_near(grads, outcomes(inputs, spec, used)[1])


@cells
def test_only_some_gradients(cell):
    inputs, spec = ragged(cell, lengths_of(9, 20))
    names = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0")
    _, every = outcomes(inputs, spec)
    for place, name in enumerate(names):
        some = (t.detach() if t is not None and t.requires_grad else t for t in inputs)
        some = type(inputs)(*some)
        some = some._replace(**{name: getattr(some, name).requires_grad_()})
        assert_near(outcomes(some, spec)[1], every[place : place + 1])


@cells
def test_derivatives_of_gradients(monkeypatch, cell):
    lengths = lengths_of(4, 3, 5)

    def second():
        inputs, spec = ragged(cell, lengths, torch.float64, hidden=3, size=2)
        given = [t for t in inputs if t is not None and t.requires_grad]
        y, h_n, *_ = whole.run(spec, inputs, cells=False)
        first = torch.autograd.grad((y**2).sum() + h_n.sum(), given, create_graph=True)
        rows = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(2)).double()
        many = torch.autograd.grad(y, given, rows, is_grads_batched=True, retain_graph=True)
        return (*torch.autograd.grad(sum((g**2).sum() for g in first), given), *many)

    found = second()
    in_parts(monkeypatch)
    assert_near(found, second())


@cells
def test_the_tape_is_of_steps_that_are_taken(cell):
    lengths = lengths_of(30, 10)
    inputs, spec = ragged(cell, lengths)
    y = whole.run(spec, inputs, cells=False)[0]
    kept = y.grad_fn.saved_tensors[9:]
    sizes = [t.shape[0] for t in kept if t.numel()]
    assert sizes == [int(lengths.sum())] * {"lstm": 2, "gru": 1, "rnn": 0}[cell]


def test_flags_without_values():
    """A FakeTensor outside its mode: its values cannot say how large the tape is."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        w_ih, w_hh, x = (
            torch.randn(*s, requires_grad=True) for s in ((1, 20, 4), (1, 20, 5), (7, 2, 4))
        )
        reset = torch.rand(7, 2) < 0.5
    y, _ = fused_rnn.lstm(x, None, w_ih, w_hh, reset=reset)
    assert y.shape == (7, 2, 1, 5)


def test_flags_that_are_refused():
    inputs, spec = ragged("gru", lengths_of(5, 3), resets=False)
    flags = inputs.flags.clone()
    flags[:3, 0] = torch.tensor([0, 1, 0])
    with pytest.raises(RuntimeError, match="row 0 goes on at step 2"):
        whole.run(spec, inputs._replace(flags=flags), cells=False)

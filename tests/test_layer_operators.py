"""A plain layer of a training step on the CPU is one operator each way: the same as its parts."""

from pathlib import Path

import pytest
import torch
from conftest import UNDER_TEST  # noqa: F401  (the environment it sets)
from test_imports import run_python

from fused_rnn import whole
from fused_rnn.autograd import LayerInputs, LayerSpec
from fused_rnn.ops import ACC_DTYPE, GATES

forward = torch.ops.fused_rnn.cpu_layer_forward.default
backward = torch.ops.fused_rnn.cpu_layer_backward.default
cells = pytest.mark.parametrize("cell", list(GATES))
REVERSE = (False, True)


def layer(cell, dtype=torch.float32, steps=7, rows=5, size=6, hidden=21, stack=2, bias=True):
    generator = torch.Generator().manual_seed(steps * rows + hidden)
    width = GATES[cell] * hidden

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.5).to(dtype).requires_grad_()

    return LayerInputs(
        draw(steps, rows, size),
        draw(stack, width, size),
        draw(stack, width, hidden),
        *((draw(stack, width), draw(stack, width)) if bias else (None, None)),
        None,
        draw(stack, rows, hidden),
        draw(stack, rows, hidden) if cell == "lstm" else None,
        None,
    )


def spec_of(cell, stack=2, relu=False):
    return LayerSpec(cell, "cpu", REVERSE[:stack], relu=relu)


def outcomes(cell, inputs, spec):
    """Outputs and gradients of the inputs that have any."""
    count = {"lstm": 4, "gru": 2, "rnn": 2}[cell]
    outputs = whole.run(spec, inputs, cells=True)[:count]
    generator = torch.Generator().manual_seed(3)
    total = 0
    for out in outputs:
        total = total + (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
    given = [t for t in inputs if t is not None and t.requires_grad]
    return [o.detach() for o in outputs], torch.autograd.grad(total, given)


def in_parts(monkeypatch):
    monkeypatch.setattr(whole, "is_whole", lambda spec, inputs, cells: False)


@cells
@pytest.mark.parametrize("dtype", list(ACC_DTYPE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stack", [1, 2])
def test_same_as_its_parts(monkeypatch, cell, dtype, bias, stack):
    """To the bit, but for gradients that are added up in another order: the biases', and that of an
    input which two entries read."""
    inputs = layer(cell, dtype, bias=bias, stack=stack)
    spec = spec_of(cell, stack)
    outputs, grads = outcomes(cell, inputs, spec)
    in_parts(monkeypatch)
    expected_outputs, expected = outcomes(cell, inputs, spec)
    for a, b in zip(outputs, expected_outputs, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    others = [t for t in (inputs.b_ih, inputs.b_hh) if t is not None]
    if stack > 1:
        others.append(inputs.x)
    given = [t for t in inputs if t is not None]
    for tensor, a, b in zip(given, grads, expected, strict=True):
        assert a.dtype == b.dtype
        if any(tensor is b for b in others):
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 60])
@pytest.mark.parametrize("steps", [1, 2, 3])
@cells
def test_few_steps(monkeypatch, cell, steps, rows):
    """Weights that are used once are not packed, and count for the same."""
    inputs = layer(cell, steps=steps, rows=rows, hidden=33, size=40)
    outputs, grads = outcomes(cell, inputs, spec_of(cell))
    several = layer(cell, steps=steps, rows=rows, hidden=33, size=40)
    both = [t if t is None else torch.cat((t, t), 1) for t in (several.x, several.h0, several.c0)]
    wide = several._replace(x=both[0], h0=both[1], c0=both[2])
    wide = LayerInputs(*(None if t is None else t.detach().requires_grad_() for t in wide))
    twice = whole.run(spec_of(cell), wide, cells=False)
    for half in twice[0].split(rows, 1):
        assert torch.equal(outputs[0], half)
    in_parts(monkeypatch)
    for a, b in zip(grads, outcomes(cell, inputs, spec_of(cell))[1], strict=True):
        torch.testing.assert_close(a, b)


@cells
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 100, 512, 513])  # 512: the most a scan projects itself
@pytest.mark.parametrize(
    "steps, rows, hidden",
    [(3, 13, 17), (3, 100, 64), (3, 40, 530), (1, 1, 17), (1, 3, 300), (1, 8, 530)],
)
def test_projected_by_the_scan(monkeypatch, cell, threads, size, steps, rows, hidden):
    """Rows enough for the scan to project its input itself, or one step of so few that nothing
    packs the weights: the bits of a product before it."""
    torch.set_num_threads(threads)
    inputs = layer(cell, steps=steps, rows=rows, size=size, hidden=hidden)
    found = outcomes(cell, inputs, spec_of(cell))
    in_parts(monkeypatch)
    expected = outcomes(cell, inputs, spec_of(cell))
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)


@cells
@pytest.mark.parametrize("hidden", [64, 192])
def test_large_tapes(cell, hidden):
    """What is written past the caches is what smaller batches leave in them."""
    # A tape of 11 MiB and more; of 4 rows, less than one. Of 64 units, no gradients of the gates.
    steps, rows = 120 * 64 // hidden, 96
    inputs = layer(cell, steps=steps, rows=rows, size=5, hidden=hidden, stack=1)
    outputs, gradients = outcomes(cell, inputs, spec_of(cell, 1))
    everything, *_ = whole.run(spec_of(cell, 1), inputs, cells=False)
    dy = torch.randn(steps, rows, hidden, generator=torch.Generator().manual_seed(1))
    (all_dx,) = torch.autograd.grad(everything, inputs.x, dy)
    for part in (slice(0, 4), slice(40, 44)):
        few = inputs._replace(
            x=inputs.x[:, part].detach().requires_grad_(),
            h0=inputs.h0[:, part].detach().requires_grad_(),
            c0=None if inputs.c0 is None else inputs.c0[:, part].detach().requires_grad_(),
        )
        y, *_ = whole.run(spec_of(cell, 1), few, cells=False)
        assert torch.equal(y, outputs[0][:, part])
        (dx,) = torch.autograd.grad(y, few.x, dy[:, part])
        assert torch.equal(dx, all_dx[:, part])
    assert all(torch.isfinite(g).all() for g in gradients)


@cells
def test_strided_tensors(monkeypatch, cell):
    inputs = layer(cell)
    strided = inputs._replace(
        x=inputs.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        w_ih=inputs.w_ih.detach().mT.contiguous().mT.requires_grad_(),
        w_hh=inputs.w_hh.detach().mT.contiguous().mT.requires_grad_(),
        h0=inputs.h0.detach().repeat(1, 1, 2)[:, :, :21].requires_grad_(),
    )
    for a, b in zip(outcomes(cell, inputs, spec_of(cell)), outcomes(cell, strided, spec_of(cell))):
        for left, right in zip(a, b, strict=True):
            assert torch.equal(left, right)


@cells
def test_operators(cell):
    inputs = LayerInputs(*(None if t is None else t.detach() for t in layer(cell)))
    x, w_ih, w_hh, b_ih, b_hh, _, h0, c0, _ = inputs
    number = list(GATES).index(cell)
    given = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, None, list(REVERSE), number, False)
    torch.library.opcheck(forward, given)
    y, h_n, c_n, tape, gates = forward(*given)
    lstm = cell == "lstm"
    tapes = (tape if lstm else None, gates if cell != "rnn" else None)
    grads = (y, h_n, c_n, tape) if lstm else (y, h_n, None, None)
    common = (*grads, x, w_ih, w_hh, h0, c0, y, *tapes, None, list(REVERSE), number, False)
    torch.library.opcheck(backward, (*common, True, True, True, True))
    for place in range(4):
        wanted = [k == place for k in range(4)]
        torch.library.opcheck(backward, (*common, *wanted))
        found = backward(*common, *wanted)
        assert [t.numel() > 0 for t in found[:4]] == wanted
    for missing in range(4 if lstm else 2):
        some = [None if k == missing else g for k, g in enumerate(grads)]
        zero = list(grads)
        zero[missing] = torch.zeros_like(grads[missing])
        for a, b in zip(
            backward(*some, *common[4:], True, True, True, True),
            backward(*zero, *common[4:], True, True, True, True),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_operators_refuse_what_they_cannot_take():
    inputs = LayerInputs(*(None if t is None else t.detach() for t in layer("gru")))
    x, w_ih, w_hh, b_ih, b_hh, _, h0, _, _ = inputs
    rest = (None, list(REVERSE), 1, False)

    def refuses(match, *given):
        with pytest.raises(RuntimeError, match=match):
            forward(*given)

    refuses("x must have shape", x[0], w_ih, w_hh, b_ih, b_hh, h0, None, *rest)
    refuses("x must have steps", x[:0], w_ih, w_hh, b_ih, b_hh, h0, None, *rest)
    refuses("x must have the dtype", x.double(), w_ih, w_hh, b_ih, b_hh, h0, None, *rest)
    refuses("w_ih must have shape", x, w_ih[:, :, :3], w_hh, b_ih, b_hh, h0, None, *rest)
    refuses("w_hh must have shape", x, w_ih, w_hh[:, :9], b_ih, b_hh, h0, None, *rest)
    refuses("both biases", x, w_ih, w_hh, b_ih, None, h0, None, *rest)
    refuses("b_hh must have shape", x, w_ih, w_hh, b_ih, b_hh[:, :2], h0, None, *rest)
    refuses("h0 must have shape", x, w_ih, w_hh, b_ih, b_hh, h0[:1], None, *rest)
    refuses("reverse must have", x, w_ih, w_hh, b_ih, b_hh, h0, None, None, [True], 1, False)
    refuses("cell must be", x, w_ih, w_hh, b_ih, b_hh, h0, None, None, list(REVERSE), 5, False)
    given = layer("lstm")
    refuses("the LSTM has a c0", *given[:5], given.h0, None, None, list(REVERSE), 0, False)


def test_sums_of_many_rows():
    """Bias gradients of a long sequence, about as exact as torch's own sums."""
    inputs = layer("rnn", steps=3000, rows=7, hidden=3, size=2, stack=1)
    spec = LayerSpec("rnn", "cpu", (False,), relu=True)
    still = inputs._replace(w_hh=torch.zeros_like(inputs.w_hh).requires_grad_())
    y = whole.run(spec, still, cells=False)[0]
    (found,) = torch.autograd.grad(y.sum(), still.b_ih)
    assert torch.equal(found[0], (y > 0).sum((0, 1)).float())


TAPE = """
import torch
from test_layer_operators import layer

torch.set_num_threads(1)  # with many, the projected input would be kept too
inputs = layer("lstm", steps=60, rows=8, hidden=40)

def tape():
    names = "x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"
    given = (getattr(inputs, name).detach() for name in names)
    return torch.ops.fused_rnn.cpu_layer_forward(*given, None, [False, True], 0, False)[3:]

first = tape()
values = [t.clone() for t in first]
second = tape()
for a, b, value in zip(first, second, values, strict=True):
    assert a.data_ptr() != b.data_ptr() and torch.equal(a, value) and torch.equal(b, value)
places = {t.data_ptr() for t in (*first, *second)}
del first, second, a, b
third = tape()
for t, value in zip(third, values, strict=True):
    assert torch.equal(t, value)
if torch.__version__ >= (2, 11):  # before, it is an ordinary tensor
    assert {t.data_ptr() for t in third} <= places
"""


def test_the_tape_is_in_kept_memory():
    """It is used again when a tape is gone, and not before. (In a process where nothing else is
    kept.)"""
    status, _, err = run_python(TAPE, PYTHONPATH=str(Path(__file__).parent))
    assert status == 0, err

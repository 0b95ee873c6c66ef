"""The backward scan of a small layer makes the gradients of weights, biases and input itself."""

import pytest
import torch
from conftest import UNDER_TEST  # noqa: F401  (the environment it sets)
from test_layer_operators import cells, in_parts, layer, outcomes, spec_of

from fused_rnn import whole
from fused_rnn.ops import ACC_DTYPE

# steps, rows, size, hidden: one chunk of rows and several, even and not; steps that fill what is
# kept and that do not; sizes of less than a vector, of several blocks, and at which both meet
# inside a vector or a block; more than 512 gates.
SHAPES = [
    (70, 6, 3, 1),
    (11, 7, 1, 70),
    (40, 12, 17, 33),
    (9, 64, 8, 32),
    (33, 20, 70, 64),
    (20, 45, 64, 100),
    (3, 600, 5, 16),
    (600, 6, 4, 8),
    (15, 33, 40, 150),
]
shapes = pytest.mark.parametrize("steps, rows, size, hidden", SHAPES)


def errors(gradients, reference):
    """Root mean squares of the errors."""
    return [
        (g.double() - r).square().mean().sqrt() for g, r in zip(gradients, reference, strict=True)
    ]


@cells
@shapes
@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("dtype", list(ACC_DTYPE))
def test_as_accurate_as_its_parts(monkeypatch, cell, steps, rows, size, hidden, stack, dtype):
    inputs = layer(cell, dtype, steps, rows, size, hidden, stack)
    exactly = type(inputs)(
        *(None if t is None else t.detach().double().requires_grad_() for t in inputs)
    )
    spec = spec_of(cell, stack)
    found = outcomes(cell, inputs, spec)
    in_parts(monkeypatch)
    expected, exact = outcomes(cell, inputs, spec), outcomes(cell, exactly, spec)
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    names = [n for n, t in zip(inputs._fields, inputs, strict=True) if t is not None]
    own, parts = errors(found[1], exact[1]), errors(expected[1], exact[1])
    for name, a, b, mine, theirs, right in zip(
        names, found[1], expected[1], own, parts, exact[1], strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape
        if name in ("h0", "c0") or (name == "x" and stack == 1):
            assert torch.equal(a, b), name  # of two entries, two sums are added
        grain = torch.finfo(ACC_DTYPE[dtype]).eps * right.abs().max()
        assert mine <= 1.5 * theirs + 16 * grain, (name, float(mine), float(theirs))


@cells
@shapes
@pytest.mark.parametrize("stack", [1, 2])
def test_whatever_the_threads(cell, steps, rows, size, hidden, stack):
    """With five, threads share out the units of a chunk too."""
    inputs = layer(cell, steps=steps, rows=rows, size=size, hidden=hidden, stack=stack)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(outcomes(cell, inputs, spec_of(cell, stack)))
    for other in found[1:]:
        for part, of in zip(other, found[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(part, of, strict=True))


@cells
@pytest.mark.parametrize("hidden, size", [(40, 9), (100, 9), (150, 40)])
def test_whatever_the_company(cell, hidden, size):
    """Rows too few for it, rows of another chunk, and of a larger one, in the same bits."""
    steps, rows = 12, 70
    inputs = layer(cell, steps=steps, rows=rows, size=size, hidden=hidden)
    outputs, gradients = outcomes(cell, inputs, spec_of(cell))
    everything, *_ = whole.run(spec_of(cell), inputs, cells=False)
    dy = torch.randn(everything.shape, generator=torch.Generator().manual_seed(1))
    (all_dx,) = torch.autograd.grad(everything, inputs.x, dy)
    for part in (slice(3, 4), slice(20, 25), slice(5, 15), slice(30, 69)):
        few = inputs._replace(
            x=inputs.x[:, part].detach().requires_grad_(),
            h0=inputs.h0[:, part].detach(),
            c0=None if inputs.c0 is None else inputs.c0[:, part].detach(),
        )
        y, *_ = whole.run(spec_of(cell), few, cells=False)
        (dx,) = torch.autograd.grad(y, few.x, dy[:, part])
        assert torch.equal(dx, all_dx[:, part])


@cells
@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_only_what_is_wanted(cell, stack, bias):
    inputs = layer(cell, steps=10, rows=30, size=19, hidden=37, stack=stack, bias=bias)
    everything = dict(
        zip(
            [n for n, t in zip(inputs._fields, inputs, strict=True) if t is not None],
            outcomes(cell, inputs, spec_of(cell, stack))[1],
            strict=True,
        )
    )
    for wanted in (("x",), ("w_ih",), ("w_hh",), ("b_ih", "b_hh"), ("x", "w_hh"), ("h0",)):
        if not bias and "b_ih" in wanted:
            continue
        chosen = inputs._replace(
            **{
                name: getattr(inputs, name).detach().requires_grad_(name in wanted)
                for name in everything
            }
        )
        gradients = outcomes(cell, chosen, spec_of(cell, stack))[1]
        in_order = [name for name in everything if name in wanted]
        for name, gradient in zip(in_order, gradients, strict=True):
            assert torch.equal(gradient, everything[name]), (wanted, name)


@cells
def test_batch_first_and_strides(cell):
    inputs = layer(cell, steps=21, rows=14, size=10, hidden=24)
    expected = outcomes(cell, inputs, spec_of(cell))
    turned = inputs.x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.zeros(21, 14, 25)[:, :, 3:23:2].copy_(inputs.x.detach())
    for x in (turned, apart):
        found = outcomes(cell, inputs._replace(x=x.requires_grad_()), spec_of(cell))
        for a, b in zip(found[0] + list(found[1]), expected[0] + list(expected[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [4, 16])
def test_no_entries(rows):
    """A stack of none: no gradients but the input's, which is zero."""
    y = torch.zeros(20, rows, 0)
    found = torch.ops.fused_rnn.cpu_layer_backward(
        *(y, None, None, None, torch.ones(20, rows, 4), torch.zeros(0, 8, 4), torch.zeros(0, 8, 8)),
        *(torch.zeros(0, rows, 8), None, y, None, None, None, [], 2, False),
        *(True, True, True, True),
    )
    assert torch.equal(found[0], torch.zeros(20, rows, 4))
    assert [t.shape[0] for t in found[1:4]] == [0, 0, 0]

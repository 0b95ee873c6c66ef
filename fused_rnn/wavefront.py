"""Several layers at once: a layer works on one chunk of steps while the layer above it works on the
chunk before, in the same launch, as entries of one stack.

A scan that keeps its weights on the chip waits for latencies more than it works, and the GPU has
room for several. The layer above needs a whole chunk of the layer below, for which its input
projection is one matrix product; so C equal chunks of L layers take C + L - 1 launches, each as
long as one layer's chunk, instead of C L chunks one after another. The numbers are those of layers
run one after another, to the bit: the state between chunks is handed on unrounded, and no sum is
taken in another order. What it costs is memory: a backward pass holds the gates' gradients of all
layers, not of one. ``Wave`` is the autograd of it; how long a chunk should be, and whether waves
pay at all, fused_rnn/cuda/planning.py says.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn import autograd, ops
from fused_rnn.autograd import LayerInputs, LayerSpec, ScanGradients


class WaveLayer(NamedTuple):
    """The tensors of one layer, as ``LayerInputs`` has them with a stack of one; c0: LSTM."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    h0: Tensor
    c0: Tensor | None


class WaveSpec(NamedTuple):
    """What is static: the layers' common spec (one direction, no flags, gates kept), the steps of a
    chunk, and the share of a layer's output that is dropped before the next."""

    layer: LayerSpec
    chunk: int
    dropout: float = 0.0


class Launch(NamedTuple):
    """One scan of so many steps: layer first + k from step starts[k] on."""

    first: int
    starts: tuple[int, ...]
    steps: int

    @property
    def layers(self) -> range:
        return range(self.first, self.first + len(self.starts))


def launches(steps: int, layers: int, chunk: int) -> list[Launch]:
    """The scans of a wave, in order. Chunks are equal but for the last one, which has a launch of
    its own for every layer; that comes after the other layers', whose input is of the stage
    before."""
    count = -(-steps // chunk)
    found = []
    for stage in range(count + layers - 1):
        low, high = max(0, stage - count + 1), min(layers - 1, stage)
        starts = tuple((stage - layer) * chunk for layer in range(low, high + 1))
        rest = steps - starts[0]
        if rest >= chunk:
            found.append(Launch(low, starts, chunk))
            continue
        if len(starts) > 1:
            found.append(Launch(low + 1, starts[1:], chunk))
        found.append(Launch(low, starts[:1], rest))
    return found


def _cat(tensors) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


def _dropped(spec: WaveSpec, values: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return values
    scale = 0.0 if spec.dropout == 1 else 1 / (1 - spec.dropout)
    return torch.where(kept, values * scale, 0)


def _stacked(parts: list[Tensor | None], like: tuple[int, ...], of: Tensor, at: int):
    """The parts, each of shape ``like`` or None for zeros, side by side; None where all are."""
    if all(part is None for part in parts):
        return None
    dtype = max((p.dtype for p in parts if p is not None), key=lambda dtype: dtype.itemsize)
    zeros = None
    if any(part is None for part in parts):
        zeros = of.new_zeros((), dtype=dtype).expand(like)
    return torch.stack([zeros if part is None else part.to(dtype) for part in parts], at)


def forward(
    spec: WaveSpec, x: Tensor, layers: list[WaveLayer], kept: list[Tensor | None], training: bool
):
    """(y [T, B, H], h_n [L, B, H], c_n [L, B, H] or None, tapes): for every launch, where
    ``training``, the state that enters its scan (c0 of the LSTM, h0 of the GRU) and the tape of
    ``autograd.backward_scan``. kept[l] bool [T, B, H] or None: what of layer l's output is not
    dropped."""
    one, (steps, rows, _), count = spec.layer, x.shape, len(layers)
    matmul = ops.family(one.backend)["matmul"]
    w_hh = torch.cat([layer.w_hh for layer in layers])
    width, hidden = w_hh.shape[1:]
    io, acc = w_hh.dtype, ops.ACC_DTYPE[w_hh.dtype]
    biases = [autograd.fold_bias(one, layer.b_ih, layer.b_hh, hidden) for layer in layers]
    b_hn = _cat([of_n for _, of_n in biases])
    gates_0 = autograd.project(one, x, layers[0].w_ih, biases[0][0])
    w_ih = torch.cat([layer.w_ih for layer in layers[1:]]).mT
    bias = _cat([folded for folded, _ in biases[1:]])

    h = [layer.h0[0].to(acc) for layer in layers]
    c = [None if layer.c0 is None else layer.c0[0].to(acc) for layer in layers]
    latest: list = [None] * count  # of each layer, the output of its last chunk
    output, tapes = w_hh.new_empty((steps, rows, hidden)), []
    for launch in launches(steps, count, spec.chunk):
        here, n = launch.layers, launch.steps
        gates_x = gates_0[launch.starts[0] :][:n]
        upper = [layer for layer in here if layer > 0]
        if upper:
            below = torch.stack(
                [
                    _dropped(spec, latest[layer - 1], _of_chunk(kept[layer - 1], start, n))
                    for layer, start in zip(here, launch.starts)
                    if layer > 0
                ]
            )
            at = slice(upper[0] - 1, upper[-1])
            of_upper = None if bias is None else bias[at]
            parts = matmul(below.flatten(1, 2), w_ih[at], of_upper, steps)
            if len(upper) < len(here):
                parts = torch.cat((gates_x.reshape(1, n * rows, width), parts))
            gates_x = parts.view(len(here), n, rows, width).permute(1, 2, 0, 3)
        at = slice(here.start, here.stop)
        h0 = torch.stack(h[at])
        c0 = None if c[0] is None else torch.stack(c[at])
        inputs = LayerInputs(gates_x, None, w_hh[at], None, None, None, h0, c0, None)
        several = one._replace(reverse=(False,) * len(here))
        b = None if b_hn is None else b_hn[at]
        y, h_n, *rest = autograd.forward_scan(several, gates_x, b, inputs, training)
        h[at] = h_n
        if one.cell == "lstm":
            c[at] = rest.pop(0)
        latest[at] = y.unbind(2)
        if here.stop == count:
            output[launch.starts[-1] :][:n] = latest[-1]
        if training:
            tapes.append((*{"lstm": (c0,), "gru": (h0.to(io),), "rnn": ()}[one.cell], y, *rest))
    c_n = None if c[0] is None else torch.stack(c)
    return output, torch.stack(h).to(io), c_n, tapes


def _of_chunk(values: Tensor | None, start: int, steps: int) -> Tensor | None:
    return None if values is None else values[start : start + steps]


def backward(spec: WaveSpec, wanted, grads, x: Tensor, layers: list[WaveLayer], kept, tapes):
    """The gradients of x and of every layer's tensors, flat; None where not ``wanted``.

    grads: those of y, h_n and c_n, each a tensor or None; wanted, flat as the gradients are.
    """
    one, (steps, rows, _), count = spec.layer, x.shape, len(layers)
    matmul = ops.family(one.backend)["matmul"]
    w_hh = torch.cat([layer.w_hh for layer in layers])
    w_ih = torch.cat([layer.w_ih for layer in layers[1:]])
    hidden = w_hh.shape[2]
    lstm = one.cell == "lstm"
    dy, dh_n, dc_n = grads
    dh: list = [None] * count if dh_n is None else list(dh_n)
    dc: list = [None] * count if dc_n is None else list(dc_n)
    above: list = [None] * count  # of each layer, the gradient of its output from the layer above
    y = w_hh.new_empty((count, steps, rows, 1, hidden))
    found_in: list = [None] * count  # of each layer, dgates and dgates_hn of all steps
    size = len(WaveLayer._fields)
    needed = [any(wanted[1 + k * size : 1 + (k + 1) * size]) for k in range(count)]
    lowest = 0 if wanted[0] else needed.index(True)  # nothing below needs a gradient
    for launch, tape in zip(
        reversed(launches(steps, count, spec.chunk)), reversed(tapes), strict=True
    ):
        entered, tape = (None, tape) if one.cell == "rnn" else (tape[0], tape[1:])
        here, starts, n = launch.layers, launch.starts, launch.steps
        for layer, start, part in zip(here, starts, tape[0].unbind(2)):
            y[layer, start : start + n, :, 0] = part
        if lowest > here.start:
            idle = lowest - here.start
            here, starts, tape = here[idle:], starts[idle:], [t[:, :, idle:] for t in tape]
            entered = None if entered is None else entered[idle:]
        if not here:
            continue
        at = slice(here.start, here.stop)
        above[-1] = _of_chunk(dy, starts[-1], n) if here.stop == count else None
        h0, c0 = (None, entered) if lstm else (entered, None)
        found = autograd.backward_scan(
            one._replace(reverse=(False,) * len(here)),
            (
                _stacked(above[at], (n, rows, hidden), w_hh, 2),
                _stacked(dh[at], (rows, hidden), w_hh, 0),
                *((_stacked(dc[at], (rows, hidden), w_hh, 0), None) if lstm else ()),
            ),
            LayerInputs(tape[0], None, w_hh[at], None, None, None, h0, c0, None),
            tape,
        )
        dh[at] = found.dh0
        if lstm:
            dc[at] = found.dc0
        parts = [found.dgates, *([] if found.dgates_hn is None else [found.dgates_hn])]
        for k, (layer, start) in enumerate(zip(here, starts)):
            if found_in[layer] is None:
                found_in[layer] = [p.new_empty((steps, rows, 1, p.shape[3])) for p in parts]
            for target, part in zip(found_in[layer], parts):
                target[start : start + n, :, 0] = part[:, :, k]
        upper = [layer for layer in here if layer > lowest]
        if upper:
            first = upper[0] - here.start
            dgates = autograd.merge_rows(found.dgates).transpose(0, 1)[first:]
            least = autograd.least_rows(steps, w_ih[0], w_hh[0])
            dx = matmul(dgates, w_ih[upper[0] - 1 : upper[-1]], None, least).to(x.dtype)
            for layer, start, part in zip(upper, starts[first:], dx):
                mask = _of_chunk(kept[layer - 1], start, n)
                above[layer - 1] = _dropped(spec, part.view(n, rows, hidden), mask)

    results: list = [None] * (1 + count * size)
    for k in range(lowest, count):
        layer, (dgates, *rest) = layers[k], found_in[k]
        found_in[k] = None
        given = x if k == 0 else _dropped(spec, y[k - 1].squeeze(2), kept[k - 1])
        need = wanted[1 + k * size : 1 + (k + 1) * size]
        want = LayerInputs(wanted[0] and k == 0, *need[:4], False, *need[4:], False)
        inputs = LayerInputs(given, *layer[:4], None, layer.h0, layer.c0, None)
        h_prev = autograd.entering(one, y[k], layer.h0, None) if want.w_hh else None
        dc0 = dc[k].unsqueeze(0) if lstm else None
        scan = ScanGradients(dgates, rest[0] if rest else None, dh[k].unsqueeze(0), dc0, None)
        found = autograd.layer_gradients(one, want, inputs, h_prev, (y[k],), scan)
        if k == 0:
            results[0] = found.x
        results[1 + k * size : 1 + (k + 1) * size] = [*found[1:5], found.h0, found.c0]
    return results


def _reference(spec: WaveSpec, count: int, tensors):
    """The outputs of the layers one after another, by the reference, from ``Wave``'s tensors."""
    x, layers, kept = _unflatten(count, tensors)
    finals = []
    for layer, mask in zip(layers, kept):
        inputs = LayerInputs(x, *layer[:4], None, layer.h0, layer.c0, None)
        y, *states = autograd.reference_forward(spec.layer, inputs)
        finals.append(states[: 2 if spec.layer.cell == "lstm" else 1])
        x = _dropped(spec, y, mask)
    return (y, *(torch.cat(parts) for parts in zip(*finals)))


def _unflatten(count: int, tensors) -> tuple[Tensor, list[WaveLayer], list[Tensor | None]]:
    size = len(WaveLayer._fields)
    layers = [WaveLayer(*tensors[1 + k * size : 1 + (k + 1) * size]) for k in range(count)]
    return tensors[0], layers, [*tensors[1 + count * size :], None]


class Wave(torch.autograd.Function):
    """apply(spec, count, x [T, B, I], *every layer's WaveLayer, *kept) -> y [T, B, H],
    h_n [L, B, H] in w_hh's dtype and, of the LSTM, c_n [L, B, H] in the arithmetic's. kept: of
    every layer but the last, bool [T, B, H] or None. A second derivative is the reference's."""

    @staticmethod
    def forward(ctx, spec, count, *tensors):
        y, h_n, c_n, tapes = forward(spec, *_unflatten(count, tensors), training=True)
        ctx.spec, ctx.count, ctx.given = spec, count, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(t for tape in tapes for t in tape))
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx, *grads):
        spec, count, given = ctx.spec, ctx.count, ctx.given
        saved = ctx.saved_tensors
        inputs, flat = saved[:given], saved[given:]
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            places = [k for k, needed in enumerate(wanted) if needed]
            found = autograd.vjp(
                lambda tensors: _reference(spec, count, tensors), inputs, places, grads
            )
            results = dict(zip(places, found))
            return (None, None, *(results.get(k) for k in range(given)))
        size = {"lstm": 4, "gru": 3, "rnn": 1}[spec.layer.cell]
        tapes = [flat[k : k + size] for k in range(0, len(flat), size)]
        grads = (*grads, None)[:3]
        results = backward(spec, wanted, grads, *_unflatten(count, inputs), tapes)
        return (None, None, *results, *(None,) * (given - len(results)))

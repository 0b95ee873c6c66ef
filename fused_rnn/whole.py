"""A layer that is one node of the graph and one operator each way, on a CPU. What it does not take,
autograd.py does."""

import torch
from torch import Tensor

from fused_rnn import observers
from fused_rnn.autograd import (
    LayerInputs,
    LayerSpec,
    ScanBackward,
    as_wanted,
    backward,
    forward,
    scan_function,
)
from fused_rnn.ops import CELLS

_cpu_layer_forward = torch.ops.fused_rnn.cpu_layer_forward.default
_cpu_layer_backward = torch.ops.fused_rnn.cpu_layer_backward.default


def is_whole(spec: LayerSpec, inputs: LayerInputs, cells: bool) -> bool:
    """Whether ``WholeLayer`` takes a layer: a plain one, on the CPU's kernels, that no transform,
    mode or compiler looks at. With flags its cells are not to be had."""
    return (
        spec.backend == "cpu"
        and (inputs.flags is None or (type(inputs.flags) in observers.PLAIN and not cells))
        and inputs.w_ih is not None
        and inputs.w_hr is None
        and spec.reset_after
        and (spec.keep_gates or spec.cell == "rnn")
        and (inputs.b_ih is None) == (inputs.b_hh is None)
        and inputs.h0.dtype == inputs.w_hh.dtype
        and observers.unwatched()
    )


class WholeLayer(torch.autograd.Function):
    """A layer by one operator each way: apply(spec, cells, x, w_ih, w_hh, b_ih, b_hh, h0, c0,
    flags) -> (y, h_n) and of the LSTM c_n and, if asked for, cells. In single steps most of the
    time is Python's and the graph's; hence no more outputs than are wanted, and no names."""

    @staticmethod
    def forward(ctx, spec, cells, *inputs):
        y, h_n, c_n, *tape = _cpu_layer_forward(
            *inputs, spec.reverse, CELLS.index(spec.cell), spec.relu
        )
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, y, *tape)
        if spec.cell != "lstm":
            return y, h_n
        return (y, h_n, c_n, tape[0]) if cells else (y, h_n, c_n)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n=None, dcells=None):
        spec, (*inputs, y, cells, gates) = ctx.spec, ctx.saved_tensors
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, flags = inputs
        want = ctx.needs_input_grad[2:-1]
        lstm, gru = spec.cell == "lstm", spec.cell == "gru"
        if torch.is_grad_enabled() or not observers.unwatched():
            wanted = (*want[:5], False, *want[5:])
            grads = (dy, dh_n, dc_n, dcells) if lstm else (dy, dh_n)
            given = LayerInputs(*inputs[:5], None, *inputs[5:])
            if spec.cell != "rnn" and gates.shape[:2] != y.shape[:2]:  # of the steps taken
                with torch.no_grad():
                    _, _, *kept = forward(spec, given, training=True)
                cells, gates = kept[1:] if lstm else (None, *kept)
            tape = (y, cells, gates) if lstm else (y, gates) if gru else (y,)
            if not torch.is_grad_enabled():  # vmap over gradients, say
                found = backward(spec, wanted, grads, given, tape)
                return None, None, *found[:5], *found[6:8], None
            found = iter(ScanBackward.apply(spec, wanted, *grads, *given, *tape))
            return None, None, *(next(found) if needed else None for needed in want), None
        want_b = want[3] or want[4]
        dx, dw_ih, dw_hh, db_ih, db_hn, dh0, dc0 = _cpu_layer_backward(
            *(dy, dh_n, dc_n, dcells, x, w_ih, w_hh, h0, c0, y),
            *(cells if lstm else None, gates if lstm or gru else None),
            *(flags, spec.reverse, CELLS.index(spec.cell), spec.relu, *want[:3], want_b),
        )
        db_hh = None
        if want[4] and gru:
            db_hh = torch.cat((db_ih[..., : 2 * w_hh.shape[-1]], db_hn), -1)
        elif want[4]:  # a tensor of its own: gradients are changed in place
            db_hh = db_ih.clone() if want[3] else db_ih
        found = (dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0)
        return None, None, *as_wanted(want, found, inputs), None


def run(spec: LayerSpec, inputs: LayerInputs, cells: bool) -> tuple[Tensor, ...]:
    """A layer with gradients: the differentiable outputs of ``forward`` (the LSTM's cells perhaps
    only where they are asked for), and perhaps the tape after them."""
    if is_whole(spec, inputs, cells):
        x, w_ih, w_hh, b_ih, b_hh, _, h0, c0, flags = inputs
        return WholeLayer.apply(spec, cells, x, w_ih, w_hh, b_ih, b_hh, h0, c0, flags)
    return scan_function().apply(spec, *inputs)

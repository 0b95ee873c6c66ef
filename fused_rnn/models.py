"""All layers of a model in one call: on a CPU by one operator where nothing wants a gradient, and
by one a layer where something does; side by side on a GPU. Each has a question, asked first, and
the call; functional.py has the way layer by layer, which takes everything."""

import torch
from torch import Tensor

from fused_rnn import backends, library, observers, wavefront
from fused_rnn.autograd import LayerInputs, LayerSpec
from fused_rnn.functional import cast_inputs, needs_gradient, same_device, same_dtype
from fused_rnn.ops import ACC_DTYPE, CELLS
from fused_rnn.whole import WholeLayer


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor on the CPU whose kernels are to be used, and nobody looks on or casts:
    what ``infer`` (where gradients are off) and ``train`` ask for."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and backends.current_backend() in (backends.AUTO, "cpu")
        and not backends.extension_missing()
        and not torch.is_autocast_enabled("cpu")
        and observers.unwatched()
    )


def infer(cell: str, x: Tensor, hx, weights: list[Tensor], flags, bias, projected, both, relu):
    """All layers of a model: y [T, B, D*P] and the final states [L*D, B, ...]; None where the
    tensors are not all plain ones of one dtype on the CPU. Arguments as ``fused_rnn::cpu_layers``
    has them, hx a tuple of states or None."""
    if not _alike(x.dtype, (*weights, *(hx or ()))):
        return None
    h0, c0 = (None, None) if hx is None else hx if len(hx) == 2 else (hx[0], None)
    y, h_n, c_n = _cpu_layers(
        x, h0, c0, weights, flags, CELLS.index(cell), bias, projected, both, relu
    )
    return y, (h_n, c_n) if cell == "lstm" else (h_n,)


_cpu_layers = torch.ops.fused_rnn.cpu_layers.default


def _alike(dtype: torch.dtype, tensors) -> bool:
    """Whether all are plain tensors of this dtype, one that there are kernels for, on the CPU."""
    if dtype not in ACC_DTYPE:
        return False
    for t in tensors:
        if type(t) not in observers.PLAIN or t.dtype is not dtype or not t.is_cpu:
            return False
    return True


def zero_states(cell: str, x: Tensor, entries: int, hidden: int, proj: int = 0):
    """The states a call starts with where it is given none: h0 [entries, B, P], c0 of the LSTM."""
    h0 = x.new_zeros((entries, x.shape[1], proj or hidden))
    if cell != "lstm":
        return (h0,)
    # Nothing writes to them, so one may be both; not for Dynamo.
    same = not proj and not torch.compiler.is_compiling()
    return h0, h0 if same else x.new_zeros((entries, x.shape[1], hidden))


def train(
    cell: str, x: Tensor, hx, weights: list[Tensor], bias: bool, both: bool, relu: bool, dropout
):
    """``infer`` for a model of which something wants a gradient, or that has dropout: no flags, no
    projection, tape kept."""
    dtype, directions = x.dtype, 2 if both else 1
    each, given = (4 if bias else 2) * directions, (*weights, *(hx or ()))
    if not _alike(dtype, given):
        return None
    spec = LayerSpec(cell, "cpu", (False, True)[:directions], relu=relu)
    zeros = zero_states(cell, x, directions, weights[1].shape[1]) if hx is None else None
    finals = []
    for first in range(0, len(weights), each):
        own = weights[first : first + each]
        if both:
            own = [torch.stack(pair) for pair in zip(own[: each // 2], own[each // 2 :])]
        at = len(finals) * directions
        states = zeros or (
            hx if len(hx[0]) == directions else [s[at : at + directions] for s in hx]
        )
        h0, c0 = states if len(states) == 2 else (states[0], None)
        if first and dropout:
            x = torch.nn.functional.dropout(x, dropout)
        own = own if bias else (*own, None, None)
        x, *final = WholeLayer.apply(spec, False, x, *own, h0, c0, None)
        finals.append(final)
    if len(finals) == 1:
        states = finals[0]
    else:
        states = [torch.cat(parts) for parts in zip(*finals)]
    return x, tuple(s if s.dtype is dtype else s.to(dtype) for s in states)


def _model_request(
    cell: str, kind: str, dtype, x: Tensor, layers: int, directions: int, hidden, proj, waves: bool
) -> backends.Request:
    """What decides the backend of a whole model on x [T, B, I]. No weight is read: what may have a
    gradient is taken to have one."""
    reverse = (False, True)[:directions]
    if kind != "cuda":
        return backends.Request(cell, kind, dtype, reverse)
    steps, rows, _ = x.shape
    return backends.Request(
        cell,
        kind,
        dtype,
        reverse,
        device_index=x.device.index,
        rows=rows,
        hidden=hidden,
        proj=proj,
        steps=backends.rounded(steps),
        layers=layers,
        training=torch.is_grad_enabled(),
        waves=waves,
    )


def library_takes(
    cell: str, x: Tensor, layers: int, directions: int, hidden: int, proj: int, waves: bool
) -> bool:
    """Whether a model on x [T, B, I], without flags or dropout, is to go to torch.nn's own path as
    a whole, for which a GPU's weights lie as it wants them; waves: ``wave_chunk`` will be asked."""
    kind = x.device.type
    if torch.compiler.is_compiling() or observers.transformed() or kind not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(kind) or type(x.shape[0]) is not int or x.dtype not in ACC_DTYPE:
        return False
    if not x.shape[1]:
        return False
    sizes = (layers, directions, hidden, proj, waves)
    return backends.choose(_model_request(cell, kind, x.dtype, x, *sizes)) == "torch"


def run_library(
    cell: str,
    x: Tensor,
    hx,
    weights: list[Tensor],
    bias: bool,
    layers: int,
    directions: int,
    hidden: int,
    proj: int,
    relu: bool,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """A model by torch.nn's own path: y and the final states, shapes as ``infer``'s; None where the
    tensors are not all of one dtype on one device, which is said elsewhere."""
    hx = hx or zero_states(cell, x, layers * directions, hidden, proj)
    device, dtype = x.device, x.dtype
    for t in (*weights, *hx):
        if t.dtype is not dtype or t.device != device:
            return None
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *hx, *weights))
    plain = not wanted or backends.current_backend() == "torch"
    run = library.call if plain else library.differentiable
    y, *finals = run(cell, x, hx, weights, bias, layers, directions == 2, relu)
    return y, tuple(finals)


def wave_chunk(cell: str, x: Tensor, layers: int, hidden: int) -> int | None:
    """Steps of a chunk where so many layers of one direction on x [T, B, I], without flags or
    projection, are to run as a wave; None where one after another. Decided from sizes: no weight is
    read."""
    kind = x.device.type
    if kind != "cuda":
        # The CUDA backend, emulated. (On a CPU, what autocast casts differs with the cell.)
        if kind != "cpu" or backends.current_backend() != "cuda" or torch.is_autocast_enabled(kind):
            return None
    if torch.compiler.is_compiling() or observers.transformed():
        return None
    steps, rows = x.shape[:2]
    if type(steps) is not int or type(rows) is not int or not rows or not hidden:
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    request = _model_request(cell, kind, dtype, x, layers, 1, hidden, 0, True)
    if dtype not in ACC_DTYPE or backends.choose(request) != "cuda":
        return None
    from fused_rnn.cuda.operators import wave_chunk

    return wave_chunk(cell, x.device, dtype, rows, hidden, layers, steps)


def run_wave(
    cell: str,
    x: Tensor,
    layers: list[wavefront.WaveLayer],
    chunk: int,
    dropout: float,
    relu: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers of one direction in chunks of so many steps: y [T, B, H] and the final states
    [L, B, H]."""
    kind = x.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        inputs = []
        for layer in layers:
            given = LayerInputs(x, *layer[:4], None, layer.h0, layer.c0, None)
            given = given if low is None else cast_inputs(given, low, False)
            x = given.x  # cast once
            same_device(given)
            same_dtype(given)
            inputs.append(given)
        io = inputs[0].w_hh.dtype
        if any(given.w_hh.dtype != io for given in inputs):
            raise RuntimeError(
                "expected all layers in one dtype, got "
                + ", ".join(str(given.w_hh.dtype) for given in inputs)
            )
        layers = [wavefront.WaveLayer(*given[1:5], given.h0, given.c0) for given in inputs]
        spec = wavefront.WaveSpec(LayerSpec(cell, "cuda", (False,), relu=relu), chunk, dropout)
        kept: list[Tensor | None] = [None] * (len(layers) - 1)
        if dropout:  # drawn as for layers one after another
            ones = torch.ones((*x.shape[:2], inputs[0].w_hh.shape[2]), dtype=io, device=x.device)
            kept = [torch.nn.functional.dropout(ones, dropout) != 0 for _ in kept]
        if any(needs_gradient(given) for given in inputs):
            flat = (t for layer in layers for t in layer)
            y, *finals = wavefront.Wave.apply(spec, len(layers), x, *flat, *kept)
        else:
            y, *finals, _ = wavefront.forward(spec, x, layers, [*kept, None], training=False)
        return y, tuple(state.to(io) for state in finals if state is not None)

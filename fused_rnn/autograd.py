"""One layer's forward, its backward, and the derivatives of both.

A layer is the input projection, one scan of the waist, and in the backward pass the matrix products
that turn gate gradients into weight, bias and input gradients. ``Scan`` wraps it as one
``torch.autograd.Function``; its backward is ``ScanBackward``, which is differentiable again by
differentiating the reference on the saved inputs. Equations: docs/math.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn import observers, ops, reference
from fused_rnn.reference import ENDED, RESET


class LayerSpec(NamedTuple):
    """What is static about a layer: everything but its tensors."""

    cell: str  # lstm, gru or rnn
    backend: str  # whose operators run it
    reverse: tuple[bool, ...]  # one per stack entry
    reset_after: bool = True  # GRU: r is applied after the recurrent product, as torch.nn does
    relu: bool = False  # RNN: relu instead of tanh
    keep_gates: bool = True  # keep the tape, or rebuild it before the backward scan
    ragged: bool = False  # some rows may end early: flags has bit 0


class LayerInputs(NamedTuple):
    """The tensors of a layer, in the order of ``Scan.apply``.

    x [T, B, I], or gates_x [T, B, S, G*H] where w_ih is None; w_ih [S, G*H, I];
    w_hh [S, G*H, P]; b_ih, b_hh [S, G*H] or None; w_hr [S, P, H] or None; h0 [S, B, P];
    c0 [S, B, H] (LSTM); flags uint8 [T, B] or None. The weights and biases of a single entry may
    do without their first axis (``stacked`` adds it): a view is a node in the graph, and dear.
    """

    x: Tensor
    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    h0: Tensor
    c0: Tensor | None
    flags: Tensor | None


_DIFFERENTIABLE = LayerInputs._fields.index("flags")  # all inputs before flags
_WEIGHTS = slice(1, 6)


def stacked(inputs: LayerInputs) -> LayerInputs:
    """The inputs, their weights and biases with a stack axis."""
    if inputs.w_hh.dim() == 3:
        return inputs
    weights = (None if w is None else w.unsqueeze(0) for w in inputs[_WEIGHTS])
    return LayerInputs(inputs.x, *weights, *inputs[6:])


_unsafe_view = torch.ops.aten._unsafe_view.default


def _side_by_side(y: Tensor) -> Tensor:
    """y [T, B, S, P] of the waist as [T, B, S*P], which is no view of it: what a Function gives
    out may be changed in place."""
    return _unsafe_view(y, (y.shape[0], y.shape[1], y.shape[2] * y.shape[3]))


def merge_rows(x: Tensor) -> Tensor:
    """[T, B, ...] as [T*B, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def fold_bias(spec: LayerSpec, b_ih: Tensor | None, b_hh: Tensor | None, hidden: int):
    """The biases as the waist takes them: one for gates_x [S, G*H], added up in the arithmetic
    dtype, and b_hn [S, H] (GRU)."""
    if b_hh is None:
        return b_ih, None
    acc = ops.ACC_DTYPE[b_hh.dtype]
    if b_ih is not None and b_ih.dtype != acc:
        b_ih = b_ih.to(acc)
    if spec.cell != "gru" or not spec.reset_after:
        return (b_hh if b_ih is None else b_ih + b_hh), None
    b_rz, b_hn = b_hh[:, : 2 * hidden], b_hh[:, 2 * hidden :]
    if b_ih is None:
        return torch.nn.functional.pad(b_rz, (0, hidden)), b_hn
    return torch.cat((b_ih[:, : 2 * hidden] + b_rz, b_ih[:, 2 * hidden :]), 1), b_hn


def _without_padding(x: Tensor, flags: Tensor | None) -> Tensor:
    """x [T, B, ...] with zeros where rows have ended: whatever lies there, an infinity or NaN,
    must not meet a zero gradient."""
    if flags is None:
        return x
    ended = (flags & ENDED != 0).reshape(*flags.shape, *(1,) * (x.dim() - 2))
    return torch.where(ended, 0, x)


def project(spec: LayerSpec, x: Tensor, w_ih: Tensor | None, bias: Tensor | None) -> Tensor:
    """gates_x [T, B, S, G*H]: x W_ih^T + bias for the whole stack in one matrix product."""
    if w_ih is None:
        return x if bias is None else x + bias
    steps, rows, size = x.shape
    stack, width, _ = w_ih.shape
    batch_first = not x.is_contiguous() and x.transpose(0, 1).is_contiguous()
    x = x.transpose(0, 1) if batch_first else x
    if stack != 1:
        w_ih = w_ih.reshape(1, stack * width, size)
        bias = None if bias is None else bias.reshape(1, stack * width)
    rows_of_x = x.reshape(1, x.shape[0] * x.shape[1], size)
    if rows_of_x.stride()[1:] != (size, 1):
        # Whether other layouts come out of reshape as views hangs on the number of rows, and on the
        # layout the kernel does, and with it a row's bits.
        rows_of_x = rows_of_x.contiguous()
    gates_x = _operators(spec, rows_of_x, w_ih, bias)["matmul"](rows_of_x, w_ih.mT, bias, steps)
    if batch_first:
        return gates_x.view(rows, steps, stack, width).transpose(0, 1)
    return gates_x.view(steps, rows, stack, width)


def forward(spec: LayerSpec, inputs: LayerInputs, training: bool) -> tuple[Tensor, ...]:
    """Run a layer: (y, h_n, c_n, cells, gates) for the LSTM, (y, h_n, gates) for the GRU,
    (y, h_n) for the RNN; without cells and gates when not ``training``. y is [T, B, S*P]."""
    inputs = stacked(inputs)
    bias, b_hn = fold_bias(spec, inputs.b_ih, inputs.b_hh, inputs.w_hh.shape[2])
    gates_x = project(spec, inputs.x, inputs.w_ih, bias)
    y, *rest = forward_scan(spec, gates_x, b_hn, inputs, training)
    return _side_by_side(y), *rest


def _operators(spec: LayerSpec, *tensors: Tensor | None) -> dict:
    """The operators of a layer's backend for these tensors, past the dispatcher where nobody would
    know and it would have nothing to do, as it has for negative views. (To be called where no
    gradient is wanted.)"""
    if not observers.unwatched():
        return ops.family(spec.backend)
    for t in tensors:
        if t is not None and (type(t) not in observers.PLAIN or t.is_neg()):
            return ops.family(spec.backend)
    return ops.direct(spec.backend)


def forward_scan(
    spec: LayerSpec, gates_x: Tensor, b_hn: Tensor | None, inputs: LayerInputs, training: bool
) -> tuple[Tensor, ...]:
    """The forward scan alone, of whose ``inputs`` it takes what ``gates_x`` and ``b_hn`` do not
    hold; returns what ``forward`` does, but y as [T, B, S, P]."""
    reverse, flags, w_hh, h0 = spec.reverse, inputs.flags, inputs.w_hh, inputs.h0
    op = _operators(spec, gates_x, b_hn, *inputs[2:])
    if spec.cell == "rnn":
        return op["rnn_forward"](gates_x, w_hh, h0, flags, reverse, spec.relu)
    if spec.cell == "lstm":
        args = (gates_x, w_hh, inputs.w_hr, h0, inputs.c0, flags, reverse)
    else:
        args = (gates_x, w_hh, b_hn, h0, flags, reverse, spec.reset_after)
    if training:
        return op[f"{spec.cell}_forward"](*args, spec.keep_gates)
    return op[f"{spec.cell}_inference"](*args)


def reference_forward(spec: LayerSpec, inputs: LayerInputs) -> tuple[Tensor, ...]:
    """The differentiable outputs of ``forward`` by the reference, computed in the arithmetic dtype
    of the waist: (y [T, B, S*P], h_n, c_n, cells) for the LSTM, (y, h_n) for the others; y and h_n
    in w_hh's dtype."""
    io = inputs.w_hh.dtype
    acc = ops.ACC_DTYPE[io]
    cast = (None if t is None else t.to(acc) for t in inputs[:_DIFFERENTIABLE])
    y, h_n, *cells = reference_scan(spec, stacked(LayerInputs(*cast, inputs.flags)))
    return (y.flatten(2).to(io), h_n.to(io), *cells)


def reference_scan(spec: LayerSpec, inputs: LayerInputs) -> tuple[Tensor, ...]:
    """``reference_forward`` of stacked inputs with every operation in their own dtype, and y as
    [T, B, S, P]."""
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, flags = inputs
    bias, b_hn = fold_bias(spec, b_ih, b_hh, w_hh.shape[2])
    x = _without_padding(x, flags)
    if w_ih is not None:
        x = torch.einsum("tbi,sgi->tbsg", x, w_ih)
    gates_x = x if bias is None else x + bias.to(w_hh.dtype)
    common = {"flags": flags, "reverse": spec.reverse}
    if spec.cell == "lstm":
        return reference.lstm_scan(gates_x, w_hh, h0, c0, w_hr=w_hr, **common)
    if spec.cell == "gru":
        return reference.gru_scan(
            gates_x, w_hh, h0, b_hn=b_hn, reset_after=spec.reset_after, **common
        )
    return reference.rnn_scan(gates_x, w_hh, h0, relu=spec.relu, **common)


def entering(spec: LayerSpec, states: Tensor, s0: Tensor, flags: Tensor | None) -> Tensor:
    """The state that enters each step: states after each step [T, B, S, P], s0 [S, B, P]
    -> [T, B, S, P] in the states' dtype."""
    s0 = s0.to(states.dtype)
    parts = []
    for s, reverse in enumerate(spec.reverse):
        own, first = states[:, :, s], s0[s].unsqueeze(0)
        if reverse:
            part = torch.cat((own[1:], first))
            if flags is not None:  # the step processed before t is t + 1
                before = flags[1:].unsqueeze(-1)
                inner = torch.where(before & RESET != 0, 0, part[:-1])
                inner = torch.where(before & ENDED != 0, first, inner)
                part = torch.cat((inner, first))
        else:
            part = torch.cat((first, own[:-1]))
            if flags is not None:
                part = torch.where(flags.unsqueeze(-1) & RESET != 0, 0, part)
        parts.append(part)
    return parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, 2)


def _rebuild_gates(spec: LayerSpec, inputs: LayerInputs, h_prev: Tensor | None) -> Tensor:
    """The tape [T, B, S, K*H] from the layer's inputs and outputs, all steps at once."""
    x, w_ih, w_hh, b_ih, b_hh, _, _, _, flags = inputs
    size = w_hh.shape[2]
    bias, b_hn = fold_bias(spec, b_ih, b_hh, size)
    gates_x = project(spec, _without_padding(x, flags if spec.ragged else None), w_ih, bias)

    def recurrent(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """h [T, B, S, P] times w [S, N, P]^T -> [T, B, S, N]."""
        product = ops.family(spec.backend)["matmul"](merge_rows(h).transpose(0, 1), w.mT, b)
        return product.transpose(0, 1).reshape(*h.shape[:3], w.shape[1])

    if spec.cell == "lstm":
        return torch.cat(reference.lstm_activate(gates_x + recurrent(h_prev, w_hh)), -1)
    w_rz, w_n = w_hh[:, : 2 * size], w_hh[:, 2 * size :]
    gates_h = recurrent(h_prev, w_rz)
    if spec.reset_after:
        hn = recurrent(h_prev, w_n, b_hn)
        return torch.cat((*reference.gru_activate(gates_x, gates_h, hn), hn), -1)
    rz = torch.sigmoid(gates_x[..., : 2 * size] + gates_h)
    hn = recurrent(rz[..., :size] * h_prev, w_n)
    return torch.cat((rz, torch.tanh(gates_x[..., 2 * size :] + hn)), -1)


def backward(
    spec: LayerSpec,
    wanted: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    inputs: LayerInputs,
    tape: tuple[Tensor, ...],
) -> LayerInputs:
    """Gradients of a layer's inputs, None where not ``wanted``.

    ``grads`` are those of ``forward``'s differentiable outputs, ``tape`` is (y, cells, gates) for
    the LSTM, (y, gates) for the GRU and (y,) for the RNN.
    """
    want, single = LayerInputs(*wanted, False), inputs.w_hh.dim() == 2
    inputs = stacked(inputs)
    (dy, *grads), (y, *rest), (stack, _, size) = grads, tape, inputs.h0.shape
    sizes = (*y.shape[:2], stack, size)
    grads = (None if dy is None else dy.view(sizes), *grads)
    tape = (y.view(sizes), *rest)
    rebuild = spec.cell != "rnn" and not spec.keep_gates
    h_prev = None
    if want.w_hh or rebuild:
        h_prev = entering(spec, tape[0], inputs.h0, inputs.flags)
    gates = _rebuild_gates(spec, inputs, h_prev) if rebuild else tape[-1]
    scan = backward_scan(spec, grads, inputs, (*tape[:-1], gates))
    found = layer_gradients(spec, want, inputs, h_prev, (*tape[:-1], gates), scan)
    if not single:
        return found
    weights = (None if grad is None else grad.squeeze(0) for grad in found[_WEIGHTS])
    return LayerInputs(found.x, *weights, *found[6:])


class ScanGradients(NamedTuple):
    """What the backward scans return; None where the cell has no such."""

    dgates: Tensor
    dgates_hn: Tensor | None  # GRU
    dh0: Tensor
    dc0: Tensor | None  # LSTM
    dh: Tensor | None  # LSTM


def backward_scan(
    spec: LayerSpec,
    grads: tuple[Tensor | None, ...],
    inputs: LayerInputs,
    tape: tuple[Tensor, ...],
) -> ScanGradients:
    """The backward scan alone; arguments as ``backward``'s, with the tape's gates."""
    w_hh, flags = inputs.w_hh, inputs.flags
    op = _operators(spec, *grads, *inputs, *tape)
    if spec.cell == "lstm":
        dgates, dh0, dc0, dh = op["lstm_backward"](
            *grads, w_hh, inputs.w_hr, inputs.c0, *tape[1:], flags, spec.reverse
        )
        return ScanGradients(dgates, None, dh0, dc0, dh)
    if spec.cell == "gru":
        dgates, dgates_hn, dh0 = op["gru_backward"](
            *grads, w_hh, inputs.h0, *tape, flags, spec.reverse, spec.reset_after
        )
        return ScanGradients(dgates, dgates_hn, dh0, None, None)
    dgates, dh0 = op["rnn_backward"](*grads, w_hh, *tape, flags, spec.reverse, spec.relu)
    return ScanGradients(dgates, None, dh0, None, None)


def least_rows(steps: int, w_ih: Tensor, w_hh: Tensor) -> int:
    """The waist's ``least`` of the product for the gradient of an entry's input, w_ih [G*H, I] and
    w_hh [G*H, P]: as training.cpp has it, whose scans make the gradients of small layers."""
    weights = w_ih.numel() + w_hh.numel()
    small = w_ih.shape[1] < 32 or weights <= (24 if w_ih.element_size() == 2 else 160) << 10
    return 1 if small else steps


def layer_gradients(
    spec: LayerSpec,
    want: LayerInputs,
    inputs: LayerInputs,
    h_prev: Tensor | None,
    tape: tuple[Tensor, ...],
    found: ScanGradients,
) -> LayerInputs:
    """The gradients ``want`` marks, by matrix products over all steps of what the scan ``found``.
    h_prev is the state that enters each step, needed for w_hh's; the tape as ``backward_scan``'s,
    of which the GRU's reset-before variant and the projection need the gates."""
    flags, size = inputs.flags, inputs.w_hh.shape[2]
    dgates, dgates_hn, dh0, dc0, dh = found
    op = _operators(spec, *found, *inputs, h_prev, *tape)
    gates = tape[-1]

    def over_steps(left: Tensor, right: Tensor) -> Tensor:
        """sum over t, b of left [T, B, S, M] outer right [T, B, S, N] -> [S, M, N]."""
        left, right = merge_rows(left), merge_rows(right)
        return op["matmul"](left.permute(1, 2, 0), right.transpose(0, 1), None, 0)

    def summed(values: Tensor) -> Tensor:
        """sum over t, b of [T, B, S, N] -> [S, N], in the same bits for any number of threads."""
        if values.shape[2] * values.shape[3] > 1:
            return values.sum((0, 1))  # PyTorch shares out the columns, never the terms of one sum,
        ones = values.new_ones(()).expand(1, 1, values.shape[0] * values.shape[1])
        rows = merge_rows(values).reshape(1, -1, values.shape[2] * values.shape[3])
        return op["matmul"](ones, rows, None).view(1, 1)  # unless there is but one sum

    width = dgates.shape[2] * dgates.shape[3]  # of all stack entries
    dx = dw_ih = dw_hh = db_ih = db_hh = dw_hr = None
    after = spec.cell == "gru" and spec.reset_after
    x, w_ih = inputs.x, inputs.w_ih
    if want.x:
        if w_ih is None:
            dx = dgates
        else:
            rows = dgates.reshape(1, -1, width)
            least = least_rows(dgates.shape[0], w_ih[0], inputs.w_hh[0])
            dx = op["matmul"](rows, w_ih.reshape(1, width, -1), None, least).view(x.shape)
    if want.w_ih:
        x = _without_padding(x, flags if spec.ragged else None)
        columns = dgates.reshape(*dgates.shape[:2], 1, width)
        dw_ih = over_steps(columns, x.unsqueeze(2)).view(w_ih.shape)
    if want.w_hh:
        if spec.cell == "gru":
            d_n = dgates_hn if after else dgates[..., 2 * size :]
            n_operand = h_prev if after else gates[..., :size] * h_prev
            d_rz = dgates[..., : 2 * size]
            dw_hh = torch.cat((over_steps(d_rz, h_prev), over_steps(d_n, n_operand)), 1)
        else:
            dw_hh = over_steps(dgates, h_prev)
    if want.b_ih or want.b_hh:
        db_ih = summed(dgates)
        if want.b_hh and after:
            db_hh = torch.cat((db_ih[:, : 2 * size], summed(dgates_hn)), 1)
        elif want.b_hh:  # a tensor of its own: gradients are changed in place
            db_hh = db_ih.clone() if want.b_ih else db_ih
    if want.w_hr:
        o = gates[..., 3 * tape[1].shape[3] :]
        dw_hr = over_steps(dh, o * torch.tanh(tape[1]))

    found = LayerInputs(dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0, None)
    return LayerInputs(*as_wanted(want, found, inputs))


def as_wanted(want, found, inputs):
    """The gradients that are wanted, in the dtypes of what they are gradients of."""
    return (
        grad.to(given.dtype) if needed and grad is not None else None
        for grad, given, needed in zip(found, inputs, want)
    )


def _substitute(run, inputs, places):
    """``run(list of tensors)`` as a function of the tensors at ``places`` alone."""

    def function(*chosen):
        given = list(inputs)
        for k, tensor in zip(places, chosen, strict=True):
            given[k] = tensor
        return run(given)

    return function, tuple(inputs[k] for k in places)


def vjp(run, inputs, places, cotangents):
    """Gradients of ``run(inputs) -> outputs`` at ``places``; a cotangent of None is zero."""
    function, chosen = _substitute(run, inputs, places)
    outputs, pull = torch.func.vjp(function, *chosen)
    return pull(
        tuple(
            torch.zeros_like(out) if c is None else c.to(out.dtype)
            for out, c in zip(outputs, cotangents, strict=True)
        )
    )


def _jvp(run, inputs, tangents):
    """J u as the gradient of v -> v^T J, which is linear, at u: two reverse passes."""
    places = [k for k, t in enumerate(tangents) if t is not None]
    function, chosen = _substitute(run, inputs, places)
    outputs, pull = torch.func.vjp(function, *chosen)
    _, pull_twice = torch.func.vjp(pull, tuple(torch.zeros_like(out) for out in outputs))
    (found,) = pull_twice(tuple(tangents[k] for k in places))
    return found


_OUTPUTS = {"lstm": 4, "gru": 2, "rnn": 2}  # differentiable outputs of forward


def _run_forward(spec):
    """The reference forward as a function of a list of LayerInputs' tensors."""
    return lambda given: reference_forward(spec, LayerInputs(*given))


def _run_backward(spec, wanted):
    """The wanted gradients by the reference, as a function of [*grads, *inputs]: differentiable
    any number of times."""
    places = [k for k, needed in enumerate(wanted) if needed]
    count = _OUTPUTS[spec.cell]
    return lambda given: vjp(_run_forward(spec), given[count:], places, given[:count])


class ScanBackward(torch.autograd.Function):
    """The backward of a layer, itself differentiable.

    apply(spec, wanted, *grads, *inputs, *tape) -> the wanted gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(spec, wanted, *tensors):
        first = _OUTPUTS[spec.cell]
        last = first + len(LayerInputs._fields)
        results = backward(
            spec, wanted, tensors[:first], LayerInputs(*tensors[first:last]), tensors[last:]
        )
        return tuple(g for g, needed in zip(results, wanted, strict=False) if needed)

    @staticmethod
    def setup_context(ctx, args, output):
        ctx.spec, ctx.wanted, *tensors = args
        ctx.count = len(tensors)
        tensors = tensors[: _OUTPUTS[ctx.spec.cell] + len(LayerInputs._fields)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 : 2 + len(saved)]
        places = [k for k, needed in enumerate(needs) if needed and saved[k] is not None]
        found = vjp(_run_backward(ctx.spec, ctx.wanted), saved, places, cotangents)
        results: list = [None] * (2 + ctx.count)
        for k, grad in zip(places, found, strict=True):
            results[2 + k] = grad
        return tuple(results)


class Scan(torch.autograd.Function):
    """One layer with gradients: apply(spec, *LayerInputs) -> ``forward``'s training outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec, *tensors):
        return forward(spec, LayerInputs(*tensors), training=True)

    @staticmethod
    def setup_context(ctx, args, output):
        ctx.spec, *inputs = args
        ctx.set_materialize_grads(False)
        y, _, *rest = output
        tape = (y, *rest[-2:]) if ctx.spec.cell == "lstm" else (y, *rest)
        if ctx.spec.cell != "rnn":
            ctx.mark_non_differentiable(rest[-1])
        ctx.save_for_backward(*inputs, *tape)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        spec, count = ctx.spec, len(LayerInputs._fields)
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack a second time
        inputs, tape = saved[:count], saved[count:]
        wanted = tuple(ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE])
        grads = grads[: _OUTPUTS[spec.cell]]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            results = backward(spec, wanted, grads, LayerInputs(*inputs), tape)
            return (None, *results)
        function = ForwardModeScanBackward if observers.forward_mode() else ScanBackward
        found = iter(function.apply(spec, wanted, *grads, *inputs, *tape))
        return (None, *(next(found) if needed else None for needed in wanted), None)


class EagerScan(torch.autograd.Function):
    """``Scan`` where no transform and no compiler looks on: a Function whose forward has the
    context is called without its signature being looked up, a tenth of a small layer's time."""

    @staticmethod
    def forward(ctx, spec, *tensors):
        outputs = Scan.forward(spec, *tensors)
        Scan.setup_context(ctx, (spec, *tensors), outputs)
        return outputs

    backward = staticmethod(Scan.backward)


def scan_function():
    """The Function by which a layer is to be called now."""
    if observers.forward_mode():
        return ForwardModeScan
    return Scan if torch.compiler.is_compiling() or observers.transformed() else EagerScan


# Forward mode has classes of its own, because Dynamo refuses a Function with a jvp.


class ForwardModeScanBackward(ScanBackward):
    """``ScanBackward`` with forward-mode derivatives (forward over reverse)."""

    @staticmethod
    def jvp(ctx, _spec, _wanted, *tangents):
        saved = ctx.saved_tensors
        return _jvp(_run_backward(ctx.spec, ctx.wanted), saved, tangents[: len(saved)])


class ForwardModeScan(Scan):
    """``Scan`` with forward-mode derivatives."""

    @staticmethod
    def jvp(ctx, _spec, *tangents):
        found = _jvp(_run_forward(ctx.spec), ctx.saved_tensors, tangents)
        return found if ctx.spec.cell == "rnn" else (*found, None)

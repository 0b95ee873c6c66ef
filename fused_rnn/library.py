"""torch.nn's own path (oneDNN, cuDNN, ...) for a layer or a whole model, and derivatives of any
order of it, which cuDNN and oneDNN have not."""

import warnings

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from fused_rnn import observers
from fused_rnn.autograd import LayerInputs, LayerSpec, reference_forward, vjp

# Nodes of the graph that stand for a whole call and have no second derivative.
NODES = ("CudnnRnnBackward0", "MiopenRnnBackward0")


def call(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    bias: bool,
    layers: int,
    both: bool,
    relu: bool,
) -> tuple[Tensor, ...]:
    """torch.nn's own path on x [T, B, I], states [L*D, B, ...] and weights in its order: y, h_n and
    of the LSTM c_n."""
    common = (weights, bias, layers, 0.0, torch.is_grad_enabled(), both, False)
    states = tuple(state.contiguous() for state in states)  # x may lie as it likes
    given = states if cell == "lstm" else states[0]
    if not _are_copied(x, weights):
        return _path(cell, relu)(x, given, *common)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        return _path(cell, relu)(x, given, *common)


def _path(cell: str, relu: bool):
    if cell == "rnn":
        return torch._VF.rnn_relu if relu else torch._VF.rnn_tanh
    return torch._VF.lstm if cell == "lstm" else torch._VF.gru


def _are_copied(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether cuDNN may copy the weights, and torch warn of it: those of one layer of several and
    those in bfloat16 do not lie one after another in memory, as it has them. A copy for a whole
    sequence is nothing to warn of."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    if observers.transformed() or not all(type(w) in observers.PLAIN for w in weights):
        return True
    # Where they are all there is in their memory they are a module's; looking costs less than
    # silence.
    return weights[0].untyped_storage().nbytes() != sum(w.nbytes for w in weights)


def differentiable(cell: str, x: Tensor, states, weights, bias, layers, both, relu):
    """``call`` with derivatives of any order. What torch.nn's path is made of has them itself but
    for the nodes of libraries: a GPU's is given a hook, and an LSTM elsewhere, a node a layer on a
    CPU, stands inside a Function; so does everything where hooks may take what nodes save, for a
    node's hook wants that. (Gradients of many vectors at once a library's node has not.)"""
    # Here already, so that they are the node's own, which the hook wants.
    states = tuple(state.contiguous() for state in states)
    spec = LayerSpec(cell, "reference", (False, True)[: 1 + both], relu=relu)
    count, options = 1 + len(weights), (bias, layers, both, relu)

    def run(given):
        return call(cell, given[0], given[count:], given[1:count], *options)

    def reference(given):
        return _reference(spec, bias, layers, given[0], given[count:], given[1:count])

    tensors = (x, *weights, *states)
    packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if packed or (cell == "lstm" and not x.is_cuda):
        return LibraryCall.apply(run, reference, *tensors)
    outputs = run(tensors)
    node = outputs[0].grad_fn
    if node.name() in NODES:
        node.register_hook(_Again(reference, tensors, 1 + len(states)))
    return outputs


def _reference(spec: LayerSpec, bias: bool, layers: int, x: Tensor, hx, weights):
    """The outputs of ``call`` by the reference, layer by layer."""
    directions = len(spec.reverse)
    each, finals = len(weights) // (layers * directions), []
    for layer in range(layers):
        at = slice(layer * directions, (layer + 1) * directions)
        entries = [weights[k * each : (k + 1) * each] for k in range(at.start, at.stop)]
        own = [torch.stack(parts) for parts in zip(*entries)]
        biases = own[2:4] if bias else [None, None]
        w_hr = own[-1] if each > 2 + 2 * bias else None
        states = [*(state[at] for state in hx), None][:2]
        x, *final = reference_forward(spec, LayerInputs(x, *own[:2], *biases, w_hr, *states, None))
        finals.append(final[: len(hx)])
    return (x, *(torch.cat(parts).to(x.dtype) for parts in zip(*finals)))


class _Again:
    """A hook of a library's node: gradients that are to be differentiated again are made by
    reference(the node's inputs, in its order) in place of the node's own. It does not keep those
    inputs alive: the node does, until its last backward pass."""

    def __init__(self, reference, tensors, outputs: int):
        self.reference, self.outputs = reference, outputs
        self.inputs = [TensorWeakRef(t) for t in tensors]

    def __call__(self, found, grads):
        if not torch.is_grad_enabled():
            return None
        inputs = [held() for held in self.inputs]
        if any(t is None for t in inputs):
            raise RuntimeError(
                "no second derivatives of torch.nn's path whose saved tensors were given hooks"
                " afterwards; torch.autograd.graph.saved_tensors_hooks around the forward pass has"
            )
        places = [k for k, grad in enumerate(found) if grad is not None]
        made = iter(vjp(self.reference, inputs, places, grads[: self.outputs]))
        return tuple(None if grad is None else next(made) for grad in found)


class LibraryCall(torch.autograd.Function):
    """Torch.nn's own path with a backward that can itself be differentiated: apply(run, reference,
    *tensors) -> the outputs of run(list of tensors), of which reference(the same list) gives those
    that have derivatives of any order."""

    @staticmethod
    def forward(ctx, run, reference, *tensors):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with torch.enable_grad():
            outputs = run(leaves)
        ctx.reference, ctx.inner = reference, (leaves, outputs)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(out.detach() for out in outputs)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # also the check that none was changed in place
        places = [k for k, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if torch.is_grad_enabled():
            found = vjp(ctx.reference, saved, places, grads)
        else:
            leaves, outputs = ctx.inner
            given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [o for o, _ in given],
                [leaves[k] for k in places],
                [g for _, g in given],
                retain_graph=True,
                allow_unused=True,
            )
        results: list = [None] * (2 + len(saved))
        for k, grad in zip(places, found, strict=True):
            results[2 + k] = grad
        return tuple(results)

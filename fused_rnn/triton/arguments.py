"""What an operator is given: checked, and laid out as the kernels take it.

The messages are those of csrc/cpu/operators.cpp.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rnn.ops import ACC_DTYPE, OPERATORS


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


class Layer(NamedTuple):
    """One call: sizes, dtypes, device, direction, and what every kernel takes of them."""

    T: int
    B: int
    S: int
    H: int
    P: int
    io: torch.dtype
    acc: torch.dtype
    device: torch.device
    flags: tuple
    reverse: tuple

    def empty(self, *shape, dtype=None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)


def check_tensor(name: str, tensor: Tensor, shape: tuple, axes: str, device) -> None:
    check(tensor.device == device, f"{name} must be on {device}, as w_hh, got {tensor.device}")
    check(
        tuple(tensor.shape) == shape,
        f"{name} must have shape {axes} = {list(shape)}, got {list(tensor.shape)}",
    )


def layer_of(name: str, sequence: Tensor, w_hh: Tensor, gates: int, square: bool, flags, reverse):
    """The layer of gates [T, B, S, gates*H] or another sequence, checked against w_hh."""
    check(sequence.dim() == 4, f"{name} must have shape [T, B, S, n], got {list(sequence.shape)}")
    check(w_hh.dim() == 3, f"w_hh must have shape [S, G*H, P], got {list(w_hh.shape)}")
    check(
        w_hh.dtype in ACC_DTYPE,
        f"w_hh must be float32, float64, bfloat16 or float16, got {w_hh.dtype}",
    )
    T, B, S, _ = sequence.shape
    _, width, P = w_hh.shape
    H = width // gates
    check(T > 0, f"{name} must have at least one step, got {list(sequence.shape)}")
    check(
        H > 0 and P > 0 and H * gates == width,
        f"w_hh must have shape [S, {gates}*H, P] with H, P > 0, got {list(w_hh.shape)}",
    )
    check(not square or P == H, f"w_hh must have shape [S, G*H, H], got {list(w_hh.shape)}")
    check(
        w_hh.shape[0] == S,
        f"w_hh must have shape [S, {gates}*H, P] with S = {S}, got {list(w_hh.shape)}",
    )
    check(len(reverse) == S, f"reverse must have S = {S} values, got {len(reverse)}")
    device = w_hh.device
    if flags is None:
        wide = torch.zeros((1, 1), dtype=torch.int32, device=device).expand(T, B)
    else:
        check(flags.dtype == torch.uint8, f"flags must be uint8, got {flags.dtype}")
        check_tensor("flags", flags, (T, B), "[T, B]", device)
        # Masks made of bytes would have Triton lay out the operands of products as bytes.
        wide = flags.to(torch.int32)
    return Layer(
        T, B, S, H, P, w_hh.dtype, ACC_DTYPE[w_hh.dtype], device,
        (wide, wide.stride(0), wide.stride(1)), _reverse_bits(reverse),
    )  # fmt: skip


_BITS = 31  # stack entries whose directions one integer of 32 bits holds
# Kernels count the elements of a tile of rows, of at most this many, in 32 bits.
_TILE_ROWS, _INT32 = 32, 2**31


def _period(reverse) -> int | None:
    """The length of the pattern that ``reverse`` repeats, if one integer holds it."""
    S = len(reverse)
    if S <= _BITS:
        return max(S, 1)
    for period in range(1, _BITS + 1):
        if all(reverse[s] == reverse[s % period] for s in range(period, S)):
            return period
    return None


def _reverse_bits(reverse) -> tuple[int, int]:
    """The directions as kernels take them: bits, and after how many entries they repeat."""
    period = _period(reverse)
    return sum(int(bool(reverse[s])) << s for s in range(min(period, len(reverse)))), period


def whole_stack(name: str):
    """Decorates an operator: run it on groups of stack entries where one launch cannot take all,
    because their directions follow no short pattern or a row of all of them is too long."""
    spec = OPERATORS[name]
    axes = [None if a is None or "S" not in a else a.index("S") for a in spec.layouts]
    out_axes = [layout.index("S") for layout in spec.outputs]
    at_w_hh = next(k for k, a in enumerate(spec.layouts) if a == "S**")

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            reverse = next(a for a in args if isinstance(a, (list, tuple)))
            w_hh = args[at_w_hh]
            longest = max(1, _INT32 // (_TILE_ROWS * 4 * max(1, *w_hh.shape[1:])))
            group = min(longest, len(reverse) if _period(reverse) is not None else _BITS)
            if len(reverse) <= max(group, 1):
                return function(*args)
            parts = []
            for first in range(0, len(reverse), group):
                last = min(first + group, len(reverse))
                given = list(args)
                for k, (arg, axis) in enumerate(zip(args, axes, strict=True)):
                    if arg is reverse:
                        given[k] = arg[first:last]
                    elif axis is not None and arg is not None:
                        given[k] = arg.narrow(axis, first, last - first)
                parts.append(function(*given))
            columns = zip(*parts, strict=True)
            return tuple(torch.cat(c, axis) for c, axis in zip(columns, out_axes, strict=True))

        return run

    return decorate


def _dtype_ok(layer: Layer, name: str, tensor: Tensor) -> None:
    check(
        tensor.dtype in (layer.io, layer.acc),
        f"{name} must have the dtype of w_hh, or the one it is computed in, got {tensor.dtype}",
    )


def sequence_of(layer: Layer, name: str, tensor: Tensor | None, size: int, axes: str) -> tuple:
    """A sequence [T, B, S, size] as kernels take it: the tensor, and the strides of its first two
    axes in rows of S*size elements. None is one row of zeros."""
    if tensor is None:
        return torch.zeros(layer.S * size, dtype=layer.acc, device=layer.device), 0, 0
    shape = (layer.T, layer.B, layer.S, size)
    check_tensor(name, tensor, shape, axes, layer.device)
    _dtype_ok(layer, name, tensor)
    row = max(1, layer.S * size)
    t, b, s, one = tensor.stride()
    if (
        (layer.B > 1 and _TILE_ROWS * b >= _INT32)
        or (one != 1 and size > 1)
        or (s != size and layer.S > 1)
        or (t % row if layer.T > 1 else 0)
        or (b % row if layer.B > 1 else 0)
    ):
        tensor = tensor.contiguous()
        t, b, s, one = tensor.stride()
    return tensor, (t // row if layer.T > 1 else 0), (b // row if layer.B > 1 else 0)


def tape_of(layer: Layer, name: str, tensor: Tensor, size: int, axes: str) -> Tensor:
    """A sequence [T, B, S, size] of the tape, contiguous."""
    check_tensor(name, tensor, (layer.T, layer.B, layer.S, size), axes, layer.device)
    _dtype_ok(layer, name, tensor)
    return tensor.contiguous()


def state_of(layer: Layer, name: str, tensor: Tensor | None, size: int, axes: str) -> Tensor:
    """A state [S, B, size], contiguous; None is zeros."""
    if tensor is None:
        return torch.zeros((layer.S, layer.B, size), dtype=layer.acc, device=layer.device)
    check_tensor(name, tensor, (layer.S, layer.B, size), axes, layer.device)
    _dtype_ok(layer, name, tensor)
    return tensor.contiguous()


def weights_of(layer: Layer, name: str, tensor: Tensor | None, shape: tuple, axes: str):
    """Weights, checked; None stays None."""
    if tensor is None:
        return None
    check_tensor(name, tensor, shape, axes, layer.device)
    check(tensor.dtype == layer.io, f"{name} must have the dtype of w_hh, got {tensor.dtype}")
    return tensor


def padded(size: int) -> int:
    """A summed axis as kernels take it: rounded up to a multiple of 16."""
    return -(-size // 16) * 16


def pad(weights: Tensor) -> Tensor:
    """Weights [S, N, K], contiguous, the last axis filled up with zeros to ``padded(K)``."""
    extra = padded(weights.shape[2]) - weights.shape[2]
    return torch.nn.functional.pad(weights, (0, extra)) if extra else weights.contiguous()

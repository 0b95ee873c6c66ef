"""The waist's matrix product on Triton's kernels. Everything about a call but its memory is worked
out once for operands of the same kind: launches follow one another closely here."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fused_rnn import plan as planning
from fused_rnn.ops import ACC_DTYPE
from fused_rnn.plan import on
from fused_rnn.precision import precision_of
from fused_rnn.triton import matmul
from fused_rnn.triton.arguments import check
from fused_rnn.triton.launch import TL_DTYPE, Launcher, device_model


class Kind(NamedTuple):
    """What kernels are compiled for, of an operand."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool  # its address is a multiple of 16

    @classmethod
    def of(cls, x: Tensor) -> "Kind":
        return cls(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)

    def told(self) -> tuple[int, ...]:
        """Strides, 0 along axes of one element, where they say nothing."""
        return tuple(s if n > 1 else 0 for s, n in zip(self.strides, self.shape, strict=True))

    def reads_wide(self) -> bool:
        """Whether a kernel can read it 16 bytes at a time, by what Triton compiles for: one axis
        lies without gaps, it and all other strides are multiples of 16."""
        strides = self.told()
        return (
            any(s == 1 and n % 16 == 0 for s, n in zip(strides, self.shape, strict=True))
            and all(s == 1 or s % 16 == 0 for s in strides)
            and self.aligned
        )


def _operand_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """What operands are multiplied in: the 16-bit dtype of either, else their own; float32 where
    they have two different ones of 16 bits."""
    if a.itemsize == b.itemsize:
        return a if a == b else torch.float32
    return min(a, b, key=lambda dtype: dtype.itemsize)


class Recipe(NamedTuple):
    """How a product of two kinds of operands is launched."""

    shape: tuple[int, int, int]  # of the result
    acc: torch.dtype  # its dtype
    splits: int = 1  # parts of the sums
    before: tuple = ()  # arguments between a and b
    between: tuple = ()  # between b and bias
    after: tuple = ()  # after the result
    product: Launcher | None = None  # None for an empty result
    sum: Launcher | None = None


@functools.lru_cache(maxsize=4096)
def _recipe(a: Kind, b: Kind, bias: Kind | None, precision: str) -> Recipe:
    for name, kind, axes in (("a", a, "[N, M, K]"), ("b", b, "[N, K, L]")):
        check(len(kind.shape) == 3, f"{name} must have shape {axes}, got {list(kind.shape)}")
        check(
            kind.dtype in ACC_DTYPE,
            f"{name} must be float32, float64, bfloat16 or float16, got {kind.dtype}",
        )
    (N, M, K), L = a.shape, b.shape[2]
    acc = ACC_DTYPE[a.dtype]
    for name, kind, shape, axes in (
        ("b", b, (N, K, L), "[N, K, L]"),
        ("bias", bias, (N, L), "[N, L]"),
    ):
        if kind is None:
            continue
        check(kind.device == a.device, f"{name} must be on {a.device}, as a, got {kind.device}")
        check(
            tuple(kind.shape) == shape,
            f"{name} must have shape {axes} = {list(shape)}, got {list(kind.shape)}",
        )
        check(kind.dtype in ACC_DTYPE, f"{name} must be a floating dtype, got {kind.dtype}")
        check(ACC_DTYPE[kind.dtype] == acc, f"{name} must be float64 where a is, and only there")
    if 0 in (N, M, L):
        return Recipe((N, M, L), acc)
    device = device_model(a.device)
    io = _operand_dtype(a.dtype, b.dtype)
    chunk = planning.matmul_chunk(K, L)
    splits = max(1, triton.cdiv(K, chunk))
    wide = L % 16 == 0 and a.reads_wide() and b.reads_wide()
    along_k = a.strides[2] == 1 and b.strides[1] == 1
    plan = planning.matmul_plan(device, N * M * splits, L, io, precision, wide, along_k)
    blocks = (chunk if splits > 1 else K + plan.block_k - 1) // plan.block_k
    tiles = triton.cdiv(M, plan.block_m) * triton.cdiv(L, plan.block_l)
    k_step = next(step for step in (plan.block_k, 16, 1) if K % step == 0)
    sizes = (M, K, L, blocks, splits, 16 if M % 16 == 0 else 1, k_step)
    tile = plan.block_m, plan.block_l, plan.block_k
    options = planning.options(device, plan)
    launches = Launcher(matmul.matmul_tiles, (tiles * N * splits, 1, 1), options)
    add_up = None
    if splits > 1:
        add_up = Launcher(matmul.sum_parts, (triton.cdiv(N * M * L, 512), 1, 1), {})
    after = (*sizes, bias is not None, TL_DTYPE[io], *tile, precision)
    return Recipe((N, M, L), acc, splits, a.told(), b.told(), after, launches, add_up)


def matrix_product(a: Tensor, b: Tensor, bias: Tensor | None, least: int = 1) -> Tensor:
    """The waist's matmul, which is the same for any number of rows."""
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    precision = precision_of(
        device_model(a.device), a.device.type, _operand_dtype(a.dtype, b.dtype)
    )
    kinds = Kind.of(a), Kind.of(b), None if bias is None else Kind.of(bias)
    recipe = _recipe(*kinds, precision)
    out = torch.empty(recipe.shape, dtype=recipe.acc, device=a.device)
    if recipe.product is None:
        return out
    parts = out if recipe.sum is None else out.new_empty((recipe.splits, *out.shape))
    stream = planning.stream_of(a.device) if a.is_cuda else None
    with on(a.device):
        bias = out if bias is None else bias
        recipe.product(
            a, *recipe.before, b, *recipe.between, bias, parts, *recipe.after, stream=stream
        )
        if recipe.sum is not None:
            recipe.sum(parts, out, out.numel(), recipe.splits, 512, stream=stream)
    return out

"""The error budget at the sizes of a GPU, where ``testing.check``, which computes on the CPU, would
take minutes, and of float32 by TF32."""

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn import plan, testing
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case


class Number(NamedTuple):
    """How numbers are held and multiplied: a dtype, and for float32 the precision of products."""

    dtype: torch.dtype
    precision: str | None = None

    def __str__(self):
        return f"{str(self.dtype)[6:]}{f'-{self.precision}' if self.precision else ''}"


NUMBERS = [
    *(Number(torch.float32, precision) for precision in plan.PRECISIONS),
    *(Number(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]

# Draws of the inputs that plain PyTorch's error is the largest of: at first, and where a result
# would be over the budget with those.
DRAWS = 3, 12


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to TF32's 10 bits, to nearest, as cuBLAS and our kernels do."""
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# Of torch's products of matrices, the place of the first operand among the arguments; and what had
# to be here besides if the reference used it.
OPERANDS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
UNROUNDED = {getattr(torch.ops.aten, name).default for name in ("mv", "addmv", "dot", "vdot")}


class ProductsByTf32(TorchDispatchMode):
    """Matrix products take their operands rounded to TF32, and sum in float32.

    What torch's setting allows, cuBLAS need not do. On an H100 plain PyTorch's largest error was
    what rounded operands give in most cases, and a half to a quarter of that with rows of 200 bytes
    (no multiple of 16) and with small products, which it then takes in float32. Errors of some of
    the products are no yardstick for errors of all."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in UNROUNDED, f"{function} is not rounded here"
        first = OPERANDS.get(function)
        if first is not None:
            rounded = map(to_tf32, args[first : first + 2])
            args = (*args[:first], *rounded, *args[first + 2 :])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def plain_products(tf32: bool):
    """Plain PyTorch's float32 products in float32, whatever torch's default is, or by TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        with ProductsByTf32() if tf32 else contextlib.nullcontext():
            yield
    finally:
        matmul.fp32_precision = before


@functools.lru_cache(maxsize=32)  # a case's backends and precisions share it
def exact_of(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Every output and gradient of plain PyTorch in float64."""
    return testing.evaluate(case, "plain", device, dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def error_of(case: Case, device: str, tf32: bool) -> dict[str, float]:
    """Plain PyTorch's error in the case's dtype; for a float64 case in float32, which
    ``testing.budget`` scales."""
    low = torch.float32 if case.dtype == torch.float64 else case.dtype
    with plain_products(tf32):
        plain = testing.evaluate(case, "plain", device, dtype=low)
    exact = exact_of(case, device)
    return {name: testing.error(plain[name], exact[name]) for name in exact}


def yardsticks(case: Case, device: str, tf32: bool, draws: int):
    """(exact, plain_errors) as ``testing.yardsticks``, taken on the device itself.

    The case is the first of the draws, so with TF32 the rounding of inputs and weights, which is
    nearly all of the error, is the same on both sides: our errors are those of plain PyTorch within
    some hundredths, and half the budget, whatever the draw."""
    errors: dict[str, float] = {}
    for draw in range(draws):
        drawn = dataclasses.replace(case, seed=case.seed + 1000 * draw)
        for name, value in error_of(drawn, device, tf32).items():
            errors[name] = max(errors.get(name, 0.0), value)
    return exact_of(case, device), errors


def compare_relu(case: Case, device: str, name: str, got, exact, error: float):
    """``testing.compare`` where a zero may be one by rounding alone.

    Whether a sum so near zero that rounding decides is above it, the budget says nothing of. Zeros
    that must be, of rows that have ended and of all that hangs on them, are the zeros of the same
    case by tanh, which is zero nowhere else."""
    must = exact_of(dataclasses.replace(case, relu=False), device)[name] == 0
    tiny = torch.finfo(exact.dtype).tiny
    exact = torch.where((exact == 0) & ~must, tiny, exact)
    return testing.compare(name, got, exact, error, case.dtype)


def assert_holds(
    case: Case, backend: str, device: str, number: Number, note=lambda name, value: None
) -> None:
    """Every output and gradient of a case, on memory full of NaN, within the budget: plain
    PyTorch's error in that dtype times one (16 bits), two (float32; TF32 against TF32) or four
    (tf32x3 against float32), plus the grain.

    tf32x3: an operand is two parts of 11 bits, whose product lacks some 2^-22 of its value, a few
    roundings in float32. But a tensor core cuts its sum off after each instruction instead of
    rounding it: n of them, one behind the other, take some n / 2 units in the last place off the
    sum so far, always towards zero, where the errors of n roundings grow by the square root of n.
    Simulated with normal operands, a sum of K terms in one such chain (n = 3 K / 8) is wrong by 3,
    7 and 15 times what float32's is at K = 64, 1024 and 4096; in parts of 32 terms, each begun from
    zero and added by a rounded addition, by 1.3, 0.3 and 0.2 times. Four times is for the latter:
    no sum may be one chain."""
    with testing.poisoned_memory(), fp32_precision(number.precision):
        got = testing.evaluate(case, backend, device)
    scale = 2 if number.precision == "tf32x3" else 1  # and twice that by ``testing.budget``
    for draws in DRAWS:
        exact, errors = yardsticks(case, device, number.precision == "tf32", draws)
        verdicts = [
            compare_relu(case, device, name, got[name], exact[name], scale * errors[name])
            if case.relu
            else testing.compare(name, got[name], exact[name], scale * errors[name], case.dtype)
            for name in exact
        ]
        if not any(verdict.fault for verdict in verdicts):
            break
    worst = max(verdicts, key=lambda v: v.error / v.budget if v.budget else v.error)
    note("worst", f"{worst.name}: {worst.error:.2e} of {worst.budget:.2e}")
    faults = [f"{v.name}: {v.fault} ({v.error:.2e} of {v.budget:.2e})" for v in verdicts if v.fault]
    assert not faults, f"{case} {number}\n" + "\n".join(faults)

"""Which CUDA kernel a scan gets, and how long a step should take: pure Python, as plan.py is.

The block scan keeps an entry's weights on one multiprocessor; its account of threads and shared
memory is csrc/cuda's, told here again so that any machine can plan (a test holds the two together).
Whatever has no block scan goes step by step, with torch's matrix products.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_rnn.plan import (
    EXCHANGE_CYCLES,
    EXPONENTIAL_INSTRUCTIONS,
    KERNEL_US,
    L2_CYCLES,
    LAUNCH_US,
    MMA_CYCLES,
    TYPICAL_ROWS,
    Device,
    Shape,
    arithmetic_cycles,
    rate_of,
)
from fused_rnn.plan import chosen as triton_chosen

KERNELS = ("step", "block")  # as the operators number them
PRODUCTS = ("bfloat16", "float16", "tf32", "tf32x3", "ieee")  # as csrc/cuda/params.h does
HALVES = PRODUCTS[:2]  # of 16-bit numbers
ROWS = 8  # of the batch, of one block
UNITS = 16  # of a warp


@dataclass(frozen=True)
class Block:
    """The block scan: one block of threads runs the sequence for 8 rows of an entry.

    max_units: the size of its kernel; held: steps along k, of 32 bytes of a row each, whose weights
    are in registers, the others being in shared memory.
    """

    max_units: int
    held: int
    threads: int
    shared: int

    kind = "block"


@dataclass(frozen=True)
class Step:
    """One matrix product of torch and one pointwise kernel a step (two each for some cells)."""

    kind = "step"


def product_of(shape: Shape) -> str:
    """How a shape's recurrent product is taken: a member of ``PRODUCTS``."""
    if shape.dtype == torch.float32:
        return shape.precision
    return str(shape.dtype).removeprefix("torch.")


def _sizes(cell: str, product: str, backward: bool) -> tuple[tuple[int, int], ...]:
    """(max_units, held) of the block scans there are, as sizes_of in csrc/cuda/block_scan.cu."""
    if product == "ieee":
        return (({"lstm": 96, "gru": 112, "rnn": 192}[cell], 0),)
    half = product in HALVES
    if half and cell == "lstm":
        if backward:
            return ((64, 4), (128, 6 if product == "float16" else 7), (176, 2))
        return ((64, 4), (128, 8), (192, 3))
    if half and cell == "gru":
        return ((64, 4), (128, 8), *(((192, 5),) if backward else ((192, 7), (208, 2))))
    if half:
        return ((64, 4), (128, 8), (256, 12 if backward else 10))
    if cell == "lstm":
        if product == "tf32x3":
            return ((64, 2), (112, 2)) if backward else ((64, 4), (128, 4))
        return ((64, 8), (128, 6 if backward else 8))
    if cell == "gru":
        return ((64, 6), (128, 7)) if backward else ((64, 8), (128, 8))
    return ((64, 8), (192, 20))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def operand_bytes(shape: Shape, max_units: int) -> int:
    """Shared memory of the two operands of a block scan: parts x sources x 8 rows, each padded."""
    product = product_of(shape)
    half = product in HALVES
    parts = 2 if product == "tf32x3" else 1
    if half and shape.cell == "rnn" and not shape.backward:
        parts = 3  # the state unrounded
    sources = shape.gates if shape.backward else 1
    row = _ceil(max_units * (2 if half else 4), 64) * 64 + 16
    return 2 * parts * sources * ROWS * row


def weight_bytes(shape: Shape, held: int) -> int:
    """Shared memory of the weights that are not in registers."""
    product = product_of(shape)
    warps = _ceil(shape.H, UNITS)
    if product == "ieee":
        return 4 * shape.gates * warps * UNITS * (warps * UNITS + 4)
    steps = warps * (1 if product in HALVES else 2)
    return 16 * 32 * shape.gates * warps * max(0, steps - held)


def block_kernel(shape: Shape) -> Block | None:
    """The block scan of a shape, whatever the device: the smallest its units fit. None where there
    is none."""
    if shape.proj or not shape.reset_after or shape.dtype == torch.float64:
        return None
    for max_units, held in _sizes(shape.cell, product_of(shape), shape.backward):
        if max_units >= shape.H:
            shared = operand_bytes(shape, max_units) + weight_bytes(shape, held)
            return Block(max_units, held, 32 * _ceil(shape.H, UNITS), shared)
    return None


def block_plan(device: Device, shape: Shape) -> Block | None:
    """The block scan of a shape, where the device has the shared memory and tensor cores for it."""
    found = block_kernel(shape)
    if found is None or device.backend != "cuda" or int(device.arch) < 80:
        return None
    return found if found.shared <= device.shared else None


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one step and what they are made of: what keeps a multiprocessor busy
    (products or the shared memory they read, then the gates), device memory, what one block takes
    by itself, launches."""

    plan: Block | Step
    products: float
    shared: float
    arithmetic: float
    sequences: float
    latency: float
    launches: float

    @property
    def total(self) -> float:
        busy = max(self.products, self.shared) + self.arithmetic
        return max(busy, self.sequences, self.latency, self.launches)


# Of a block scan's exponential with its quotient where operands have 11 bits: two instructions of
# the special function unit, which does 16 a clock where others go at 128. Elsewhere library calls.
FAST_EXPONENTIAL = 2 * 128 / 16


def predict(device: Device, shape: Shape, plan: Block | Step) -> Prediction:
    """The model: what one step of a scan should take on a device."""
    us_per_cycle = 1e-3 / device.clock
    gates, out, rows = shape.gates, shape.proj or shape.H, shape.S * shape.B
    per_unit = (gates * 4 + 4 + shape.itemsize) * (2 if shape.backward else 1)
    sequences = rows * shape.H * per_unit / device.memory * 1e-3
    if isinstance(plan, Step):
        phases = 2 if shape.two_phases else 1
        wide = 8 if shape.dtype == torch.float64 else 4  # products are in the arithmetic's dtype
        share = device.clock * device.multiprocessors * 1e3
        return Prediction(
            plan,
            gates * shape.H * out * rows / (share * device.fma / (wide / 4)),
            gates * shape.H * out * wide * shape.S / device.l2 * 1e-3,
            arithmetic_cycles(shape, rows * shape.H, EXPONENTIAL_INSTRUCTIONS) / share,
            2 * sequences,
            2 * phases * (KERNEL_US + L2_CYCLES * us_per_cycle),
            2 * phases * LAUNCH_US,
        )
    product = product_of(shape)
    size = 2 if product in HALVES else 4
    units = plan.threads // 2
    each = _ceil(shape.S * _ceil(shape.B, ROWS), device.multiprocessors)  # blocks, in all
    together = max(1, min(each, device.shared // plan.shared, 65536 // (plan.threads * 168)))
    work = gates * units * units * ROWS / rate_of(device, shape)
    # Every warp reads every operand, and its own weights that are not in registers.
    parts = operand_bytes(shape, plan.max_units) // (2 * ROWS * plan.max_units * size)
    read = plan.threads // 32 * parts * ROWS * units * size + weight_bytes(shape, plan.held)
    chain = units * size / 32 * MMA_CYCLES * (3 if product == "tf32x3" else 1)
    exponential = FAST_EXPONENTIAL
    if product == "ieee":
        chain = units * 4.0  # one multiply-add after another
    if product in ("ieee", "tf32x3"):
        exponential = EXPONENTIAL_INSTRUCTIONS
    arithmetic = arithmetic_cycles(shape, units * ROWS, exponential)
    alone = max(work, read / 128, chain) + arithmetic + EXCHANGE_CYCLES + L2_CYCLES / 4
    return Prediction(
        plan,
        work * each * us_per_cycle,
        read / 128 * each * us_per_cycle,
        arithmetic * each * us_per_cycle,
        sequences,
        alone * _ceil(each, together) * us_per_cycle,
        0.0,
    )


def choices(device: Device, shape: Shape) -> list[Prediction]:
    """Every kernel that can run a shape, the fastest by prediction first."""
    plans = [block_plan(device, shape), Step()]
    return sorted((predict(device, shape, p) for p in plans if p), key=lambda p: p.total)


@lru_cache(maxsize=4096)
def chosen(device: Device, shape: Shape) -> Prediction:
    """The kernel a scan gets, with what a step should take. The kind is decided for a typical
    batch, because a row's bits may not depend on how many rows are beside it."""
    kind = choices(device, replace(shape, B=TYPICAL_ROWS))[0].plan.kind
    return next(p for p in choices(device, shape) if p.plan.kind == kind)


def choose(device: Device, shape: Shape) -> Block | Step:
    """The kernel a scan gets. Every shape gets one."""
    return chosen(device, shape).plan


def blocks_win(device: Device, shape: Shape) -> bool:
    """Whether a shape has block scans, forward and backward, that are predicted to take no longer
    than the Triton backend's kernels: what the automatic choice wants of this backend."""
    for backward in (False, True):
        if choose(device, replace(shape, backward=backward)).kind != "block":
            return False
    return chosen(device, shape).total <= triton_chosen(device, shape).total

"""Which kernel and which tiles a scan gets, and how long a step should take: pure Python.

The choice depends on (device, cell, S, B, H, dtype) through a small model of bytes, products and
synchronisations. Its constants were measured on an H100, or are published figures of other GPUs;
docs/performance.md has its predictions beside what has been measured. Nothing here imports Triton
or touches a GPU, so all of it is tested anywhere.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_rnn.ops import GATES

PRECISIONS = ("ieee", "tf32", "tf32x3")  # of products; float32 alone has a choice


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU.

    backend: "cuda" or "hip", as Triton calls its targets; arch: 80, 90, 100, "gfx942", ...;
    shared: bytes of shared memory one program may have; clock: GHz; memory, l2: GB/s of the whole
    GPU; l2_one: bytes a clock one multiprocessor reads from L2; mma16, mma32, fma: multiply-adds a
    clock a multiprocessor does on 16-bit and TF32 operands by tensor cores, and on float32 by FMA;
    together: blocks that may wait for one another, None for one a multiprocessor.
    """

    name: str
    backend: str
    arch: int | str
    multiprocessors: int
    shared: int
    clock: float
    memory: float
    l2: float
    l2_one: float = 64
    mma16: int = 1024
    mma32: int = 512
    fma: int = 128
    together: int | None = None

    @property
    def warp(self) -> int:
        return 64 if self.backend == "hip" else 32

    @property
    def has_tf32(self) -> bool:
        return self.arch == "gfx942" if self.backend == "hip" else int(self.arch) >= 80


DEVICES = {
    device.name: device
    for device in (
        Device("A100", "cuda", 80, 108, 163 * 1024, 1.41, 1935, 4000),
        Device("H100", "cuda", 90, 132, 227 * 1024, 1.98, 3350, 5500),
        Device("H200", "cuda", 90, 132, 227 * 1024, 1.98, 4800, 5500),
        Device("B200", "cuda", 100, 148, 227 * 1024, 1.85, 8000, 9000),
        Device("RTX 5090", "cuda", 120, 170, 99 * 1024, 2.4, 1792, 6000, mma16=256, mma32=128),
        Device("MI300X", "hip", "gfx942", 304, 64 * 1024, 2.1, 5300, 10000, fma=256),
    )
}


@lru_cache
def device_of(index: int) -> Device:
    """The model of a GPU that is here, by torch's index: its own sizes, and the rates of the known
    GPU of its architecture, or of the A100."""
    has = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch: int | str = has.gcnArchName.split(":")[0]
        like, backend = DEVICES["MI300X"], "hip"
    else:
        arch, backend = has.major * 10 + has.minor, "cuda"
        like = DEVICES["A100"]
        for known in DEVICES.values():
            if known.backend == "cuda" and known.arch <= arch:
                like = known
    for known in DEVICES.values():
        if known.name in has.name:
            like = known
    return replace(
        like,
        name=has.name,
        backend=backend,
        arch=arch,
        multiprocessors=has.multi_processor_count,
        shared=getattr(has, "shared_memory_per_block_optin", like.shared),
    )


_NOTHING = contextlib.nullcontext()


def on(device: torch.device):
    """The context in which kernels go to a tensor's device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The current stream's handle, as Triton asks for it; ``torch.cuda.current_stream`` makes an
    object of several microseconds."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


@dataclass(frozen=True)
class BlockPlan:
    """Block scan: the whole sequence in one launch, weights held by every program."""

    block_h: int
    block_b: int
    num_warps: int
    num_stages: int = 1

    kind = "block"


@dataclass(frozen=True)
class TilePlan:
    """Tiles of units and rows: one launch a step, or (streamed) one for the whole sequence."""

    block_u: int
    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    streamed: bool = False

    @property
    def kind(self) -> str:
        return "streamed" if self.streamed else "step"


@dataclass(frozen=True)
class Shape:
    """A scan as the plan sees it: cell with its variant, stack, rows, units, size of the hidden
    state where it is projected (0 elsewhere), dtype, precision of products, direction of time."""

    cell: str
    S: int
    B: int
    H: int
    dtype: torch.dtype
    proj: int = 0
    reset_after: bool = True
    precision: str = "ieee"
    backward: bool = False

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def two_phases(self) -> bool:
        """Whether a step is two products, one after the other."""
        return bool(self.proj) or (self.cell == "gru" and not self.reset_after)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tensor_cores(shape: Shape) -> bool:
    return shape.itemsize == 2 or shape.precision != "ieee"


def held_bytes(shape: Shape) -> int:
    """Bytes of weights a block scan holds: padded to a power of two, twice with 3xTF32, whose
    weights are kept as two numbers each."""
    block_h = max(32, _power_of_2(shape.H))
    copies = 2 if shape.precision == "tf32x3" else 1
    return copies * shape.gates * block_h * block_h * shape.itemsize


def block_plan(device: Device, shape: Shape) -> BlockPlan | None:
    """The block scan of a shape, or None where the weights do not fit a multiprocessor."""
    block_h = max(32, _power_of_2(shape.H))
    if shape.proj or shape.dtype == torch.float64 or block_h > 128:
        return None
    if device.backend == "hip":  # weights stay in registers: 512 of 4 bytes a lane, half for them
        if held_bytes(shape) > 128 * 1024:
            return None
    elif held_bytes(shape) + _STAGING > device.shared:
        return None
    if not _tensor_cores(shape):
        # Products by FMA keep their operands in registers.
        return BlockPlan(block_h, 16, 8) if block_h == 32 else None
    # Too little room in registers (the compile tests say where): 3xTF32, which has every operand
    # twice; units beyond 64 in odd sizes, in float32, on AMD, or on Blackwell for the LSTM, and of
    # float32 except on Hopper, which multiplies straight from shared memory.
    odd = shape.H % 16 != 0
    blackwell = device.backend == "cuda" and int(device.arch) >= 100
    if shape.precision == "tf32x3" and (block_h > 32 or blackwell):
        return None
    if block_h == 128 and shape.itemsize == 4 and (odd or device.arch != 90):
        return None
    if block_h == 128 and odd and device.backend == "hip":
        return None
    if block_h == 128 and odd and blackwell and shape.cell == "lstm":
        return None
    warps = {32: 4, 64: 8 if device.backend == "cuda" else 4, 128: 8}[block_h]
    # Eight rows where much else takes registers: a step reads, keeps and writes up to 20 values for
    # each of its units, and where H is odd each of these has an address of its own. AMD's smallest
    # matrix instruction has 16 columns.
    crowded = block_h == 128 or odd or shape.precision == "tf32x3"
    crowded = crowded or (block_h == 64 and shape.itemsize == 4)
    return BlockPlan(block_h, 8 if crowded and device.backend == "cuda" else 16, warps)


# Shared memory of a block scan besides its weights: operands on their way between layouts, and
# alignment. The compile tests hold every configuration against the target's limit.
_STAGING = 16 * 1024


def tile_plan(device: Device, shape: Shape, streamed: bool) -> TilePlan | None:
    """Tiles of the step path, or of the streamed scan (None for two-phase cells)."""
    if streamed and shape.two_phases:
        return None
    stages = 2 if device.backend == "hip" else 4
    # No more threads than a tile has elements: what threads hold twice, they would read and write
    # twice, some after others have written.
    warps = min(8, 16 * 16 // device.warp)
    if shape.dtype == torch.float64:
        return TilePlan(16, 16, 16, 4, 1, streamed)
    if not _tensor_cores(shape):
        return TilePlan(16, 16, 32, warps, 2, streamed)
    block_k = 128 // shape.itemsize
    if streamed:
        # One program does all units: large tiles, all warps, to keep many loads in flight.
        if shape.precision == "tf32x3":
            return TilePlan(16, 16, block_k, warps, stages, True)
        return TilePlan(32, 16, block_k, 8, stages, True)
    # Enough programs for all multiprocessors, each with as few weights to read as possible. Odd
    # sizes are read element by element and need the registers of twice as many threads.
    if shape.H % 16 == 0 and shape.proj % 16 == 0:
        warps = 4
    return TilePlan(16, 16 if shape.B <= 32 else 32, block_k, warps, stages)


def options(device: Device, plan) -> dict:
    """Triton's options for a plan. NVIDIA's assembler would rather spill a little than use more
    registers than 128 or 168; it is told that all may be used."""
    found = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if device.backend == "cuda":
        threads = 32 * plan.num_warps * getattr(plan, "programs", 1)
        found["maxnreg"] = min(255, 65536 // threads // 8 * 8)
    return found


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one step and what they are made of; ``measured``: how many times their sum it
    took on an H100."""

    plan: BlockPlan | TilePlan
    products: float
    weights: float
    sequences: float
    arithmetic: float
    latency: float
    launches: float
    measured: float = 1.0

    @property
    def total(self) -> float:
        busy = max(self.products, self.weights, self.sequences) + self.arithmetic
        return (busy + max(self.latency, self.launches)) * self.measured


def measured(shape: Shape, kind: str) -> float:
    """How many times what the model makes of their parts Triton's kernels took on an H100: block
    scans of 64 and 128 units, and one step of 512 a launch. (Streamed scans are taken to be like
    block scans.)"""
    if kind != "step":
        wide = 1.7 if shape.itemsize == 4 else 1.0
        return wide * (2.3 if shape.backward else 1.8)
    if shape.itemsize == 2:
        return 1.6 if shape.backward else 0.9
    return 5.4 if shape.backward else 1.7


# Cycles, measured on an H100: shared memory 29 (a write, a barrier and a read: about 100), L2 277,
# one tensor core instruction of a chain 24; about 30 instructions an exponential with its quotient.
EXCHANGE_CYCLES = 100
L2_CYCLES = 277
MMA_CYCLES = 24
EXPONENTIALS = {"lstm": 5, "gru": 3, "rnn": 1}  # of a unit, forward; the LSTM's backward has one
EXPONENTIAL_CYCLES = 35
# What a unit of a row costs a multiprocessor, which does 128 instructions a clock: some 20 for each
# exponential with its quotient, and 8 for each value read, written or formed.
EXPONENTIAL_INSTRUCTIONS, VALUE_INSTRUCTIONS = 20, 8
# From the host: one launch of a loop that reuses a compiled kernel (a virtual machine's beside an
# H100 took 11 to 16); on the GPU: from the end of one kernel to the start of the next.
LAUNCH_US = 10.0
KERNEL_US = 1.0


def arithmetic_cycles(shape: Shape, elements: int) -> float:
    """Clocks of a multiprocessor for the gates of so many units and rows."""
    count = EXPONENTIALS[shape.cell]
    if shape.backward:
        count = 1 if shape.cell == "lstm" else 0
    values = 3 * shape.gates + 3 if shape.backward else 2 * shape.gates + 3
    instructions = count * EXPONENTIAL_INSTRUCTIONS + values * VALUE_INSTRUCTIONS
    return elements * instructions / 128


def rate_of(device: Device, shape: Shape) -> float:
    """Multiply-adds a clock of one multiprocessor."""
    if shape.itemsize == 4:
        return {"ieee": device.fma, "tf32": device.mma32, "tf32x3": device.mma32 / 3}[
            shape.precision
        ]
    return device.mma16 if shape.itemsize == 2 else device.fma / 2


def predict(device: Device, shape: Shape, plan: BlockPlan | TilePlan) -> Prediction:
    """The model: what one step of a scan should take on a device."""
    gates, out = shape.gates, shape.proj or shape.H
    us_per_cycle = 1e-3 / device.clock
    rate = rate_of(device, shape)
    tiles = shape.S * -(-shape.B // plan.block_b)
    # Gates in and out (float32), y, and what the backward scan adds.
    per_unit = (gates * 4 + 4 + shape.itemsize) * (2 if shape.backward else 1)
    sequences = shape.S * shape.B * shape.H * per_unit / device.memory * 1e-3
    exponentials = EXPONENTIAL_CYCLES * EXPONENTIALS[shape.cell] / (2 if shape.backward else 1)
    weights_bytes = gates * shape.H * out * shape.itemsize
    phases = 2 if shape.two_phases else 1
    if isinstance(plan, BlockPlan):
        waves = -(-tiles // device.multiprocessors)
        work = gates * plan.block_h**2 * plan.block_b
        chain = plan.block_h / 16 * MMA_CYCLES * (2 if shape.backward else 1)
        latency = (chain + 2 * EXCHANGE_CYCLES * phases + exponentials + L2_CYCLES / 4) * waves
        elements = plan.block_h * plan.block_b * waves
        return Prediction(
            plan,
            work / rate * waves * us_per_cycle,
            0.0,
            sequences,
            arithmetic_cycles(shape, elements) * us_per_cycle,
            latency * us_per_cycle,
            0.0,
            measured(shape, plan.kind),
        )
    blocks = -(-shape.H // plan.block_u)
    padded = 4 if gates == 3 and not shape.backward else gates
    work = padded * plan.block_u * out * plan.block_b
    loads = -(-(gates * shape.H if shape.backward else out) // plan.block_k)
    chain = loads * max(plan.block_k / 16 * MMA_CYCLES, L2_CYCLES / plan.num_stages) + L2_CYCLES
    latency = (chain + 2 * EXCHANGE_CYCLES + exponentials) * phases
    if plan.streamed:
        waves = -(-tiles // device.multiprocessors)
        weights = weights_bytes / device.l2_one * waves * us_per_cycle
        total = latency * (blocks + 1) / 2 * waves * us_per_cycle  # two blocks overlap
        elements = plan.block_u * plan.block_b * blocks * waves
        return Prediction(
            plan,
            work * blocks / rate * waves * us_per_cycle,
            weights,
            sequences,
            arithmetic_cycles(shape, elements) * us_per_cycle,
            total,
            0.0,
            measured(shape, plan.kind),
        )
    waves = -(-tiles * blocks // device.multiprocessors)
    weights = weights_bytes * tiles / device.l2 * 1e-3
    elements = plan.block_u * plan.block_b * waves
    return Prediction(
        plan,
        work / rate * waves * us_per_cycle,
        weights,
        sequences,
        arithmetic_cycles(shape, elements) * us_per_cycle,
        latency * us_per_cycle + KERNEL_US * phases,
        LAUNCH_US * phases,
        measured(shape, plan.kind),
    )


def choices(device: Device, shape: Shape) -> list[Prediction]:
    """Every kernel that can run a shape, the fastest by prediction first."""
    plans = [
        block_plan(device, shape),
        tile_plan(device, shape, streamed=True),
        tile_plan(device, shape, streamed=False),
    ]
    return sorted((predict(device, shape, p) for p in plans if p), key=lambda p: p.total)


# The batch for which the kind of kernel is decided, whatever the batch is: kinds differ in the
# order of their sums, and a row's bits may not depend on how many rows are beside it.
TYPICAL_ROWS = 32


@lru_cache(maxsize=4096)
def chosen(device: Device, shape: Shape) -> Prediction:
    """The kernel and tiles a scan gets, with what a step should take."""
    kind = choices(device, replace(shape, B=TYPICAL_ROWS))[0].plan.kind
    return next(p for p in choices(device, shape) if p.plan.kind == kind)


def choose(device: Device, shape: Shape) -> BlockPlan | TilePlan:
    """The kernel and tiles a scan gets. Every shape gets some."""
    return chosen(device, shape).plan


@dataclass(frozen=True)
class MatmulPlan:
    """Tiles of the matrix product; programs: how many a multiprocessor shall hold at a time, one's
    loads and stores behind another's products."""

    block_m: int
    block_l: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1


def matmul_block_k(dtype: torch.dtype, precision: str) -> int:
    """Terms a step of the product takes; in float32, unless in plain TF32, also the terms that are
    summed by themselves before they are added to the total."""
    if dtype.itemsize == 2:
        return 64
    return 32 if dtype == torch.float32 and precision == "tf32" else 16


def matmul_plan(
    device: Device,
    rows: int,
    L: int,
    dtype: torch.dtype,
    precision: str,
    aligned: bool = True,
    along_k: bool = True,
) -> MatmulPlan:
    """Tiles by the rows and width of the result, parts of its sums counted as rows, the dtype,
    whether all operands can be read 16 bytes at a time, and whether both lie along k, which is what
    weights and the dtype make of a projection but not of its gradients.

    A row's bits may not depend on the number of rows, so nothing here that rows decide may change
    the order of an element's sum: block_k is ``matmul_block_k`` for all, and every tile that can be
    had instead of another takes the same kind of instruction, which has one depth in k. FMA takes
    one term after another in any tile. Hopper multiplies by wgmma where tiles have 64 rows or a
    multiple and warps come in fours, by mma.sync where there are two warps, for which ``along_k``
    decides in TF32; earlier GPUs by mma.sync in any tile. Of AMD's and Blackwell's instructions
    less is known, so rows decide nothing there.
    """
    block_k = matmul_block_k(dtype, precision)
    cuda, hopper = device.backend == "cuda", device.backend == "cuda" and device.arch == 90
    if dtype == torch.float64:
        return MatmulPlan(32, 32, block_k, 4, 1)
    if precision == "tf32x3":
        if hopper and aligned:
            return MatmulPlan(128, 64, block_k, 8, 3)
        if hopper:  # eight warps would share 64 rows of wgmma by doing some of them twice
            return MatmulPlan(64, 64, block_k, 4, 2)
        return MatmulPlan(64, 64, block_k, 8, 2)
    few = cuda and int(device.arch) < 100
    few = few and -(-rows // 128) * -(-L // 128) < device.multiprocessors
    if dtype == torch.float32 and precision == "ieee":
        if few or not cuda or not aligned:
            return MatmulPlan(64, 64, block_k, 8, 2)
        return MatmulPlan(128, 64, block_k, 8, 3, 2 if int(device.arch) < 100 else 1)
    if not aligned:  # read element by element, each with an address in a register
        return MatmulPlan(64, 64, block_k, 8, 1)
    block_l = 64 if L <= 64 else 128
    if not hopper:
        return MatmulPlan(128, block_l, block_k, 8, 3 if cuda and device.shared > 160 * 1024 else 2)
    # (As measured on an H100. wgmma takes TF32 along k alone, and Triton turns other operands round
    # through registers and shared memory, which takes three times as long.)
    if dtype == torch.float32 and not along_k:
        return MatmulPlan(64, block_l, block_k, 2, 3)
    wide = L >= 256 and -(-rows // 128) * -(-L // 256) >= device.multiprocessors
    if dtype == torch.float32:
        # Operands are rounded in registers, and b goes back to shared memory: three programs, so
        # that two have products to do meanwhile.
        return (
            MatmulPlan(128, 256, block_k, 8, 3)
            if wide
            else MatmulPlan(64, block_l, block_k, 4, 3, 3)
        )
    if few:
        return MatmulPlan(64, block_l, block_k, 4, 3, 2)
    return (
        MatmulPlan(128, 256, block_k, 8, 4) if wide else MatmulPlan(128, block_l, block_k, 8, 3, 2)
    )


def matmul_chunk(K: int, L: int) -> int:
    """Terms summed by one program. Sums beyond 4096 terms, which are weight gradients as a rule,
    are shared out, the more the narrower the result: it has some four times as many rows as
    columns, so this makes about 256 tiles of 128 by 128; partial sums have to be stored, and none
    is shorter than 1024. Beyond 16384 terms even wide results are. Depends on K and L alone: a
    row's bits may not depend on the rows."""
    if K <= 4096:
        return -(-max(K, 1) // 128) * 128
    room = max(1, min(64, 8192 // L))
    parts = min(room, max(1, (1 << 20) // (L * L), -(-K // 16384)))
    return -(-max(1024, -(-K // parts)) // 128) * 128

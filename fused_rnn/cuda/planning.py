"""Which CUDA kernel a scan gets, and how long a step should take: pure Python, as plan.py is.

The block scan keeps an entry's weights on one multiprocessor, the grid scan on many; the account of
threads and shared memory is csrc/cuda's, told here again so that any machine can plan (a test holds
the two together). Whatever has neither goes step by step, with torch's matrix products.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_rnn.ops import CELLS as CELLS  # in the order in which params.h numbers them
from fused_rnn.plan import (
    EXCHANGE_CYCLES,
    EXPONENTIALS,
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

KERNELS = ("step", "block", "grid", "wide grid")  # as the operators number them
PRODUCTS = ("bfloat16", "float16", "tf32", "tf32x3", "ieee")  # as csrc/cuda/params.h does
HALVES = PRODUCTS[:2]  # of 16-bit numbers
COLUMNS = 8  # of one tensor core product: rows of the batch, of which a block scan has 8 or 4
UNITS = 16  # of a warp of a block scan, of a block of a grid scan
WARPS = 8  # of a block of a grid scan
GROUP = 16  # rows of a grid scan's batch tile that take a step together


@dataclass(frozen=True)
class Block:
    """The block scan: one block of threads runs the sequence for 8 rows of an entry, or 4.

    max_units: the size of its kernel; held: steps along k, of 32 bytes of a row each, whose weights
    are in registers, the others being in shared memory.
    """

    rows: int
    max_units: int
    held: int
    threads: int
    shared: int

    kind = "block"
    kernel = KERNELS.index(kind)


@dataclass(frozen=True)
class Grid:
    """The grid scan: 16 units or 32 to a block, all blocks at the same time, the state through L2.

    rows: of a batch tile; held: pieces of a warp's weights that are in registers; slices: blocks of
    an entry and tile; shared: bytes of shared memory of each.
    """

    rows: int
    units: int
    held: int
    slices: int
    shared: int

    kind = "grid"

    @property
    def kernel(self) -> int:
        return KERNELS.index("grid" if self.units == UNITS else "wide grid")


@dataclass(frozen=True)
class Step:
    """One matrix product of torch and one pointwise kernel a step (two each for some cells)."""

    kind = "step"
    kernel = KERNELS.index(kind)
    rows = 0


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
        return ((64, 7), (128, 6)) if backward else ((64, 8), (128, 8))
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
    return 2 * parts * sources * COLUMNS * row


def weight_bytes(shape: Shape, held: int) -> int:
    """Shared memory of the weights that are not in registers."""
    product = product_of(shape)
    warps = _ceil(shape.H, UNITS)
    if product == "ieee":
        return 4 * shape.gates * warps * UNITS * (warps * UNITS + 4)
    steps = warps * (1 if product in HALVES else 2)
    return 16 * 32 * shape.gates * warps * max(0, steps - held)


def block_kernel(shape: Shape, rows: int = COLUMNS) -> Block | None:
    """The block scan of a shape for so many rows a block, whatever the device: the smallest its
    units fit. None where there is none."""
    if shape.proj or not shape.reset_after or shape.dtype == torch.float64:
        return None
    for max_units, held in _sizes(shape.cell, product_of(shape), shape.backward):
        if max_units >= shape.H:
            shared = operand_bytes(shape, max_units) + weight_bytes(shape, held)
            return Block(rows, max_units, held, 32 * _ceil(shape.H, UNITS), shared)
    return None


def block_plan(device: Device, shape: Shape) -> Block | None:
    """The block scan of a shape, where the device has the shared memory and tensor cores for it: of
    four rows a block, whose gates take half the time, as long as that keeps no multiprocessor busy
    twice. (A row has the same bits in either.)"""
    half = COLUMNS // 2
    few = shape.S * _ceil(shape.B, half) <= device.multiprocessors
    found = block_kernel(shape, half if few else COLUMNS)
    if found is None or device.backend != "cuda" or int(device.arch) < 80:
        return None
    return found if found.shared <= device.shared else None


def _held(shape: Shape, units: int) -> int:
    """Pieces of a warp's weights a grid scan has in registers, as held_of in
    csrc/cuda/grid_scan.cu."""
    half = product_of(shape) in HALVES
    if shape.cell == "rnn" or (shape.backward and half):
        return 8 if half and not shape.backward else 12 if units == UNITS else 4
    return 2 if product_of(shape) == "ieee" and not shape.backward else 3


def scatters(shape: Shape) -> bool:
    """Whether a backward grid scan hands round sums instead of the gates' gradients: where these
    are more bytes than 8, a float32 written and read, for a unit and row."""
    return shape.backward and shape.gates * shape.itemsize > 8


def _gathers_back(shape: Shape) -> bool:
    return shape.backward and not scatters(shape)


def grid_tiles(shape: Shape, units: int) -> int:
    """Tiles of 16 rows in a piece of a grid scan's weights."""
    return units // UNITS if _gathers_back(shape) else shape.gates


def grid_weight_bytes(shape: Shape, units: int) -> int:
    """Shared memory of a block's weights that are not in registers."""
    pieces = _ceil(_ceil(shape.H, 64 // shape.itemsize), WARPS)
    if _gathers_back(shape):
        pieces *= shape.gates
    return WARPS * max(0, pieces - _held(shape, units)) * grid_tiles(shape, units) * 2 * 32 * 16


def grid_kernel(shape: Shape, rows: int, units: int = UNITS) -> Grid | None:
    """The grid scan of a shape for batch tiles of so many rows and blocks of so many units,
    whatever the device. None where there is none: 32 units have backward scans that gather the
    gradients of several gates."""
    if shape.proj or not shape.reset_after or shape.dtype == torch.float64:
        return None
    if units != UNITS and (not _gathers_back(shape) or shape.cell == "rnn"):
        return None
    tiles = grid_tiles(shape, units)
    products = tiles * 2 * (512 if scatters(shape) else WARPS * UNITS * 8 * 4)
    states = (2 if shape.cell == "lstm" else 1) * units // UNITS
    states *= _ceil(rows, GROUP) * 32 * WARPS * 4
    shared = products + grid_weight_bytes(shape, units) + states
    return Grid(rows, units, _held(shape, units), _ceil(shape.H, units), shared)


def grid_plan(device: Device, shape: Shape) -> Grid | None:
    """The grid scan of a shape with the rows and units that are predicted to be fastest, where its
    blocks fit the device, one a multiprocessor."""
    fitting = grid_kernels(device, shape)
    return min(fitting, key=lambda plan: predict(device, shape, plan).total, default=None)


def grid_kernels(device: Device, shape: Shape) -> list[Grid]:
    """The grid scans of a shape, without those of more rows than a smaller one needs, whose blocks
    fit the device."""
    fitting: list[Grid] = []
    if device.backend != "cuda" or int(device.arch) < 80:
        return fitting
    for rows, units in itertools.product(TILE_ROWS, (UNITS, 2 * UNITS)):
        found = grid_kernel(shape, rows, units)
        if found is None or (fitting and rows >= shape.B + GROUP):
            continue
        if found.shared <= device.shared and found.slices <= blocks_together(device):
            fitting.append(found)
    return fitting


TILE_ROWS = (8, 16, 32, 48, 64, 80, 96, 112, 128)


def blocks_together(device: Device) -> int:
    """Blocks of a grid scan the device runs at the same time: one fills a multiprocessor."""
    return device.multiprocessors if device.together is None else device.together


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one step and what they are made of: what keeps a multiprocessor busy
    (products or the memory they read, then the gates), device memory, what one block takes by
    itself, launches."""

    plan: Block | Grid | Step
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


# What one warp's instructions take. Measured on an H100: with two warps on each scheduler, which is
# what the registers leave room for, one instruction of a warp every six clocks in a block scan and
# every five in a grid scan, most of them waiting for the one before. Counted in the machine code:
# what a step has of them besides the gates; what a slot has for each exponential with its quotient
# (library calls where precision is full) and for each value read, written or formed. Of a block's
# backward scan and of a grid's with 32 units, as they were measured: more besides, less a slot.
BLOCK_ISSUE, GRID_ISSUE = 6.0, 5.0
BLOCK_INSTRUCTIONS, GRID_INSTRUCTIONS = 110, 350
BLOCK_BACKWARD_INSTRUCTIONS, WIDE_GRID_INSTRUCTIONS = 380, 650
EXPONENTIAL_OF_LANE, EXACT_EXPONENTIAL_OF_LANE = 12, 30
VALUE_OF_LANE, BACKWARD_VALUE_OF_LANE, BLOCK_BACKWARD_VALUE_OF_LANE = 6, 9, 5
# What scattering adds to the bytes it moves.
SCATTERING = 1.3
# Instructions of all warps a clock of a multiprocessor that has enough of them.
ISSUED = 2.4


def lane_instructions(shape: Shape, slots: int, block: bool) -> float:
    """Instructions of a warp for the gates of so many slots a lane of a block scan or a grid's."""
    exact = product_of(shape) in ("ieee", "tf32x3")
    exponential = EXACT_EXPONENTIAL_OF_LANE if exact else EXPONENTIAL_OF_LANE
    if shape.backward:
        count, values = int(shape.cell == "lstm"), 3 * shape.gates + 3
        value = BLOCK_BACKWARD_VALUE_OF_LANE if block else BACKWARD_VALUE_OF_LANE
        return slots * (count * exponential + values * value)
    count, values = EXPONENTIALS[shape.cell], 2 * shape.gates + 3
    return slots * (count * exponential + values * VALUE_OF_LANE)


# A grid's blocks come round by a count in L2: measured from the last store of an operand to its
# first load, and what each further block adds.
GRID_BARRIER_CYCLES, GRID_BLOCK_CYCLES = 1650, 2
# Of what several groups of rows in a tile take one after another, the part nothing hides.
GRID_GROUPS = 0.9


def predict_grid(device: Device, shape: Shape, plan: Grid, sequences: float) -> Prediction:
    """The model of a grid scan: groups of rows follow one another through a step, each with its
    products, its gates and its way through L2, and little of one is hidden behind another's."""
    us_per_cycle = 1e-3 / device.clock
    size = shape.itemsize
    parts = 3 if size == 2 and shape.cell == "rnn" and not shape.backward else 1
    sources = shape.gates if shape.backward else 1
    tiles, scattering = grid_tiles(shape, plan.units), scatters(shape)
    rows = min(plan.rows, _ceil(shape.B, COLUMNS) * COLUMNS)
    groups, in_group = _ceil(rows, GROUP), min(rows, GROUP)
    launch = max(1, blocks_together(device) // plan.slices)  # pairs
    pairs = shape.S * _ceil(shape.B, plan.rows)
    waves, side_by_side = _ceil(pairs, launch), min(pairs, launch)
    # Of one group, in clocks: products, meanwhile the operand (scattering the parcels, written and
    # read) and the weights in shared memory; what warps pass through shared memory; the gates.
    work = shape.gates * plan.units * shape.H * parts * in_group / rate_of(device, shape)
    steps = shape.gates * plan.units * shape.H * parts / (tiles * UNITS * (32 // size)) / WARPS
    chain = steps * MMA_CYCLES * tiles / max(4, tiles)  # of a warp, four sums or more side by side
    traffic = in_group * shape.H * (8 * SCATTERING if scattering else size * parts * sources)
    traffic = max(
        traffic / device.l2_one, traffic * plan.slices * side_by_side * device.clock / device.l2
    )
    in_shared = grid_weight_bytes(shape, plan.units) / 128
    if product_of(shape) == "ieee":  # handing operands round takes longer than multiplying them
        work, chain = 3 * work, 3 * chain
    passed = shape.gates * size if scattering else 2 * tiles * 4  # a warp, for a unit and row
    sums = WARPS * UNITS * in_group * passed / 128
    instructions = GRID_INSTRUCTIONS if plan.units == UNITS else WIDE_GRID_INSTRUCTIONS
    instructions += lane_instructions(shape, plan.units // UNITS, block=False)
    arithmetic = GRID_ISSUE * instructions
    exchange = GRID_BARRIER_CYCLES + GRID_BLOCK_CYCLES * plan.slices + L2_CYCLES
    group = max(work, chain, traffic, in_shared) + sums + arithmetic + exchange
    several = GRID_GROUPS if groups > 1 and not scattering else 1.0
    scale = groups * waves * us_per_cycle
    return Prediction(
        plan,
        max(work, chain) * scale,
        max(traffic, in_shared) * scale,
        (sums + instructions * WARPS / ISSUED) * scale,
        sequences,
        group * several * scale,
        0.0,
    )


def predict(device: Device, shape: Shape, plan: Block | Grid | Step) -> Prediction:
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
            arithmetic_cycles(shape, rows * shape.H) / share,
            2 * sequences,
            2 * phases * (KERNEL_US + L2_CYCLES * us_per_cycle),
            2 * phases * LAUNCH_US,
        )
    if isinstance(plan, Grid):
        return predict_grid(device, shape, plan, sequences)
    product = product_of(shape)
    size = 2 if product in HALVES else 4
    units = plan.threads // 2
    each = _ceil(shape.S * _ceil(shape.B, plan.rows), device.multiprocessors)  # blocks, in all
    together = max(1, min(each, device.shared // plan.shared, 65536 // (plan.threads * 168)))
    work = gates * units * units * COLUMNS / rate_of(device, shape)
    # Every warp reads every operand, and its own weights that are not in registers.
    parts = operand_bytes(shape, plan.max_units) // (2 * COLUMNS * plan.max_units * size)
    read = plan.threads // 32 * parts * COLUMNS * units * size + weight_bytes(shape, plan.held)
    chain = units * size / 32 * MMA_CYCLES * (3 if product == "tf32x3" else 1)
    if product == "ieee":
        chain = units * 4.0  # one multiply-add after another
    instructions = BLOCK_BACKWARD_INSTRUCTIONS if shape.backward else BLOCK_INSTRUCTIONS
    instructions += lane_instructions(shape, plan.rows // 2, block=True)
    alone = max(work, read / 128, chain) + BLOCK_ISSUE * instructions + EXCHANGE_CYCLES
    return Prediction(
        plan,
        work * each * us_per_cycle,
        read / 128 * each * us_per_cycle,
        instructions * plan.threads / 32 / ISSUED * each * us_per_cycle,
        sequences,
        alone * _ceil(each, together) * us_per_cycle,
        0.0,
    )


def choices(device: Device, shape: Shape) -> list[Prediction]:
    """Every kernel that can run a shape, the fastest by prediction first."""
    plans = [block_plan(device, shape), grid_plan(device, shape), Step()]
    return sorted((predict(device, shape, p) for p in plans if p), key=lambda p: p.total)


@lru_cache(maxsize=4096)
def chosen(device: Device, shape: Shape) -> Prediction:
    """The kernel a scan gets, with what a step should take. The kind is decided for a typical
    batch, because a row's bits may not depend on how many rows are beside it."""
    kind = choices(device, replace(shape, B=TYPICAL_ROWS))[0].plan.kind
    return next(p for p in choices(device, shape) if p.plan.kind == kind)


def choose(device: Device, shape: Shape) -> Block | Grid | Step:
    """The kernel a scan gets. Every shape gets one."""
    return chosen(device, shape).plan


# Of one launch of a wave, forward or backward: what the host takes for its handful of operators,
# called from Python, and what the GPU takes besides the scan's steps, to read weights, project a
# chunk and pass it on. The host's is half of what a layer's call took on a virtual machine beside
# an H100, the GPU's an estimate; where they cost more, waves do not pay.
WAVE_HOST_US = 400.0
WAVE_GPU_US = 25.0
# How many times faster a wave has to be predicted than layers one after another.
WAVE_CAUTION = 1.2


@dataclass(frozen=True)
class Wave:
    """Layers side by side, a chunk of steps a launch (fused_rnn/wavefront.py), beside the same
    layers one after another: predicted microseconds, forward and backward."""

    chunk: int
    total: float
    alone: float


@lru_cache(maxsize=4096)
def wave(device: Device, shape: Shape, layers: int, steps: int) -> Wave | None:
    """The best wave of so many layers of a shape, for which S is one. None where there is none: the
    layers' scans do not keep their weights on the chip, or get other kernels side by side, whose
    sums are in another order."""
    if layers < 2:
        return None
    alone = side_by_side = 0.0
    for backward in (False, True):
        ways = [w for w in scans_of_wave(shape, layers) if w.backward == backward]
        one, *_, several = found = [chosen(device, way) for way in ways]
        if one.plan.kind == "step" or any(p.plan.kind != one.plan.kind for p in found):
            return None
        # Gates and their gradients are gathered from their launches: read and written once more.
        again = 8 * layers * shape.B * shape.gates * shape.H / device.memory * 1e-3
        alone += one.total
        side_by_side += several.total + again

    def launch(count: int) -> float:
        return max(2 * WAVE_HOST_US, count * side_by_side + 2 * WAVE_GPU_US)

    def total(chunk: int) -> float:
        whole, rest = divmod(steps, chunk)
        return (whole + layers - 1) * launch(chunk) + (layers * launch(rest) if rest else 0)

    chunks = {-(-steps // parts) for parts in range(2, min(steps, 64) + 1)}
    if not chunks:
        return None
    best = min(chunks, key=total)
    alone = layers * max(2 * WAVE_HOST_US, steps * alone + 2 * WAVE_GPU_US)
    return Wave(best, total(best), alone)


def scans_of_wave(shape: Shape, layers: int) -> list[Shape]:
    """The scans of a wave's launches, forward and backward, from one layer to all of them."""
    ways = itertools.product(range(1, layers + 1), (False, True))
    return [replace(shape, S=count, backward=backward) for count, backward in ways]


def wave_chunk(device: Device, shape: Shape, layers: int, steps: int) -> int | None:
    """Steps of a chunk where layers side by side are predicted to be faster; None elsewhere."""
    found = wave(device, shape, layers, steps)
    return found.chunk if found and found.total * WAVE_CAUTION < found.alone else None


def scans_win(device: Device, shape: Shape) -> bool:
    """Whether a shape has scans that keep their weights on the chip, forward and backward, and they
    are predicted to take no longer than the Triton backend's kernels: what the automatic choice
    wants of this backend."""
    both = [replace(shape, backward=backward) for backward in (False, True)]
    if any(choose(device, way).kind == "step" for way in both):
        return False
    ours, theirs = (sum(of(device, way).total for way in both) for of in (chosen, triton_chosen))
    return ours <= theirs

"""The registry of cases: shapes named after what people use a recurrent layer for."""

import difflib
import math
import random
from dataclasses import dataclass, replace
from itertools import product

CELLS = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Case:
    """One shape of one use. `use/variant` is its name.

    state: an initial state is passed in, as a caller does who carries it from call to call.
    min_length: rows have lengths drawn from [min_length * T, T]; None means all rows are full.
    reset_rate: probability that a (step, row) starts a new episode.
    quick: the cells that run in the default selection; empty means only with --full.
    """

    use: str
    variant: str
    T: int
    B: int
    I: int
    H: int
    cells: tuple = ("LSTM", "GRU")
    modes: tuple = MODES
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    state: bool = False
    min_length: float | None = None
    reset_rate: float = 0.0
    quick: tuple = ()

    @property
    def name(self):
        return f"{self.use}/{self.variant}"

    def __post_init__(self):
        unknown = set(self.cells + self.quick) - set(CELLS) or set(self.modes) - set(MODES)
        if unknown:
            raise ValueError(f"{self.name}: unknown {sorted(unknown)}")
        if min(self.T, self.B, self.I, self.H, self.layers) < 1:
            raise ValueError(f"{self.name}: T, B, I, H and layers must be positive")
        if self.proj and (self.cells != ("LSTM",) or self.proj >= self.H):
            raise ValueError(f"{self.name}: proj is for the LSTM alone and smaller than H")
        if self.min_length is not None and not 0 < self.min_length <= 1:
            raise ValueError(f"{self.name}: min_length is a fraction of T in (0, 1]")
        if self.reset_rate and (self.bidirectional or self.min_length is not None):
            raise ValueError(f"{self.name}: torch.nn has no idiom for resets with this")


@dataclass(frozen=True)
class Job:
    """A case with everything chosen: what one row of the table times."""

    case: Case
    cell: str
    mode: str
    dtype: str = "float32"

    @property
    def key(self):
        return (self.case.name, self.cell, self.mode, self.dtype)


BOTH = ("LSTM", "GRU")
INFERENCE = ("inference",)
TRAINING = ("training",)
GPU = "gpu"  # a use that --full leaves out on a CPU, where it would take hours

CASES = (
    # One step at a time, one stream: audio, sensors, a robot's control loop.
    Case("streaming", "h128", 1, 1, 128, 128, cells=CELLS, modes=INFERENCE, state=True,
         quick=CELLS),
    Case("streaming", "h512", 1, 1, 512, 512, cells=CELLS, modes=INFERENCE, state=True),
    Case("streaming", "two_layers", 1, 1, 80, 256, layers=2, modes=INFERENCE, state=True),
    # A handful of streams, or a short chunk of one.
    Case("online", "b4", 1, 4, 64, 256, modes=INFERENCE, state=True, quick=BOTH),
    Case("online", "chunk8", 8, 1, 64, 256, modes=INFERENCE, state=True, quick=BOTH),
    Case("online", "chunk20_b2", 20, 2, 128, 512, modes=INFERENCE, state=True),
    # Rollouts with episode boundaries inside the sequence; acting is one step for many actors.
    Case("reinforcement_learning", "t64", 64, 32, 128, 128, modes=TRAINING, state=True,
         reset_rate=0.01, quick=BOTH),
    Case("reinforcement_learning", "t128", 128, 64, 256, 256, cells=CELLS, state=True,
         reset_rate=0.005),
    Case("reinforcement_learning", "t64_b16", 64, 16, 64, 256, state=True, reset_rate=0.02),
    Case("reinforcement_learning", "acting", 1, 32, 128, 128, modes=INFERENCE, state=True),
    # Labels for every word of a sentence.
    Case("tagging", "h128", 50, 32, 100, 128, bidirectional=True, quick=BOTH),
    Case("tagging", "h256", 50, 16, 300, 256, cells=CELLS, bidirectional=True),
    Case("tagging", "two_layers", 40, 32, 100, 200, layers=2, bidirectional=True),
    # Few features, a small state, many steps.
    Case("time_series", "h32", 150, 64, 8, 32, cells=CELLS, quick=CELLS),
    Case("time_series", "h64", 200, 128, 16, 64, cells=CELLS),
    Case("time_series", "h57", 100, 48, 5, 57, cells=CELLS),
    # The word-level language models of the textbooks.
    Case("language_model", "h512", 35, 20, 512, 512, layers=2, quick=BOTH),
    Case("language_model", "h650", 35, 20, 650, 650, cells=CELLS, layers=2),
    Case("language_model", "projected", 35, 20, 512, 1024, cells=("LSTM",), proj=256),
    # Sequences of different lengths in one batch.
    Case("ragged", "h128", 80, 32, 128, 128, min_length=0.1, quick=BOTH),
    Case("ragged", "bidirectional", 60, 32, 128, 256, cells=CELLS, bidirectional=True,
         min_length=0.1),
    # Frames of sound: long, both directions.
    Case("speech", "h256", 250, 8, 80, 256, bidirectional=True, quick=BOTH),
    Case("speech", "h512", 400, 8, 160, 512, bidirectional=True),
    Case("speech", "three_layers", 300, 16, 80, 320, cells=("LSTM",), layers=3, bidirectional=True),
    # Shapes that reach every kind of GPU kernel: weights on one multiprocessor (H <= 128) or spread
    # over many, with few rows and many; then rows that end early or start anew.
    Case(GPU, "h64", 512, 64, 64, 64),
    Case(GPU, "h128", 512, 64, 128, 128),
    Case(GPU, "h256", 256, 32, 256, 256),
    Case(GPU, "h512", 256, 32, 512, 512),
    Case(GPU, "h1024", 256, 32, 1024, 1024),
    Case(GPU, "h64_b16", 512, 16, 64, 64),
    Case(GPU, "h128_b16", 512, 16, 128, 128),
    Case(GPU, "h64_both", 512, 64, 64, 64, bidirectional=True),
    Case(GPU, "h128_both", 512, 64, 128, 128, bidirectional=True),
    *(
        Case(GPU, f"h{H}_b{B}", 256, B, H, H)
        for H, batches in (
            (256, (16, 64, 128)),
            (512, (8, 16, 64, 128)),
            (768, (16, 64)),
            (1024, (8, 16, 64, 128)),
            (1536, (16, 64)),
        )
        for B in batches
    ),
    Case(GPU, "h512_both", 256, 32, 512, 512, bidirectional=True),
    Case(GPU, "h1024_both", 256, 32, 1024, 1024, bidirectional=True),
    # Several layers, long enough to go side by side, and too short for it.
    Case(GPU, "h128_layers", 1000, 32, 128, 128, layers=3),
    Case(GPU, "h512_layers", 1000, 16, 512, 512, layers=3),
    Case(GPU, "h1024_layers", 1000, 8, 1024, 1024, layers=2),
    Case(GPU, "h512_layers_short", 128, 16, 512, 512, layers=2),
    Case(GPU, "ragged_h128", 512, 64, 128, 128, min_length=0.1),
    Case(GPU, "ragged_h512", 256, 32, 512, 512, min_length=0.1),
    Case(GPU, "resets_h128", 512, 64, 128, 128, state=True, reset_rate=0.002),
    Case(GPU, "resets_h512", 256, 32, 512, 512, state=True, reset_rate=0.002),
    Case(GPU, "ragged_h1024", 256, 32, 1024, 1024, min_length=0.1),
    Case(GPU, "resets_h1024", 256, 32, 1024, 1024, state=True, reset_rate=0.002),
)  # fmt: skip


class UnknownName(ValueError):
    """A name on the command line that is not in a registry; the message lists what is."""


def choose(kind, wanted, existing):
    """The members of `existing` that `wanted` names, or UnknownName with what there is."""
    lowered = {name.lower(): name for name in existing}
    chosen = []
    for name in wanted:
        if name.lower() not in lowered:
            near = difflib.get_close_matches(name.lower(), lowered, n=1)
            hint = f" (did you mean {lowered[near[0]]!r}?)" if near else ""
            raise UnknownName(f"unknown {kind} {name!r}{hint}; there are: {', '.join(existing)}")
        chosen.append(lowered[name.lower()])
    return list(dict.fromkeys(chosen))


def find_cases(names, cases=CASES):
    """Cases by full name (`speech/h256`) or by use (`speech`: all its variants), in the order of
    the names."""
    uses = list(dict.fromkeys(case.use for case in cases))
    chosen = choose("case", names, uses + [case.name for case in cases])
    named = (case for name in chosen for case in cases if name in (case.use, case.name))
    return list(dict.fromkeys(named))


def resize(case, *, T=(), B=(), I=(), H=()):
    """The case at every combination of the given sizes; an empty list keeps its own."""
    sizes = {"T": T, "B": B, "I": I, "H": H}
    given = {axis: values for axis, values in sizes.items() if values}
    if not given:
        return [case]
    variants = []
    for values in product(*given.values()):
        new = dict(zip(given, values, strict=True))
        label = "_".join(f"{axis.lower()}{size}" for axis, size in new.items())
        variants.append(replace(case, variant=f"{case.variant}@{label}", **new))
    return variants


def select(
    names=(), *, full=False, cells=(), modes=(), dtypes=("float32",), sizes=None, device="cpu"
):
    """Jobs for a command line.

    Without names: the quick selection, or everything with `full`. A use named without `full` runs
    its quick variants (all of them where it has none); a full name runs as it is. The use "gpu"
    runs where it is named, and with `full` on a GPU.
    """
    cells = choose("cell", cells, CELLS)
    modes = choose("mode", modes, MODES)
    quick_uses = {case.use for case in CASES if case.quick}
    jobs = []
    for case in find_cases(names) if names else CASES:
        by_full_name = case.name.lower() in {name.lower() for name in names}
        whole = full or by_full_name or (names and case.use not in quick_uses)
        run_cells = case.cells if whole or cells else case.quick
        if not (whole or case.quick):
            continue
        if case.use == GPU and not names and device == "cpu":
            continue
        for resized in resize(case, **(sizes or {})):
            for dtype, cell, mode in product(dtypes, run_cells, resized.modes):
                if (not cells or cell in cells) and (not modes or mode in modes):
                    jobs.append(Job(resized, cell, mode, dtype))
    return jobs


SWEEP = "sweep"
SWEEP_OPERATIONS = 5e9  # of a forward pass, at most: a tenth of a second and less


def weights(case, cell):
    """Values of all weight matrices of a case's model."""
    directions, state = 2 if case.bidirectional else 1, case.proj or case.H
    count = 0
    for layer in range(case.layers):
        inputs = case.I if layer == 0 else directions * state
        count += directions * (GATES[cell] * case.H * (inputs + state) + case.proj * case.H)
    return count


def operations(case, cell):
    """Of a forward pass whose rows are as long as T: two for every weight, step and row."""
    return 2 * weights(case, cell) * case.T * case.B


def sweep(count, seed, *, cells=(), modes=(), dtypes=("float32",)):
    """Jobs of random sizes and options, for finding shapes that nobody thought of: each size is
    drawn evenly on a log scale, as far as the operations of a call allow."""
    cells, modes = choose("cell", cells, CELLS) or CELLS, choose("mode", modes, MODES) or MODES
    draw = random.Random(seed)

    def size(most):
        return round(math.exp(draw.uniform(0, math.log(most))))

    jobs = []
    while len(jobs) < count:
        T, B, I, H = size(1000), size(256), size(1024), size(1024)
        both, layers = draw.random() < 0.25, draw.choice((1, 1, 1, 2, 3))
        ragged = 0.1 if draw.random() < 0.2 and min(T, B) > 1 else None
        cell, mode, dtype = draw.choice(cells), draw.choice(modes), draw.choice(dtypes)
        variant = f"{len(jobs) + 1}_t{T}_b{B}_i{I}_h{H}" + f"_l{layers}" * (layers > 1)
        variant += "_both" * both + "_ragged" * bool(ragged)
        case = Case(SWEEP, variant, T, B, I, H, cells=(cell,), modes=(mode,), layers=layers,
                    bidirectional=both, min_length=ragged)  # fmt: skip
        if operations(case, cell) <= SWEEP_OPERATIONS:
            jobs.append(Job(case, cell, mode, dtype))
    return jobs

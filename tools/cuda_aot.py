"""Every kernel of csrc/cuda, compiled for GPUs that are not here: what each uses and what is wrong.

Compiles as setup.py does, one architecture at a time, and reads what a kernel uses from what ptxas
says and from the machine code: registers, spills, tensor core instructions, acquires and releases.
Holds that against fused_rnn/cuda/planning.py and the GPU's limits. As a program it prints the
table, and exits with 1 if there are faults. Needs nvcc, and cuobjdump of the toolkit or of Triton.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import build_cuda
import torch

from fused_rnn.cuda import planning
from fused_rnn.plan import DEVICES, Device, Shape

ROOT = Path(__file__).resolve().parents[1]
CELLS = dict(zip(("lstm", "gru", "rnn"), build_cuda.CELLS))
PRODUCTS = dict(zip(planning.PRODUCTS, build_cuda.PRODUCTS))


class Unit(NamedTuple):
    """What is compiled as one: a source in csrc/cuda, and of a scan's the cell and product."""

    source: str
    cell: str = ""
    product: str = ""

    @property
    def ending(self) -> str:
        """What the object's name ends with."""
        return f"_{CELLS[self.cell]}_{PRODUCTS[self.product]}" if self.cell else ""

    def __str__(self):
        return " ".join([Path(self.source).stem, *filter(None, self[1:])])


SCANS = [Unit(*which) for which in itertools.product(build_cuda.SCANS, CELLS, PRODUCTS)]
POINTWISE = Unit("pointwise.cu")
UNITS = [*SCANS, POINTWISE]

# Of one multiprocessor, of every architecture here. A block's warps are four, eight ... as far as
# registers go, a thread's registers a multiple of eight.
REGISTERS = 65536
# The H for which a source's scans are looked at. 256: csrc/cuda/products.cuh has it too. A grid
# scan has a multiprocessor for each block of 16 or 32 units.
MOST_BLOCKS = max(d.multiprocessors for d in DEVICES.values() if d.backend == "cuda")
SIZES = {
    "block_scan.cu": range(1, 256 + 1),
    "grid_scan.cu": range(planning.UNITS, 2 * planning.UNITS * MOST_BLOCKS + 1, planning.UNITS),
}

# The tensor core instruction of each product: what it multiplies, what it adds in.
TENSOR_OP = {
    "bfloat16": "HMMA.16816.F32.BF16",
    "float16": "HMMA.16816.F32",
    "tf32": "HMMA.1688.F32.TF32",
    "tf32x3": "HMMA.1688.F32.TF32",
    "ieee": None,
}

# Accesses at the scope of the GPU, and what orders others by them: after an acquire nothing is read
# before what the multiprocessor's own cache holds is forgotten; before a release nothing is
# accessed after the wait for all that was written.
ACCESS, STRONG = r"(?:LD|ST|RED|ATOM)G?\.", r"G?\.E(?:\.\w+)*\.STRONG\.GPU"
LOAD, STORE = f"LD{STRONG}", f"(?:ST|RED){STRONG}"
ACQUIRE = rf"\b{LOAD}(?: (?!{ACCESS})\S+)* CCTL\.IVALL\b"
RELEASE = rf"\bMEMBAR\S*\.GPU(?: (?!{ACCESS})\S+)* {STORE}\b"


class BlockScan(NamedTuple):
    """A block scan, from the template arguments of its symbol."""

    cell: str
    product: str
    backward: bool
    max_units: int
    held: int
    lane_rows: int  # a quarter of the block's
    gates: int
    sources: int
    parts: int

    family = "block"

    @property
    def key(self) -> tuple:
        """What the plan tells it by."""
        return self[:6]

    def __str__(self):
        return f"{_title(self)} [{self.max_units} {self.held} {self.lane_rows}]"


class GridScan(NamedTuple):
    """A grid scan, likewise. unit_tiles: 16 units of a block each."""

    cell: str
    product: str
    backward: bool
    unit_tiles: int
    held: int
    gates: int
    parts: int

    family = "grid"

    @property
    def key(self) -> tuple:
        return self[:5]

    @property
    def units(self) -> int:
        return self.unit_tiles * planning.UNITS

    def __str__(self):
        return f"{_title(self)} [{self.units} {self.held}]"


class Pointwise(NamedTuple):
    """A kernel of the step path, by its name with template arguments."""

    name: str

    def __str__(self):
        return self.name


Kernel = BlockScan | GridScan | Pointwise


def direction_of(kernel: BlockScan | GridScan) -> str:
    return "backward" if kernel.backward else "forward"


def unit_of(kernel: BlockScan | GridScan) -> Unit:
    """The unit that it is in."""
    return Unit(f"{kernel.family}_scan.cu", kernel.cell, kernel.product)


def _title(kernel: BlockScan | GridScan) -> str:
    return f"{unit_of(kernel)} {direction_of(kernel)}"


class Report(NamedTuple):
    """What a compiled kernel uses. registers, stack: of a thread; spilled: bytes, stores and loads;
    local: instructions that touch local memory; threads: the most a block may have; shared: bytes
    besides those of the launch; ops: how many there are of each instruction; acquires, releases: of
    the loads and stores at the scope of the GPU."""

    registers: int
    stack: int
    spilled: int
    local: int
    threads: int
    shared: int
    ops: Counter
    acquires: int = 0
    releases: int = 0

    @property
    def tensor_ops(self) -> int:
        return sum(self.matching(r"HMMA|\w*GMMA|UTC\w*MMA|DMMA|IMMA|QMMA|OMMA").values())

    def matching(self, pattern: str) -> dict[str, int]:
        """The instructions whose first word that is."""
        whole = re.compile(rf"({pattern})(\.|$)")
        return {op: count for op, count in self.ops.items() if whole.match(op)}


@functools.cache
def find_cuobjdump(nvcc: str) -> str:
    """Triton's, which is known to be new enough, or else the toolkit's."""
    folders = [str(Path(nvcc).resolve().parent)]
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations if triton else ():
        folders.insert(0, str(Path(folder, "backends/nvidia/bin")))
    found = shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if not found:
        raise build_cuda.CannotBuild("cuobjdump is not found", "install Triton")
    return found


def find_toolkit() -> build_cuda.Toolkit:
    """The toolkit, for the architectures of a build that no setting changes."""
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    return build_cuda.find_toolkit(ours)


def architectures(toolkit: build_cuda.Toolkit) -> list[str]:
    return [code for code in toolkit.codes if code.startswith("sm_")]


def device_of(architecture: str) -> Device:
    """The GPU the plan knows of an architecture."""
    number = int(re.sub(r"\D", "", architecture))
    return next(d for d in DEVICES.values() if d.backend == "cuda" and d.arch == number)


# What the symbols of scans are like; one with a lane or traits of another kernel is none.
SCAN_NAMES = {
    scan: re.compile(
        rf"void {scan.family}_(?P<way>(?P<backward>backward)|forward)"
        r"<(?P<cell>Lstm|Gru|Rnn)(?i:(?P=way))Lane<\(Product\)(?P<product>\d), "
        rf"{place} ?>, {traits} ?>\("
    )
    for scan, place, traits in (
        (
            BlockScan,
            r"BlockPlace<(?P<lane_rows>\d)>",
            r"ProductTraits<\(Product\)(?P=product), (?P<gates>\d), (?P<max_units>\d+), "
            r"(?P<held>\d+), (?P<sources>\d), (?P<parts>\d), (?P=lane_rows)>",
        ),
        (
            GridScan,
            r"GridPlace<(?P<unit_tiles>\d)>",
            r"GridTraits<\(Product\)(?P=product), (?P<gates>\d), (?(backward)true|false), "
            r"(?P<parts>\d), (?P<held>\d+), (?P=unit_tiles)>",
        ),
    )
}


def parse_name(name: str) -> Kernel:
    """The kernel of a demangled symbol, such as void fused_rnn::cuda::block_forward<...>(...)."""
    name = name.replace("fused_rnn::cuda::", "").replace("fused_rnn::", "")
    for scan, pattern in SCAN_NAMES.items():
        if found := pattern.match(name):
            product = planning.PRODUCTS[int(found["product"])]
            numbers = {field: int(found[field]) for field in scan._fields[3:]}
            return scan(found["cell"].lower(), product, found["backward"] is not None, **numbers)
    found = re.match(r"void (\w+(?:<[\w, ]+>)?)\(", name)
    if not found:
        raise ValueError(f"no kernel has a name like {name}")
    return Pointwise(found[1])


def _run(command, text: str | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=text)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_unit(
    toolkit: build_cuda.Toolkit, architecture: str, unit: Unit, flags: tuple[str, ...] = ()
) -> dict[Kernel, Report]:
    """The kernels of a unit, compiled for "sm_80" ..."""
    one = replace(toolkit, codes=(architecture,))
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    source, command = next(
        (source, command)
        for source, ending, command in one.compilations(str(Path("csrc/cuda", unit.source)), cxx)
        if ending == unit.ending
    )
    cuobjdump = find_cuobjdump(toolkit.nvcc)
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "unit.cubin"))
        said = _run([*command, *flags, "-Xptxas", "-v", "-cubin", source, "-o", cubin])
        code, elf = _run([cuobjdump, "-sass", cubin]), _run([cuobjdump, "-elf", cubin])
    return _read(said, code, elf)


def _sections(text: str, title: str) -> dict[str, str]:
    """What follows each title, by the symbol the title's group is."""
    parts = re.split(title, text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def _read(said: str, code: str, elf: str) -> dict[Kernel, Report]:
    """Reports from what ptxas says, the machine code, and the attributes of the kernels."""
    said_of = _sections(said, r"Compiling entry function '(\w+)' for")
    code_of = _sections(code, r"^\s*Function : (\w+)$")
    attributes = _sections(elf, r"^\.nv\.info\.(\w+)$")
    symbols = list(said_of)
    if not symbols or not set(symbols) == set(code_of) == set(attributes):
        raise RuntimeError(f"ptxas tells of {symbols}, cuobjdump of {list(code_of)}")
    names = _run(["c++filt"], "\n".join(symbols)).splitlines()
    reports = {}
    for symbol, name in zip(symbols, names):
        said = said_of[symbol]
        ops = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code_of[symbol])
        in_order = " ".join(ops)

        def total(pattern, said=said):
            return sum(int(each) for each in re.findall(pattern, said))

        threads = re.search(
            r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(\w+) (\w+) (\w+)", attributes[symbol]
        )
        x, y, z = (int(each, 16) for each in threads.groups())
        report = Report(
            registers=total(r"Used (\d+) registers"),
            stack=total(r"(\d+) bytes stack frame"),
            spilled=total(r"(\d+) bytes spill (?:stores|loads)"),
            local=sum(op.split(".")[0] in ("STL", "LDL") for op in ops),
            threads=x * y * z,
            shared=total(r"(\d+) bytes smem"),
            ops=Counter(ops),
            acquires=len(re.findall(ACQUIRE, in_order)),
            releases=len(re.findall(RELEASE, in_order)),
        )
        if not report.registers or not ops:
            raise RuntimeError(f"nothing is known of {name}: {said}")
        reports[parse_name(name)] = report
    return reports


def shape_of(unit: Unit, hidden: int, backward: bool) -> Shape:
    dtype = getattr(torch, unit.product) if unit.product in planning.HALVES else torch.float32
    precision = unit.product if dtype == torch.float32 else "ieee"
    return Shape(unit.cell, 1, 1, hidden, dtype, precision=precision, backward=backward)


@functools.cache
def planned(unit: Unit) -> dict[tuple, dict[int, planning.Block | planning.Grid]]:
    """The scans the plan knows of a unit: by their keys the H that run them, and their plans. (Of
    grid scans, for one group of rows.)"""
    found: dict = {}
    for backward, hidden in itertools.product((False, True), SIZES[unit.source]):
        shape = shape_of(unit, hidden, backward)
        if unit.source == "block_scan.cu":
            plans = [planning.block_kernel(shape, rows) for rows in (4, 8)]
        else:
            widths = (planning.UNITS, 2 * planning.UNITS)
            plans = [planning.grid_kernel(shape, planning.GROUP, units) for units in widths]
        for plan in filter(None, plans):
            block = plan.kind == "block"
            size = plan.max_units if block else plan.units // planning.UNITS
            key = (unit.cell, unit.product, backward, size, plan.held)
            found.setdefault((*key, plan.rows // 4) if block else key, {})[hidden] = plan
    return found


def fits(device: Device, plan: planning.Block | planning.Grid) -> bool:
    resident = plan.kind == "block" or plan.slices <= planning.blocks_together(device)
    return resident and plan.shared <= device.shared


def largest(device: Device, kernel: BlockScan | GridScan) -> tuple[int, int]:
    """The largest H that runs a kernel on a device, with the shared memory of its launch; zeros if
    none does."""
    plans = planned(unit_of(kernel)).get(kernel.key, {})
    sizes = [hidden for hidden, plan in plans.items() if fits(device, plan)]
    return (sizes[-1], plans[sizes[-1]].shared) if sizes else (0, 0)


def registers_of(report: Report) -> int:
    """Registers that a block takes as they are given out."""
    warps = -(-report.threads // 128) * 4
    return warps * 32 * (-(-report.registers // 8) * 8)


def operand_bytes(kernel: BlockScan) -> int:
    """Shared memory of a block's operands, as the kernel has it from its template arguments."""
    size = 2 if kernel.product in planning.HALVES else 4
    row = -(-kernel.max_units * size // 64) * 64 + 16
    return 2 * kernel.parts * kernel.sources * planning.COLUMNS * row


def faults(device: Device, kernel: Kernel, report: Report) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if report.spilled or report.local:
        found.append(f"spills {report.spilled} bytes, {report.local} accesses of local memory")
    if registers_of(report) > REGISTERS:
        found.append(
            f"does not launch: {report.threads} threads of {report.registers} registers take "
            f"{registers_of(report)} of {REGISTERS}"
        )
    if isinstance(kernel, Pointwise):
        return found
    found += _faults_of_plan(kernel, report)
    _, shared = largest(device, kernel)
    if report.shared + shared > device.shared:
        found.append(
            f"needs {report.shared + shared} bytes of shared memory, {device.name} has "
            f"{device.shared}"
        )
    found += _faults_of_product(kernel, report)
    if isinstance(kernel, GridScan):
        found += _faults_of_order(report)
    elif TENSOR_OP[kernel.product] and not report.matching("LDSM"):
        found.append("does not load its operands by ldmatrix")
    return found


def _faults_of_plan(kernel: BlockScan | GridScan, report: Report) -> list[str]:
    """Where the plan has it otherwise."""
    plans = planned(unit_of(kernel)).get(kernel.key)
    if not plans:
        return ["is not one of the plan's"]
    found, hidden = [], max(plans)
    shape = shape_of(unit_of(kernel), hidden, kernel.backward)
    threads = 32 * planning.WARPS
    if isinstance(kernel, BlockScan):
        threads = plans[hidden].threads
        if hidden != kernel.max_units:
            found.append(f"is planned up to H = {hidden} only")
        if planning.operand_bytes(shape, kernel.max_units) != operand_bytes(kernel):
            found.append(
                f"has operands of {operand_bytes(kernel)} bytes, the plan of "
                f"{planning.operand_bytes(shape, kernel.max_units)}"
            )
    if threads > report.threads:
        found.append(f"has at most {report.threads} threads, planned are {threads}")
    if shape.gates != kernel.gates:
        found.append(f"has {kernel.gates} gates, the plan {shape.gates}")
    return found


def _faults_of_product(kernel: BlockScan | GridScan, report: Report) -> list[str]:
    wanted = TENSOR_OP[kernel.product]
    if wanted is None:
        if not report.tensor_ops:
            return []
        return [f"has {report.tensor_ops} tensor core instructions, and should have none"]
    found = []
    # At the least, for each tile of weights and part of the operand: of a block scan, all of whose
    # loops are unrolled, one a step along k; of a grid scan one a chunk of 8 rows and each of the
    # two steps whose weights are held together.
    if isinstance(kernel, BlockScan):
        fewest = kernel.gates * kernel.max_units // (16 if kernel.product in planning.HALVES else 8)
    else:
        shape = shape_of(unit_of(kernel), planning.UNITS, kernel.backward)
        tiles = planning.grid_tiles(shape, kernel.units)
        fewest = tiles * 2 * kernel.held * (planning.GROUP // planning.COLUMNS)
    fewest *= 3 if kernel.product == "tf32x3" else kernel.parts
    if report.ops[wanted] < fewest:
        found.append(f"has {report.ops[wanted]} {wanted}, {fewest} are the least")
    if report.tensor_ops != report.ops[wanted]:
        others = sorted(set(report.matching("HMMA")) - {wanted})
        found.append(f"has tensor core instructions of another product: {' '.join(others)}")
    return found


def _faults_of_order(report: Report) -> list[str]:
    """Where blocks that pass on memory to one another would not see what was written."""
    found = []
    for access, what, ordered in (
        (LOAD, "acquires", report.acquires),
        (STORE, "releases", report.releases),
    ):
        strong = sum(count for op, count in report.ops.items() if re.fullmatch(access, op))
        if not ordered or ordered < strong:
            found.append(f"has {ordered} {what} in {strong} accesses at the scope of the GPU")
    return found


def missing(unit: Unit, kernels) -> list[str]:
    """The plan's kernels that a unit does not have."""
    if unit == POINTWISE:
        return []
    has = {kernel.key for kernel in kernels}
    return [f"{unit.source} lacks {key}" for key in planned(unit) if key not in has]


def compile_all(toolkit, pairs: list[tuple[str, Unit]], jobs: int = 2):
    """Yields (architecture, kernel, report, faults) of every kernel of the pairs (architecture,
    unit). kernel and report are None for what is not there, or does not compile."""

    def attempt(pair):
        try:
            return compile_unit(toolkit, *pair)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(jobs) as pool:
        for (architecture, unit), got in zip(pairs, pool.map(attempt, pairs)):
            if isinstance(got, RuntimeError):
                yield architecture, None, None, [f"{unit} does not compile: {got}"]
                continue
            device = device_of(architecture)
            for kernel, report in got.items():
                yield architecture, kernel, report, faults(device, kernel, report)
            for wrong in missing(unit, got):
                yield architecture, None, None, [wrong]


COLUMNS = (
    *("architecture", "kernel", "cell", "product", "direction", "max_units", "block_units"),
    *("block_rows", "held", "threads", "registers", "spilled", "largest_H", "shared", "tensor_ops"),
    *("ldmatrix", "faults"),
)


def row_of(architecture, kernel, report, wrong) -> tuple:
    """A row of the table; shared is of the launch at the largest H that runs on the device."""
    if kernel is None:
        return (architecture, *("",) * (len(COLUMNS) - 2), "; ".join(wrong))
    name, which, sizes = str(kernel), ("",) * 7, ("", "")
    if not isinstance(kernel, Pointwise):
        direction = direction_of(kernel)
        name = f"{kernel.family}_{direction}"
        block = isinstance(kernel, BlockScan)
        size = (kernel.max_units, "", 4 * kernel.lane_rows) if block else ("", kernel.units, "")
        which = (kernel.cell, kernel.product, direction, *size, kernel.held)
        sizes = largest(device_of(architecture), kernel)
        sizes = sizes if sizes[0] else ("", "")
    ldmatrix = sum(report.matching("LDSM").values())
    used = (report.threads, report.registers, report.spilled)
    return (
        *(architecture, name, *which, *used, *sizes, report.tensor_ops, ldmatrix),
        "; ".join(wrong),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/cuda_aot.py", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="sm_80 ...; all that are built by default")
    parser.add_argument("--match", default="", help='only units of this name: "grid_scan lstm"')
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="only faults and the summary")
    parser.add_argument("--csv", help="write the table to this file too")
    options = parser.parse_args(arguments)
    try:
        toolkit = find_toolkit()
        find_cuobjdump(toolkit.nvcc)
    except build_cuda.CannotBuild as error:
        parser.error("; ".join(error.args[:2]))
    pairs = [
        (architecture, unit)
        for architecture in options.architectures or architectures(toolkit)
        for unit in UNITS
        if options.match in str(unit)
    ]
    begin, rows, faulty = time.monotonic(), [], 0
    for architecture, kernel, report, wrong in compile_all(toolkit, pairs, options.jobs):
        faulty += bool(wrong)
        rows.append(row_of(architecture, kernel, report, wrong))
        if wrong or not options.quiet:
            used = ""
            if report:
                used = f"{report.threads:>4} {report.registers:>4} {report.tensor_ops:>4}"
            print(f"{architecture:<7}{used:<15} {kernel or ''} {'; '.join(wrong)}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows(rows)
    took = time.monotonic() - begin
    print(f"{len(rows)} kernels of {len(pairs)} compilations in {took:.0f} s, {faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())

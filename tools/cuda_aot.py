"""Every kernel of csrc/cuda, compiled for GPUs that are not here: what each uses and what is wrong.

Compiles as setup.py does, one architecture at a time, and reads what a kernel uses from what ptxas
says and from the machine code: registers, spills, tensor core instructions. Holds that against
fused_rnn/cuda/planning.py and the GPU's limits. As a program it prints the table, and exits with 1
if there are faults. Needs nvcc, and cuobjdump of the toolkit or of Triton.
"""

import argparse
import csv
import functools
import importlib.util
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
SOURCES = ("csrc/cuda/block_scan.cu", "csrc/cuda/pointwise.cu")
UNITS = [f"{cell}_{kind}" for cell in build_cuda.CELLS for kind in build_cuda.PRODUCTS]
POINTWISE = "pointwise"

# Of one multiprocessor, of every architecture here. A block's warps are four, eight ... as far as
# registers go, a thread's registers a multiple of eight.
REGISTERS = 65536
LARGEST_BLOCK_SCAN = 256  # units; csrc/cuda/products.cuh has it too

# The tensor core instruction of each product: what it multiplies, what it adds in.
TENSOR_OP = {
    "bfloat16": "HMMA.16816.F32.BF16",
    "float16": "HMMA.16816.F32",
    "tf32": "HMMA.1688.F32.TF32",
    "tf32x3": "HMMA.1688.F32.TF32",
    "ieee": None,
}


class BlockScan(NamedTuple):
    """A block scan, from the template arguments of its symbol."""

    cell: str
    product: str
    backward: bool
    max_units: int
    held: int
    gates: int
    sources: int
    parts: int

    @property
    def unit(self) -> str:
        """What the object's name ends with that it is in."""
        kind = build_cuda.PRODUCTS[planning.PRODUCTS.index(self.product)]
        return f"k{self.cell.capitalize()}_{kind}"

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    def __str__(self):
        size = f"[{self.max_units} {self.held}]"
        return f"{self.cell} {self.product} {self.direction} {size}"


class Pointwise(NamedTuple):
    """A kernel of the step path, by its name with template arguments."""

    name: str

    def __str__(self):
        return self.name


class Report(NamedTuple):
    """What a compiled kernel uses. registers, stack: of a thread; spilled: bytes, stores and loads;
    local: instructions that touch local memory; threads: the most a block may have; shared: bytes
    besides those of the launch; ops: how many there are of each instruction."""

    registers: int
    stack: int
    spilled: int
    local: int
    threads: int
    shared: int
    ops: Counter

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


def parse_name(name: str) -> BlockScan | Pointwise:
    """The kernel of a demangled symbol, such as void fused_rnn::cuda::block_forward<...>(...)."""
    name = name.replace("fused_rnn::cuda::", "").replace("fused_rnn::", "")
    found = re.match(
        r"void block_(forward|backward)<(Lstm|Gru|Rnn)(Forward|Backward)Lane<\(Product\)(\d)>, "
        r"ProductTraits<\(Product\)(\d), (\d), (\d+), (\d+), (\d), (\d)> ?>\(",
        name,
    )
    if not found:
        return Pointwise(re.match(r"void (\w+(?:<[\w, ]+>)?)\(", name)[1])
    way, cell, lane_way, lane_product, product, gates, units, held, sources, parts = found.groups()
    if (way, lane_product) != (lane_way.lower(), product):
        raise ValueError(f"a lane of another kernel: {name}")
    return BlockScan(
        *(cell.lower(), planning.PRODUCTS[int(product)], way == "backward"),
        *map(int, (units, held, gates, sources, parts)),
    )


def _run(command, text: str | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=text)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_unit(
    toolkit: build_cuda.Toolkit, architecture: str, unit: str, flags: tuple[str, ...] = ()
) -> dict[BlockScan | Pointwise, Report]:
    """The kernels of a unit, "kLstm_kBf16" ... or "pointwise", compiled for "sm_80" ..."""
    one = replace(toolkit, codes=(architecture,))
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    source, command = next(
        (source, command)
        for path in SOURCES
        for source, ending, command in one.compilations(path, cxx)
        if unit == (ending.removeprefix("_") or Path(source).stem)
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


def _read(said: str, code: str, elf: str) -> dict[BlockScan | Pointwise, Report]:
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
        said, ops = (
            said_of[symbol],
            re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code_of[symbol]),
        )

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
        )
        if not report.registers or not ops:
            raise RuntimeError(f"nothing is known of {name}: {said}")
        reports[parse_name(name)] = report
    return reports


def shape_of(cell: str, product: str, hidden: int, backward: bool) -> Shape:
    dtype = getattr(torch, product) if product in ("bfloat16", "float16") else torch.float32
    precision = product if dtype == torch.float32 else "ieee"
    return Shape(cell, 1, 1, hidden, dtype, precision=precision, backward=backward)


@functools.cache
def planned(unit: str) -> dict[tuple, tuple[int, ...]]:
    """The block scans the plan knows of a unit, as BlockScan begins, and the H that run them."""
    cell, kind = unit.removeprefix("k").split("_")
    cell, product = cell.lower(), planning.PRODUCTS[build_cuda.PRODUCTS.index(kind)]
    found: dict = {}
    for backward in (False, True):
        for hidden in range(1, LARGEST_BLOCK_SCAN + 1):
            block = planning.block_kernel(shape_of(cell, product, hidden, backward))
            if block:
                key = (cell, product, backward, block.max_units, block.held)
                found[key] = (*found.get(key, ()), hidden)
    return found


def largest(device: Device, kernel: BlockScan) -> tuple[int, int]:
    """The largest H that runs a kernel on a device, with the shared memory of its launch; zeros if
    none does."""
    sizes = planned(kernel.unit).get(kernel[:5], ())
    for hidden in reversed(sizes):
        shape = shape_of(kernel.cell, kernel.product, hidden, kernel.backward)
        block = planning.block_plan(device, shape)
        if block:
            return hidden, block.shared
    return 0, 0


def registers_of(report: Report) -> int:
    """Registers that a block takes as they are given out."""
    warps = -(-report.threads // 128) * 4
    return warps * 32 * (-(-report.registers // 8) * 8)


def operand_bytes(kernel: BlockScan) -> int:
    """Shared memory of a block's operands, as the kernel has it from its template arguments."""
    size = 2 if kernel.product in ("bfloat16", "float16") else 4
    row = -(-kernel.max_units * size // 64) * 64 + 16
    return 2 * kernel.parts * kernel.sources * planning.ROWS * row


def faults(device: Device, kernel: BlockScan | Pointwise, report: Report) -> list[str]:
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

    hidden = planned(kernel.unit).get(kernel[:5])
    if not hidden:
        found.append("is not one of the plan's")
    else:
        shape = shape_of(kernel.cell, kernel.product, hidden[-1], kernel.backward)
        block = planning.block_kernel(shape)
        if hidden[-1] != kernel.max_units:
            found.append(f"is planned up to H = {hidden[-1]} only")
        if block.threads > report.threads:
            found.append(f"has at most {report.threads} threads, planned are {block.threads}")
        if planning.operand_bytes(shape, kernel.max_units) != operand_bytes(kernel):
            found.append(
                f"has operands of {operand_bytes(kernel)} bytes, the plan of "
                f"{planning.operand_bytes(shape, kernel.max_units)}"
            )
        if shape.gates != kernel.gates:
            found.append(f"has {kernel.gates} gates, the plan {shape.gates}")
    _, shared = largest(device, kernel)
    if report.shared + shared > device.shared:
        found.append(
            f"needs {report.shared + shared} bytes of shared memory, {device.name} has "
            f"{device.shared}"
        )

    wanted = TENSOR_OP[kernel.product]
    if wanted is None and report.tensor_ops:
        found.append(f"has {report.tensor_ops} tensor core instructions, and should have none")
    elif wanted is not None:
        # One a step along k, gate and part at the least: all the loops are unrolled.
        steps = kernel.max_units // (16 if kernel.product in ("bfloat16", "float16") else 8)
        each = 3 if kernel.product == "tf32x3" else kernel.parts
        fewest = steps * kernel.gates * each
        if report.ops[wanted] < fewest:
            found.append(f"has {report.ops[wanted]} {wanted}, {fewest} are the least")
        if report.tensor_ops != report.ops[wanted]:
            others = sorted(set(report.matching("HMMA")) - {wanted})
            found.append(f"has tensor core instructions of another product: {' '.join(others)}")
        if not report.matching("LDSM"):
            found.append("does not load its operands by ldmatrix")
    return found


def missing(unit: str, kernels) -> list[str]:
    """The plan's kernels that a unit does not have."""
    if unit == POINTWISE:
        return []
    has = {kernel[:5] for kernel in kernels}
    return [f"{' '.join(map(str, key))} is not there" for key in planned(unit) if key not in has]


def compile_all(toolkit, pairs: list[tuple[str, str]], jobs: int = 2):
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
    *("architecture", "kernel", "cell", "product", "direction", "max_units", "held", "threads"),
    *("registers", "spilled", "largest_H", "shared", "tensor_ops", "ldmatrix", "faults"),
)


def row_of(architecture, kernel, report, wrong) -> tuple:
    """A row of the table; shared is of the launch at the largest H that runs on the device."""
    if kernel is None:
        return (architecture, *("",) * (len(COLUMNS) - 2), "; ".join(wrong))
    name, which, sizes = str(kernel), ("",) * 5, ("", "")
    if isinstance(kernel, BlockScan):
        name = f"block_{kernel.direction}"
        which = (kernel.cell, kernel.product, kernel.direction, kernel.max_units, kernel.held)
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
    parser.add_argument("--match", default="", help="only units whose name has this")
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
        for unit in (*UNITS, POINTWISE)
        if options.match in unit
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

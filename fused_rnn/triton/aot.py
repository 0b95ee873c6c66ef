"""Every kernel configuration the plan can choose, compiled for GPUs that are not here.

``configurations(device)`` lists them, ``compile_for(device, configuration)`` compiles one with the
compilers that Triton carries and reads what it uses from the machine code: registers, spills,
shared memory, tensor core instructions. `python -m fused_rnn.triton.aot` prints the table.
"""

import argparse
import csv
import functools
import inspect
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_rnn import plan as planning
from fused_rnn.plan import BlockPlan, Device, MatmulPlan, Shape, TilePlan
from fused_rnn.triton import block, matmul, tiles_gru, tiles_lstm, tiles_rnn
from fused_rnn.triton.launch import TL_DTYPE

# Pointers by the dtype of what they point to, as modules call the operators.
_IO = set(
    [
        "w_hh",
        "w",
        "w_hr",
        "b_hn",
        "h0",
        "c0",
        "y",
        "h_n",
        "hs",
        "ds",
        "m",
        "rh",
        "dy",
        "dh_n",
        "dh_operand",
        "dn_operand",
    ]
)
_SIZES = ("H", "P", "L", "a_n", "a_m", "a_k", "b_n", "b_k", "b_l")
_SHORT = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


class Configuration(NamedTuple):
    """A kernel by name, dtype, precision of products, constants besides tiles, tiles, and whether
    sizes are multiples of 16, which makes loads and stores wide."""

    kernel: str
    dtype: torch.dtype
    precision: str
    constants: tuple[tuple[str, object], ...]
    plan: BlockPlan | TilePlan | MatmulPlan
    aligned: bool

    def __str__(self):
        constants = " ".join(f"{k}={v}" for k, v in self.constants)
        sizes = " ".join(map(str, vars(self.plan).values()))
        aligned = "" if self.aligned else " odd"
        return (
            f"{self.kernel} {str(self.dtype)[6:]} {self.precision} {constants} [{sizes}]{aligned}"
        )


class Report(NamedTuple):
    """What a compiled kernel uses: registers a thread, bytes spilled, bytes of shared memory, and
    how many tensor core instructions it has."""

    registers: int
    spilled: int
    shared: int
    tensor_ops: int


@functools.cache
def kernels() -> dict:
    """Every kernel by name."""
    return {
        name: value
        for module in (block, tiles_lstm, tiles_gru, tiles_rnn, matmul)
        for name, value in vars(module).items()
        if name.endswith(("_block", "_tiles", "sum_parts"))
    }


def _kernels_of(shape: Shape, plan) -> list[tuple[str, tuple]]:
    """The kernels that run a shape under a plan, with their constants."""
    way = "backward" if shape.backward else "forward"
    if plan.kind == "block":
        if shape.cell == "gru":
            after = ("RESET_AFTER", shape.reset_after)
            bias = () if shape.backward else (("HAS_BIAS", shape.reset_after),)
            return [(f"gru_{way}_block", (*bias, after))]
        return [(f"{shape.cell}_{way}_block", ())]
    if shape.cell == "lstm":
        found = [(f"lstm_{way}_tiles", (("PROJECTED", bool(shape.proj)),))]
        if shape.proj:
            found.append(
                ("lstm_backward_project_tiles" if shape.backward else "lstm_project_tiles", ())
            )
        return found
    if shape.cell == "gru" and not shape.reset_after:
        if shape.backward:
            return [
                ("gru_before_backward_candidate_tiles", ()),
                ("gru_before_backward_reset_tiles", ()),
            ]
        return [("gru_before_gates_tiles", ()), ("gru_before_candidate_tiles", ())]
    bias = (("HAS_BIAS", True),) if shape.cell == "gru" and not shape.backward else ()
    return [(f"{shape.cell}_{way}_tiles", bias)]


def precisions_of(device: Device, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways products of a dtype can be taken on a device."""
    return planning.PRECISIONS if dtype == torch.float32 and device.has_tf32 else ("ieee",)


def _shapes(device: Device):
    """Shapes that reach every plan of ``choices``."""
    sizes = itertools.product((20, 32, 57, 64, 100, 128, 1000, 1024), (1, 200))
    variants = (
        *(("lstm", proj, True) for proj in (0, 15, 16)),
        *(("gru", 0, False), ("gru", 0, True), ("rnn", 0, True)),
    )
    for (hidden, rows), (cell, proj, after) in itertools.product(sizes, variants):
        for dtype, backward in itertools.product(_SHORT, (False, True)):
            for precision in precisions_of(device, dtype):
                yield Shape(cell, 1, rows, hidden, dtype, proj, after, precision, backward)


def configurations(device: Device) -> list[Configuration]:
    """Every configuration ``plan.py`` can choose on a device."""
    found = {}
    for shape in _shapes(device):
        for prediction in planning.choices(device, shape):
            for kernel, constants in _kernels_of(shape, prediction.plan):
                aligned = shape.H % 16 == 0 and shape.proj % 16 == 0
                key = Configuration(
                    kernel, shape.dtype, shape.precision, constants, prediction.plan, aligned
                )
                found[key._replace(plan=_untold(prediction.plan))] = key
    for dtype, aligned in itertools.product(_SHORT, (True, False)):
        for precision in precisions_of(device, dtype):
            # Projections, gradients of their inputs, of their weights: operands' axes without gaps.
            ways = (("a_k", "b_k"), ("a_k", "b_l"), ("a_m", "b_l"))
            for rows, width, way in itertools.product((16, 1 << 20), (64, 1024), ways):
                along_k = way == ("a_k", "b_k")
                plan = planning.matmul_plan(device, rows, width, dtype, precision, aligned, along_k)
                # Gradients are float32 where the rest has 16 bits. Of K that is no multiple of the
                # blocks' and of one that is, one each.
                step = 16 if aligned else 1
                found_a = [(_SHORT[dtype], plan.block_k if aligned else 1)]
                if dtype.itemsize == 2:
                    found_a.append(("fp32", step))
                for a, k_step in found_a:
                    constants = (("A", a), ("CONTIGUOUS", way), ("K_STEP", k_step))
                    key = Configuration("matmul_tiles", dtype, precision, constants, plan, aligned)
                    found[key] = key
    parts = MatmulPlan(512, 512, 512, 4, 1)
    for dtype in (torch.float32, torch.float64):
        key = Configuration("sum_parts", dtype, "ieee", (("BLOCK", 512),), parts, True)
        found[key] = key
    return list(found.values())


def _untold(plan):
    """The plan without what no kernel sees: streamed and step are one kernel."""
    return replace(plan, streamed=False) if isinstance(plan, TilePlan) else plan


def _source(configuration: Configuration) -> ASTSource:
    """The kernel with the types, constants and alignment its launcher gives it."""
    function = kernels()[configuration.kernel]
    io = _SHORT[configuration.dtype]
    acc = "fp64" if io == "fp64" else "fp32"
    plan = configuration.plan
    constants: dict = {
        "PRECISION": configuration.precision,
        "ACC": TL_DTYPE[torch.float64 if io == "fp64" else torch.float32],
        "IO": TL_DTYPE[configuration.dtype],
        "M_STEP": 16 if configuration.aligned else 1,
        **dict(configuration.constants),
        **{name.upper(): size for name, size in vars(plan).items() if name.startswith("block_")},
    }
    if configuration.kernel == "matmul_tiles":
        constants["HAS_BIAS"] = True
    one = constants.get("CONTIGUOUS", ())
    signature, constexprs, attrs = {}, {}, {}
    for position, name in enumerate(inspect.signature(function.fn).parameters):
        if name.isupper() and len(name) > 1:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name == "flags":
            signature[name] = "*i32"
        elif configuration.kernel == "matmul_tiles" and name in ("a", "b", "bias", "out"):
            kind = {"a": constants["A"], "b": io, "bias": acc, "out": acc}[name]
            signature[name] = "*" + kind
            attrs[(position,)] = [["tt.divisibility", 16]]
        elif configuration.kernel == "sum_parts":
            signature[name] = "i32" if name in ("count", "splits") else "*" + io
        elif configuration.kernel == "matmul_tiles" and name in one:
            signature[name], constexprs[name] = "constexpr", 1
        elif configuration.kernel == "matmul_tiles" or _is_scalar(name):
            signature[name] = "i32"
            always = name in ("K", "D", "M") and configuration.kernel != "matmul_tiles"
            if always or (configuration.aligned and name in _SIZES):
                attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            wide = name == "hs" and configuration.kernel == "rnn_forward_tiles"
            signature[name] = "*" + (io if name in _IO and not wide else acc)
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)


def _is_scalar(name: str) -> bool:
    return (len(name) == 1 and name.isupper()) or name.endswith(("_t", "_b")) or name in (
        *("relu", "first", "count", "keep_cells", "keep_gates", "reverse_bits", "reverse_period"),
    )  # fmt: skip


def compile_for(device: Device, configuration: Configuration) -> Report:
    """Compile a configuration for a device's architecture and read what it uses."""
    target = GPUTarget(device.backend, device.arch, device.warp)
    options = planning.options(device, configuration.plan)
    compiled = triton.compile(_source(configuration), target=target, options=options)
    if device.backend == "hip":
        text = compiled.asm["amdgcn"]

        def count(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", text).group(1))

        spilled = 4 * count("vgpr_spill_count")
        return Report(count("vgpr_count"), spilled, compiled.metadata.shared, text.count("v_mfma"))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option):
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage"))
        code = dump("-sass")
    registers, stack, _, local = map(int, usage.groups())
    ops = len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA|DMMA)\b", code))
    touched = len(re.findall(r"\b(?:STL|LDL)\b", code))  # a stack frame by itself is not a spill
    return Report(registers, (stack + local) if touched else 0, compiled.metadata.shared, ops)


def fault(device: Device, configuration: Configuration, report: Report) -> str | None:
    """What is wrong with a compiled configuration, or None."""
    if report.spilled:
        return f"spills {report.spilled} bytes"
    if report.shared > device.shared:
        return f"needs {report.shared} bytes of shared memory, {device.name} has {device.shared}"
    wide = configuration.dtype.itemsize == 2 or configuration.precision != "ieee"
    if wide and not report.tensor_ops:
        return "has no tensor core instruction"
    return None


def _silent():
    """Keep the compiler's own reports of failures, thousands of lines, off the terminal."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _try(job):
    device, configuration = job
    try:
        report = compile_for(device, configuration)
    except Exception as error:
        return device, configuration, None, f"{type(error).__name__}: {str(error)[:300]}"
    return device, configuration, report, fault(device, configuration, report)


def compile_all(pairs: list[tuple[Device, Configuration]], jobs: int = 2):
    """Yield (device, configuration, report or None, fault or None), compiled in processes whose
    kernels are not interpreted whatever the environment says."""
    os.environ["TRITON_INTERPRET"] = "0"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_silent) as pool:
        yield from pool.map(_try, pairs, chunksize=4)


def sample(device: Device, part: int, parts: int) -> list[Configuration]:
    """One ``parts``-th of a device's configurations: of every kernel and way of multiplying one
    size, and from part to part other ones."""
    groups: dict = {}
    for configuration in configurations(device):
        groups.setdefault(configuration[:4], []).append(configuration)
    keys = sorted(groups, key=str)
    return [
        groups[key][(number // parts + part) % len(groups[key])]
        for number, key in enumerate(keys)
        if number % parts == part % parts
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compile everything for the named devices and print the table; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m fused_rnn.triton.aot", description=__doc__)
    parser.add_argument("devices", nargs="*", default=["A100", "H100", "B200", "MI300X"])
    parser.add_argument("--match", default="", help="only configurations whose name has this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="only faults and the summary")
    parser.add_argument("--csv", help="write the table to this file too")
    options = parser.parse_args(arguments)
    pairs = [
        (device, configuration)
        for device in (planning.DEVICES[name] for name in options.devices)
        for configuration in configurations(device)
        if options.match in str(configuration)
    ]
    faults, rows = 0, []
    for device, configuration, report, wrong in compile_all(pairs, options.jobs):
        faults += wrong is not None
        rows.append((device.name, configuration, *(report or ("",) * 4), wrong or ""))
        if wrong or not options.quiet:
            used = "" if report is None else "{:>4} {:>6} {:>7} {:>5}".format(*report)
            print(f"{device.name:<7}{used:<26} {configuration} {wrong or ''}", flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("device", "configuration", *Report._fields, "fault"))
            table.writerows(rows)
    print(f"{len(pairs)} configurations, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

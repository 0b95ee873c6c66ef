"""All kernels of the CUDA backend at a few small shapes: `python -m benchmarks.sanitize`.

Under compute-sanitizer it finds accesses out of bounds, races and misused barriers:

    compute-sanitizer --tool racecheck python -m benchmarks.sanitize

It calls the library's own operators, so that besides their kernels next to nothing runs on the GPU:
inputs are copied there from the host, results back, and held against the reference in float64. The
bounds are wide, for that is a test's subject (tests/test_gpu.py); here they show that it was these
scans that ran.

With `--device cpu` an emulated library runs them, which FUSED_RNN_CUDA_LIBRARY names.
"""

import argparse
import itertools
import sys
from typing import NamedTuple

import torch

from benchmarks.kernels import cuda_model
from benchmarks.progress import Progress
from fused_rnn import plan, reference
from fused_rnn.cuda import planning
from fused_rnn.ops import ACC_DTYPE, GATES

REVERSE = (False, True)
# Sizes around a tile: 23 leaves most of a second warp's units empty; 100 and 150 take the kernels
# of other sizes. Eleven rows are one block of rows and a part of another.
HIDDEN, STEPS, ROWS = (23, 100, 150), 4, 11
# Grid scans have one kernel for all sizes: three slices of units, the last not whole; tiles of
# eight rows, of which there are two, and of sixteen.
GRID_HIDDEN, TILES = 40, (8, 16)
# Errors allowed, as a share of the largest value.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
    "tf32": 2**-7,
}


class Scan(NamedTuple):
    """One scan, forward and back: a cell with its variant, a dtype and precision, H, a kernel."""

    cell: str
    hidden: int
    dtype: torch.dtype
    kernel: str  # step, block or grid
    precision: str = "ieee"
    proj: int = 0
    reset_after: bool = True
    relu: bool = False
    tile: int = 0  # rows, of a grid scan and of a block scan's block
    units: int = planning.UNITS  # of its blocks

    def __str__(self):
        variant = f"-proj{self.proj}" if self.proj else "" if self.reset_after else "-before"
        number = self.precision if self.dtype == torch.float32 else ""
        size = {"block": f" {self.tile}", "grid": f" {self.tile}x{self.units}"}
        kernel = self.kernel + size.get(self.kernel, "")
        words = kernel, f"{self.cell}{variant or '-relu' * self.relu}", f"H{self.hidden}"
        return " ".join([*words, str(self.dtype)[6:], number]).strip()

    @property
    def bound(self):
        return BOUNDS["tf32" if self.precision == "tf32" else self.dtype]

    def choice(self, backward):
        """Kernel and rows, as the operators want them. (Forward all blocks have 16 units.)"""
        wide = backward and self.units != planning.UNITS
        return planning.KERNELS.index("wide grid" if wide else self.kernel), self.tile


def scans(hidden, kernels, device):
    """Every scan there is: block scans in each size, grid scans with each tile, steps in the first
    size alone, as their kernels do not depend on it."""
    numbers = [(torch.float32, p) for p in plan.PRECISIONS]
    numbers += [(torch.bfloat16, "ieee"), (torch.float16, "ieee")]
    cells = ({"cell": "lstm"}, {"cell": "gru"}, {"cell": "rnn"}, {"cell": "rnn", "relu": True})
    for size, cell, (dtype, precision), rows in itertools.product(hidden, cells, numbers, (4, 8)):
        scan = Scan(
            **cell, hidden=size, dtype=dtype, kernel="block", precision=precision, tile=rows
        )
        if "block" in kernels and all(fits(scan, device, b) for b in (False, True)):
            yield scan
    widths = (planning.UNITS, 2 * planning.UNITS)
    for cell, (dtype, precision), tile, units in itertools.product(cells, numbers, TILES, widths):
        scan = Scan(
            **cell,
            hidden=GRID_HIDDEN,
            dtype=dtype,
            kernel="grid",
            precision=precision,
            tile=tile,
            units=units,
        )
        backward = planning.grid_kernel(shape_of(scan, True), tile, units)
        if "grid" in kernels and backward is not None:
            yield scan
    size = hidden[0]
    two_phases = {"cell": "lstm", "proj": max(1, size // 3)}, {"cell": "gru", "reset_after": False}
    for cell, dtype in itertools.product((*cells, *two_phases), ACC_DTYPE):
        if "step" in kernels:
            yield Scan(**cell, hidden=size, dtype=dtype, kernel="step")


def shape_of(scan, backward):
    return plan.Shape(
        *(scan.cell, len(REVERSE), ROWS, scan.hidden, scan.dtype),
        precision=scan.precision,
        backward=backward,
    )


def fits(scan, device, backward):
    return planning.block_plan(device, shape_of(scan, backward)) is not None


class Tensors:
    """A scan's inputs on the CPU: values that its dtype holds, as float64."""

    def __init__(self, scan, steps, rows):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = scan.dtype
        S, H, width = len(REVERSE), scan.hidden, GATES[scan.cell] * scan.hidden
        out = scan.proj or H
        self.gates_x = self.draw(steps, rows, S, width)
        self.w_hh = self.draw(S, width, out) * 2 ** -(H.bit_length() // 2)
        self.w_hr = self.draw(S, out, H) * 2 ** -(H.bit_length() // 2) if scan.proj else None
        self.b_hn = self.draw(S, H) if scan.cell == "gru" and scan.reset_after else None
        self.h0, self.c0 = self.draw(S, rows, out), self.draw(S, rows, H)
        self.dy, self.dh_n = self.draw(steps, rows, S, out), self.draw(S, rows, out)
        self.dc_n, self.dcells = self.draw(S, rows, H), self.draw(steps, rows, S, H)
        ended = torch.arange(steps).unsqueeze(1) >= torch.randint(
            1, steps + 1, (rows,), generator=self.generator
        )
        reset = torch.rand(steps, rows, generator=self.generator) < 0.3
        self.flags = (ended * reference.ENDED + reset * reference.RESET).to(torch.uint8)

    def draw(self, *shape):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype).double()


def wanted(scan, t):
    """Results by name, from the reference in float64."""
    leaves = {"gates_x": t.gates_x, "h0": t.h0}
    if scan.cell == "lstm":
        leaves["c0"] = t.c0
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    options = {"flags": t.flags, "reverse": REVERSE}
    if scan.cell == "lstm":
        outputs = reference.lstm_scan(w_hh=t.w_hh, w_hr=t.w_hr, **leaves, **options)
        cotangents = t.dy, t.dh_n, t.dc_n, t.dcells
    else:
        given = {"reset_after": scan.reset_after, "b_hn": t.b_hn}
        given = given if scan.cell == "gru" else {"relu": scan.relu}
        outputs = getattr(reference, f"{scan.cell}_scan")(w_hh=t.w_hh, **leaves, **options, **given)
        cotangents = t.dy, t.dh_n
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    found = dict(zip(("y", "h_n", "c_n", "cells"), outputs, strict=False))
    return found | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def found(scan, t, device):
    """The same from the operators; what inference and training both give is named twice."""
    acc = ACC_DTYPE[scan.dtype]

    def on(value, dtype=scan.dtype):
        return None if value is None else value.to(dtype).to(device)

    def call(name, *args):
        op = getattr(torch.ops.fused_rnn, f"cuda_scan_{scan.cell}_{name}")
        choice = (*scan.choice(name == "backward"), plan.PRECISIONS.index(scan.precision))
        stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
        return op(*args, *choice, stream)

    flags = t.flags.to(device), REVERSE
    gates_x, w_hh, h0, dy, dh_n = map(on, (t.gates_x, t.w_hh, t.h0, t.dy, t.dh_n))
    if scan.cell == "lstm":
        w_hr, c0 = on(t.w_hr), on(t.c0)
        args = gates_x, w_hh, w_hr, h0, c0, *flags
        short = dict(zip(("y", "h_n", "c_n"), call("inference", *args), strict=True))
        *outputs, gates = call("forward", *args, True)
        results = dict(zip(("y", "h_n", "c_n", "cells"), outputs, strict=True))
        cotangents = dy, dh_n, on(t.dc_n, acc), on(t.dcells, acc)
        grads = call("backward", *cotangents, w_hh, w_hr, c0, results["cells"], gates, *flags)
        results |= dict(zip(("dgates_x", "dh0", "dc0"), grads, strict=False))
    elif scan.cell == "gru":
        args = gates_x, w_hh, on(t.b_hn), h0, *flags, scan.reset_after
        short = dict(zip(("y", "h_n"), call("inference", *args), strict=True))
        y, h_n, gates = call("forward", *args, True)
        grads = call("backward", dy, dh_n, w_hh, h0, y, gates, *flags, scan.reset_after)
        results = {"y": y, "h_n": h_n, "dgates_x": grads[0], "dh0": grads[2]}
    else:
        short, (y, h_n) = {}, call("forward", gates_x, w_hh, h0, *flags, scan.relu)
        grads = call("backward", dy, dh_n, w_hh, y, *flags, scan.relu)
        results = {"y": y, "h_n": h_n, "dgates_x": grads[0], "dh0": grads[1]}
    return results | {f"{name} without a tape": value for name, value in short.items()}


def faults(scan, steps, rows, device):
    """One line for every result that is wrong."""
    tensors = Tensors(scan, steps, rows)
    exact = wanted(scan, tensors)
    for name, value in found(scan, tensors, device).items():
        right = exact[name.split()[0]].detach()
        error = float((value.cpu().double() - right).abs().max())
        allowed = scan.bound * max(1.0, float(right.abs().max()))
        if not error <= allowed:  # so that NaN is one
            yield f"FAULT {scan}: {name} is off by {error:.1e}, {allowed:.1e} would be right"


def main(arguments=None):
    """Run all; returns the exit status, 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: an emulated library")
    add("--kernels", default="block,grid,step", help="some of block, grid and step; default all")
    add("-T", type=int, default=STEPS, metavar="N", help=f"steps; default {STEPS}")
    add("-B", type=int, default=ROWS, metavar="N", help=f"rows; default {ROWS}")
    sizes = ",".join(map(str, HIDDEN))
    add("-H", default=sizes, metavar="N,N", help=f"hidden sizes; default {sizes}")
    options = parser.parse_args(arguments)
    kernels = options.kernels.split(",")
    if unknown := set(kernels) - {"block", "grid", "step"}:
        print(f"error: no kernels {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    device = cuda_model(options.device)
    if device is None:
        return 2
    todo = list(scans([int(n) for n in options.H.split(",")], kernels, device))
    progress, wrong = Progress(len(todo)), 0
    for scan in todo:
        progress.start(str(scan))
        for fault in faults(scan, options.T, options.B, options.device):
            progress.note(fault)
            wrong += 1
    progress.close()
    print(f"sanitize: {len(todo)} scans forward and back, {wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What one step of each scan takes beside what the model says: `python -m benchmarks.scans`.

Every kernel of the CUDA backend that can run a shape (block scans, grid scans in every tile, the
step path), and with `--triton` the Triton backend's choice, forward and backward, without anything
around it: microseconds a step by CUDA events, the prediction of fused_rnn/cuda/planning.py (or
plan.py), and their ratio. `chosen` marks the kernel that the plan takes.

With `--device cpu` an emulated library runs tiny sizes, which only shows that it runs.
"""

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import replace

import torch

from benchmarks import machine
from benchmarks.kernels import cuda_model
from benchmarks.stats import median
from benchmarks.timing import clock_for
from fused_rnn import plan
from fused_rnn.cuda import planning
from fused_rnn.ops import ACC_DTYPE, GATES

STEPS, REPEATS = 256, 5
# (entries, rows, units)
SHAPES = (
    *((1, B, 64) for B in (16, 64, 128)),
    *((1, B, 128) for B in (1, 16, 64, 128)),
    *((1, B, 256) for B in (1, 16, 64, 128)),
    *((1, B, 512) for B in (1, 16, 32, 64, 128)),
    *((1, B, 768) for B in (16, 64)),
    *((1, B, 1024) for B in (8, 32, 64, 128)),
    *((1, B, 1536) for B in (16, 64)),
    *((2, B, H) for B, H in ((64, 64), (32, 128), (16, 256), (32, 512))),
)
NUMBERS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"))


class Scan:
    """A scan's tensors and the calls of its operators."""

    def __init__(self, shape: plan.Shape, steps: int, device: str):
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device, self.reverse = shape, device, [False] * shape.S
        S, B, H, width = shape.S, shape.B, shape.H, GATES[shape.cell] * shape.H

        def normal(*sizes, dtype=shape.dtype):
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        acc = ACC_DTYPE[shape.dtype]
        self.gates_x, self.w_hh = normal(steps, B, S, width), normal(S, width, H) * H**-0.5
        self.h0, self.c0 = normal(S, B, H), normal(S, B, H)
        self.dy, self.dh_n, self.dc_n = (
            normal(steps, B, S, H),
            normal(S, B, H),
            normal(S, B, H, dtype=acc),
        )
        self.b_hn = normal(S, H)
        self.results = None

    def call(self, backward, operators):
        """A function that runs the scan once; ``operators``: by name, without a choice."""
        flags = None, self.reverse
        if self.shape.cell == "lstm":
            forward = self.gates_x, self.w_hh, None, self.h0, self.c0, *flags
            if not backward:
                return lambda: operators("lstm_forward")(*forward, True)
            *_, cells, gates = operators("lstm_forward")(*forward, True)
            back = self.dy, self.dh_n, self.dc_n, None, self.w_hh, None, self.c0, cells, gates
            return lambda: operators("lstm_backward")(*back, *flags)
        if self.shape.cell == "gru":
            forward = self.gates_x, self.w_hh, self.b_hn, self.h0, *flags, True, True
            if not backward:
                return lambda: operators("gru_forward")(*forward)
            y, _, gates = operators("gru_forward")(*forward)
            back = self.dy, self.dh_n, self.w_hh, self.h0, y, gates, *flags, True
            return lambda: operators("gru_backward")(*back)
        forward = self.gates_x, self.w_hh, self.h0, *flags, False
        if not backward:
            return lambda: operators("rnn_forward")(*forward)
        y, _ = operators("rnn_forward")(*forward)
        return lambda: operators("rnn_backward")(self.dy, self.dh_n, self.w_hh, y, *flags, False)

    def cuda(self, backward, choice):
        """By the CUDA backend's kernel ``choice``; the forward of a backward is by steps."""
        stream = 0
        if self.device == "cuda":
            stream = torch.cuda.current_stream().cuda_stream
        precision = plan.PRECISIONS.index(self.shape.precision)

        def operators(name):
            kernel, rows = choice if name.endswith("backward") == backward else (0, 0)
            op = getattr(torch.ops.fused_rnn, f"cuda_scan_{name}")
            return lambda *args: op(*args, kernel, rows, precision, stream)

        return self.call(backward, operators)

    def triton(self, backward):
        from fused_rnn.triton.operators import IMPLEMENTATIONS

        return self.call(backward, IMPLEMENTATIONS.__getitem__)


def kernels(device: plan.Device, shape: plan.Shape):
    """(name, kernel and rows as the operators want them, prediction, whether it is chosen)."""
    chosen = planning.chosen(device, shape).plan
    plans = [planning.Step()]
    if planning.block_plan(device, shape) is not None:
        plans += [planning.block_kernel(shape, rows) for rows in (4, 8)]
    plans += planning.grid_kernels(device, shape)
    for found in plans:
        name = planning.KERNELS[found.kernel] + (f" {found.rows}" if found.rows else "")
        predicted = planning.predict(device, shape, found).total
        yield name, (found.kernel, found.rows), predicted, found == chosen


def measure(call, clock, steps, repeats):
    """Microseconds of a step: the median of so many calls, after one that is not timed."""
    call()
    return median([clock.measure(lambda _: call(), 0, 1) for _ in range(repeats)]) * 1e6 / steps


def main(arguments=None):
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scans", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: an emulated library")
    add("--cells", default="lstm,gru", help="some of lstm, gru and rnn")
    add("--triton", action="store_true", help="the Triton backend's kernels too")
    add("--quick", action="store_true", help="a few steps of a few tiny shapes")
    add("--limit", type=float, metavar="S", help="begin no further shape after so many seconds")
    add("--json", metavar="FILE", help="write rows and versions there")
    options = parser.parse_args(arguments)
    device = cuda_model(options.device)
    if device is None:
        return 2
    shapes, steps, repeats = SHAPES, STEPS, REPEATS
    if options.quick:
        shapes, steps, repeats = ((1, 3, 20),), 2, 1
    clock, rows = clock_for(options.device), []
    print(f"{'scan':44} {'kernel':14} {'us/step':>8} {'model':>8} {'ratio':>6}")
    begin = time.perf_counter()
    jobs = list(itertools.product(shapes, options.cells.split(","), NUMBERS))
    for number, ((S, B, H), cell, (dtype, precision)) in enumerate(jobs):
        if options.limit is not None and time.perf_counter() - begin >= options.limit:
            left_out = len(jobs) - number
            print(f"note: {left_out} of {len(jobs)} are left out: {options.limit:g} s are over")
            break
        shape = plan.Shape(cell, S, B, H, dtype, precision=precision)
        scan = Scan(shape, steps, options.device)
        for backward in (False, True):
            way = replace(shape, backward=backward)
            held = precision if dtype == torch.float32 else str(dtype)[6:]
            label = f"{cell} S={S} B={B} H={H} {held} {'backward' if backward else 'forward'}"
            todo = [
                (name, scan.cuda(backward, choice), predicted, best)
                for name, choice, predicted, best in kernels(device, way)
            ]
            if options.triton:
                theirs = plan.chosen(device, way)
                name = f"triton {theirs.plan.kind}"
                todo.append((name, scan.triton(backward), theirs.total, False))
            for name, call, predicted, best in todo:
                us = measure(call, clock, steps, repeats)
                rows.append(
                    {"cell": cell, "S": S, "B": B, "H": H, "number": held, "backward": backward,
                     "kernel": name, "chosen": best, "us": us, "model": predicted}
                )  # fmt: skip
                print(
                    f"{label:44} {name + ' *' * best:14} {us:8.2f} {predicted:8.2f}"
                    f" {us / predicted:6.2f}",
                    flush=True,
                )
    for kind in ("block", "grid", "wide grid", "step", "triton"):
        ratios = [row["us"] / row["model"] for row in rows if row["kernel"].startswith(kind)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{kind}: measured / model {mean:.2f} over {len(ratios)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"meta": machine.describe(options.device), "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a launch costs here, and the rates around it: `python -m benchmarks.launch_cost`.

The step path launches a kernel a time step, so these numbers bound it: microseconds of a kernel
that does nothing, launched through Triton's dispatch, by a compiled kernel's handle as
fused_rnn/triton/launch.py does it, and inside a replayed CUDA graph; beside them what torch asks
for a tensor, and the rates of copies and matrix products.

On a CPU (`--device cpu`, with TRITON_INTERPRET=1) it only shows that it runs.
"""

import argparse
import contextlib
import json
import sys
import time

import torch
import triton
import triton.language as tl

from benchmarks import machine, report
from benchmarks.stats import median
from benchmarks.timing import clock_for
from fused_rnn.triton.launch import Steps

REPEATS = 7


@triton.jit(do_not_specialize=["step"])
def few_arguments(out, step, SIZE: tl.constexpr):
    """Does next to nothing; three arguments."""
    if step < 0:
        tl.store(out + tl.arange(0, SIZE), step)


@triton.jit(do_not_specialize=["step", "n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7"])
def many_arguments(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, n0, n1, n2, n3, n4, n5, n6, n7, step,
    SIZE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
):  # fmt: skip
    """Does next to nothing; 26 arguments, about as many as one step of an LSTM takes."""
    if step < 0:
        tl.store(p0 + tl.arange(0, SIZE), step + n0)


def launches(device):
    """The two kernels as (name, kernel, arguments before and after the step)."""
    out = torch.zeros(32, dtype=torch.int32, device=device)
    return (
        ("3 arguments", few_arguments, (out,), (32,)),
        ("26 arguments", many_arguments, (out,) * 12 + tuple(range(2, 10)), (32, 1, 2, 3, 4)),
    )


class Bench:
    """Rows of the table, measured on one device; `quick` takes a few calls of everything."""

    def __init__(self, device, quick):
        self.device, self.quick = torch.device(device), quick
        self.clock, self.rows = clock_for(device), []

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def _host_us(self, call, count):
        """Microseconds until the host may go on, without what the device has left to do."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter_ns()
        for index in range(count):
            call(index)
        elapsed = time.perf_counter_ns() - begin
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return elapsed * 1e-3 / count

    def per_call(self, what, call, count=400, inside=1, host=True):
        """A row of microseconds for call(index), or for each of `inside` things that it does."""
        count, repeats = (3, 2) if self.quick else (count, REPEATS)
        call(0)  # compiles
        total = [self.clock.measure(call, 0, count) * 1e6 / inside for _ in range(repeats)]
        hosts = [self._host_us(call, count) for _ in range(repeats)] if host else []
        row = {"what": what, "us": median(total), "host_us": median(hosts) if host else None}
        self.rows.append(row)

    def rate(self, what, call, amount, unit):
        """A row of `amount` (bytes or operations) a second for call(index), in units of 1e9 or
        1e12."""
        count, repeats = (1, 1) if self.quick else (10, REPEATS)
        call(0)
        seconds = median([self.clock.measure(call, 0, count) for _ in range(repeats)])
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
        row = {"what": what, "us": seconds * 1e6, "rate": amount / seconds / scale, "unit": unit}
        self.rows.append(row)

    def launch_rows(self):
        grid = (1, 1, 1)
        for name, kernel, before, after in launches(self.device):

            def dispatch(index, kernel=kernel, before=before, after=after):
                kernel[grid](*before, index, *after, num_warps=1)

            self.per_call(f"launch by dispatch, {name}", dispatch)
            self.per_call(f"launch by handle, {name}", self._steps(kernel, before, after))
            if self.on_gpu:
                self._graph_row(name, kernel, before, after)

    def _steps(self, kernel, before, after):
        """The package's own launcher of a kernel with only the step changing."""
        return Steps(kernel, (1, 1, 1), before + (0,), after, len(before), {"num_warps": 1})

    def _graph_row(self, name, kernel, before, after, inside=400):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps = self._steps(kernel, before, after)
            for index in range(inside):
                steps(index)
        what = f"kernel in a replayed graph of {inside}, {name}"
        self.per_call(what, lambda _: graph.replay(), count=5, inside=inside, host=False)

    def tensor_rows(self):
        for shape in ((64, 128), (512, 64, 1, 512)):
            for make in (torch.empty, torch.zeros):
                what = f"torch.{make.__name__} {list(shape)}"
                self.per_call(what, lambda _, m=make, s=shape: m(s, device=self.device))

    def copy_row(self):
        size = 2**18 if self.quick else 2**28
        a, b = torch.empty(2, size, device=self.device)
        self.rate("device-to-device copy, read and write", lambda _: b.copy_(a), 8 * size, "GB/s")

    def product_rows(self):
        n = 64 if self.quick else 8192
        for name, dtype in (("bfloat16", torch.bfloat16), ("TF32", torch.float32)):
            x, y = torch.randn(2, n, n, device=self.device).to(dtype)
            with tf32_products():
                self.rate(
                    f"torch.mm {name} {n}",
                    lambda _, x=x, y=y: torch.mm(x, y),
                    2 * n**3,
                    "TFLOP/s",
                )


@contextlib.contextmanager
def tf32_products():
    """float32 products by TF32 while the context lasts, on GPUs that have it."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def measure(device, quick):
    """All rows, in the order of the table."""
    bench = Bench(device, quick)
    with torch.cuda.device(bench.device) if bench.on_gpu else contextlib.nullcontext():
        bench.launch_rows()
        bench.tensor_rows()
        bench.copy_row()
        bench.product_rows()
    return bench.rows


def table(rows):
    lines = [["what", "us", "us on the host", "rate"]]
    for row in rows:
        rate = f"{report.number(row['rate'])} {row['unit']}" if "rate" in row else ""
        host = row.get("host_us")
        lines.append(
            [row["what"], report.number(row["us"]), "" if host is None else f"{host:.2f}", rate]
        )
    return report.align(lines, left=("what",))


def main(arguments=None):
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch_cost", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to rehearse")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="a few calls each, small tensors")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {options.device}: torch sees no GPU here", file=sys.stderr)
        return 2
    if options.device == "cpu" and not triton.knobs.runtime.interpret:
        print("error: --device cpu needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    rows = measure(options.device, options.quick)
    print(table(rows))
    if options.json:
        result = {"meta": machine.describe(options.device), "rows": rows}
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

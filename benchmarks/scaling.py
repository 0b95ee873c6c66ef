"""Time and memory of one layer against its number of steps and of rows: both should grow in
proportion.

    python -m benchmarks.scaling                     a table, for docs/performance.md
    python -m benchmarks.scaling --cell GRU --hidden 256

Every size runs in a process of its own, whose greatest memory is the operating system's account of
it, less what it had before the first call. A time is the median of a step of a call, over a second.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

import fused_rnn
from benchmarks.stats import median

STEPS = (1, 10, 100, 1000, 20000)
ROWS = (1, 4, 16, 64, 256, 1024)
FIXED_STEPS, FIXED_ROWS = 100, 16
BUDGET_S, CALLS = 1.0, 400
COLUMNS = (
    *("T", "B", "inference us/step", "training us/step", "training us/row and step"),
    *("training MiB", "torch.nn: the same"),
)


def resident():
    """The most memory this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(library, cell, hidden, steps, rows, budget_s=BUDGET_S):
    """Seconds of a call in inference and in training, and bytes that training came to need."""
    module = getattr({"ours": fused_rnn, "torch": torch.nn}[library], cell)(hidden, hidden)
    x = torch.randn(steps, rows, hidden)
    gradient = torch.randn(steps, rows, hidden)

    def infer():
        with torch.no_grad():
            module(x)

    def train():
        module(x)[0].backward(gradient)
        module.zero_grad()

    before = resident()
    found = []
    for call in (infer, train):
        call()
        times, begin = [], time.perf_counter()
        while len(times) < CALLS and (not times or time.perf_counter() - begin < budget_s):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found.append(median(times))
    return *found, resident() - before


def _apart(*arguments):
    """measure(*arguments) in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return tuple(map(float, done.stdout.split()))


def table(cell, hidden, sizes, budget_s):
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for steps, rows in sizes:
        ours = _apart("ours", cell, hidden, steps, rows, budget_s)
        other = _apart("torch", cell, hidden, steps, rows, budget_s)
        inference, training = (1e6 * seconds / steps for seconds in ours[:2])
        values = [f"{steps:,}", f"{rows:,}", f"{inference:.3g}", f"{training:.3g}"]
        values += [f"{training / rows:.3g}", f"{ours[2] / 2**20:.0f}"]
        values.append(
            f"{1e6 * other[0] / steps:.3g} / {1e6 * other[1] / steps:.3g},"
            f" {other[2] / 2**20:.0f} MiB"
        )
        lines.append("| " + " | ".join(values) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main(arguments=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--cell", default="LSTM", choices=("LSTM", "GRU", "RNN"))
    parser.add_argument("--hidden", type=int, default=128, help="also the input's size")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds a size and mode")
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--one", nargs=6, metavar="X", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        library, cell, *sizes, budget_s = options.one
        print(*measure(library, cell, *map(int, sizes), float(budget_s)))
        return
    sizes = [(steps, FIXED_ROWS) for steps in options.steps]
    sizes += [(FIXED_STEPS, rows) for rows in options.rows]
    print("\n".join(table(options.cell, options.hidden, sizes, options.budget)))


if __name__ == "__main__":
    main()

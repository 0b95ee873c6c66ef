"""The command line: which jobs, which providers, how long, where the results go."""

import argparse
import pathlib
import sys

import torch

from benchmarks import compare, plot, providers, report
from benchmarks.cases import CASES, CELLS, MODES, SWEEP, UnknownName, choose, select, sweep
from benchmarks.problem import DTYPES
from benchmarks.progress import Progress
from benchmarks.session import FAILURES, run
from benchmarks.timing import threads

QUICK_S, FULL_S = 1.5, 6.0
EPILOG = """\
examples:
  python -m benchmarks                                  the quick selection, under three minutes
  python -m benchmarks --full                           every case, cell and mode
  python -m benchmarks streaming tagging/h256           a use (all its quick cases), or one case
  python -m benchmarks speech/h256 --cells gru -T 100,500 -H 128
  python -m benchmarks --providers torch,ours:all       every available backend by itself
  python -m benchmarks --sweep 200 --seed 1             random shapes, to find slow ones
  python -m benchmarks compare before.json after.json   has it become faster?

exit status: 0; 1 where a provider was WRONG or raised; 2 where the command line makes no sense
"""


def _names(text):
    return [name for name in text.split(",") if name]


def _sizes(text):
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("sizes must be positive")
    return sizes


def _device(text):
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; cpu, cuda or cuda:1") from None
    return text


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fused_rnn against torch.nn and ONNX Runtime, after checking all of them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="use or use/variant; default: the quick ones")
    add("--full", action="store_true", help="every case with every cell, and a larger budget")
    add("--list", action="store_true", help="list cases and providers, and stop")
    add("--cells", type=_names, default=[], metavar="NAMES", help=f"of {','.join(CELLS)}")
    add("--modes", type=_names, default=[], metavar="NAMES", help=f"of {','.join(MODES)}")
    add("--dtypes", type=_names, default=["float32"], metavar="NAMES",
        help=f"of {','.join(DTYPES)}; default float32")  # fmt: skip
    for axis, meaning in zip("TBIH", ("steps", "rows", "input size", "hidden size"), strict=True):
        about = f"{meaning}, in place of the case's own"
        add(f"-{axis}", type=_sizes, default=[], metavar="N,N", help=about)
    add("--sweep", type=int, metavar="N", help="N random shapes instead of cases")
    add("--seed", type=int, default=0, metavar="N", help="of the random shapes; default 0")
    add("--providers", type=_names, default=[], metavar="NAMES",
        help=f"default {','.join(providers.DEFAULT)}; ours:all: each backend")  # fmt: skip
    add("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    add(
        "--graph",
        action="store_true",
        help="on a GPU: calls replayed as CUDA graphs, the time of their kernels alone",
    )
    add("--threads", type=int, metavar="N", help="torch's and ONNX Runtime's threads")
    add("--budget", type=float, metavar="S",
        help=f"seconds of timing a row; default {QUICK_S}, with --full {FULL_S}")  # fmt: skip
    add("--limit", type=float, metavar="S",
        help="begin no further row after so many seconds; what is done is written")  # fmt: skip
    add("--out", type=pathlib.Path, default=pathlib.Path("build/bench"), metavar="DIR",
        help="for results.csv, results.json, ratios.png; default build/bench")  # fmt: skip
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two results.json, and stop")
    return parser


def listing():
    """All cases with their shapes, and all providers with what keeps them away."""
    lines = [["case", "cells", "quick", "modes", "T", "B", "I", "H", "layers", "besides"]]
    for case in CASES:
        extra = ["bidirectional"] * case.bidirectional + ["state given"] * case.state
        extra += [f"proj {case.proj}"] * bool(case.proj)
        extra += [f"resets {case.reset_rate:.1%}"] * bool(case.reset_rate)
        extra += [f"lengths from {case.min_length or 0:.0%}"] * (case.min_length is not None)
        names = [case.name, *map(" ".join, (case.cells, case.quick, case.modes))]
        sizes = [str(n) for n in (case.T, case.B, case.I, case.H, case.layers)]
        lines.append(names + sizes + [", ".join(extra)])
    out = [report.align(lines, left=("cells", "quick", "modes", "besides")), "", "providers:"]
    every = [name for name in providers.existing() if name != "ours:all"]
    for provider in providers.find(every):
        out.append(f"  {provider.name:24} {provider.unavailable('cpu') or 'available'}")
    return "\n".join(out)


def _providers(options):
    """Providers that can run here; the absence of one asked for by name is an error."""
    present, notes = [], []
    for provider in providers.find(options.providers or providers.DEFAULT):
        reason = provider.unavailable(options.device)
        if reason is None:
            present.append(provider)
        elif options.providers:
            raise UnknownName(f"provider {provider.name} is not available: {reason}")
        else:
            notes.append(f"note: without {provider.name}: {reason}")
    return present, notes


def write(result, out):
    """Results into the folder; returns lines that say what is there and what is missing."""
    out.mkdir(parents=True, exist_ok=True)
    report.write_csv(result, out / "results.csv")
    report.write_json(result, out / "results.json")
    written, notes = ["results.csv", "results.json"], []
    try:
        swept = all(row["case"].startswith(f"{SWEEP}/") for row in result["rows"])
        if (plot.draw_sweep if swept else plot.draw)(result, out / "ratios.png"):
            written.append("ratios.png")
    except plot.PlotUnavailable as missing:
        notes.append(f"note: {missing}")
    return [f"written: {', '.join(str(out / name) for name in written)}", *notes]


def benchmark(options):
    which = {
        "cells": options.cells,
        "modes": options.modes,
        "dtypes": choose("dtype", options.dtypes, DTYPES),
    }
    sizes = {axis: getattr(options, axis) for axis in "TBIH"}
    if options.sweep is not None:
        if options.sweep < 1:
            raise UnknownName("--sweep must be positive")
        if options.cases or options.full or any(sizes.values()):
            raise UnknownName("--sweep draws its own shapes: no cases, --full or sizes with it")
        jobs = sweep(options.sweep, options.seed, **which)
    else:
        device = torch.device(options.device).type
        jobs = select(options.cases, full=options.full, sizes=sizes, device=device, **which)
    if not jobs:
        raise UnknownName("no case has these cells and modes; see --list")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UnknownName("--device cuda: torch sees no CUDA device here")
    if options.graph and not options.device.startswith("cuda"):
        raise UnknownName("--graph is of CUDA graphs: it wants --device cuda")
    present, notes = _providers(options)
    for note in notes:
        print(note, file=sys.stderr)
    budget = options.budget if options.budget is not None else FULL_S if options.full else QUICK_S
    with threads(options.threads):
        result = run(
            jobs,
            present,
            budget_s=budget,
            device=options.device,
            progress=Progress(len(jobs)),
            limit_s=options.limit,
            graph=options.graph,
        )
    print(report.table(result))
    print("\n".join(write(result, options.out)))
    return 1 if any(row["status"] in FAILURES for row in result["rows"]) else 0


def main(arguments=None):
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["compare"]:
        arguments[:1] = ["--compare"]
    options = make_parser().parse_intermixed_args(arguments)
    try:
        if options.compare:
            print(compare.text(*map(report.read_json, options.compare)))
            return 0
        if options.list:
            print(listing())
            return 0
        return benchmark(options)
    except (UnknownName, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

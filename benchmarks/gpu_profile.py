"""Which kernels ran: `python -m benchmarks.gpu_profile`.

For a few cases, a call of torch.nn and one of fused_rnn's kernels under torch.profiler, and the
names of all kernels with how often they ran and their time: proof of the algorithm that cuDNN chose
(its persistent kernels say so in their names), and of what else a call of ours launches.

With `--device cpu` the names are those of torch's CPU operators, which only shows that it runs.
"""

import argparse
import contextlib
import sys

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, providers
from benchmarks.cases import UnknownName, select
from benchmarks.problem import make_problem

# (case, cell, dtype): one that cuDNN has a persistent algorithm for, then others.
SHAPES = (
    ("gpu/h512", "LSTM", "float16"),
    ("gpu/h512", "LSTM", "bfloat16"),
    ("gpu/h512", "LSTM", "float32"),
    ("gpu/h512", "GRU", "float16"),
    ("gpu/h128", "LSTM", "float16"),
    ("gpu/h128", "LSTM", "float32"),
    ("gpu/h128", "GRU", "bfloat16"),
    ("gpu/h64_both", "LSTM", "float16"),
    ("gpu/ragged_h128", "LSTM", "float16"),
)
LONGEST_NAME = 160  # templates go on for pages; the algorithm is at the beginning


def kernels_of(runner, on_gpu):
    """[name, count, microseconds] of everything that one warm call runs, the longest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with runner.context():
        for index in range(2):
            runner.call(index)
            runner.clear()
        if on_gpu:
            torch.cuda.synchronize()
        with profile(activities=activities) as recorded:
            runner.call(0)
            if on_gpu:
                torch.cuda.synchronize()
        runner.clear()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        [event.key, event.count, event.self_device_time_total or event.self_cpu_time_total]
        for event in recorded.key_averages()
        if event.device_type == wanted
    ]
    return sorted(found, key=lambda row: -row[2])


def sections(device, names, sizes, shapes=SHAPES):
    """One text a case, mode and provider; the last of all says how many of them had no kernel."""
    on_gpu, silent = torch.device(device).type == "cuda", 0
    for case, cell, dtype in shapes:
        for job in select([case], cells=[cell], dtypes=[dtype], sizes=sizes):
            problem = make_problem(job, device)
            for provider in providers.find(names):
                head = f"{job.case.name} {cell} {job.mode} {dtype}, {provider.name}"
                try:
                    rows = kernels_of(provider.prepare(problem), on_gpu)
                except Exception as error:  # one that cannot is a line, not the end
                    yield f"{head}: {type(error).__name__}: {str(error)[:300]}\n"
                    silent += 1
                    continue
                silent += not rows
                yield f"{head}: {sum(row[1] for row in rows)} launches\n" + (
                    "".join(f"{us:12.1f} us {n:6} x {k[:LONGEST_NAME]}\n" for k, n, us in rows)
                    or "    no kernel was recorded\n"
                )
    yield f"{silent} without a record\n"


def main(arguments=None):
    """Write the texts; returns the exit status, 1 where anything was not recorded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to rehearse")
    parser.add_argument("--providers", default="torch,ours:triton", metavar="NAMES")
    parser.add_argument("--out", metavar="FILE", help="instead of the terminal")
    parser.add_argument("--shapes", type=int, metavar="N", help="only the first N shapes")
    for axis in "TBH":
        parser.add_argument(f"-{axis}", type=int, metavar="N", help="in place of the case's own")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {options.device}: torch sees no GPU here", file=sys.stderr)
        return 2
    names = options.providers.split(",")
    try:
        providers.find(names)
    except UnknownName as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = {axis: [n] for axis in "TBH" if (n := getattr(options, axis))}
    with open(options.out, "w") if options.out else contextlib.nullcontext(sys.stdout) as out:
        for key, value in machine.describe(options.device).items():
            print(f"{key:16} {value}", file=out)
        for text in sections(options.device, names, sizes, SHAPES[: options.shapes]):
            print(f"\n{text}", end="", file=out, flush=True)
    return 0 if text.startswith("0 ") else 1


if __name__ == "__main__":
    sys.exit(main())

"""python -m fused_rnn info | verify: what is here, and whether its numbers hold."""

import argparse
import contextlib
import itertools
import os
import platform
import shutil
import sys
from importlib import metadata

import torch

import fused_rnn
from fused_rnn import backends
from fused_rnn.precision import fp32_precision
from fused_rnn.testing import Case, check

_ISA = ("portable", "AVX2", "AVX-512", "AVX-512 and AMX")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def info() -> int:
    """Print versions, devices, instruction set, and every backend or why not."""
    print(f"fused_rnn {fused_rnn.__version__}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    print(f"torch     {torch.__version__}")
    for package in ("triton", "numpy", "onnxruntime"):
        print(f"{package:<9} {_version(package)}")
    print(f"threads   {torch.get_num_threads()} of {os.cpu_count()} cores")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        print(f"gpus      {', '.join(names)}")
    else:
        print("gpus      none that torch can use")
    if backends.available_backends()["cpu"] is None:
        print(f"cpu runs  {_ISA[torch.ops.fused_rnn.cpu_isa()]}")
    print(f"backends  (selected: {backends.current_backend()})")
    for name, reason in backends.available_backends().items():
        row = backends.BACKENDS[name]
        print(f"  {name:<10} {row.description}: {'available' if reason is None else reason}")
    return 0


def grid(dtypes: list[torch.dtype]) -> list[Case]:
    """The cases of `verify`: every cell and option, at sizes that fill vectors and do not."""
    cases = []
    sizes = ((1, 1, 3, 1), (9, 5, 6, 57), (6, 33, 16, 100), (40, 2, 8, 16))
    for dtype, (steps, rows, inputs, hidden) in itertools.product(dtypes, sizes):
        common = {"steps": steps, "rows": rows, "inputs": inputs, "hidden": hidden, "dtype": dtype}
        for cell in ("lstm", "gru", "rnn"):
            cases.append(Case(cell, **common))
            cases.append(Case(cell, reverse=(False, True), lengths=True, reset=True, **common))
            cases.append(Case(cell, reverse=(True,), tape="recompute", reset=True, **common))
        cases.append(Case("lstm", proj=max(1, hidden // 3), cells=True, lengths=True, **common))
        cases.append(Case("gru", reset_after=False, lengths=True, reset=True, **common))
        cases.append(Case("rnn", relu=True, lengths=True, **common))
    return cases


def _progress(done: int, total: int, label: str) -> None:
    if sys.stderr.isatty():
        width = max(10, min(40, shutil.get_terminal_size().columns - 50))
        filled = width * done // total
        bar = "#" * filled + "." * (width - filled)
        end = "\n" if done == total else ""
        print(f"\r[{bar}] {done}/{total} {label:<30.30}", end=end, file=sys.stderr, flush=True)


def device_for(backend: str) -> str:
    """Where `verify` runs a backend: the GPU kernels on a GPU where there is one and they are
    neither emulated nor interpreted, all else on the CPU."""
    request = backends.Request("lstm", "cuda", torch.float32)
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return "cuda" if on_gpu and backends.why_not(backend, request) is None else "cpu"


def _precision(device: str):
    """float32 products of the context: ieee on a GPU, because the budget is float32's."""
    return fp32_precision("ieee") if device == "cuda" else contextlib.nullcontext()


def verify(
    names: list[str] | None, dtypes: list[torch.dtype], device: str | None = None, every: int = 1
) -> int:
    """Run backends on every ``every``-th case of the grid against float64 and print the largest
    error of each result as a share of its budget. 0 where every one holds. ``device``: cpu or
    cuda; None is ``device_for`` each backend."""
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: there is no GPU that torch can use", file=sys.stderr)
        return 2
    available = backends.available_backends()
    for name in names or []:
        if name not in available or available[name] is not None:
            reason = available.get(name, f"no such backend; there are {', '.join(available)}")
            print(f"backend {name}: {reason}", file=sys.stderr)
            return 2
    # torch.nn's own path is what errors are measured by; it is run when asked for.
    names = names or [n for n, reason in available.items() if reason is None and n != "torch"]
    devices = {name: device or device_for(name) for name in names}
    cases, rows, faults, skipped = grid(dtypes)[::every], {}, [], dict.fromkeys(names, 0)
    for done, case in enumerate(cases, 1):
        _progress(done, len(cases), str(case))
        for name in names:
            request = backends.Request(
                case.cell,
                devices[name],
                case.dtype,
                case.reverse,
                case.lengths or case.reset,
                case.cells,
                case.reset_after,
            )
            if backends.why_not(name, request) is not None:
                skipped[name] += 1
                continue
            with _precision(devices[name]):
                verdicts = check(case, name, device=devices[name])
            for verdict in verdicts:
                kind = "gradients" if verdict.name.startswith("d") else "outputs"
                key = (name, case.cell, str(case.dtype)[6:], kind)
                used = verdict.error / verdict.budget if verdict.budget else verdict.error > 0
                count, worst, largest = rows.get(key, (0, 0.0, 0.0))
                rows[key] = (count + 1, max(worst, used), max(largest, verdict.error))
                if verdict.fault:
                    faults.append(f"{name}: {case}: {verdict.name}: {verdict.fault}")
    print(
        f"{'backend':<10} {'cell':<5} {'dtype':<9} {'what':<10} {'n':>4} {'max error':>10}"
        " of budget"
    )
    for (name, cell, dtype, kind), (count, worst, largest) in sorted(rows.items()):
        print(
            f"{name:<10} {cell:<5} {dtype:<9} {kind:<10} {count:>4} {largest:>10.1e} {worst:>8.0%}"
        )
    for name, count in skipped.items():
        if count:
            print(f"{name}: {count} of {len(cases)} cases are not for it on {devices[name]}")
    for fault in faults:
        print(f"FAULT {fault}")
    if not rows:
        print("verify: nothing was checked")
        return 2
    print("verify: " + (f"{len(faults)} faults" if faults else "all results hold"))
    return 1 if faults else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, instruction set, backends and why not")
    command = commands.add_parser(
        "verify", help="run every available backend against float64 on a grid"
    )
    command.add_argument("--backend", action="append", help="only this one; may be repeated")
    command.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="only this one; may be repeated",
    )
    command.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to run; default: cuda and triton on a GPU where one is, the others on the CPU",
    )
    command.add_argument(
        "--every", type=int, default=1, metavar="N", help="only every N-th case of the grid"
    )
    options = parser.parse_args(arguments)
    if options.command == "info":
        return info()
    names = options.dtype or ["float32", "float64", "bfloat16", "float16"]
    if options.every < 1:
        parser.error("--every must be positive")
    dtypes = [getattr(torch, name) for name in names]
    return verify(options.backend, dtypes, options.device, options.every)


if __name__ == "__main__":
    sys.exit(main())

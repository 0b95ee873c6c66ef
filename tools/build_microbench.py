"""Builds csrc/cuda/microbench, a program that measures barriers, exchanges and latencies of a GPU.

    python tools/build_microbench.py                 for the GPU that is here, into build/microbench
    python tools/build_microbench.py --arch sm_90a   for another

It needs neither torch nor anything else of the project but its sources; the toolkit is found as
build_cuda.py finds it. One architecture at a time, and no PTX: what runs is what was compiled.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import build_cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "csrc/cuda/microbench/microbench.cu"
OLDEST_NVCC = (12, 6)  # the first whose <cuda/ptx> has all that is used


def find_toolkit():
    """The toolkit, if it is new enough."""
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    toolkit = build_cuda.find_toolkit(ours)
    if toolkit.version < OLDEST_NVCC:
        wanted = "install a CUDA toolkit >= {}.{}, or set CUDA_HOME to where one is"
        found = "{} {}.{} is too old for the micro-benchmarks".format(
            toolkit.nvcc, *toolkit.version
        )
        raise build_cuda.CannotBuild(found, wanted.format(*OLDEST_NVCC))
    return toolkit


def source_hash(root=ROOT):
    """A hash of all that is compiled, which the results keep."""
    digest = hashlib.sha256()
    folder = root / "csrc" / "cuda"
    for path in (folder / "primitives.cuh", *sorted((folder / "microbench").iterdir())):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def make_command(toolkit, arch, output):
    """The command that builds the program for "sm_80", "sm_90a" ... or "native"."""
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    ((_, _, command),) = replace(toolkit, codes=()).compilations(SOURCE, cxx)
    if arch == "native":
        code = "-arch=native"
    else:
        code = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
    defined = f'-DFUSED_RNN_MICROBENCH_HASH="{source_hash()}"'
    return [*command, code, defined, SOURCE, "-o", str(output)]


def build(toolkit, arch, output, flags=()):
    """Builds the program; returns what nvcc said."""
    output = Path(output).resolve()
    if arch != "native" and not re.fullmatch(r"sm_\d+[af]?", arch):
        raise build_cuda.CannotBuild(f"{arch} is no architecture", "give one as --arch sm_90a")
    if arch == "native":  # nvcc would warn and build for another
        asked = [toolkit.nvcc, "-arch=native", "--dryrun", "-c", "-x", "cu", os.devnull]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode or "Cannot find valid GPU" in done.stdout + done.stderr:
            raise build_cuda.CannotBuild("nvcc finds no GPU here", "name one: --arch sm_90a")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*make_command(toolkit, arch, output), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        failed = f"this command failed:\n    {shlex.join(command)}\n{said}"
        raise build_cuda.CannotBuild(failed, "")
    return said


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python tools/build_microbench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="native", help="sm_80, sm_90a ...; the GPU's by default")
    parser.add_argument("--out", default=ROOT / "build" / "microbench", help="build/microbench")
    options = parser.parse_args(arguments)
    try:
        said = build(find_toolkit(), options.arch, options.out)
    except build_cuda.CannotBuild as error:
        print("error: " + "; ".join(filter(None, error.args[:2])), file=sys.stderr)
        return 1
    print(said, end="")
    print(f"{options.out} is built for {options.arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

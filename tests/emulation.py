"""Builds libraries of kernels that run on the CPU, into build/emulator, and loads them."""

import fcntl
import functools
import importlib.machinery
import importlib.util
import itertools
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import ninja
import pybind11
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import build_cuda  # noqa: E402

OUTPUT = ROOT / "build" / "emulator"
# To be linked into whatever holds kernels.
EMULATOR = [
    f"csrc/emulator/{name}.cpp"
    for name in ("barriers", "fibers", "launch", "memory", "races", "scheduler", "warp")
]
# (Hidden: libraries loaded together each keep an emulator of their own.)
FLAGS = (
    "-std=c++20 -O2 -g0 -fPIC -fvisibility=hidden -fno-gnu-unique -Wall -Wextra "
    f"-DFUSED_RNN_EMULATOR -I{shlex.quote(str(ROOT / 'csrc'))}"
)


class Unit(NamedTuple):
    """One object of a library: a source, relative to the repository, flags of its own, which come
    first, and what tells it from other objects of that source."""

    source: str
    flags: tuple[str, ...] = ()
    tag: str = ""

    @property
    def object(self):
        return f"{self.source.replace('/', '_')}{self.tag}.o"


def objects_of(name):
    """Where the objects of a library are."""
    return OUTPUT / f"{name}.objects"


def ninja_build(name, units, flags=(), link_flags=(), jobs=2):
    """Compiles and links ``units`` (plain sources, or ``Unit``), where anything has changed since
    the last time. Returns the path of the shared library build/emulator/``name``."""
    folder = objects_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    units = [unit if isinstance(unit, Unit) else Unit(unit) for unit in units]

    def escape(path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    target = escape(OUTPUT / name)
    lines = [
        f"flags = {FLAGS} {shlex.join(flags)}",
        f"link_flags = {shlex.join(link_flags)}",
        "rule compile",
        "  command = g++ $own $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ -shared $in $link_flags -o $out",
    ]
    for unit in units:
        lines.append(f"build {unit.object}: compile {escape(ROOT / unit.source)}")
        lines.append(f"  own = {shlex.join(unit.flags)}")
    lines.append(f"build {target}: link {' '.join(unit.object for unit in units)}")
    text = "\n".join(lines) + "\n"
    file = folder / "build.ninja"
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", str(jobs)]
    with open(folder / "lock", "w") as lock:  # test processes side by side build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        # (Unchanged, it stays as old as it is.)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} does not build:\n{done.stdout}{done.stderr}")
    return OUTPUT / name


def load_module(name, path):
    """The Python module `name` from a shared library."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def build_module():
    """The emulator's own test module, csrc/emulator/module.cpp."""
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    path = ninja_build(
        f"emulator{sysconfig.get_config_var('EXT_SUFFIX')}",
        ["csrc/emulator/module.cpp", *EMULATOR],
        [f"-isystem{include}" for include in includes],
    )
    return load_module("emulator", path)


# The library of the CUDA backend as fused_rnn loads it, emulated.
LIBRARY = "libfused_rnn_emulated.so"
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{TORCH / 'include'}")
TORCH_LINK_FLAGS = (f"-L{TORCH / 'lib'}", "-ltorch_cpu")


def scan_unit(source, cell, kind, flags=()):
    """The unit of one cell's and product's scans, of one of ``SCANS``."""
    defines = (f"-DFUSED_RNN_CELL={cell}", f"-DFUSED_RNN_PRODUCT={kind}")
    return Unit(source, (*flags, *defines), f"_{cell}_{kind}")


def cuda_units():
    pairs = itertools.product(SCANS, build_cuda.CELLS, build_cuda.PRODUCTS)
    scans = [scan_unit(*pair) for pair in pairs]
    return [*map(Unit, EMULATOR), Unit("csrc/cuda/pointwise.cu"), *scans, Unit(OPERATORS)]


OPERATORS = "csrc/cuda/operators.cpp"
SCANS = [f"csrc/cuda/{name}" for name in build_cuda.SCANS]


def build_cuda_library():
    """The path of the CUDA backend's library, built."""
    return ninja_build(LIBRARY, cuda_units(), TORCH_FLAGS, TORCH_LINK_FLAGS)


if __name__ == "__main__":
    sys.exit(0 if build_module() and build_cuda_library() else 1)

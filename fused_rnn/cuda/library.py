"""The CUDA kernels' library: where it is, and loading it once.

FUSED_RNN_CUDA_LIBRARY names another file than the package's own: the tests' emulated library, whose
kernels run on CPU tensors.
"""

import os
from pathlib import Path

import torch

NAME = "libfused_rnn_cuda.so"
REMEDY = (
    "build it where nvcc is: `FUSED_RNN_CUDA=1 pip install --no-build-isolation .` in the source"
    " tree, or install a wheel built so"
)
_NO_GPU = "there is no NVIDIA GPU that torch can use"
_loaded = False


def path() -> Path:
    named = os.environ.get("FUSED_RNN_CUDA_LIBRARY")
    return Path(named) if named else Path(__file__).parent.parent / NAME


def why_unavailable() -> str | None:
    """None where the kernels can run, having loaded them; else why not and what would help. Without
    a GPU the library is loaded only where FUSED_RNN_CUDA_LIBRARY names it. (A call of any layer
    asks; so a file that was not there is not looked for again in this process.)"""
    return None if _loaded else _load()


_absent: dict[str | None, str] = {}  # by the variable's value: looking takes as long as a launch


def _load() -> str | None:
    global _loaded
    named = os.environ.get("FUSED_RNN_CUDA_LIBRARY")
    if named in _absent:
        return _absent[named]
    file = path()
    if not file.is_file():
        _absent[named] = f"there is no {file.name} in this installation; {REMEDY}"
        return _absent[named]
    gpu = torch.cuda.is_available() and not torch.version.hip
    if not gpu and not named:
        return _NO_GPU
    if reason := _open(file):
        return reason
    if not gpu and not is_emulated():
        return _NO_GPU
    _loaded = True
    return None


def _open(file: Path) -> str | None:
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} could not be loaded ({error}); {REMEDY}"
    return None


_facts: dict[object, int] = {}  # of the library that is loaded


def is_emulated() -> bool:
    """Whether the library that is loaded runs its kernels on the CPU."""
    if "emulated" not in _facts:
        _facts["emulated"] = torch.ops.fused_rnn.cuda_is_emulated()
    return bool(_facts["emulated"])


def has_code_for(index: int) -> bool:
    """Whether the library that is loaded has code for a GPU, by torch's index."""
    if index not in _facts:
        with torch.cuda.device(index):  # the library makes it the current one
            _facts[index] = torch.ops.fused_rnn.cuda_has_code_for(index)
    return bool(_facts[index])


_lost = False


def grids_lost() -> bool:
    """Whether a grid scan has been given up in this process, which then runs no more of them."""
    return _lost


def note_whether_lost() -> None:
    """To be called when an operator of the library has raised."""
    global _lost
    _lost = _lost or bool(torch.ops.fused_rnn.cuda_grid_is_lost())


def grid_resident(index: int | None, *scan) -> int:
    """How many blocks of a grid scan (the arguments of cuda_grid_resident) the current GPU, or the
    part of it this process may use, runs at the same time, as it says itself."""
    key = (index, *scan)
    if key not in _facts:
        _facts[key] = torch.ops.fused_rnn.cuda_grid_resident(*scan)
    return _facts[key]


# Under torch.compile these are asked once, outside the graph, and their answers are constants of
# it: what torch.compiler.assume_constant_result says, without importing the compiler.
for _function in (why_unavailable, is_emulated, has_code_for):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]

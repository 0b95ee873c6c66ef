"""The CUDA kernels' library: where it is, and loading it once.

FUSED_RNN_CUDA_LIBRARY names another file than the package's own: the tests' emulated library, whose
kernels run on CPU tensors.
"""

import functools
import os
from pathlib import Path

import torch

NAME = "libfused_rnn_cuda.so"
REMEDY = (
    "build it where nvcc is: `FUSED_RNN_CUDA=1 pip install --no-build-isolation .` in the source"
    " tree, or install a wheel built so"
)


def path() -> Path:
    named = os.environ.get("FUSED_RNN_CUDA_LIBRARY")
    return Path(named) if named else Path(__file__).parent.parent / NAME


@functools.lru_cache
def _load(file: Path) -> str | None:
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return f"{file.name} could not be loaded ({error}); {REMEDY}"
    return None


def why_unavailable() -> str | None:
    """None where the kernels can run, having loaded them; else why not and what would help. Without
    a GPU the library is loaded only where FUSED_RNN_CUDA_LIBRARY names it."""
    file = path()
    if not file.is_file():
        return f"there is no {file.name} in this installation; {REMEDY}"
    gpu = torch.cuda.is_available() and not torch.version.hip
    if not gpu and not os.environ.get("FUSED_RNN_CUDA_LIBRARY"):
        return "there is no NVIDIA GPU that torch can use"
    if reason := _load(file):
        return reason
    if not gpu and not is_emulated():
        return "there is no NVIDIA GPU that torch can use"
    return None


def is_emulated() -> bool:
    """Whether the library that is loaded runs its kernels on the CPU."""
    return bool(torch.ops.fused_rnn.cuda_is_emulated())

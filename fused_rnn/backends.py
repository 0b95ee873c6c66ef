"""The table of backends: where each runs, why it is unavailable, and which one a call gets."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fused_rnn import cudnn, plan
from fused_rnn.cuda import library as cuda_library
from fused_rnn.cuda import planning as cuda_planning
from fused_rnn.ops import ACC_DTYPE
from fused_rnn.precision import fp32_precisions, precision_of, torch_fp32_precision

REMEDY = (
    "build it with a C++ compiler: `pip install --no-build-isolation .` in the source tree,"
    " or install a wheel of fused_rnn for this platform"
)


class Request(NamedTuple):
    """What decides which backend can run a layer."""

    cell: str  # lstm, gru or rnn
    device: str  # device type
    dtype: torch.dtype
    reverse: tuple[bool, ...] = (False,)
    flags: bool = False  # lengths or reset given
    cells: bool = False  # all cell states asked for
    reset_after: bool = True
    projected_input: bool = False  # gates_x given instead of x
    # Sizes, which the automatic choice on a GPU goes by; None where they are not known.
    device_index: int | None = None
    rows: int | None = None
    hidden: int | None = None
    proj: int = 0
    steps: int | None = None  # None: many
    layers: int = 1
    training: bool = False  # a gradient is wanted
    waves: bool = False  # the layers may run side by side (wavefront.py)


def rounded(steps: int) -> int:
    """Steps for a Request, to three binary digits: one choice for all that are about so many."""
    shift = max(0, steps.bit_length() - 3)
    return -(-steps >> shift) << shift


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    ``unavailable()`` is None or the reason and remedy; ``refuses(request)`` is None or the reason;
    ``yields(request)`` is None, or why the automatic choice prefers a later row of the table.
    """

    name: str
    description: str
    unavailable: Callable[[], str | None]
    refuses: Callable[[Request], str | None]
    yields: Callable[[Request], str | None] = lambda request: None


def _load_extension() -> str | None:
    """Load the C++ extension, which registers the CPU operators: None, or why it cannot be."""
    try:
        import fused_rnn._C  # noqa: F401
    except (ImportError, OSError) as error:
        return f"the C++ extension fused_rnn._C could not be loaded ({error}); {REMEDY}"
    return None


_extension_missing = _load_extension()


def extension_missing() -> bool:
    """Whether the C++ extension, and with it the CPU's kernels, could not be loaded."""
    return _extension_missing is not None


def _cpu_refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return (
            f"it runs on CPU tensors, the input is on {request.device}; move the module and input"
        )
    return None


def _interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _find_triton() -> str | None:
    """None where the triton package is, which is not imported for that; else why not."""
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:
        found = None
    if found is None:
        return (
            "triton is not installed; pip install triton (CUDA and ROCm builds of torch bring it)"
        )
    return None


# Looked for once, here: a call of any layer asks, and torch.compile cannot trace a look.
_triton_missing = _find_triton()


def _cuda_unavailable() -> str | None:
    reason = cuda_library.why_unavailable()
    if reason is None and not cuda_library.is_emulated() and _triton_missing:
        return f"its matrix products outside the scans are Triton's: {_triton_missing}"
    return reason


def _cuda_refuses(request: Request) -> str | None:
    runs_on = "cpu" if cuda_library.is_emulated() else "cuda"
    if request.device != runs_on:
        where = "on CPU tensors, being emulated" if runs_on == "cpu" else "on NVIDIA GPUs"
        return f"it runs {where}, the input is on {request.device}; move the module and input"
    index = request.device_index or 0
    if runs_on == "cuda" and not cuda_library.has_code_for(index):
        arch = ".".join(map(str, torch.cuda.get_device_capability(index)))
        return (
            f"the library has no code for this GPU; TORCH_CUDA_ARCH_LIST={arch}"
            " FUSED_RNN_CUDA=1 pip install --no-build-isolation . builds it"
        )
    return None


def _cuda_yields(request: Request) -> str | None:
    if request.device == "cpu":
        return "emulated kernels are slow"
    if request.hidden is None or request.rows == 0:
        return "sizes are not known, or the batch is empty; Triton's kernels take any"
    device, shape = _planned(request)
    if cuda_library.grids_lost():
        device = replace(device, together=0)
    if not cuda_planning.scans_win(device, shape):
        return f"Triton's kernels are predicted to be faster at B = {shape.B}, H = {shape.H}"
    return _torch_is_faster(request, device, shape, cuda_planning)


def _torch_is_faster(request: Request, device, shape: plan.Shape, planner) -> str | None:
    """That torch.nn's own path can take a call and is predicted to be faster than the kernels of
    one of our planners; None elsewhere."""
    if _torch_refuses(request) or not _torch_takes(device, shape):
        return None
    ways = (shape, replace(shape, backward=True))
    step = tuple(planner.chosen(device, way).total for way in ways)
    steps, layers, training = request.steps, request.layers, request.training
    ours = cudnn.our_call_us(step, steps, layers, training)
    if request.waves and planner is cuda_planning and steps is not None:
        if cuda_planning.wave_chunk(device, shape, layers, steps) is not None:
            wave = cuda_planning.wave(device, shape, layers, steps)
            ours *= wave.total / wave.alone
    if ours <= cudnn.call_us(device, shape, steps, layers, training):
        return None
    length = "" if steps is None else f"T = {steps}, "
    return f"torch.nn's path is predicted to be faster at {length}B = {shape.B}, H = {shape.H}"


def _triton_unavailable() -> str | None:
    if _triton_missing is not None:
        return _triton_missing
    if not _has_gpu() and not _interpreting():
        return (
            "there is no GPU that torch can use; TRITON_INTERPRET=1, set before the first use, runs"
            " its kernels slowly on the CPU"
        )
    return None


def _triton_refuses(request: Request) -> str | None:
    if request.device == "cuda":
        if _interpreting():
            return "TRITON_INTERPRET is set; unset it to run on the GPU"
        return None
    if request.device == "cpu" and _interpreting():
        return None
    return (
        f"it runs on NVIDIA and AMD GPUs, the input is on {request.device}; move the module and"
        " input to a GPU" + ("" if request.device != "cpu" else ", or set TRITON_INTERPRET=1")
    )


def _triton_yields(request: Request) -> str | None:
    if request.device == "cpu":
        return "interpreted kernels are slow"
    # (Sizes are not given under torch.compile and transforms, which torch.nn's path cannot take.)
    if request.hidden is None or request.rows == 0:
        return None
    return _torch_is_faster(request, *_planned(request), plan)


def _planned(request: Request) -> tuple[plan.Device, plan.Shape]:
    """The device and shape of a request on a GPU, as the planner sees them."""
    device = plan.device_of(request.device_index or 0)
    precision = precision_of(device, "cuda", request.dtype)
    rows = plan.TYPICAL_ROWS if request.rows is None else request.rows
    return device, plan.Shape(
        *(request.cell, len(request.reverse), rows, request.hidden, request.dtype, request.proj),
        reset_after=request.reset_after,
        precision=precision,
    )


def _torch_takes(device: plan.Device, shape: plan.Shape) -> bool:
    """Whether torch.nn's path takes float32 products as asked: it knows torch's setting alone."""
    if shape.dtype != torch.float32 or not device.has_tf32:
        return True
    return shape.precision == torch_fp32_precision()


def _torch_refuses(request: Request) -> str | None:
    if request.flags:
        return "torch.nn's path has no lengths or reset"
    if request.cells:
        return "torch.nn's path does not return all cell states"
    if not request.reset_after:
        return "torch.nn's GRU is reset-after only"
    if request.projected_input:
        return "torch.nn's path computes the input projection itself (w_ih is required)"
    if request.reverse not in ((False,), (False, True)):
        return f"torch.nn's path has reverse=(False,) or (False, True) only, got {request.reverse}"
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++ SIMD scans", lambda: _extension_missing, _cpu_refuses),
        Backend(
            "cuda",
            "CUDA C++ kernels",
            _cuda_unavailable,
            _cuda_refuses,
            _cuda_yields,
        ),
        Backend(
            "triton",
            "Triton kernels",
            _triton_unavailable,
            _triton_refuses,
            _triton_yields,
        ),
        Backend("torch", "torch.nn's own path", lambda: None, _torch_refuses),
        Backend("reference", "plain PyTorch loop", lambda: None, lambda request: None),
    )
}
AUTO = "auto"  # the order of BACKENDS is the order of the automatic choice, but for ``yields``


def _known(name: str, source: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {[AUTO, *BACKENDS]}, got {name!r}")
    return name


_selected = _known(os.environ.get("FUSED_RNN_BACKEND", AUTO) or AUTO, "FUSED_RNN_BACKEND")


class use_backend:
    """Run layers on the named backend: a setter, and a context manager that restores.

    name: a key of ``available_backends()``, or "auto" (the default), which chooses for each call.
    An explicit backend never falls back: a call it cannot run raises RuntimeError. The setting is
    the process's; the environment variable FUSED_RNN_BACKEND gives its first value.

    Raises ValueError for an unknown name, RuntimeError for an unavailable backend.

    >>> with use_backend("reference"):
    ...     current_backend()
    'reference'
    """

    def __init__(self, name: str):
        global _selected
        if _known(name, "name") != AUTO and (reason := BACKENDS[name].unavailable()):
            raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
        self._previous = _selected
        _selected = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _selected
        _selected = self._previous


def current_backend() -> str:
    """The name set by ``use_backend`` or FUSED_RNN_BACKEND; "auto" by default."""
    return _selected


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None where it is available, or the reason and remedy."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def why_not(name: str, request: Request) -> str | None:
    """Why the named backend cannot run the request, or None where it can."""
    if request.dtype not in ACC_DTYPE:
        return f"dtype {request.dtype} is not one of {[str(d) for d in ACC_DTYPE]}"
    return BACKENDS[name].unavailable() or BACKENDS[name].refuses(request)


_warned = False


def _warn_once(request: Request, chosen: str) -> None:
    global _warned
    if not _warned and request.device == "cpu" and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"fused_rnn runs on its {chosen!r} backend, not at its speed: {_extension_missing}",
            stacklevel=2,
        )


def choose(request: Request, name: str | None = None) -> str:
    """The backend for a request: the named or selected one, or the first that takes it.

    Raises RuntimeError when an explicit backend cannot take it, naming those that can.
    """
    name = _selected if name is None else _known(name, "backend")
    if name != AUTO:
        reason = why_not(name, request)
        if reason is None:
            return name
        others = [other for other in BACKENDS if why_not(other, request) is None]
        raise RuntimeError(
            f"backend {name!r} cannot run this {request.cell}: {reason}."
            f" What would: {', '.join(others) or 'none'}"
        )
    if request.device == "cuda" and not torch.compiler.is_compiling():
        state = (cuda_library.why_unavailable(), cuda_library.grids_lost())
        if request.dtype == torch.float32:
            state += fp32_precisions()
        return _choose_on_gpu(request, state)
    return _first(request)


@functools.lru_cache(maxsize=4096)
def _choose_on_gpu(request: Request, state) -> str:
    """The automatic choice, which on a GPU is made from predictions and costs as much as a launch;
    it depends on ``state`` too, which may change."""
    return _first(request)


def _first(request: Request) -> str:
    """The first backend of the table that takes a request and does not yield, or else the first."""
    second = None  # one that can, but would rather leave it to another
    for name in BACKENDS:
        if why_not(name, request) is None:
            if BACKENDS[name].yields(request) is None:
                second = name
                break
            second = second or name
    if second is not None:
        if _extension_missing is not None:
            _warn_once(request, second)
        return second
    raise RuntimeError(f"no backend can run this {request.cell}: {why_not('reference', request)}")

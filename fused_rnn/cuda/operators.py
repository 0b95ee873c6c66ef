"""The operators ``fused_rnn::cuda_*``: a plan, a precision and a stream for the library's own.

Schemas are fused_rnn/ops.py's, meanings docs/design.md's.
"""

import contextlib
import functools
import threading
from dataclasses import replace

import torch
from torch import Tensor

from fused_rnn import plan as devices
from fused_rnn.cuda import library, planning
from fused_rnn.ops import ACC_DTYPE, GATES
from fused_rnn.plan import PRECISIONS, Shape
from fused_rnn.precision import precision_of

# The model that plans emulated runs on the CPU; so many blocks the emulated library lets wait for
# one another.
_EMULATED_DEVICE = replace(devices.DEVICES["H200"], together=16)


def device_model(device: torch.device) -> devices.Device:
    """The model plans are made by; grid scans are in none once one of them was lost."""
    if reason := library.why_unavailable():
        raise RuntimeError(f"the CUDA backend is unavailable: {reason}")
    if device.type == "cpu":
        if not library.is_emulated():
            raise RuntimeError(
                "the CUDA backend runs on NVIDIA GPUs, the tensors are on the CPU; move them to a"
                " GPU"
            )
        model = _EMULATED_DEVICE
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        model = devices.device_of(index)
    return replace(model, together=0) if library.grids_lost() else model


_settings = threading.Lock()


@contextlib.contextmanager
def _no_less_than(precision: str, device: torch.device):
    """The step path's products are torch's, in ieee as torch has it by default. Where torch's own
    setting allows them TF32 and the scan is not to have it, the setting is changed meanwhile; it
    is the process's, so one scan at a time does that."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or precision == "tf32" or matmul.fp32_precision != "tf32":
        yield
        return
    with _settings:
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "tf32"


_NOTHING = contextlib.nullcontext()


def _settled(model: devices.Device, shape: Shape, device: torch.device):
    """The kernel a shape gets, and the model as the GPU corrects it: a grid scan's kernel is taken
    only where the GPU says that all its blocks run at the same time."""
    found = planning.choose(model, shape)
    while isinstance(found, planning.Grid):
        product = planning.PRODUCTS.index(planning.product_of(shape))
        scan = (
            *(planning.CELLS.index(shape.cell), product, shape.H),
            *(found.kernel, found.rows, shape.backward),
        )
        with devices.on(device):
            together = library.grid_resident(device.index, *scan)
        if together >= planning.blocks_together(model):
            break
        model = replace(model, together=together)
        found = planning.choose(model, shape)
    return found, model


def wave_chunk(
    cell: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    layers: int,
    steps: int,
) -> int | None:
    """Steps of a chunk where layers are predicted to be faster as a wave; None elsewhere."""
    model = device_model(device)
    precision = precision_of(model, device.type, dtype)
    shape = Shape(cell, 1, rows, hidden, dtype, precision=precision)
    return _wave_chunk(model, device, shape, layers, steps)


@functools.lru_cache(maxsize=1024)
def _wave_chunk(model, device, shape: Shape, layers: int, steps: int) -> int | None:
    if planning.wave_chunk(model, shape, layers, steps) is None:
        return None  # and the GPU need not be asked
    for way in planning.scans_of_wave(shape, layers):
        _, model = _settled(model, way, device)
    return planning.wave_chunk(model, shape, layers, steps)


def _run(name: str, w_hh: Tensor, sequence: Tensor, *args, proj=0, reset_after=True):
    """One of the library's operators, with the kernel its shape gets."""
    device, dtype = w_hh.device, w_hh.dtype
    precision = precision_of(device_model(device), device.type, dtype)
    sizes = None
    if w_hh.dim() == 3 and sequence.dim() == 4:  # else the operator says what is wrong
        S, width, _ = w_hh.shape
        sizes = S, sequence.shape[1], width, dtype, proj, reset_after, precision
    state = planning.choose, library.why_unavailable(), library.grids_lost()
    kernel = _kernel(name, device, sizes, state)
    stream = devices.stream_of(device) if device.type == "cuda" else 0
    choice = (kernel.kernel, kernel.rows, PRECISIONS.index(precision), stream)
    products = _no_less_than(precision, device) if kernel.kind == "step" else _NOTHING
    with torch.no_grad(), devices.on(device), products:
        try:
            return _operator(name)(*args, *choice)
        except RuntimeError:
            library.note_whether_lost()
            raise


@functools.cache
def _operator(name: str):
    """The library's own, which is loaded by now."""
    return getattr(torch.ops.fused_rnn, f"cuda_scan_{name}").default


@functools.lru_cache(maxsize=4096)
def _kernel(name: str, device: torch.device, sizes, state):
    """The kernel a scan of so many entries, rows and gates gets. It depends on ``state`` too, which
    may change."""
    model = device_model(device)
    if sizes is None:
        return planning.Step()
    cell, direction = name.split("_")
    S, rows, width, dtype, proj, reset_after, precision = sizes
    backward = direction == "backward"
    if not S or width < GATES[cell] or dtype not in ACC_DTYPE:
        return planning.Step()
    hidden = width // GATES[cell]
    shape = Shape(cell, S, rows, hidden, dtype, proj, reset_after, precision, backward)
    return _settled(model, shape, device)[0]


def _projection(w_hr: Tensor | None) -> int:
    return 0 if w_hr is None else w_hr.shape[-2] if w_hr.dim() > 1 else 1


def lstm_forward(gates_x, w_hh, w_hr, *rest):
    args = (gates_x, w_hh, w_hr, *rest)
    return _run("lstm_forward", w_hh, gates_x, *args, proj=_projection(w_hr))


def lstm_inference(gates_x, w_hh, w_hr, *rest):
    args = (gates_x, w_hh, w_hr, *rest)
    return _run("lstm_inference", w_hh, gates_x, *args, proj=_projection(w_hr))


def lstm_backward(dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, *rest):
    args = (dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, *rest)
    return _run("lstm_backward", w_hh, cells, *args, proj=_projection(w_hr))


def gru_forward(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates):
    args = (gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates)
    return _run("gru_forward", w_hh, gates_x, *args, reset_after=reset_after)


def gru_inference(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after):
    args = (gates_x, w_hh, b_hn, h0, flags, reverse, reset_after)
    return _run("gru_inference", w_hh, gates_x, *args, reset_after=reset_after)


def gru_backward(dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after):
    args = (dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after)
    return _run("gru_backward", w_hh, y, *args, reset_after=reset_after)


def rnn_forward(gates_x, w_hh, *rest):
    return _run("rnn_forward", w_hh, gates_x, gates_x, w_hh, *rest)


def rnn_backward(dy, dh_n, w_hh, y, *rest):
    return _run("rnn_backward", w_hh, y, dy, dh_n, w_hh, y, *rest)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None, least: int = 1) -> Tensor:
    """The waist's matmul, which is outside the scans: the Triton backend's on a GPU, the CPU
    backend's in emulation. A row's bits depend on the row alone in both, and not on `least`, which
    has a meaning for that backend's own layers."""
    device_model(a.device)
    if a.device.type == "cpu":
        return torch.ops.fused_rnn.cpu_matmul(a, b, bias)
    from fused_rnn.triton.operators import matrix_product

    return matrix_product(a, b, bias)


IMPLEMENTATIONS = {
    "lstm_forward": lstm_forward,
    "lstm_inference": lstm_inference,
    "lstm_backward": lstm_backward,
    "gru_forward": gru_forward,
    "gru_inference": gru_inference,
    "gru_backward": gru_backward,
    "rnn_forward": rnn_forward,
    "rnn_backward": rnn_backward,
    "matmul": matmul,
}

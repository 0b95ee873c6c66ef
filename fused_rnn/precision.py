"""How float32 products are taken on a GPU: torch's own flags for RNNs, or a choice made here."""

import os

import torch

from fused_rnn.plan import PRECISIONS, Device


def _known(value: str | None, source: str) -> str | None:
    if value is not None and value not in PRECISIONS:
        raise ValueError(f"{source} must be one of {list(PRECISIONS)} or None, got {value!r}")
    return value


_selected = _known(os.environ.get("FUSED_RNN_FP32_PRECISION") or None, "FUSED_RNN_FP32_PRECISION")


class fp32_precision:
    """How float32 products are taken on a GPU: a setter, and a context manager that restores.

    value: "ieee"; "tf32" (operands rounded to 10 bits of mantissa); "tf32x3" (each operand as two
    TF32 numbers: errors near those of ieee at a third of TF32's speed); or None, the default, which
    follows torch: TF32 where ``torch.backends.cudnn.rnn.fp32_precision`` is "tf32", torch's own
    default for RNNs, which ``torch.backends.cudnn.allow_tf32 = False`` changes too; else ieee. The
    C++ kernels on a CPU are always ieee. The environment variable FUSED_RNN_FP32_PRECISION gives
    the first value.

    Raises ValueError for anything else.

    >>> with fp32_precision("tf32x3"):
    ...     current_fp32_precision("cuda")
    'tf32x3'
    """

    def __init__(self, value: str | None):
        global _selected
        self._previous = _selected
        _selected = _known(value, "value")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _selected
        _selected = self._previous


def torch_fp32_precision() -> str:
    """What torch.nn's own path takes float32 products in on a GPU: "ieee" or "tf32"."""
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"


def current_fp32_precision(device: str = "cuda") -> str:
    """What float32 products on a device type are taken in: a member of ``PRECISIONS``."""
    if _selected is not None:
        return _selected
    return "ieee" if device == "cpu" else torch_fp32_precision()


def fp32_precisions() -> tuple[str, str]:
    """On a GPU, our way and that of torch.nn's own path; every call there asks."""
    theirs = torch_fp32_precision()
    return _selected or theirs, theirs


def precision_of(device: Device, kind: str, dtype: torch.dtype) -> str:
    """How a scan's products of a dtype are taken on a device; ``kind``: cuda or cpu."""
    if dtype == torch.float32 and device.has_tf32:
        return current_fp32_precision(kind)
    return "ieee"

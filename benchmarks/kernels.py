"""What the programs that run the CUDA backend's kernels by themselves have in common."""

import sys

from fused_rnn import plan
from fused_rnn.cuda import library


def cuda_model(device: str) -> plan.Device | None:
    """The planner's model for ``device``: cuda, or cpu, where an emulated library is to run. None,
    and a line that says why, where the library is not one for it."""
    reason = library.why_unavailable()
    if reason is None and library.is_emulated() != (device == "cpu"):
        reason = f"the library is {'' if library.is_emulated() else 'not '}an emulated one"
    if reason:
        print(f"error: --device {device}: {reason}", file=sys.stderr)
        return None
    return plan.DEVICES["H200"] if device == "cpu" else plan.device_of(0)

"""Launching: which kernel and tiles a call gets, one launch or one a step, on which device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rnn import plan as planning
from fused_rnn.plan import Shape
from fused_rnn.precision import precision_of
from fused_rnn.triton import primitives
from fused_rnn.triton.arguments import Layer, check, padded

TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
INTERPRETED = bool(primitives.INTERPRETED.value)
# The model that plans interpreted runs on the CPU.
_INTERPRETED_DEVICE = planning.DEVICES["H200"]


def device_model(device: torch.device) -> planning.Device:
    """The planner's model of the device of a call; raises where no kernel can run on it."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return planning.device_of(index)
    check(
        INTERPRETED,
        f"the Triton backend runs on GPU tensors, got {device}; move the tensors to a GPU, or set"
        " TRITON_INTERPRET=1 before fused_rnn is first used, which runs it slowly on a CPU",
    )
    return _INTERPRETED_DEVICE


class Launcher:
    """Launches one kernel again and again, with arguments that Triton compiles the same code for.

    The first launch goes through Triton's dispatch, which compiles; the others call the compiled
    kernel, at a fraction of the time on the host. (That takes a grid of three numbers.)
    """

    def __init__(self, kernel, grid: tuple[int, int, int], options: dict):
        self.kernel, self.grid, self.options, self.compiled = kernel, grid, options, None

    def __call__(self, *args, stream: int | None) -> None:
        if self.compiled is not None:
            self.compiled(*args, stream=stream)
            return
        found = self.kernel[self.grid](*args, **self.options)
        if not INTERPRETED:
            self.compiled = found[self.grid]


class Steps:
    """Launches one kernel again and again with only the step changing."""

    def __init__(self, kernel, grid, args: tuple, constants: tuple, step_at: int, options: dict):
        self.launcher, self.step_at = Launcher(kernel, grid, options), step_at
        self.args, self.stream = [*args, *constants], None

    def __call__(self, step: int) -> None:
        if self.stream is None and not INTERPRETED:
            self.stream = torch.cuda.current_stream().cuda_stream
        self.args[self.step_at] = step
        self.launcher(*self.args, stream=self.stream)


class Call:
    """One call of an operator: its layer, and the plan and precision it runs with."""

    def __init__(self, layer: Layer, cell: str, *, proj=False, reset_after=True, backward=False):
        device = self.device = device_model(layer.device)
        self.layer = layer
        self.precision = precision_of(device, layer.device.type, layer.io)
        shape = Shape(
            *(cell, layer.S, layer.B, layer.H, layer.io, layer.P if proj else 0),
            *(reset_after, self.precision, backward),
        )
        self.plan = planning.choose(device, shape)
        self.is_block = self.plan.kind == "block"

    def block(self, kernel, args: tuple, constants: tuple = ()) -> None:
        """Launch a block scan, which is the whole call."""
        layer, plan = self.layer, self.plan
        grid = (layer.S * triton.cdiv(layer.B, plan.block_b),)
        sizes = (layer.T, layer.B, layer.S, layer.H, padded(layer.H))
        constants = (*constants, plan.block_h, plan.block_b, self.precision)
        options = planning.options(self.device, plan)
        kernel[grid](*args, *layer.reverse, *sizes, *constants, **options)

    def steps(
        self, kernel, units: int, args: tuple, sizes: tuple, constants=(), loops=True
    ) -> Steps:
        """The launcher of a tile kernel over ``units``, for one step at a time. ``loops``: the
        kernel can run several steps."""
        layer, plan = self.layer, self.plan
        grid = (layer.S * triton.cdiv(layer.B, plan.block_b), triton.cdiv(units, plan.block_u), 1)
        before = (*args, *layer.reverse)
        args = (*before, *((0, 1) if loops else (0,)), layer.T, layer.B, layer.S, *sizes)
        constants = (*constants, plan.block_u, plan.block_b, plan.block_k, self.precision)
        options = planning.options(self.device, plan)
        return Steps(kernel, grid, args, constants, len(before), options)

    def scan(self, steps: Steps, count: int) -> None:
        """All steps of a kernel that loops: in one launch where the plan streams, else in one
        each."""
        if self.plan.streamed:
            steps.launcher.grid = (steps.launcher.grid[0], 1, 1)
            steps.args[steps.step_at + 1] = count
            steps(0)
        else:
            for step in range(count):
                steps(step)


def operand(layer: Layer, size: int) -> Tensor:
    """[S, B, padded(size)] in io, for what one launch leaves and another multiplies; the padding is
    zero and stays so."""
    shape = (layer.S, layer.B, padded(size))
    return torch.zeros(shape, dtype=layer.io, device=layer.device)


def halves(layer: Layer, first: Tensor | None, size: int, dtype=None) -> Tensor:
    """Two of ``operand``: [2, S, B, padded(size)], what one step reads and the other half, which it
    writes. The first half starts as ``first``."""
    shape = (2, layer.S, layer.B, padded(size))
    both = torch.zeros(shape, dtype=dtype or layer.io, device=layer.device)
    if first is not None:
        both[0, ..., :size].copy_(first)
    return both

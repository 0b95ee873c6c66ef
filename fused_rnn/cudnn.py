"""How long a call of torch.nn's own path takes on an NVIDIA GPU, and one of ours beside it: what
the automatic choice between them goes by. Pure Python, like plan.py.

Measured on an H100 with cuDNN 9.19 (benchmarks/results/h100: steps in graphs, where no host is in
the way, and what a call takes besides them in the tables). Where cuDNN keeps the weights on the
chip for the whole sequence it takes one launch, elsewhere a product and a pointwise kernel a step.
"""

from dataclasses import replace

import torch

from fused_rnn.plan import Device, Shape, rate_of

# Microseconds of a step of cuDNN's persistent kernels for small states, forward and both ways, with
# 16 rows of up to 64 units and of up to 128, and what every further row adds. They exist in float16
# and in float32, in which they multiply by FMA.
SMALL = {
    (torch.float16, "lstm"): ((1.2, 2.1), (1.92, 3.71), (0.005, 0.02)),
    (torch.float16, "gru"): ((1.1, 2.6), (1.69, 3.48), (0.005, 0.02)),
    (torch.float32, "lstm"): ((0.52, 0.8), (2.32, 4.1), (0.005, 0.02)),
    (torch.float32, "gru"): ((0.55, 1.5), (0.99, 2.26), (0.003, 0.045)),
}
# A step of two launches, and with what the backward has besides, in 16 bits and in more.
LAUNCHED, LAUNCHED_BOTH, LAUNCHED_BOTH_WIDE = 4.4, 10.0, 20.0
# Microseconds of the host, inference and training: for a call of torch.nn's path, for a layer of
# ours, and for each of cuDNN's launches. Between hosts that launch fast and slowly: 0.6 of what a
# virtual machine took.
HOST, OUR_HOST, HOST_LAUNCH = (65.0, 850.0), (210.0, 1100.0), 5.0
# What a long call takes besides its steps, of either: the GPU's other work, and the part of the
# host's during which the GPU has nothing to do.
BESIDES, OUR_BESIDES = (70.0, 250.0), (280.0, 630.0)


def step_us(device: Device, shape: Shape) -> tuple[float, float, bool]:
    """Microseconds of a step of cuDNN, forward and both ways, and whether it launches each."""
    elements = shape.S * shape.B * shape.H
    plain = not shape.proj and shape.reset_after
    cell = shape.cell if shape.cell == "lstm" else "gru"
    if plain and shape.H <= 128 and (shape.dtype, cell) in SMALL:
        memory = elements * (2 * shape.gates + 2) * shape.itemsize / device.memory * 1e-3
        rate = device.mma16 if shape.itemsize == 2 else device.fma
        work = (
            elements * shape.gates * shape.H / (device.multiprocessors * device.clock * 1e3 * rate)
        )
        *sizes, row = SMALL[shape.dtype, cell]
        rows = max(0, shape.B - 16)
        forward, both = (of + rows * more for of, more in zip(sizes[shape.H > 64], row))
        bound = max(memory, work)
        return max(forward * shape.S, bound), max(both * shape.S, 3 * bound), False
    persistent = (
        *(plain, shape.cell == "lstm", shape.dtype == torch.float16, shape.S == 1),
        *(shape.H % 128 == 0, shape.H <= 1024, shape.B % 8 == 0, shape.B <= 128),
    )
    if all(persistent):
        forward = 0.9 + 0.05 * shape.B + 0.001 * shape.H
        return forward, 2.65 * forward, False
    out = shape.proj or shape.H
    weights = shape.gates * shape.H * out * shape.itemsize
    products = 2 * shape.gates * shape.H * out * shape.B
    rate = rate_of(
        device, replace(shape, precision="ieee" if shape.precision == "ieee" else "tf32")
    )
    peak = device.multiprocessors * device.clock * 2e3 * rate  # operations a us
    work = max(weights / device.l2 * 1e-3, 2 * products / peak)
    both = LAUNCHED_BOTH if shape.itemsize == 2 else LAUNCHED_BOTH_WIDE
    return (LAUNCHED + work) * shape.S, (both + 3 * work) * shape.S, True


def call_us(device: Device, shape: Shape, steps: int | None, layers: int, training: bool) -> float:
    """A call of torch.nn's path: so many layers of a shape. steps: None for a long sequence, of
    which a step alone counts."""
    *each, launches = step_us(device, shape)
    if steps is None:
        return layers * each[training]
    host = HOST[training]
    if launches:
        host += layers * steps * shape.S * (4 if training else 2) * HOST_LAUNCH
    return max(host, layers * steps * each[training] + BESIDES[training])


def our_call_us(step: tuple[float, float], steps: int | None, layers: int, training: bool) -> float:
    """The same of our kernels, whose forward and backward scans take so long a step."""
    each = sum(step) if training else step[0]
    if steps is None:
        return layers * each
    return layers * max(OUR_HOST[training], steps * each + OUR_BESIDES[training])

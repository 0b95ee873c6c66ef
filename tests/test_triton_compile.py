"""Ahead-of-time compilation of the Triton kernels for GPUs that are not here: everything compiles,
spills nothing, fits the target's shared memory, and multiplies on tensor cores where dtypes allow.

By default a share of them for each GPU, every kernel with every way of multiplying in one size for
some NVIDIA GPU; FUSED_RNN_COMPILE=all takes all of them.
"""

import os

import pytest

from fused_rnn import plan

SHARES = {"A100": (0, 4), "H100": (1, 2), "B200": (2, 4), "MI300X": (3, 4)}  # part, of so many
ALL = os.environ.get("FUSED_RNN_COMPILE") == "all"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARES)
def test_compiles(name):
    from fused_rnn.triton import aot

    device = plan.DEVICES[name]
    chosen = aot.configurations(device) if ALL else aot.sample(device, *SHARES[name])
    assert len(chosen) > 40
    faults = [
        f"{configuration}: {wrong}"
        for _, configuration, _, wrong in aot.compile_all([(device, c) for c in chosen])
        if wrong is not None
    ]
    assert not faults, "\n".join(faults)


def test_the_sample_has_every_kernel_and_way_of_multiplying():
    from fused_rnn.triton import aot

    device = plan.DEVICES["H100"]
    shares = [aot.sample(device, *SHARES[name]) for name in ("A100", "H100", "B200")]
    found = [configuration[:4] for share in shares for configuration in share]
    assert sorted(found, key=str) == sorted({c[:4] for c in aot.configurations(device)}, key=str)
    assert {configuration.kernel for share in shares for configuration in share} == set(
        aot.kernels()
    )


def test_faults_are_seen():
    """A spill, too much shared memory, and products that miss the tensor cores."""
    from fused_rnn.triton import aot

    device = plan.DEVICES["A100"]
    wide = next(c for c in aot.configurations(device) if c.dtype.itemsize == 2)
    assert aot.fault(device, wide, aot.Report(64, 0, 1024, 8)) is None
    assert "spills" in aot.fault(device, wide, aot.Report(255, 8, 1024, 8))
    assert "shared memory" in aot.fault(device, wide, aot.Report(64, 0, device.shared + 1, 8))
    assert "tensor core" in aot.fault(device, wide, aot.Report(64, 0, 1024, 0))

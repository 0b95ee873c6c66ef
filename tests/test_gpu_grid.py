"""Grid scans on a GPU: blocks that wait for one another, beside other work, in CUDA graphs, many in
a row. The bodies run on a CPU too, tiny, as those of tests/test_gpu.py do."""

import pytest
import test_gpu
import torch
from test_gpu import DEVICE, size
from test_gpu_calls import capture, cuda_only, lstm_arguments, lstm_scan

pytestmark = [pytest.mark.gpu, test_gpu.pytestmark[1]]
backend = test_gpu.backend

GRID = 2  # the kernel's number
HIDDEN = pytest.mark.parametrize("hidden", (size(512, 20), size(1000, 40)))


@cuda_only
@HIDDEN
def test_beside_others_on_other_streams(hidden, backend):
    """Two scans at the same time, and large products of a third stream between them."""
    given = [lstm_arguments(hidden), lstm_arguments(hidden)]
    given[1][0].mul_(-1)
    wanted = [lstm_scan(each, GRID) for each in given]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    if DEVICE == "cpu":
        return
    a = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        with torch.cuda.stream(streams[2]):
            a @ a
        for stream, each in zip(streams, given, strict=False):
            with torch.cuda.stream(stream):
                found.append(lstm_scan(each, GRID, stream.cuda_stream))
    torch.cuda.synchronize()
    for number, outputs in enumerate(found):
        for ours, alone in zip(outputs, wanted[number % 2], strict=True):
            assert torch.equal(ours, alone), number


@cuda_only
@HIDDEN
def test_replayed_many_times(hidden, backend):
    """A captured scan gives the bits of an eager one at every replay, on new values each."""
    arguments = lstm_arguments(hidden)

    def call():
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
        return lstm_scan(arguments, GRID, stream)

    outputs, replay = capture(call)
    for _ in range(size(50, 2)):
        arguments[0].mul_(-0.9)
        wanted = call()
        replay()
        for ours, eager in zip(outputs, wanted, strict=True):
            assert torch.equal(ours, eager)


@cuda_only
def test_many_of_random_sizes(backend):
    """Each gives about what the step path does, and the next is not disturbed."""
    generator = torch.Generator().manual_seed(5)
    for number in range(size(200, 3)):
        hidden = int(torch.randint(1, size(400, 40), (), generator=generator))
        arguments = lstm_arguments(hidden)
        found, wanted = lstm_scan(arguments, GRID), lstm_scan(arguments, 0)
        for ours, steps in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                ours.float(), steps.float(), rtol=0.03, atol=0.03, msg=f"{number}: H = {hidden}"
            )


@cuda_only
def test_a_refused_launch_spoils_nothing(backend):
    """More blocks than run together are a RuntimeError with the numbers; later calls go on."""
    arguments = lstm_arguments(40)
    before = lstm_scan(arguments, GRID)
    with pytest.raises(
        RuntimeError, match=r"of H = 5000 takes 313 blocks at the same time, the GPU"
    ):
        lstm_scan(lstm_arguments(5000), GRID)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for ours, earlier in zip(lstm_scan(arguments, GRID), before, strict=True):
        assert torch.equal(ours, earlier)

"""Timing of several runners in one process: A B B A, so that drift falls on all alike.

A *pass* times one block of calls of every runner; passes go through the runners forwards and
backwards in turn. A block's median is one observation, and observations of one pass are pairs.
"""

import contextlib
import time
from dataclasses import dataclass, field

import torch

from benchmarks.stats import median

BLOCK_S = 0.02  # a block repeats calls for about this long
SAMPLE_S = 0.0002  # a sample is so many calls that the clock's own cost is below one in a thousand
SETTLE_S = 0.002  # threads of the runner before spin about this long and would be in the way
LONGEST_BLOCK_S = 3 * BLOCK_S  # where a neighbour makes calls longer than estimated
WARM_UP_S = 0.2  # a call longer than this is its own warm-up
MIN_PASSES, MAX_PASSES = 6, 400


class CpuClock:
    """Wall time by perf_counter_ns."""

    def measure(self, call, first, repeat):
        """Seconds a call takes, over `repeat` calls call(first), call(first + 1), ..."""
        begin = time.perf_counter_ns()
        for index in range(first, first + repeat):
            call(index)
        return (time.perf_counter_ns() - begin) * 1e-9 / repeat

    def peak_memory(self, call):
        return None


class CudaClock:
    """Time between two events on the current stream, waits for launches included."""

    def __init__(self, device):
        self.device = device

    def measure(self, call, first, repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for index in range(first, first + repeat):
            call(index)
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) * 1e-3 / repeat

    def peak_memory(self, call):
        """Bytes the allocator had to add at most during call(0)."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call(0)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def clock_for(device):
    device = torch.device(device)
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def quick_estimate(runner):
    """Seconds a call takes, roughly: the best of four warm ones, or of what fits into WARM_UP_S."""
    clock, times = clock_for(runner.device), []
    with runner.context():
        clock.measure(runner.call, 0, 1)  # the first call may compile, allocate, choose
        runner.clear()
        while len(times) < 4 and sum(times) < WARM_UP_S:
            times.append(clock.measure(runner.call, 0, 1))
            runner.clear()
    return min(times)


@dataclass
class Timing:
    """What one runner gave: seconds a call, one median for each pass, and all samples."""

    blocks: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    peak_memory: int | None = None


class _Lane:
    """One runner on its way through the passes; knows how many calls fill a block."""

    def __init__(self, runner, clock):
        self.runner, self.clock, self.timing = runner, clock, Timing()
        self.calls = 0
        # Gradients are dropped between samples, outside the clock, so training takes one call each.
        self.single = runner.training
        estimate = quick_estimate(runner)
        with runner.context():
            if not getattr(runner, "keeps_memory", False):
                self.timing.peak_memory = clock.peak_memory(runner.call)
            runner.clear()
        self.slow = estimate > WARM_UP_S
        self.repeat = 1 if self.single else max(1, round(SAMPLE_S / estimate))
        self.samples = max(1, min(200, round(BLOCK_S / (estimate * self.repeat))))

    def _sample(self, repeat):
        seconds = self.clock.measure(self.runner.call, self.calls, repeat)
        self.calls += repeat
        self.runner.clear()
        return seconds

    def block(self):
        """Settle, warm up, time one block."""
        time.sleep(SETTLE_S)
        with self.runner.context():
            if not self.slow:
                self._sample(self.repeat)
            samples, begin = [], time.perf_counter()
            while len(samples) < self.samples and time.perf_counter() - begin < LONGEST_BLOCK_S:
                samples.append(self._sample(self.repeat))
        self.timing.samples += samples
        self.timing.blocks.append(median(samples))


def interleave(runners, budget_s, device="cpu"):
    """Time runners (name -> runner) side by side for about budget_s seconds: name -> Timing.

    Slow runners get MIN_PASSES passes even beyond the budget, up to three times of it.
    """
    clock = clock_for(device)
    lanes = {name: _Lane(runner, clock) for name, runner in runners.items()}
    order = list(lanes.values())
    begin = time.perf_counter()
    for number in range(MAX_PASSES):
        for lane in order:
            lane.block()
        order.reverse()
        elapsed = time.perf_counter() - begin
        enough = number + 1 >= MIN_PASSES and elapsed >= budget_s
        if enough or (number >= 1 and elapsed >= 3 * budget_s):
            break
    return {name: lane.timing for name, lane in lanes.items()}


@contextlib.contextmanager
def threads(number):
    """torch's intra-op threads set to `number` for a while; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

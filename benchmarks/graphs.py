"""Calls replayed as CUDA graphs (`--graph`): the time of a call's kernels, without the host's.

A host that launches slowly hides how fast kernels are, on either side; a replayed graph launches
once. Replays run on the same inputs each time, so what fits the L2 cache stays there.
"""

import torch

from benchmarks.providers import Refused

WARM_UPS = 3  # calls on a side stream before the capture: they compile, choose and allocate


class Replayed:
    """A runner's call(0), captured once: `call` replays it, whatever the index."""

    training = False  # gradients are written by every replay, so none have to be dropped between
    keeps_memory = True  # all of it is the graph's: a replay allocates nothing

    def __init__(self, runner):
        """Raises Refused where a call asks the GPU for values, which would end the capture, and
        with it the state of torch's random numbers."""
        problem = runner.problem
        if runner.backend.startswith("eager") and (
            problem.lengths is not None or problem.reset is not None
        ):
            raise Refused("torch.nn's ways with lengths and resets cannot be captured")
        self.device, self.backend = runner.device, f"{runner.backend}, replayed"
        self.context, self.results = runner.context, runner.results
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), runner.context():
            for _ in range(WARM_UPS):
                runner.call(0)
                runner.clear()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), runner.context():
            self.kept = runner.call(0)  # of a training step also the graph of the backward

    def call(self, index):
        self.graph.replay()

    def clear(self):
        pass

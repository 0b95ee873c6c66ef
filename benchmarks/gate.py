"""The correctness gate: nothing is timed that does not compute what torch.nn computes.

With e(.) the largest error against torch.nn in float64 on the same values, a provider passes where
e(provider) <= 2 e(torch.nn in this dtype) + grain, for every output and every gradient by itself.
The grain is the spacing of the dtype's numbers at the largest reference value. The error of
torch.nn is the largest over several draws of the inputs, because that of one small tensor may be
luck.
"""

from dataclasses import dataclass

import torch

from benchmarks.floor import operations
from benchmarks.problem import cast, redraw

# Draws of a small problem, and of one whose results are many numbers anyway.
DRAWS, FEW_DRAWS, SMALL = 6, 2, 5e8


@dataclass(frozen=True)
class Verdict:
    """The tensor nearest to (or farthest over) its budget."""

    tensor: str
    error: float
    budget: float

    @property
    def passed(self):
        return self.error <= self.budget  # False for NaN

    def __str__(self):
        sign = "<=" if self.passed else "is over"
        return f"{self.tensor}: error {self.error:.2e} {sign} budget {self.budget:.2e}"


def error_of(value, truth):
    """Largest absolute difference; infinite where shapes differ or a value is not finite."""
    if value is None or value.shape != truth.shape:
        return float("inf")
    difference = (value.to(truth) - truth).abs()
    if not torch.isfinite(difference).all():
        return float("inf")
    return difference.max().item() if difference.numel() else 0.0


class Gate:
    """Truth and budgets of one problem, computed once for all its providers."""

    def __init__(self, problem, torch_runner):
        """torch_runner(problem) makes the torch.nn runner whose results are the yardstick."""
        measured, unit = problem, 1.0
        if problem.dtype == torch.float64:
            # Nothing here is more exact than float64, so its error is float32's, scaled.
            measured = cast(problem, torch.float32)
            unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        errors = {}
        for number in reversed(range(DRAWS if operations(problem) < SMALL else FEW_DRAWS)):
            drawn = redraw(measured, number)
            truths = torch_runner(cast(drawn, torch.float64)).results()
            for name, value in torch_runner(drawn).results().items():
                errors[name] = max(errors.get(name, 0.0), error_of(value, truths[name]))
        # The last draw is the problem itself; float64 inputs must not be rounded for the truth.
        exact = problem.dtype == torch.float64
        self.truth = torch_runner(problem).results() if exact else truths
        self.budgets = {}
        for name, truth in self.truth.items():
            scale = truth.abs().max().item() if truth.numel() else 0.0
            grain = torch.finfo(problem.dtype).eps * scale
            self.budgets[name] = 2 * unit * errors[name] + grain

    def judge(self, results):
        """The verdict on results (name -> tensor): of all tensors, the one that fares worst."""
        verdicts = []
        for name, truth in self.truth.items():
            error = error_of(results.get(name), truth)
            verdicts.append(Verdict(name, error, self.budgets[name]))

        def strain(verdict):
            return verdict.error / verdict.budget if verdict.budget else verdict.error

        return max(verdicts, key=strain)

"""Statistics of repeated timings: quantiles and bootstrap intervals of a ratio, all seeded."""

import math
from dataclasses import dataclass

import torch

RESAMPLES = 2000
SEED = 20240229


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    lo: float
    hi: float

    def __str__(self):
        return f"{self.value:.2f} [{self.lo:.2f}, {self.hi:.2f}]"


def _tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def quantile(values, q):
    return torch.quantile(_tensor(values), q).item()


def median(values):
    return quantile(values, 0.5)


def _resampled_medians(values, random):
    """[RESAMPLES] medians of samples drawn from `values` with replacement."""
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=random)
    return torch.quantile(values[index], 0.5, dim=1)


def _interval(value, resampled):
    lo, hi = torch.quantile(resampled, _tensor([0.025, 0.975])).exp().tolist()
    return Interval(math.exp(value), lo, hi)


def paired_ratio(numerators, denominators):
    """Median of a[i] / b[i] with its interval; a[i] and b[i] were timed next to each other.

    Pairing removes what both have in common, such as a clock rate that drifts or a busy neighbour.
    """
    logs = _tensor(numerators).log() - _tensor(denominators).log()
    random = torch.Generator().manual_seed(SEED)
    return _interval(median(logs), _resampled_medians(logs, random))


def unpaired_ratio(numerators, denominators):
    """Ratio of two medians with its interval, for timings of different runs."""
    a, b = _tensor(numerators).log(), _tensor(denominators).log()
    random = torch.Generator().manual_seed(SEED)
    resampled = _resampled_medians(a, random) - _resampled_medians(b, random)
    return _interval(median(a) - median(b), resampled)


def geometric_mean(values):
    return math.exp(sum(math.log(value) for value in values) / len(values))

"""The floor: no code can be faster on this machine than its arithmetic and its memory allow.

Both rates are measured in the same run, at sizes like the case's, by torch's own matrix product
and dot product. The floor of a call is the larger of operations / rate and weight bytes /
bandwidth.
"""

import contextlib
import functools
import time

import torch

from benchmarks.cases import GATES, weights
from benchmarks.timing import SETTLE_S, clock_for, threads

MEASURE_S = 0.03
# A tall product shows the machine's rate; rows beyond this do not raise it.
MM_ROWS = (256, 2048)


def operations(problem):
    """Floating point operations of a call: two for every weight and every step of every row."""
    # Backward multiplies twice: once for the gradient of the input, once for that of the weights.
    times = 3 if problem.training else 1
    return 2 * weights(problem.job.case, problem.job.cell) * problem.rows * times


def weight_bytes(problem):
    return sum(p.numel() * p.element_size() for p in problem.module.parameters())


def _best(call, device):
    """The shortest of repeated calls, in seconds, on one thread or on all.

    One thread is tried besides because a busy neighbour slows all threads to its own time slices.
    """
    clock, times, configured = clock_for(device), [], torch.get_num_threads()
    for number in {1, configured}:
        with threads(number):
            time.sleep(SETTLE_S)
            clock.measure(call, 0, 2)
            begin = time.perf_counter()
            while time.perf_counter() - begin < MEASURE_S:
                times.append(clock.measure(call, 0, 1))
    return min(times)


@contextlib.contextmanager
def _precision_of_rnns(device):
    """On a GPU torch takes float32 products of RNNs and of torch.mm by different rules, RNNs in
    TF32 by default: a floor taken by the other rule would be none."""
    if torch.device(device).type != "cuda":
        yield
        return
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def mm_rate(rows, inner, columns, dtype, device, num_threads):
    """Operations a second of torch.mm; num_threads is there for the cache."""
    rows = min(max(rows, MM_ROWS[0]), MM_ROWS[1])
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    with _precision_of_rnns(device):
        return 2 * rows * inner * columns / _best(lambda _: torch.mm(a, b, out=out), device)


@functools.cache
def read_bandwidth(bytes_, device, num_threads):
    """Bytes a second at which a working set of this size is read, from whatever cache holds it."""
    half = max(bytes_ // 8, 1)
    a, b = torch.randn(2, half, device=device)
    one = torch.ones(1, device=device)
    dispatch = _best(lambda _: torch.dot(one, one), device)
    seconds = _best(lambda _: torch.dot(a, b), device) - dispatch
    return 8 * half / max(seconds, 1e-8)


def floor_s(problem):
    """Seconds below which a call cannot come."""
    case = problem.job.case
    number = torch.get_num_threads()
    inner = case.I + (case.proj or case.H)
    columns = GATES[problem.job.cell] * case.H
    device = str(problem.device)
    rate = mm_rate(problem.rows, inner, columns, problem.dtype, device, number)
    bytes_ = weight_bytes(problem)
    return max(operations(problem) / rate, bytes_ / read_bandwidth(bytes_, device, number))

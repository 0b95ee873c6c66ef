"""The same bits again: across runs, numbers of threads, companions in the batch, and layouts."""

import dataclasses

import pytest
import torch

from fused_rnn import GRU, LSTM, RNN
from fused_rnn.testing import Case, evaluate, make_inputs, run

# Sizes on both sides of every choice of the scheduler: one thread, rows shared out, units shared.
SIZES = {
    "small": {"steps": 3, "rows": 3, "hidden": 9},
    "rows": {"steps": 20, "rows": 37, "hidden": 100, "inputs": 50},
    "units": {"steps": 4, "rows": 1, "hidden": 600, "inputs": 40},
    "wide": {"steps": 2, "rows": 9, "hidden": 520, "inputs": 300},
}
CELLS = {
    "lstm": {"cells": True},
    "lstm-proj": {"cell": "lstm", "proj": 8},
    "gru": {},
    "gru-before": {"cell": "gru", "reset_after": False},
    "rnn": {},
}


def case_of(cell, size, **fields):
    return Case(**({"cell": cell, "reverse": (False, True)} | CELLS[cell] | SIZES[size] | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_runs_and_threads(cell, size, dtype):
    """Outputs and every gradient, on one thread, some, more than there are cores, and again."""
    case = case_of(cell, size, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(evaluate(case, "cpu"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_companions(cell, size, threads):
    """A row alone, among any others and in any place has the same outputs and input gradient."""
    torch.set_num_threads(threads)
    case = dataclasses.replace(case_of(cell, size), lengths=True)
    tensors = {
        k: t.float() if t is not None and t.is_floating_point() else t
        for k, t in make_inputs(case).items()
    }

    def outputs(rows):
        given = dict(tensors)
        for name in ("input", "dy"):
            given[name] = tensors[name][:, rows]
        for name in ("h0", "c0"):
            given[name] = None if tensors[name] is None else tensors[name][:, rows]
        given["lengths"] = tensors["lengths"][rows]
        given["input"] = given["input"].clone().requires_grad_()
        y, h_n, *rest = run(case, given, "cpu")
        (dx,) = torch.autograd.grad(y, given["input"], given["dy"])
        return y, h_n.transpose(0, 1), dx, *(r.transpose(0, 1) for r in rest[:1])

    whole = outputs(list(range(case.rows)))
    for rows in ([0], [case.rows - 1], list(range(case.rows))[::-1], list(range(0, case.rows, 2))):
        part = outputs(rows)
        for k, (all_rows, some) in enumerate(zip(whole, part, strict=True)):
            axis = 0 if k in (1, 3) else 1
            index = torch.tensor(rows)
            assert torch.equal(all_rows.index_select(axis, index), some), k


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_layouts(kind):
    """batch_first, a transposed input and a contiguous one give the same bits."""
    torch.manual_seed(0)
    first = kind(12, 20, 2, bidirectional=True, batch_first=True)
    second = kind(12, 20, 2, bidirectional=True)
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 8, 12)
    y = first(x)[0]
    assert torch.equal(y, second(x.transpose(0, 1))[0].transpose(0, 1))
    assert torch.equal(y, second(x.transpose(0, 1).contiguous())[0].transpose(0, 1))


def test_one_sum_over_many_rows():
    """The bias gradient of a single unit: the one case where the sum has a single output."""
    case = Case("rnn", steps=300, rows=300, inputs=1, hidden=1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(case, "cpu"))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name

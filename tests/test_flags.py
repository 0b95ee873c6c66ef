"""What lengths, reset and reverse mean, against runs of each row and each segment alone."""

import dataclasses

import pytest
import torch
from conftest import keeps_bits

from fused_rnn.testing import Case, make_inputs, run

CELLS = {
    "lstm": {"cells": True},
    "lstm-proj": {"cell": "lstm", "proj": 3, "cells": True},
    "gru": {},
    "gru-before": {"cell": "gru", "reset_after": False},
    "rnn": {},
}


def case_of(cell, **fields):
    fields = {"cell": cell, "steps": 9, "rows": 6, "dtype": torch.float64} | CELLS[cell] | fields
    return Case(**fields)


def one_row(tensors, b, steps):
    """The tensors of row b alone, its first ``steps`` steps."""
    row = dict(tensors)
    row["input"] = tensors["input"][steps, b : b + 1]
    for name in ("h0", "c0"):
        if tensors[name] is not None:
            row[name] = tensors[name][:, b : b + 1]
    row["lengths"] = row["reset"] = None
    return row


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths(cell, reverse, backend, device):
    """A row of length n is that row alone with n steps: outputs zero after it, final states its
    own, and a row of length 0 returns its initial state."""
    case = case_of(cell, lengths=True, reverse=(reverse,))
    tensors = make_inputs(case, device)
    tensors["lengths"] = torch.tensor([9, 0, 4, 1, 8, 4], device=device)
    y, *finals = run(case, tensors, backend)
    cells = finals.pop() if case.cells else None
    for b, n in enumerate(tensors["lengths"].tolist()):
        assert y[n:, b].abs().sum() == 0
        assert cells is None or cells[n:, b].abs().sum() == 0
        if n == 0:
            wanted = [t[:, b] for t in (tensors["h0"], tensors["c0"]) if t is not None]
        else:
            alone = run(case, one_row(tensors, b, slice(0, n)), backend)
            torch.testing.assert_close(y[:n, b], alone[0][:, 0], rtol=0, atol=1e-15)
            wanted = [t[:, 0] for t in alone[1 : 1 + len(finals)]]
            if cells is not None:
                torch.testing.assert_close(cells[:n, b], alone[-1][:, 0], rtol=0, atol=1e-15)
        for final, state in zip(finals, wanted, strict=True):
            torch.testing.assert_close(final[:, b], state, rtol=0, atol=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_reset(cell, reverse, backend, device):
    """Segments between resets are sequences of their own from a zero state (the first processed
    one from the initial state, unless its first step resets)."""
    case = case_of(cell, reset=True, reverse=(reverse,))
    tensors = make_inputs(case, device)
    tensors["reset"][:, 0] = False
    tensors["reset"][:, 1] = True
    y, *finals = run(case, tensors, backend)
    for b in range(case.rows):
        starts = [t for t in range(case.steps) if t == 0 or tensors["reset"][t, b]]
        segments = list(zip(starts, [*starts[1:], case.steps], strict=True))
        initial_owner = segments[-1] if reverse else segments[0]
        for start, end in segments:
            alone = one_row(tensors, b, slice(start, end))
            cut = not reverse and bool(tensors["reset"][0, b])
            if (start, end) != initial_owner or cut:
                alone = {
                    k: torch.zeros_like(v) if k in ("h0", "c0") and v is not None else v
                    for k, v in alone.items()
                }
            wanted = run(case, alone, backend)
            torch.testing.assert_close(y[start:end, b], wanted[0][:, 0], rtol=0, atol=1e-15)
            if (start, end) == (segments[0] if reverse else segments[-1]):
                count = 2 if case.cell == "lstm" else 1
                for final, state in zip(finals[:count], wanted[1:], strict=False):
                    torch.testing.assert_close(final[:, b], state[:, 0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_reset_in_the_padding_is_ignored(cell, reverse, backend, device):
    case = case_of(cell, lengths=True, reset=True, reverse=(reverse,))
    tensors = make_inputs(case, device)
    padded = torch.arange(case.steps, device=device).unsqueeze(1) >= tensors["lengths"]
    with_resets = run(case, tensors | {"reset": tensors["reset"] | padded}, backend)
    without = run(case, tensors | {"reset": tensors["reset"] & ~padded}, backend)
    for ours, theirs in zip(with_resets, without, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_full_lengths_and_no_resets_change_nothing(cell, backend, device):
    case = case_of(cell, reverse=(False, True))
    tensors = make_inputs(case, device)
    plain = run(case, tensors, backend)
    tensors["lengths"] = torch.full((case.rows,), case.steps, dtype=torch.int32, device=device)
    tensors["reset"] = torch.zeros(case.steps, case.rows, dtype=torch.bool, device=device)
    for ours, theirs in zip(run(case, tensors, backend), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reversed_entry_is_the_flipped_sequence(cell, backend, device):
    case = case_of(cell)
    tensors = make_inputs(case, device)
    y, *rest = run(dataclasses.replace(case, reverse=(True,)), tensors, backend)
    flipped = tensors | {"input": tensors["input"].flip(0)}
    wanted, *others = run(case, flipped, backend)
    bits = {"rtol": 0, "atol": 0} if keeps_bits(backend) else {}
    torch.testing.assert_close(y, wanted.flip(0), **bits)
    count = 2 if case.cell == "lstm" else 1
    for ours, theirs in zip(rest[:count], others[:count], strict=True):
        torch.testing.assert_close(ours, theirs, **bits)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_chunks_is_the_sequence(cell, backend, device):
    """Carrying the state from chunk to chunk gives the whole run, bit for bit in float64."""
    case = case_of(cell)
    tensors = make_inputs(case, device)
    whole = run(case, tensors, backend)
    parts, given = [], dict(tensors)
    for start in range(0, case.steps, 2):
        chunk = run(case, given | {"input": tensors["input"][start : start + 2]}, backend)
        parts.append(chunk[0])
        given["h0"] = chunk[1]
        if case.cell == "lstm":
            given["c0"] = chunk[2]
    assert torch.equal(torch.cat(parts), whole[0]) or not keeps_bits(backend)
    torch.testing.assert_close(torch.cat(parts), whole[0])

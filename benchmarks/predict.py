"""What the planner's model says a step should take on a GPU: `python -m benchmarks.predict`.

Prints the tables of docs/performance.md: for every shape of the registry (one layer of a case) the
faster backend's kernel, the predicted microseconds of a step forward / backward, and in brackets
what a forward step of torch.nn's path is taken to cost; and for its models of several layers in one
direction what running them as a wave should gain. No GPU is needed. With --write the tables go into
the document.
"""

import pathlib
import sys
from dataclasses import replace

import torch

from benchmarks.cases import CASES
from fused_rnn import cudnn, plan
from fused_rnn.cuda import planning
from fused_rnn.plan import DEVICES, Shape

COLUMNS = (
    ("H200", torch.bfloat16, "ieee", "H200 bfloat16"),
    ("H200", torch.float32, "tf32", "H200 TF32"),
    ("A100", torch.bfloat16, "ieee", "A100 bfloat16"),
    ("A100", torch.float32, "tf32", "A100 TF32"),
    ("B200", torch.bfloat16, "ieee", "B200 bfloat16"),
    ("B200", torch.float32, "tf32", "B200 TF32"),
)


def cell_text(device: plan.Device, shape: Shape) -> str:
    """One field: backend and kernel, forward / backward (torch.nn)."""
    backward = replace(shape, backward=True)
    theirs = cudnn.step_us(device, shape)[0]
    name, planner = "Triton", plan
    if planning.scans_win(device, shape):
        name, planner = "CUDA", planning
    ours = planner.chosen(device, shape)
    back = planner.chosen(device, backward).total
    return f"{name} {ours.plan.kind} {ours.total:.1f} / {back:.1f} ({theirs:.1f})"


def rows():
    """One row for every different shape of the registry's LSTMs and GRUs."""
    seen = set()
    for case in CASES:
        for cell in case.cells:
            entries = 2 if case.bidirectional else 1
            key = (cell, entries, case.B, case.H, case.proj)
            if cell == "RNN" or key in seen:
                continue
            seen.add(key)
            sizes = f"B={case.B} H={case.H}" + (f" P={case.proj}" if case.proj else "")
            sizes += " both ways" if entries == 2 else ""
            fields = []
            for name, dtype, precision, _ in COLUMNS:
                shape = Shape(cell.lower(), entries, case.B, case.H, dtype, case.proj)
                fields.append(cell_text(DEVICES[name], replace(shape, precision=precision)))
            yield (f"{cell} {sizes}", *fields)


def wave_text(device: plan.Device, shape: Shape, layers: int, steps: int) -> str:
    """One field: how much faster a wave is, and its chunk in steps; whether it is taken."""
    found = planning.wave(device, shape, layers, steps)
    if found is None:
        return "none"
    taken = planning.wave_chunk(device, shape, layers, steps) is not None
    gain = f"{found.alone / found.total:.1f}"
    return f"**{gain}**, {found.chunk} steps" if taken else gain


def wave_rows():
    """One row for every model of the registry with several layers in one direction."""
    for case in CASES:
        if case.layers == 1 or case.bidirectional or case.proj or case.min_length:
            continue
        for cell in case.cells:
            fields = []
            for name, dtype, precision, _ in COLUMNS:
                shape = Shape(cell.lower(), 1, case.B, case.H, dtype, precision=precision)
                fields.append(wave_text(DEVICES[name], shape, case.layers, case.T))
            yield (f"{cell} T={case.T} B={case.B} H={case.H}, {case.layers} layers", *fields)


def table(first: str, rows) -> str:
    """A table in Markdown, whose first column is called so."""
    lines = [f"| {first} | " + " | ".join(column[3] for column in COLUMNS) + " |"]
    lines.append("| --- " * (1 + len(COLUMNS)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


DOCUMENT = pathlib.Path(__file__).parent.parent / "docs/performance.md"
END = "<!-- end -->"


def tables() -> dict[str, str]:
    """By the comment that begins it in the document."""
    return {
        "<!-- predictions -->\n": table("layer", rows()),
        "<!-- waves -->\n": table("model", wave_rows()),
    }


def written(text: str) -> str:
    """The document with its tables replaced by the present ones."""
    for begin, new in tables().items():
        before, _, rest = text.partition(begin)
        text = before + begin + new + "\n" + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    else:
        sys.stdout.write("\n\n".join(tables().values()) + "\n")

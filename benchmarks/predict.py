"""What the planner's model says a step should take on a GPU: `python -m benchmarks.predict`.

Prints the table of docs/performance.md: for every shape of the registry (one layer of a case) the
faster backend's kernel, the predicted microseconds of a step forward / backward, and in brackets
what a forward step of torch.nn's path is taken to cost. No GPU is needed. With --write the table
goes into the document.
"""

import pathlib
import sys
from dataclasses import replace

import torch

from benchmarks.cases import CASES
from fused_rnn import plan
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
    theirs = plan.cudnn_step_us(device, shape)
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


def table() -> str:
    """The table in Markdown."""
    lines = ["| layer | " + " | ".join(column[3] for column in COLUMNS) + " |"]
    lines.append("| --- " * (1 + len(COLUMNS)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows()]
    return "\n".join(lines)


DOCUMENT = pathlib.Path(__file__).parent.parent / "docs/performance.md"
BEGIN, END = "<!-- predictions -->\n", "<!-- end -->"


def written(text: str) -> str:
    """The document with its table replaced by the present one."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    else:
        sys.stdout.write(table() + "\n")

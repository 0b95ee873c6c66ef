"""Faults put into the real CUDA kernels, one at a time: the emulator or the results must tell each.

A fault is a change of one line of csrc/cuda. The block scans of one cell and product are compiled
with it and linked with the other objects of the emulated library, and a process of its own runs
them on several tiles of rows and in several orders.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import emulation
import pytest
from conftest import GPU

pytestmark = pytest.mark.skipif(
    GPU, reason="the processes started here would load the GPU's library"
)

# Runs a cell, forward and backward, against the reference: prints what is wrong, or "right".
PROGRAM = """
import sys
import torch
from fused_rnn.cuda import library
from fused_rnn.testing import Case, check

cell, dtype, hidden = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
assert library.why_unavailable() is None
for seed in range(2):
    torch.ops.fused_rnn.cuda_emulate(seed, 2)
    for flags in (False, True):
        case = Case(cell, 5, 11, 3, hidden, (False, True), dtype, lengths=flags, reset=flags)
        try:
            verdicts = check(case, "cuda", "cpu")
        except RuntimeError as error:
            sys.exit("report: " + str(error))
        wrong = [f"{v.name} {v.fault}" for v in verdicts if v.fault]
        if wrong:
            sys.exit("wrong: " + ", ".join(wrong))
print("right")
"""


class Fault(NamedTuple):
    """What is changed, where, and a word of what must be said: of a report, or "wrong" results."""

    file: str
    old: str
    new: str
    says: str
    count: int = 1  # how often ``old`` is there
    cell: str = "lstm"
    dtype: str = "bfloat16"
    precision: str = "ieee"
    hidden: int = 37

    @property
    def program(self):
        return self.cell, self.dtype, self.precision, self.hidden


LAST_BARRIER = "    if (more) lane.read(p, place, t);\n    barrier();\n"
FAULTS = {
    "a step's barrier dropped": Fault(
        "block_scan.cuh", LAST_BARRIER, LAST_BARRIER.replace("    barrier();\n", ""), "race"
    ),
    "a step's barrier for one warp only": Fault(
        "block_scan.cuh", LAST_BARRIER, LAST_BARRIER.replace("barrier", "warp_barrier"), "race"
    ),
    "a barrier only some threads reach": Fault(
        "block_scan.cuh",
        LAST_BARRIER,
        LAST_BARRIER.replace("    barrier", "    if (thread_index() < 64) barrier"),
        "",
    ),
    "the barrier after clearing dropped": Fault(
        "block_scan.cuh",
        "  lane.read(p, place, t);\n  barrier();\n",
        "  lane.read(p, place, t);\n",
        "race",
    ),
    "a backward step's barrier dropped": Fault(
        "block_scan.cuh",
        "    if (more) lane.read(p, place, t, t + direction, step + 2 < T);\n    barrier();\n",
        "    if (more) lane.read(p, place, t, t + direction, step + 2 < T);\n",
        "race",
    ),
    "the operand of the wrong parity read": Fault(
        "block_scan.cuh",
        "weights.multiply(sums, shared.operands[step % 2]);",
        "weights.multiply(sums, shared.operands[(step + 1) % 2]);",
        "",
    ),
    "the backward operand of the wrong parity read": Fault(
        "block_scan.cuh",
        "weights, shared.operands[step % 2]);",
        "weights, shared.operands[(step + 1) % 2]);",
        "",
    ),
    "operands not cleared": Fault(
        "block_scan.cuh", "  clear(shared.operands);\n", "", "read before", count=2
    ),
    "a fragment's rows swapped": Fault(
        "products.cuh", "const int m = g + i % 2 * 8;", "const int m = g + i / 2 * 8;", "wrong"
    ),
    "a fragment's columns swapped": Fault(
        "products.cuh",
        "const int k = j * 16 + 2 * q + i / 2 * 8;",
        "const int k = j * 16 + 2 * q + i % 2 * 8;",
        "wrong",
    ),
    "a TF32 fragment's columns shifted": Fault(
        "products.cuh",
        "j * 8 + q + i / 2 * 4",
        "j * 8 + q + i / 2 * 2",
        "wrong",
        dtype="float32",
        precision="tf32x3",
    ),
    "lanes and rows of an operand confused": Fault(
        "products.cuh", "row + j * 32 + lane / 8 * 16", "row + j * 32 + lane % 4 * 16", "wrong"
    ),
    "a step along k too few": Fault(
        "products.cuh",
        "for (int j = 0; j < Traits::kSteps; j += 2)",
        "for (int j = 2; j < Traits::kSteps; j += 2)",
        "wrong",
    ),
    "a tile of rows too far": Fault(
        "rows.cuh",
        "static_cast<int64_t>(block_x()) * kRows; }",
        "static_cast<int64_t>(block_x() + 1) * kRows; }",
        "",
    ),
    "rows beyond the batch taken": Fault(
        "rows.cuh", "row(i % 2) < batch && unit(i) < hidden", "unit(i) < hidden", ""
    ),
    "units beyond the last taken": Fault(
        "rows.cuh", "row(i % 2) < batch && unit(i) < hidden", "row(i % 2) < batch", ""
    ),
    "weights in shared memory one place off": Fault(
        "products.cuh",
        "return shared_ + ((j - Traits::kHeld) * Traits::kGates + gate) * 32;",
        "return shared_ + ((j + 1 - Traits::kHeld) * Traits::kGates + gate) * 32;",
        "",
        hidden=140,
    ),
    "the last step's inputs read once more": Fault(
        "block_scan.cuh",
        "    if (more) lane.read(p, place, t);\n",
        "    lane.read(p, place, t);\n",
        "",
    ),
    "a reset forgotten": Fault(
        "block_scan.cuh", "if (cut[i % 2]) lane.zero(i);", "", "wrong", cell="gru"
    ),
    "the state of an ended row not carried": Fault(
        "block_cells.cuh", "h[i] = live ? out.h.v : h[i];", "h[i] = out.h.v;", "wrong", count=2
    ),
    "the small part of an operand lost": Fault(
        "products.cuh",
        "    value = rest(value, high);\n",
        "    value = 0.0f;\n",
        "wrong",
        dtype="float32",
        precision="tf32x3",
    ),
}
PRODUCT_OF = {
    ("bfloat16", "ieee"): "kBf16",
    ("float32", "ieee"): "kIeee",
    ("float32", "tf32x3"): "kTf32x3",
}


def test_every_fault_is_one():
    for name, fault in FAULTS.items():
        text = (emulation.ROOT / "csrc/cuda" / fault.file).read_text()
        assert text.count(fault.old) == fault.count, name
        assert fault.old != fault.new


def run(library, fault):
    """(exit status, output) of the program on a library, with what a fault is looked for with."""
    command = [sys.executable, "-c", PROGRAM, fault.cell, fault.dtype, str(fault.hidden)]
    environment = {
        "FUSED_RNN_CUDA_LIBRARY": str(library),
        "FUSED_RNN_FP32_PRECISION": fault.precision,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


def build(name, fault, folder):
    """The library with a fault: the changed header comes first on the path, and the objects that
    saw it first in the link, so that no template of an unchanged object takes its place."""
    changed = folder / "cuda" / fault.file
    changed.parent.mkdir(parents=True)
    text = (emulation.ROOT / "csrc/cuda" / fault.file).read_text()
    changed.write_text(text.replace(fault.old, fault.new))
    product = PRODUCT_OF[fault.dtype, fault.precision]
    cell = f"k{fault.cell.capitalize()}"
    unit = emulation.block_scan(cell, product, flags=(f"-I{folder}",))
    objects = emulation.objects_of(emulation.LIBRARY)
    others = [str(objects / u.object) for u in emulation.cuda_units() if u.object != unit.object]
    target = f"fault_{name.replace(' ', '_').replace(chr(39), '')}.so"
    (emulation.OUTPUT / target).unlink(missing_ok=True)  # the other objects may be new
    link = (*others, *emulation.TORCH_LINK_FLAGS)
    return emulation.ninja_build(target, [unit], emulation.TORCH_FLAGS, link, jobs=1)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each faulty library says, and what the right one says to the same program."""
    right = emulation.build_cuda_library()
    found = {}

    def look(name):
        fault = FAULTS[name]
        found[name] = run(build(name, fault, tmp_path_factory.mktemp("fault")), fault)

    def compare(fault):
        found[fault.program] = run(right, fault)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(look, name) for name in FAULTS]
        jobs += [pool.submit(compare, f) for f in {f.program: f for f in FAULTS.values()}.values()]
        for job in jobs:
            job.result()
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_seen(name, outcomes):
    fault = FAULTS[name]
    status, output = outcomes[name]
    assert status == 1, f"{name}: {output}"
    assert ("report: " in output or "wrong: " in output) and fault.says in output, output
    assert outcomes[fault.program] == (0, "right\n"), "and without it nothing is wrong"

"""Faults put into the real CUDA kernels, one at a time: the emulator or the results must tell each.

A fault is a change of one line of csrc/cuda. The block or grid scans of one cell and product are
compiled with it and linked with the other objects of the emulated library, and a process of its own
runs them on several tiles of rows and in several orders.
"""

import os
import re
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
from fused_rnn.cuda import library, planning
from fused_rnn.testing import Case, check

cell, dtype = sys.argv[1], getattr(torch, sys.argv[2])
hidden, tile, seeds = map(int, sys.argv[3:])
assert library.why_unavailable() is None
if tile:
    planning.choose = lambda device, shape: planning.grid_kernel(shape, tile)
for seed in range(seeds):
    torch.ops.fused_rnn.cuda_emulate(seed, 2)
    for flags in (False, True):
        rows = 19 if tile else 11
        case = Case(cell, 5, rows, 3, hidden, (False, True), dtype, lengths=flags, reset=flags)
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
    tile: int = 0  # rows of a batch tile of a grid scan; a block scan if 0
    seeds: int = 2  # orders to try

    @property
    def program(self):
        return self.cell, self.dtype, self.precision, self.hidden, self.tile, self.seeds


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
        "const int k = first + 2 * q + i / 2 * 8;",
        "const int k = first + 2 * q + i % 2 * 8;",
        "wrong",
    ),
    "a TF32 fragment's columns shifted": Fault(
        "products.cuh",
        "first + q + i / 2 * 4",
        "first + q + i / 2 * 2",
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
        "return block_x() * kBlockRows; }",
        "return (block_x() + 1) * kBlockRows; }",
        "",
    ),
    "rows beyond the batch taken": Fault(
        "rows.cuh", "row_is(i % kLaneRows) && unit(i) < hidden", "unit(i) < hidden", ""
    ),
    "units beyond the last taken": Fault(
        "rows.cuh", "row_is(i % kLaneRows) && unit(i) < hidden", "row_is(i % kLaneRows)", ""
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
        "block_scan.cuh", "if (cut[i % kLaneRows]) lane.zero(i);", "", "wrong", cell="gru"
    ),
    "the state of an ended row not carried": Fault(
        "cells.cuh", "h[i] = live ? out.h.v : h[i];", "h[i] = out.h.v;", "wrong", count=2
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


def grid_fault(old, new, says, *, file="grid_scan.cuh", tile=8, **fields):
    """A fault in a grid scan."""
    return Fault(file, old, new, says, tile=tile, **fields)


ARRIVAL = """    barrier();
    if (thread_index() == 0 && !lost_) add_release(count(group), 1);
"""
NEVER = "a block that never arrives"
FAULTS |= {
    "a count of arrivals off by one": grid_fault(
        "(static_cast<uint32_t>(number) + 1) * block_count_x();",
        "(static_cast<uint32_t>(number) + 1) * block_count_x() - 1;",
        "race",
    ),
    "an arrival before the last store": grid_fault(
        ARRIVAL,
        "\n".join([ARRIVAL.splitlines()[1], ARRIVAL.splitlines()[0], ""]),
        "race",
    ),
    "acquire dropped": grid_fault("load_acquire(at)", "load_relaxed(at)", "race"),
    "release dropped": grid_fault("add_release(count", "add_relaxed(count", "race"),
    "threads that did not wait not joined": grid_fault(
        "lost_ = barrier_any(thread_index() == 0 && (lost_ || await(number, group)));",
        "lost_ = thread_index() == 0 && (lost_ || await(number, group));",
        "",
    ),
    "groups counted together": grid_fault(
        "return arrived_ + group * kCountWords;", "return arrived_;", "race", tile=32, seeds=14
    ),
    "units written by two blocks": grid_fault(
        "const int unit = block_x() * Traits::kBlockUnits +",
        "const int unit = block_x() / 2 * 2 * Traits::kBlockUnits +",
        "race",
    ),
    "rows written by two blocks": grid_fault(
        "static_cast<int>(end < layer.batch ? end : layer.batch);",
        "static_cast<int>(layer.batch);",
        "",
    ),
    "one operand instead of two": grid_fault(
        "(number % 2 * params_.groups + group)", "(0 * params_.groups + group)", "race"
    ),
    "warps' sums read before they are there": grid_fault(
        "      barrier();\n      add_sums(total", "      add_sums(total", "read before"
    ),
    "a warp's sums left out": grid_fault(
        "for (int warp = 1; warp < kGridWarps; ++warp)",
        "for (int warp = 1; warp + 1 < kGridWarps; ++warp)",
        "wrong",
        file="grid_products.cuh",
        hidden=70,
    ),
    "an operand's lanes confused": grid_fault(
        "row * 4 + k % kHalf / kNumbers",
        "row * 4 + k / 2 % 4",
        "",
        file="grid_products.cuh",
        dtype="float32",
        precision="tf32x3",
    ),
    "an operand's words confused": grid_fault(
        "const int word = step * 2 + k / kHalf;",
        "const int word = k / kHalf * 2 + step;",
        "wrong",
        file="grid_products.cuh",
    ),
    "another source's weights taken": grid_fault(
        "kGathersBack ? piece % Traits::kSources : tile",
        "kGathersBack ? (piece + 1) % Traits::kSources : tile",
        "wrong",
        file="grid_products.cuh",
        cell="gru",
    ),
    "another group's state taken": grid_fault(
        "states_ + (group * kStates + i) * kGridThreads",
        "states_ + i * kGridThreads",
        "wrong",
        tile=32,
    ),
    "another tile's rows taken": grid_fault(
        "first_row_ = static_cast<int>(pair % params.tiles * params.rows);", "first_row_ = 0;", ""
    ),
    "a reset forgotten by a grid": grid_fault(
        "if (cut) lane.zero(i);", "", "wrong", cell="gru", tile=16
    ),
    "a block's own operand read before it is there": grid_fault(
        "      barrier();\n      if (!lost_) scatter",
        "      if (!lost_) scatter",
        "",
        dtype="float32",
        precision="tf32x3",
    ),
    "parcels of another block collected": grid_fault(
        "block_x() * block_count_x())",
        "(block_x() + 1) % block_count_x() * block_count_x())",
        "wrong",
        dtype="float32",
        precision="tf32x3",
    ),
    "a parcel left": grid_fault(
        "first + i < block_count_x() ? load",
        "first + i + 1 < block_count_x() ? load",
        "wrong",
        cell="gru",
        dtype="float32",
        precision="tf32x3",
    ),
    "a parcel's rows confused": grid_fault(
        "of[i / 4 * 8 + 2 * q + i % 2]",
        "of[i / 4 * 8 + 2 * q + i / 2 % 2]",
        "",
        dtype="float32",
        precision="tf32x3",
    ),
    NEVER: grid_fault(
        "if (thread_index() == 0 && !lost_)",
        "if (thread_index() == 0 && !lost_ && block_x() != 1)",
        "a grid scan before this call was given up: lstm forward, bfloat16, step 0: block (",
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


def run(library, fault, program=PROGRAM):
    """(exit status, output) of a program on a library, with what a fault is looked for with."""
    command = [sys.executable, "-c", program, fault.cell, fault.dtype]
    command += [str(fault.hidden), str(fault.tile), str(fault.seeds)]
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
    source = f"csrc/cuda/{'grid' if fault.tile else 'block'}_scan.cu"
    unit = emulation.scan_unit(source, cell, product, flags=(f"-I{folder}",))
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
        library = build(name, fault, tmp_path_factory.mktemp("fault"))
        found[name] = run(library, fault)
        if name == NEVER:
            found["lost"] = run(library, fault, LOST)

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


# What a process sees of a block that never arrives.
LOST = """
import torch
import fused_rnn
from fused_rnn.cuda import library, operators, planning
from fused_rnn.plan import DEVICES, Shape

assert library.why_unavailable() is None
shape = Shape("lstm", 1, 8, 40, torch.bfloat16)
plan, choices = planning.grid_kernel(shape, 8), planning.choices
planning.block_plan = lambda device, shape: None  # a grid scan is the best there is
torch.manual_seed(0)
module = fused_rnn.LSTM(3, 40).bfloat16()
x = torch.randn(6, 8, 3).bfloat16()
assert operators._settled(operators.device_model(x.device), shape, x.device)[0] == plan
with torch.no_grad(), fused_rnn.use_backend("cuda"):
    print("results", module(x)[0].isnan().all().item(), library.grids_lost())
    try:
        module(x)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    print("then", operators._settled(operators.device_model(x.device), shape, x.device)[0].kind)
    ours = module(x)[0]
torch.testing.assert_close(ours, module(x)[0], rtol=2e-2, atol=2e-2)
print("and right")
"""


def test_a_lost_grid_scan_is_reported_and_no_other_begun(outcomes):
    """Its results are NaN, the next call says what happened, and later ones go step by step."""
    status, output = outcomes["lost"]
    assert status == 0, output
    results, report, then, right = output.splitlines()
    assert results == "results True False"
    assert re.search(
        r"a grid scan before this call was given up: lstm forward, bfloat16, step 0: block"
        r" \(\d, 0\) waited in vain for 1 more to come\. Its results are NaN\. From now on this"
        r" process runs no grid scans$",
        report,
    )
    assert (then, right) == ("then step", "and right")

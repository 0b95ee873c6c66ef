"""Ahead-of-time compilation of the CUDA kernels for GPUs that are not here: everything compiles,
spills nothing, can be launched as planned, and multiplies on tensor cores where products allow.
"""

import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import build_cuda
import cuda_aot
from cuda_aot import BlockScan, GridScan, Pointwise, Report, Unit

from fused_rnn.plan import DEVICES

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "sm_120"]
# Small ones, of each family.
BLOCK_UNIT, GRID_UNIT = (Unit(source, "rnn", "float16") for source in build_cuda.SCANS)


@pytest.fixture(scope="module")
def toolkit():
    try:
        found = cuda_aot.find_toolkit()
        cuda_aot.find_cuobjdump(found.nvcc)
    except build_cuda.CannotBuild as error:
        pytest.skip("; ".join(error.args[:2]))
    return found


def is_compiled(architecture, unit):
    """Everything with FUSED_RNN_COMPILE=all. Else a sample of the grid scans, each of which takes
    ptxas some twenty seconds: all of them on Hopper, two elsewhere."""
    if os.environ.get("FUSED_RNN_COMPILE") == "all" or unit.source != "grid_scan.cu":
        return True
    if architecture == "sm_90a":
        return True
    return (unit.cell, unit.product) in (("lstm", "bfloat16"), ("gru", "tf32"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(toolkit, architecture):
    if architecture not in cuda_aot.architectures(toolkit):
        pytest.skip(f"{toolkit.nvcc} makes no code for {architecture}")
    units = [unit for unit in cuda_aot.UNITS if is_compiled(architecture, unit)]
    pairs = [(architecture, unit) for unit in units]
    found = list(cuda_aot.compile_all(toolkit, pairs))
    wrong = [f"{kernel or ''}: {'; '.join(faults)}" for _, kernel, _, faults in found if faults]
    assert not wrong, "\n".join(wrong)
    kernels = [kernel for _, kernel, _, _ in found]
    scans = [(cuda_aot.unit_of(k), k.key) for k in kernels if not isinstance(k, Pointwise)]
    planned = [u for u in cuda_aot.SCANS if u in units]
    assert sorted(scans) == sorted((u, key) for u in planned for key in cuda_aot.planned(u))
    assert any(isinstance(kernel, Pointwise) for kernel in kernels)


def test_all_that_is_built_is_compiled_here():
    codes, _ = build_cuda.gpu_codes("", "nvcc", ("80", "90", "100", "120"))
    assert [code for code in codes if code.startswith("sm_")] == ARCHITECTURES
    assert all(cuda_aot.device_of(a).name for a in ARCHITECTURES)
    sources = {path.name for path in cuda_aot.ROOT.glob("csrc/cuda/*.cu")}
    assert sources == {unit.source for unit in cuda_aot.UNITS}
    for source in sources:
        objects = build_cuda.Toolkit("nvcc", (13, 0), "", "", ()).compilations(source, ["c++"])
        endings = [unit.ending for unit in cuda_aot.UNITS if unit.source == source]
        assert [ending for _, ending, _ in objects] == endings


@pytest.mark.parametrize("unit", cuda_aot.SCANS, ids=str)
def test_every_size_of_the_plan_has_a_kernel(unit):
    """Each H up to the largest runs the smallest block scan that fits it, and every grid scan."""
    for backward in (False, True):
        sizes = {k: list(h) for k, h in cuda_aot.planned(unit).items() if k[2] == backward}
        if unit.source == "block_scan.cu":
            for lane_rows in (1, 2):
                hidden = [h for key, each in sizes.items() if key[5] == lane_rows for h in each]
                assert hidden == list(range(1, max(hidden) + 1))
            assert all(max(h) == key[3] for key, h in sizes.items())
        else:
            assert all(h == list(cuda_aot.SIZES["grid_scan.cu"]) for h in sizes.values())
            assert [key[3] for key in sizes] in ([1], [1, 2])


# Symbols of scans: a lane and its place, traits, and what tells those of the family.
LANE = "<fused_rnn::cuda::{}Lane<(fused_rnn::cuda::Product){}, fused_rnn::cuda::{}>, "
TRAITS = "fused_rnn::cuda::{}Traits<(fused_rnn::cuda::Product){}, {}> >(fused_rnn::cuda::Params)"


def symbol(way, lane, traits):
    return f"void fused_rnn::cuda::{way}" + LANE.format(*lane) + TRAITS.format(*traits)


def test_kernel_names():
    traits = ("Product", 3, "3, 128, 7, 3, 2, 1")
    block = symbol("block_backward", ("GruBackward", 3, "BlockPlace<1> "), traits)
    scan = BlockScan("gru", "tf32x3", True, 128, 7, 1, gates=3, sources=3, parts=2)
    assert cuda_aot.parse_name(block) == scan
    assert cuda_aot.unit_of(scan) == ("block_scan.cu", "gru", "tf32x3")
    assert str(scan) == "block_scan gru tf32x3 backward [128 7 1]"

    traits = ("Grid", 0, "4, true, 1, 12, 2")
    grid = symbol("grid_backward", ("LstmBackward", 0, "GridPlace<2> "), traits)
    scan = GridScan("lstm", "bfloat16", True, 2, 12, gates=4, parts=1)
    assert cuda_aot.parse_name(grid) == scan
    assert cuda_aot.unit_of(scan) == ("grid_scan.cu", "lstm", "bfloat16")
    assert str(scan) == "grid_scan lstm bfloat16 backward [32 12]"

    assert cuda_aot.parse_name(
        "void fused_rnn::cuda::start<double, fused_rnn::RnnForward>(int)"
    ) == Pointwise("start<double, RnnForward>")


@pytest.mark.parametrize(
    "name",
    [
        ("block_forward", ("RnnForward", 1, "BlockPlace<2> "), ("Product", 0, "1, 64, 4, 1, 3, 2")),
        ("block_forward", ("RnnForward", 0, "BlockPlace<1> "), ("Product", 0, "1, 64, 4, 1, 3, 2")),
        (
            "block_forward",
            ("RnnBackward", 0, "BlockPlace<2> "),
            ("Product", 0, "1, 64, 4, 1, 3, 2"),
        ),
        ("block_forward", ("RnnForward", 0, "GridPlace<1> "), ("Product", 0, "1, 64, 4, 1, 3, 1")),
        ("block_forward", ("RnnForward", 0, "BlockPlace<2> "), ("Grid", 0, "1, false, 3, 8, 1")),
        ("grid_forward", ("RnnForward", 1, "GridPlace<1> "), ("Grid", 0, "1, false, 3, 8, 1")),
        ("grid_forward", ("RnnBackward", 0, "GridPlace<1> "), ("Grid", 0, "1, false, 3, 8, 1")),
        ("grid_forward", ("RnnForward", 0, "BlockPlace<1> "), ("Grid", 0, "1, false, 3, 8, 1")),
        ("grid_forward", ("RnnForward", 0, "GridPlace<1> "), ("Grid", 0, "1, true, 3, 8, 1")),
        ("grid_backward", ("RnnBackward", 0, "GridPlace<1> "), ("Grid", 0, "1, false, 1, 12, 1")),
        ("grid_backward", ("GruBackward", 0, "GridPlace<2> "), ("Grid", 0, "3, true, 1, 12, 1")),
        ("grid_scan", ("RnnForward", 0, "GridPlace<1> "), ("Grid", 0, "1, false, 3, 8, 1")),
    ],
)
def test_lanes_and_traits_of_another_kernel_are_seen(name):
    with pytest.raises(ValueError, match="no kernel has a name like"):
        cuda_aot.parse_name(symbol(*name))


# Faults are seen: in what is compiled wrongly, and in reports of each kind.


@pytest.mark.parametrize("unit", [BLOCK_UNIT, GRID_UNIT], ids=str)
def test_a_compiled_spill_is_seen(toolkit, unit):
    few = ("-maxrregcount=64", "-Xptxas", "--override-directive-values")
    tight = cuda_aot.compile_unit(toolkit, "sm_80", unit, few)
    wrong = {k: cuda_aot.faults(DEVICES["A100"], k, report) for k, report in tight.items()}
    spilling = [k for k, found in wrong.items() if any("spills" in each for each in found)]
    assert all(report.registers <= 64 for report in tight.values())
    assert len(spilling) > len(tight) // 2
    assert all(tight[k].spilled > 0 and tight[k].local > 0 and tight[k].stack > 0 for k in spilling)


@pytest.mark.parametrize("unit", [BLOCK_UNIT, GRID_UNIT], ids=str)
def test_compiled_instructions_are_seen(toolkit, unit):
    """A kernel is not taken for one of another product."""
    device = DEVICES["A100"]
    plain = cuda_aot.compile_unit(toolkit, "sm_80", unit._replace(product="ieee"))
    half = cuda_aot.compile_unit(toolkit, "sm_80", unit)
    kernels = [(scan, report) for scan, report in plain.items() if not scan.backward]
    (scan, report) = kernels[0]
    assert cuda_aot.faults(device, scan, report) == []
    claimed = next(k for k in half if not k.backward and getattr(k, "max_units", 128) == 128)
    assert "has 0 HMMA" in " ".join(cuda_aot.faults(device, claimed, report))
    found = cuda_aot.faults(device, scan, half[claimed])
    assert "tensor core instructions, and should have none" in " ".join(found)
    other = claimed._replace(product="bfloat16")
    found = " ".join(cuda_aot.faults(device, other, half[claimed]))
    assert "has 0 HMMA.16816.F32.BF16" in found and "of another product" in found
    assert cuda_aot.missing(unit, half) == []
    assert cuda_aot.missing(unit, list(half)[1:]) != []


# Kernels that pass on a number by a flag, in order and out of it.
PASSING = """
#include "cuda/primitives.cuh"
using namespace fused_rnn::cuda;
template <int kOrder>
FUSED_RNN_KERNEL(32) take(uint32_t* flag, const float* from, float* to) {
  if constexpr (kOrder == 0) while (load_relaxed(flag) == 0) {}
  if constexpr (kOrder == 1) while (load_acquire(flag) == 0) {}
  if constexpr (kOrder == 2) { while (load_relaxed(flag) == 0) {} fence(); }
  *to = *from + 1.0f;
}
template <int kOrder>
FUSED_RNN_KERNEL(32) give(uint32_t* flag, float* to) {
  *to = 1.0f;
  if constexpr (kOrder == 0) store_relaxed(flag, 1);
  if constexpr (kOrder == 1) store_release(flag, 1);
  if constexpr (kOrder == 2) { fence(); store_relaxed(flag, 1); }
  if constexpr (kOrder == 3) add_release(flag, 1);
}
#define TAKE(order) template __global__ void take<order>(uint32_t*, const float*, float*);
#define GIVE(order) template __global__ void give<order>(uint32_t*, float*);
TAKE(0) TAKE(1) TAKE(2) GIVE(0) GIVE(1) GIVE(2) GIVE(3)
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_acquires_and_releases_are_seen(toolkit, architecture, tmp_path):
    if architecture not in cuda_aot.architectures(toolkit):
        pytest.skip(f"{toolkit.nvcc} makes no code for {architecture}")
    source = tmp_path / "passing.cu"
    source.write_text(PASSING)
    found = cuda_aot.compile_unit(toolkit, architecture, Unit(str(source)))
    for order in (0, 1, 2):
        taking, giving = (found[Pointwise(f"{name}<{order}>")] for name in ("take", "give"))
        assert taking.acquires == (order != 0) and giving.releases == (order != 0)
        assert taking.releases == giving.acquires == 0
    assert found[Pointwise("give<3>")].releases == 1


def test_what_does_not_compile_is_seen(toolkit):
    (found,) = cuda_aot.compile_all(toolkit, [("sm_1", BLOCK_UNIT)])
    assert found[:3] == ("sm_1", None, None) and "does not compile" in found[3][0]


SCAN = BlockScan("lstm", "bfloat16", True, 64, 4, 2, gates=4, sources=4, parts=1)
OPS = Counter({"HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 16})
GOOD = Report(212, stack=0, spilled=0, local=0, threads=128, shared=0, ops=OPS)


def grid_scan(cell, product, backward, unit_tiles=1, **template):
    """A grid scan as it is planned."""
    keys = cuda_aot.planned(Unit("grid_scan.cu", cell, product))
    (key,) = (key for key in keys if key[2:4] == (backward, unit_tiles))
    gates = cuda_aot.shape_of(Unit("", cell, product), 16, backward).gates
    return GridScan(*key, **{"gates": gates, "parts": 1, **template})


GRID = grid_scan("lstm", "bfloat16", False)
LEAST = 2 * 2 * 4 * GRID.held
GRID_OPS = Counter({"HMMA.16816.F32.BF16": LEAST, "LDG.E.STRONG.GPU": 3, "STG.E.STRONG.GPU": 2})
GRID_GOOD = GOOD._replace(registers=255, threads=256, ops=GRID_OPS, acquires=3, releases=2)


def faults_of(scan=SCAN, device="A100", **other):
    good = GRID_GOOD if isinstance(scan, GridScan) else GOOD
    return " ".join(cuda_aot.faults(DEVICES[device], scan, good._replace(**other)))


def test_no_fault_is_seen_where_there_is_none():
    for scan in (SCAN, GRID, Pointwise("lstm_step<float>")):
        assert faults_of(scan) == ""


@pytest.mark.parametrize(
    ("says", "other"),
    [
        ("spills 8 bytes", {"spilled": 8}),
        ("1 accesses of local memory", {"local": 1}),
        ("96 threads, planned are 128", {"threads": 96}),
        ("does not launch", {"threads": 288, "registers": 176}),
        ("bytes of shared memory", {"shared": DEVICES["A100"].shared}),
        ("has 0 HMMA", {"ops": Counter({"LDSM.16.M88.4": 16})}),
        ("has 15 HMMA", {"ops": OPS - Counter({"HMMA.16816.F32.BF16": 17})}),
        ("of another product: HMMA.16816.F32", {"ops": OPS + Counter({"HMMA.16816.F32": 1})}),
        ("ldmatrix", {"ops": Counter({"HMMA.16816.F32.BF16": 32})}),
        ("not one of the plan's", {"scan": SCAN._replace(held=3)}),
        ("not one of the plan's", {"scan": SCAN._replace(max_units=80)}),
        ("has operands of", {"scan": SCAN._replace(sources=1)}),
        ("has operands of", {"scan": SCAN._replace(parts=2)}),
        ("has 3 gates", {"scan": SCAN._replace(gates=3)}),
        ("spills", {"scan": Pointwise("lstm_step<float>"), "spilled": 4}),
        ("spills 8 bytes", {"scan": GRID, "spilled": 8}),
        ("does not launch", {"scan": GRID, "threads": 288}),
        ("128 threads, planned are 256", {"scan": GRID, "threads": 128}),
        ("bytes of shared memory", {"scan": GRID, "shared": DEVICES["A100"].shared}),
        ("not one of the plan's", {"scan": GRID._replace(held=GRID.held + 1)}),
        ("has 3 gates", {"scan": GRID._replace(gates=3)}),
        ("of another product", {"scan": GRID, "ops": GRID_OPS + Counter({"HMMA.16816.F32": 1})}),
        ("has 2 acquires in 3 acc", {"scan": GRID, "acquires": 2}),
        ("has 1 releases in 2 acc", {"scan": GRID, "releases": 1}),
        ("has 0 acquires in 0 acc", {"scan": GRID, "acquires": 0, "ops": Counter()}),
        ("has 0 releases in 0 acc", {"scan": GRID, "releases": 0, "ops": Counter()}),
    ],
)
def test_faults_are_seen(says, other):
    assert says in faults_of(**other)


@pytest.mark.parametrize(
    ("scan", "each_step"),
    [
        (GRID, 4),
        (grid_scan("gru", "float16", True), 1),
        (grid_scan("gru", "float16", True, unit_tiles=2), 2),
        (grid_scan("gru", "tf32", True), 3),
        (grid_scan("lstm", "tf32x3", True, parts=2), 4 * 3),
        (grid_scan("rnn", "tf32x3", True, parts=2), 3),
        (grid_scan("rnn", "bfloat16", False, parts=3), 3),
    ],
    ids=str,
)
def test_the_least_that_a_grid_scan_multiplies(scan, each_step):
    op, least = cuda_aot.TENSOR_OP[scan.product], 2 * 2 * scan.held * each_step
    assert "are the least" not in faults_of(scan, ops=Counter({op: least}))
    found = faults_of(scan, ops=Counter({op: least - 1}))
    assert f"has {least - 1} {op}, {least} are the least" in found


def test_registers_are_given_out_to_four_warps_at_a_time():
    # 9 warps of 176 registers would be 50,688; 12 of them do not fit.
    assert cuda_aot.registers_of(GOOD._replace(threads=288, registers=169)) == 12 * 32 * 176
    assert cuda_aot.registers_of(GOOD._replace(threads=384, registers=168)) == 64512
    assert cuda_aot.registers_of(GOOD._replace(threads=256, registers=255)) == 65536


@pytest.mark.parametrize("source", build_cuda.SCANS)
def test_a_planned_kernel_fits_and_the_next_size_does_not(source):
    """The largest H of a kernel on a device, where shared memory or multiprocessors bound it."""
    bounded = Counter()
    units = [unit for unit in cuda_aot.SCANS if unit.source == source]
    for device, unit in itertools.product((DEVICES["A100"], DEVICES["RTX 5090"]), units):
        for key, plans in cuda_aot.planned(unit).items():
            scan = (
                BlockScan(*key, gates=0, sources=0, parts=0)
                if source == "block_scan.cu"
                else GridScan(*key, gates=0, parts=0)
            )
            at, shared = cuda_aot.largest(device, scan)
            assert shared <= device.shared
            more = [plan for hidden, plan in plans.items() if hidden > at]
            if at and more:
                resident = more[0].kind == "block" or more[0].slices <= device.multiprocessors
                assert more[0].shared > device.shared or not resident
                bounded["shared memory" if resident else "multiprocessors"] += 1
    assert bounded["shared memory"] > 3
    assert (bounded["multiprocessors"] > 0) == (source == "grid_scan.cu")

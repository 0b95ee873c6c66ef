"""Ahead-of-time compilation of the CUDA kernels for GPUs that are not here: everything compiles,
spills nothing, can be launched as planned, and multiplies on tensor cores where products allow.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import build_cuda
import cuda_aot
from cuda_aot import BlockScan, Pointwise, Report

from fused_rnn.cuda import planning
from fused_rnn.plan import DEVICES

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "sm_120"]
UNITS = [*cuda_aot.UNITS, cuda_aot.POINTWISE]


@pytest.fixture(scope="module")
def toolkit():
    try:
        found = cuda_aot.find_toolkit()
        cuda_aot.find_cuobjdump(found.nvcc)
    except build_cuda.CannotBuild as error:
        pytest.skip("; ".join(error.args[:2]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(toolkit, architecture):
    if architecture not in cuda_aot.architectures(toolkit):
        pytest.skip(f"{toolkit.nvcc} makes no code for {architecture}")
    found = list(cuda_aot.compile_all(toolkit, [(architecture, unit) for unit in UNITS]))
    wrong = [f"{kernel or ''}: {'; '.join(faults)}" for _, kernel, _, faults in found if faults]
    assert not wrong, "\n".join(wrong)
    scans = [kernel[:5] for _, kernel, _, _ in found if isinstance(kernel, BlockScan)]
    assert sorted(scans) == sorted(key for unit in cuda_aot.UNITS for key in cuda_aot.planned(unit))
    assert any(isinstance(kernel, Pointwise) for _, kernel, _, _ in found)


def test_all_that_is_built_is_compiled_here():
    codes, _ = build_cuda.gpu_codes("", "nvcc", ("80", "90", "100", "120"))
    assert [code for code in codes if code.startswith("sm_")] == ARCHITECTURES
    assert all(cuda_aot.device_of(a).name for a in ARCHITECTURES)
    sources = {
        str(path.relative_to(cuda_aot.ROOT)) for path in cuda_aot.ROOT.glob("csrc/cuda/*.cu")
    }
    assert sources == set(cuda_aot.SOURCES)


def test_every_size_of_the_plan_has_a_unit():
    """Each H up to the largest runs the smallest kernel of a unit that fits it."""
    for unit in cuda_aot.UNITS:
        for backward in (False, True):
            sizes = {k: h for k, h in cuda_aot.planned(unit).items() if k[2] == backward}
            hidden = [h for each in sizes.values() for h in each]
            assert hidden == list(range(1, max(hidden) + 1))
            assert all(max(h) == key[3] for key, h in sizes.items())


def test_kernel_names():
    assert cuda_aot.parse_name(
        "void fused_rnn::cuda::block_backward<fused_rnn::cuda::GruBackwardLane"
        "<(fused_rnn::cuda::Product)3>, fused_rnn::cuda::ProductTraits<(fused_rnn::cuda::Product)3,"
        " 3, 128, 7, 3, 2> >(fused_rnn::cuda::Params<fused_rnn::GruBackward>)"
    ) == BlockScan("gru", "tf32x3", True, 128, 7, gates=3, sources=3, parts=2)
    assert cuda_aot.parse_name(
        "void fused_rnn::cuda::start<double, fused_rnn::RnnForward>(int)"
    ) == Pointwise("start<double, RnnForward>")
    with pytest.raises(ValueError):
        cuda_aot.parse_name(
            "void fused_rnn::cuda::block_forward<fused_rnn::cuda::RnnForwardLane"
            "<(fused_rnn::cuda::Product)1>, fused_rnn::cuda::ProductTraits"
            "<(fused_rnn::cuda::Product)0, 1, 64, 4, 1, 3> >(int)"
        )


# Faults are seen: in what is compiled wrongly, and in reports of each kind.


def test_a_compiled_spill_is_seen(toolkit):
    few = ("-maxrregcount=64", "-Xptxas", "--override-directive-values")
    tight = cuda_aot.compile_unit(toolkit, "sm_80", "kRnn_kF16", few)
    wrong = {k: cuda_aot.faults(DEVICES["A100"], k, report) for k, report in tight.items()}
    spilling = [k for k, found in wrong.items() if any("spills" in each for each in found)]
    assert all(report.registers <= 64 for report in tight.values())
    assert len(spilling) > len(tight) // 2
    assert all(tight[k].spilled > 0 and tight[k].local > 0 and tight[k].stack > 0 for k in spilling)


def test_compiled_instructions_are_seen(toolkit):
    """A kernel is not taken for one of another product."""
    device = DEVICES["A100"]
    plain = cuda_aot.compile_unit(toolkit, "sm_80", "kRnn_kIeee")
    half = cuda_aot.compile_unit(toolkit, "sm_80", "kRnn_kF16")
    kernels = [(scan, report) for scan, report in plain.items() if not scan.backward]
    (scan, report) = kernels[0]
    assert cuda_aot.faults(device, scan, report) == []
    claimed = next(k for k in half if not k.backward and k.max_units == 128)
    assert "has 0 HMMA" in " ".join(cuda_aot.faults(device, claimed, report))
    found = cuda_aot.faults(device, scan, half[claimed])
    assert "tensor core instructions, and should have none" in " ".join(found)
    other = claimed._replace(product="bfloat16")
    found = " ".join(cuda_aot.faults(device, other, half[claimed]))
    assert "has 0 HMMA.16816.F32.BF16" in found and "of another product" in found
    assert cuda_aot.missing("kRnn_kF16", half) == []
    assert cuda_aot.missing("kRnn_kF16", list(half)[1:]) != []


def test_what_does_not_compile_is_seen(toolkit):
    (found,) = cuda_aot.compile_all(toolkit, [("sm_1", "kRnn_kF16")])
    assert found[:3] == ("sm_1", None, None) and "does not compile" in found[3][0]


SCAN = BlockScan("lstm", "bfloat16", True, 64, 4, gates=4, sources=4, parts=1)
OPS = Counter({"HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 16})
GOOD = Report(registers=212, stack=0, spilled=0, local=0, threads=128, shared=0, ops=OPS)


def faults_of(scan=SCAN, device="A100", **other):
    return " ".join(cuda_aot.faults(DEVICES[device], scan, GOOD._replace(**other)))


def test_no_fault_is_seen_where_there_is_none():
    assert faults_of() == "" and faults_of(Pointwise("lstm_step<float>")) == ""


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
    ],
)
def test_faults_are_seen(says, other):
    assert says in faults_of(**other)


def test_registers_are_given_out_to_four_warps_at_a_time():
    # 9 warps of 176 registers would be 50,688; 12 of them do not fit.
    assert cuda_aot.registers_of(GOOD._replace(threads=288, registers=169)) == 12 * 32 * 176
    assert cuda_aot.registers_of(GOOD._replace(threads=384, registers=168)) == 64512
    assert cuda_aot.registers_of(GOOD._replace(threads=256, registers=255)) == 65536


def test_a_planned_kernel_fits_and_the_next_unit_does_not():
    """The largest H of a kernel on a device, where shared memory bounds it."""
    bounded = 0
    for unit in cuda_aot.UNITS:
        for key in cuda_aot.planned(unit):
            cell, product, backward, max_units, _ = key
            scan = BlockScan(*key, gates=0, sources=0, parts=0)
            at, shared = cuda_aot.largest(DEVICES["RTX 5090"], scan)
            assert shared <= DEVICES["RTX 5090"].shared
            if at and at != max_units:
                bounded += 1
                more = cuda_aot.shape_of(cell, product, at + 1, backward)
                assert planning.block_kernel(more).shared > DEVICES["RTX 5090"].shared
    assert bounded > 3

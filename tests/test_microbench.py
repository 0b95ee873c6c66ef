"""csrc/cuda/microbench without a GPU: that it compiles to what it measures, its arguments, what it
makes of its numbers, and how it is built.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import build_cuda
import build_microbench
import cuda_aot

ROOT = build_microbench.ROOT
FOLDER = ROOT / "csrc" / "cuda" / "microbench"
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "sm_120"]
PROGRAM = "sm_90a"  # of the others machine code alone, which takes half the time
CLUSTER_OPS = r"STAS|SYNCS|UCGABAR_\w+"  # st.async, mbarrier, barrier.cluster


@pytest.fixture(scope="module")
def toolkit():
    try:
        found = build_microbench.find_toolkit()
        cuda_aot.find_cuobjdump(found.nvcc)
    except build_cuda.CannotBuild as error:
        pytest.skip("; ".join(error.args[:2]))
    return found


@pytest.fixture(scope="module")
def built(toolkit, tmp_path_factory):
    """(file, what nvcc said) of each architecture."""
    folder = tmp_path_factory.mktemp("microbench")
    names = [each for each in ARCHITECTURES if each in cuda_aot.architectures(toolkit)]

    def build(name):
        flags = ("-Xptxas", "-v", *(() if name == PROGRAM else ("-cubin",)))
        return folder / name, build_microbench.build(toolkit, name, folder / name, flags)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(build, names)))


@pytest.fixture(scope="module")
def kernels(toolkit, built):
    """Of each architecture and kernel, how many there are of each instruction."""
    return {name: read_kernels(toolkit, path) for name, (path, _) in built.items()}


def read_kernels(toolkit, path):
    command = [cuda_aot.find_cuobjdump(toolkit.nvcc), "-sass", str(path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.M)
    listing = "\n".join(parts[1::2])
    names = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True)
    found = {}
    for symbol, text in zip(names.stdout.splitlines(), parts[2::2]):
        name = re.sub(r"fused_rnn::microbench::|\(anonymous namespace\)::|^void ", "", symbol)
        name = re.sub(r"\(\w+\)(?=\d)", "", name.rpartition("(")[0])
        ops = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text)
        found[name] = Counter(ops)
    return found


def count(ops, pattern):
    whole = re.compile(rf"({pattern})(\.|$)")
    return sum(number for op, number in ops.items() if whole.match(op))


def run(program, *arguments):
    """(exit status, stdout, stderr) where no GPU is seen."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(program), *arguments], env=environ, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


# --- what it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(built, kernels, architecture):
    if architecture not in built:
        pytest.skip(f"nvcc makes no code for {architecture}")
    said = built[architecture][1]
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert len(spilled) >= len(kernels[architecture]) == 20
    assert {number for each in spilled for number in each} == {"0"}
    assert not any(count(ops, "STL|LDL") for ops in kernels[architecture].values())
    assert "warning" not in said


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_have_the_instructions_they_measure(kernels, architecture):
    if architecture not in kernels:
        pytest.skip(f"nvcc makes no code for {architecture}")
    found = kernels[architecture]
    polls, releases = r"LDG?\.E\.STRONG\.GPU", r"STG?\.E\.STRONG\.GPU"
    counter, flags, together, groups = (found[f"grid_barrier<{i}>"] for i in range(4))
    for ops in (counter, flags, found["exchange_flags"]):
        assert count(ops, polls) and count(ops, r"CCTL\.IVALL"), "an acquire"
        assert count(ops, r"MEMBAR\.(ALL|SC)\.GPU"), "a release"
    assert count(counter, r"(ATOMG?|RED)\.E\.ADD\.STRONG\.GPU") and not count(counter, releases)
    assert count(flags, releases) and count(found["exchange_flags"], releases)
    assert count(together, polls) == 8 and count(together, r"MEMBAR\.(ALL|SC)\.GPU") == 2
    assert count(groups, r"(ATOMG?|RED)\.E\.ADD\.STRONG\.GPU")

    assert count(found["exchange_flags"], r"LDG\.E\.128") == 20
    tagged = found["exchange_tagged"]
    assert count(tagged, r"LDG\.E\.128\.STRONG\.GPU") == 20
    assert count(tagged, r"STG\.E\.64\.STRONG\.GPU") == 1
    # Besides those of whoever gives up there is no fence.
    assert not count(tagged, r"MEMBAR\.(ALL|SC)\.GPU")

    assert count(found["chase_l2"], r"LDG\.E\.64\.STRONG\.GPU") == 1
    assert count(found["chase_shared"], "LDS") == 1
    assert count(found["mma<0, 1, 16>"], r"HMMA\.16816\.F32\.BF16") == 16
    assert count(found["mma<1, 1, 16>"], r"HMMA\.1688\.F32\.TF32") == 16
    assert count(found["mma<0, 8, 4>"], r"HMMA\.16816\.F32\.BF16") == 32
    assert count(found["mma<1, 8, 4>"], r"HMMA\.1688\.F32\.TF32") == 32
    assert count(found["block_barrier"], r"BAR\.SYNC") >= 16
    for name in ("releases", "releases_apart"):
        assert count(found[name], r"MEMBAR\.(ALL|SC)\.GPU") == count(found[name], releases) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clusters_are_there_from_sm_90_on(kernels, architecture):
    if architecture not in kernels:
        pytest.skip(f"nvcc makes no code for {architecture}")
    found = kernels[architecture]
    released, relaxed, ping_pong, all_to_all = (
        found[name]
        for name in ("cluster_barrier<true>", "cluster_barrier<false>", "ping_pong", "all_to_all")
    )
    if architecture == "sm_80":
        assert not any(count(ops, CLUSTER_OPS) for ops in found.values())
        for ops in (released, relaxed, ping_pong, all_to_all):
            assert not count(ops, "BAR|CS2R"), "nothing is left of it"
        return
    for ops in (released, relaxed):
        assert count(ops, "UCGABAR_ARV") and count(ops, "UCGABAR_WAIT")
    assert count(released, "MEMBAR") and not count(relaxed, "MEMBAR")
    assert count(ping_pong, "STAS") == 2
    assert count(all_to_all, r"STAS\.128") == 2
    for ops in (ping_pong, all_to_all):
        assert count(ops, r"SYNCS\.ARRIVE") and count(ops, r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT")
        # Before the first step and after the last all blocks of the cluster meet, and nowhere else
        # is there a fence of the whole GPU.
        assert count(ops, "UCGABAR_ARV") == count(ops, r"MEMBAR\.ALL\.GPU") == 2
    others = set(found) - {"ping_pong", "all_to_all", "cluster_barrier<true>"}
    others -= {"cluster_barrier<false>"}
    assert not any(count(found[name], CLUSTER_OPS) for name in others)


# --- the program


@pytest.mark.slow
def test_without_a_gpu_it_says_so(built, tmp_path):
    path = tmp_path / "result.json"
    status, out, err = run(built[PROGRAM][0], "--quick", "--json", str(path))
    assert (status, out) == (3, "") and not path.exists()
    assert re.fullmatch(r"microbench: no GPU here: .+\n", err)


@pytest.mark.slow
def test_arguments(built):
    program = built[PROGRAM][0]
    status, out, err = run(program, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: microbench ")
    assert all(word in out for word in ("--quick", "--only TEXT", "--json FILE", "exit status"))
    assert max(map(len, out.splitlines())) <= 100
    wrong = {("--fast",): "unknown argument --fast", ("--json",): "--json needs a value"}
    for arguments, says in wrong.items():
        status, out, err = run(program, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"microbench: {says}\nusage: ")


# --- statistics, table and JSON, compiled by a C++ compiler alone

REPORT = r"""
#include <cstdio>
#include <cstdlib>
#include <limits>
#include "cuda/microbench/report.h"
using namespace fused_rnn::microbench;

int main(int count, char** arguments) {
  std::vector<double> values;
  for (int i = 1; i < count; ++i) values.push_back(std::atof(arguments[i]));
  const Summary ns = summarize(values);
  const Summary odd{1, std::numeric_limits<double>::infinity(), 2, 3, 4};
  std::vector<Row> rows{
      {{"exchange", "flags", 132, 1}, count - 1, 2000, ns, ns, 0, ""},
      {{"mma_rate", "m16n8k8 tf32"}, count - 1, 2000, ns, odd, 1024, ""},
      {{"cluster_barrier", "one cluster", 16, 16}, 0, 0, {}, {}, 0, "no \"clusters\"\n\\"},
  };
  std::fputs(json({{"device", json(std::string("A\tB"))}, {"sms", json(132)}}, rows, "").c_str(),
             stdout);
  std::puts("====");
  std::puts(json({}, {}, "why").c_str());
  std::puts("====");
  std::puts(table_head().c_str());
  for (const Row& row : rows) std::puts(table_line(row).c_str());
  for (const Row& row : rows) std::puts(name_of(row.which).c_str());
  try {
    summarize({});
  } catch (const std::invalid_argument& error) {
    std::puts(error.what());
  }
}
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report(numbers): what the program prints for them, in three parts."""
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not shutil.which(cxx[0]):
        pytest.skip(f"{cxx[0]} is not found")
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.cpp").write_text(REPORT)
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    command = [*cxx, *flags, "report.cpp", "-o", "report"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def printed(numbers):
        status, out, err = run(folder / "report", *map(repr, numbers))
        assert (status, err) == (0, "")
        return out.split("====\n")

    return printed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 31, 32])
def test_statistics(report, size):
    numbers = [float(x) for x in np.random.default_rng(size).lognormal(3, 2, size)]
    row = json.loads(report(numbers)[0])["rows"][0]
    names = ["min", "q25", "median", "q75", "max"]
    assert set(row["ns"]) == set(names) and row["ns"] == row["clocks"]
    found = [row["ns"][name] for name in names]
    np.testing.assert_allclose(found, np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-9)
    assert row["repeats"] == size


def test_json_and_table(report):
    whole, failed, rest = report([40.0, 10.0, 20.0, 30.0, 1000.0])
    result = json.loads(whole)
    assert result["meta"] == {"device": "A\tB", "sms": 132} and result["failure"] is None
    first, rate, absent = result["rows"]
    where = {"benchmark": "exchange", "variant": "flags", "blocks": 132, "cluster": 1}
    assert {name: first[name] for name in where} == where
    assert first["steps"] == 2000 and "multiply_adds_per_clock" not in first
    assert rate["multiply_adds_per_clock"] == 512 and rate["clocks"]["q25"] is None
    assert absent["absent"] == 'no "clusters"\n\\' and "ns" not in absent
    assert json.loads(failed) == {"meta": {}, "failure": "why", "rows": []}

    lines = rest.splitlines()
    assert lines[0].split()[:4] == ["benchmark", "variant", "blocks", "cluster"]
    assert lines[1].split() == ["exchange", "flags", "132", "1", "30.0", "[20.0,", "40.0]", "10.0",
                                "30.0"]  # fmt: skip
    assert len(lines[0]) == len(lines[1]) and lines[2].endswith("  512 multiply-adds/clock/SM")
    assert lines[3].startswith("cluster_barrier") and "absent: no" in lines[3]
    assert lines[-4:] == ["exchange flags, 132 blocks", "mma_rate m16n8k8 tf32, 1 block",
                          "cluster_barrier one cluster, 16 blocks in clusters of 16",
                          "nothing was measured"]  # fmt: skip


# --- how it is built


def test_inline_ptx_is_in_one_file():
    texts = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert [name for name, text in texts.items() if re.search(r"\basm\b", text)] == [
        "primitives_bench.cuh"
    ]


def test_source_hash(tmp_path):
    """It changes with the content and the name of every source, and with the primitives."""
    copy = tmp_path / "csrc" / "cuda"
    shutil.copytree(FOLDER, copy / "microbench")
    shutil.copy(ROOT / "csrc" / "cuda" / "primitives.cuh", copy)
    seen = [build_microbench.source_hash(tmp_path)]
    assert seen == [build_microbench.source_hash()]
    for path in (copy / "primitives.cuh", *sorted((copy / "microbench").iterdir())):
        path.write_text(path.read_text() + "\n")
        seen.append(build_microbench.source_hash(tmp_path))
    path.rename(path.with_name("other.h"))
    seen.append(build_microbench.source_hash(tmp_path))
    assert len(set(seen)) == len(seen) > 8


def test_command():
    toolkit = build_cuda.Toolkit("nvcc", (13, 0), "include", "cudart", ("sm_80", "compute_80"))
    for arch, code in (
        ("sm_90a", "-gencode=arch=compute_90a,code=sm_90a"),
        ("sm_80", "-gencode=arch=compute_80,code=sm_80"),
        ("native", "-arch=native"),
    ):
        command = build_microbench.make_command(toolkit, arch, "somewhere")
        assert [word for word in command if "arch" in word] == [code]
        assert command[-3:] == [build_microbench.SOURCE, "-o", "somewhere"]
        assert f'-DFUSED_RNN_MICROBENCH_HASH="{build_microbench.source_hash()}"' in command
        assert "-Icsrc" in command and command[0] == "nvcc"


def test_it_is_no_part_of_the_library():
    """setup.py compiles the .cu files of csrc/cuda itself."""
    assert 'cuda/*.cu"' in (ROOT / "setup.py").read_text()
    assert (ROOT / build_microbench.SOURCE).parent == FOLDER != ROOT / "csrc" / "cuda"


def test_what_cannot_be_built_is_said(toolkit, monkeypatch, tmp_path, capsys):
    out = ("--out", str(tmp_path / "program"))
    assert build_microbench.main(["--arch", "Hopper", *out]) == 1
    assert "Hopper is no architecture; give one as --arch sm_90a" in capsys.readouterr().err
    assert build_microbench.main(["--arch", "sm_1", *out]) == 1
    assert "this command failed" in capsys.readouterr().err
    monkeypatch.setattr(build_microbench, "OLDEST_NVCC", (99, 1))
    assert build_microbench.main(["--arch", "sm_80", *out]) == 1
    assert "install a CUDA toolkit >= 99.1" in capsys.readouterr().err
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda environ: None)
    assert build_microbench.main(["--arch", "sm_80", *out]) == 1
    assert "nvcc is not found" in capsys.readouterr().err
    assert not (tmp_path / "program").exists()


def test_the_native_architecture_needs_a_gpu(tmp_path):
    """nvcc without a GPU warns and makes code for another."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\necho \"nvcc warning : Cannot find valid GPU for '-arch=native'\" >&2\n"
    )
    nvcc.chmod(0o755)
    toolkit = build_cuda.Toolkit(str(nvcc), (13, 0), "include", "cudart", ())
    with pytest.raises(build_cuda.CannotBuild, match="nvcc finds no GPU here"):
        build_microbench.build(toolkit, "native", tmp_path / "program")
    nvcc.write_text('#!/bin/sh\necho "$@"\n')
    said = build_microbench.build(toolkit, "native", tmp_path / "program")
    assert "-arch=native" in said and build_microbench.SOURCE in said

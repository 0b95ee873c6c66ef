"""benchmarks/gpu_check.sh and what it runs, as far as that shows without a GPU and in seconds."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import UNDER_TEST, group_of

import fused_rnn
from fused_rnn.cuda import library
from fused_rnn.plan import DEVICES

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
sys.path.append(str(ROOT))  # after everything else: an installed fused_rnn stays in front

from benchmarks import gpu_profile, launch_cost, machine, sanitize, scans  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(*command, **environment):
    """(exit status, stdout, stderr) of a command at the root of the source tree."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


@bash
def test_syntax():
    assert run("bash", "-n", SCRIPT) == (0, "", "")
    assert os.access(SCRIPT, os.X_OK)


@bash
@pytest.mark.parametrize("arguments", [
    (), ("--fast", "results"), ("one", "two"), ("--rehearse",), ("--built",),
    ("--seconds",), ("--seconds", "many", "results"), ("results", "--seconds", "-5"),
    ("--seconds=60", "results"),
], ids=" ".join)  # fmt: skip
def test_wrong_arguments_give_the_usage(arguments, tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "usage: benchmarks/gpu_check.sh" in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@bash
def test_help():
    status, out, err = run("bash", SCRIPT, "--help")
    assert status == 0 and out.startswith("usage: ") and err == ""


@pytest.fixture
def python(tmp_path):
    """A Python that says what it is asked to run, and does nothing."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "asked: $*"\n')
    path.chmod(0o755)
    return path


def stages_of(folder):
    """Names of all stages with what came of them, in order of their numbers."""
    lines = [line.split() for line in (folder / "stages.txt").read_text().splitlines()]
    names = [line[0] for line in lines]
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))
    assert {f"{name}.log" for name in names} <= {path.name for path in folder.iterdir()}
    return {name[3:]: " ".join(line[1:-2]) for name, line in zip(names, lines, strict=True)}


@bash
@pytest.mark.parametrize("options", [(), ("--built",)], ids=["", "--built"])
def test_the_stages(options, python, tmp_path):
    """All of them, with a Python that does nothing."""
    folder = tmp_path / "out"
    chosen = {"CASES": "gpu/h64 speech", "PROVIDERS": "torch,ours:cuda"}
    given = {"PYTHON": str(python), "FUSED_RNN_CUDA_LIBRARY": "", **chosen}
    status, out, err = run("bash", SCRIPT, "--rehearse", *options, folder, **given)
    assert err == ""
    stages = stages_of(folder)
    # Nothing to build with: the microbench is skipped, and so is all that would build it.
    failed = {name for name, came in stages.items() if came not in ("ok", "skipped")}
    assert status == bool(failed) and failed <= {"loads"}, out
    assert ("loads" in stages) == bool(options)
    after = list(stages)[list(stages).index("tests_gpu") :]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    assert after == [
        *("tests_gpu", "tests_large", "tests_cuda_file"),
        *(f"verify_{backend}_{dtype}" for backend in ("triton", "cuda") for dtype in dtypes),
        *(f"sanitize_{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
        *("microbench", "scans", "launch_cost", "profile"),
        *("bench_float16", "bench_bfloat16", "bench_float32"),
    ]
    summary = (folder / "summary.txt").read_text()
    asked = (folder / f"{len(stages)}_bench_float32.log").read_text()
    assert asked.startswith("asked: -m benchmarks gpu/h64 speech --device cpu --dtypes float32 ")
    assert " --providers torch,ours:cuda " in asked
    assert summary.startswith("A REHEARSAL") and "\n== stages\n01_environment" in summary


@bash
def test_no_time(python, tmp_path):
    """Nothing begins after the time is over."""
    given = {"PYTHON": str(python), "FUSED_RNN_CUDA_LIBRARY": ""}
    folder = tmp_path / "out"
    assert run("bash", SCRIPT, "--rehearse", "--seconds", "0", folder, **given)[0] == 1
    assert set(stages_of(folder).values()) == {"not run"}


@bash
@pytest.mark.parametrize(("libraries", "microbench"), [(0, 0), (1, 0), (0, 1), (0, None)])
def test_what_was_built_elsewhere_has_to_load(libraries, microbench, tmp_path):
    """The libraries, and build/microbench, which is then where it is looked for."""
    function = re.search(r"^loads\(\) \{.*?^\}", SCRIPT.read_text(), re.M | re.S)[0]
    function = re.sub(r" #.*", "", function, count=1)
    work = tmp_path / "work"
    for path, code in (("python", libraries), ("build/microbench", microbench)):
        if code is not None:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(f"#!/bin/sh\nexit {code}\n")
            (tmp_path / path).chmod(0o755)
    work.mkdir()
    done = subprocess.run(
        ["bash", "-uc", f"{function}\nloads"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "WORK": str(work)},
        capture_output=True,
    )
    loads = libraries == 0 and microbench == 0
    assert (done.returncode == 0) == loads == (work / "microbench").exists()


def test_every_gpu_test_is_in_one_stage():
    """The -k expressions that the tests are shared out by, and that both have some."""
    text = SCRIPT.read_text()
    expressions = re.findall(r'^in_shell tests "[^"]*" \S+ (.*)$', text, re.M)
    assert expressions == ['"not $LARGE"', "$LARGE"]
    (large,) = re.findall(r"^LARGE=(\w+)", text, re.M)
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_gpu.py").read_text(), re.M)
    assert 0 < sum(large in name for name in tests) < len(tests)


def test_what_shares_a_truth_runs_in_one_process():
    """Groups of tests for pytest-xdist, by their ids."""
    file = "tests/test_gpu.py::test_"
    for name, group in {
        "numerics[triton-lstm-proj-H64-B7-flags-float32-tf32x3]": "lstm-proj-H64-B7-flags",
        "numerics[cuda-lstm-proj-H64-B7-flags-bfloat16]": "lstm-proj-H64-B7-flags",
        "numerics[cuda-gru-H1024-B8-reversed-float64]": "gru-H1024-B8-reversed",
        "every_kind_of_plan[triton-streamed-rnn-relu-float32-tf32]": "rnn-relu",
        "every_kind_of_plan[cuda-grid-rnn-relu-bfloat16]": "rnn-relu",
    }.items():
        assert group_of(file + name) == f"test_{name.partition('[')[0]} {group}"
    for alone in ("deterministic[cuda-grid-gru-H200-float32]", "large_weights[cuda-grid]"):
        assert group_of(file + alone) == file + alone


def test_the_cases_it_names_are_there():
    text = SCRIPT.read_text()
    real = " ".join(re.findall(r"^SELECTION\+?=\((.*?)\)$", text, re.M)).split()
    (rehearsed,) = re.findall(r"^ +SELECTION=\((.*?)\)$", text, re.M)
    known = {case.use for case in CASES} | {case.name for case in CASES}
    assert set(rehearsed.split()) <= known
    assert real[0] == "gpu" and set(real) == {case.use for case in CASES}
    assert {case for case, _, _ in gpu_profile.SHAPES} <= known


def test_the_microbench_is_built_beside_the_library_and_what_is_timed_runs_alone():
    """Its build is under way while the library's is; clocks run after what runs side by side."""
    text = SCRIPT.read_text()
    stages = [m[1] for m in re.finditer(r"^ *next (\w+)$", text, re.M)]
    assert stages.index("build") == stages.index("microbench_build") + 1
    assert re.search(r'in_shell microbench_build\n +stage "\$NAME" .* &\n', text)
    timed = ["microbench", "scans", "launch_cost", "profile"]
    assert stages[-len(timed) :] == timed  # the tables are named by their dtypes
    last_side_by_side = text.index("next sanitize_$tool")
    assert last_side_by_side < text.index("\nwait\n") < text.index("next microbench\n")


@bash
@pytest.mark.parametrize(("program", "status", "says"), [
    (None, 77, "it is not built"),
    ("echo no GPU here >&2; exit 3", 77, "no GPU here"),
    ("echo a table; exit 1", 1, "a table"),
    ('echo $1 $2; echo {} >"$3"', 0, "--quick --json"),
], ids=["not built", "no GPU", "failed", "passed"])  # fmt: skip
def test_the_microbench_stage(program, status, says, tmp_path):
    function = re.search(r"^microbench\(\) \{.*?^\}", SCRIPT.read_text(), re.M | re.S)[0]
    if program:
        (tmp_path / "microbench").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "microbench").chmod(0o755)
    folders = {"WORK": str(tmp_path), "OUT": str(tmp_path)}
    found, out, err = run("bash", "-uc", f"{function}\nmicrobench", **folders)
    assert (found, says in out + err) == (status, True)
    assert (tmp_path / "microbench.json").exists() == (status == 0)


def test_launch_cost_runs_without_a_gpu(tmp_path):
    path = tmp_path / "launch.json"
    program = (sys.executable, "-m", "benchmarks.launch_cost", "--device", "cpu")
    status, out, err = run(*program, "--quick", "--json", path, TRITON_INTERPRET="1")
    assert status == 0, err
    result = json.loads(path.read_text())
    assert result["meta"]["kernel_hash"] == machine.kernel_hash()
    whats = [row["what"] for row in result["rows"]]
    assert all(what in out for what in whats) and len(set(whats)) == len(whats)
    for words in ("launch by dispatch", "launch by handle", "torch.empty", "torch.zeros", "copy",
                  "bfloat16", "TF32"):  # fmt: skip
        assert any(words in what for what in whats), words
    status, out, err = run(*program, TRITON_INTERPRET="0")
    assert status == 2 and err.strip() == "error: --device cpu needs TRITON_INTERPRET=1"


def test_launch_cost_and_profile_want_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(launch_cost.torch.cuda, "is_available", lambda: False)
    for program in (launch_cost, gpu_profile):
        assert program.main([]) == 2
        assert "torch sees no GPU here" in capsys.readouterr().err


def test_profile_names_what_ran(tmp_path):
    path = tmp_path / "kernels.txt"
    arguments = ["--device", "cpu", "--providers", "torch,ours:reference", "--shapes", "1"]
    sizes = ["-T", "2", "-B", "2", "-H", "4"]
    assert gpu_profile.main([*arguments, *sizes, "--out", str(path)]) == 0
    text = path.read_text()
    assert "aten::lstm" in text and text.endswith("\n0 without a record\n")
    for mode in ("inference", "training"):
        assert f"LSTM {mode} float16, ours:reference: " in text
    assert gpu_profile.main(["--device", "cpu", "--providers", "nobody"]) == 2


@pytest.fixture
def cuda_device():
    """Where the CUDA backend runs here."""
    reason = fused_rnn.available_backends()["cuda"]
    if reason is not None:
        pytest.skip(reason)
    return UNDER_TEST["cuda"]


def test_sanitize_runs_every_kernel(cuda_device, capsys):
    sizes = ["-T", "1", "-B", "2", "-H", "23"]
    assert sanitize.main(["--device", cuda_device, *sizes]) == 0
    out, err = capsys.readouterr()
    assert out == "sanitize: 112 scans forward and back, 0 wrong results\n"
    for words in ("block 4 lstm H23 float32 tf32x3", "block 8 rnn-relu H23 float16",
                  "grid 8x16 gru H40 float32 tf32", "grid 16x32 lstm H40 bfloat16",
                  "step lstm-proj7 H23 bfloat16", "step gru-before H23 float64"):  # fmt: skip
        assert words in err, words
    assert sanitize.main(["--device", cuda_device, "--kernels", "block", *sizes]) == 0
    assert capsys.readouterr().out == "sanitize: 40 scans forward and back, 0 wrong results\n"


def test_scans_times_every_kernel(cuda_device, tmp_path, capsys):
    """Tiny sizes of every kernel that can run them."""
    path = tmp_path / "scans.json"
    arguments = ["--device", cuda_device, "--quick"]
    assert scans.main([*arguments, "--cells", "lstm,gru,rnn", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("scan ")
    rows = json.loads(path.read_text())["rows"]
    assert all(row["us"] > 0 and row["model"] > 0 for row in rows)
    found = {(row["cell"], row["number"], row["backward"], row["chosen"]) for row in rows}
    ways = itertools.product(("lstm", "gru", "rnn"), ("bfloat16", "tf32"), (False, True))
    assert {way[:3] for way in found} == set(ways)
    assert sum(row["chosen"] for row in rows) == 12, "one of each"
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"block 4", "block 8", "grid 8", "wide grid 8", "step"}
    for kind in ("block", "grid", "wide grid", "step"):
        assert f"\n{kind}: measured / model " in out
    assert scans.main([*arguments, "--limit", "0"]) == 0
    assert "note: 4 of 4 are left out: 0 s are over\n" in capsys.readouterr().out


def test_sanitize_has_block_scans_of_every_size():
    """For a GPU with shared memory for all of them: whatever fits, both ways, is run."""
    scans = list(sanitize.scans(sanitize.HIDDEN, ["block"], DEVICES["H200"]))
    assert {scan.hidden for scan in scans} == set(sanitize.HIDDEN)
    for cell in ("lstm", "gru", "rnn"):
        for dtype in (torch.bfloat16, torch.float16):
            found = {scan.hidden for scan in scans if (scan.cell, scan.dtype) == (cell, dtype)}
            assert found == set(sanitize.HIDDEN), (cell, dtype)
        precisions = {scan.precision for scan in scans if scan.cell == cell}
        assert precisions == {"ieee", "tf32", "tf32x3"}


def test_sanitize_sees_a_wrong_result(cuda_device, monkeypatch, capsys):
    right = sanitize.found

    def wrong(*args):
        results = right(*args)
        results["dh0"][0, 0, 0] = float("nan")
        return results

    monkeypatch.setattr(sanitize, "found", wrong)
    sizes = ["-T", "1", "-B", "1", "-H", "4", "--kernels", "step"]
    assert sanitize.main(["--device", cuda_device, *sizes]) == 1
    out, err = capsys.readouterr()
    assert "24 wrong results" in out and "FAULT step lstm H4 float64: dh0 is off by nan" in err


@pytest.mark.parametrize("program", [scans, sanitize])
def test_wants_a_library_for_its_device(program, capsys, monkeypatch):
    monkeypatch.setattr(library, "why_unavailable", lambda: "it is not there")
    assert program.main([]) == 2
    assert capsys.readouterr().err == "error: --device cuda: it is not there\n"
    monkeypatch.setattr(library, "why_unavailable", lambda: None)
    monkeypatch.setattr(library, "is_emulated", lambda: True)
    assert program.main([]) == 2
    assert "the library is an emulated one" in capsys.readouterr().err


def test_sanitize_wants_kernels_that_there_are(capsys):
    assert sanitize.main(["--kernels", "block,blocks"]) == 2
    assert capsys.readouterr().err == "error: no kernels blocks\n"


def test_kernel_hash(tmp_path):
    """It is the same every time, and changes with the content and the name of every source."""
    copy = tmp_path / "copy"
    for folder in machine.KERNELS:
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "fused_rnn" / "plan.py", copy / "fused_rnn" / "plan.py")
    assert machine.kernel_hash(copy) == machine.kernel_hash() == machine.kernel_hash(ROOT)
    seen = [machine.kernel_hash(copy)]
    (copy / "fused_rnn" / "triton" / "notes.txt").write_text("no kernel")
    (copy / "fused_rnn" / "other.py").write_text("no kernel")
    (copy / "csrc" / "cpu").mkdir()
    (copy / "csrc" / "cpu" / "scan.inl").write_text("no kernel of a GPU")
    assert machine.kernel_hash(copy) in seen
    sources = ("plan.py", "triton/block.py", "cuda/planning.py", "cuda/operators.py")
    sources = [f"fused_rnn/{name}" for name in sources]
    sources += [f"csrc/cuda/{name}" for name in ("block_scan.cu", "operators.cpp", "rows.cuh")]
    sources += ["csrc/cuda/steps.h", "csrc/math/gates.h", "csrc/waist/operators.h"]
    for path in (copy / name for name in sources):
        path.write_text(path.read_text() + "\n")
        seen.append(machine.kernel_hash(copy))
    block = copy / "fused_rnn" / "triton" / "block.py"
    block.rename(block.with_name("blocks.py"))
    seen.append(machine.kernel_hash(copy))
    assert len(set(seen)) == len(seen) == len(sources) + 2
    assert machine.describe("cpu")["kernel_hash"] == machine.kernel_hash()

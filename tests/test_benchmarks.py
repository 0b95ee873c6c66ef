"""The benchmark harness: registry, gate, statistics, ONNX, command line. Nothing asserts a time."""

import contextlib
import csv
import io
import json
import math
import pathlib
import socket
import sys
from dataclasses import replace

import pytest
import torch

# After everything else, so that an installed fused_rnn stays in front of the source tree's.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

from benchmarks import cases, compare, onnx_model, plot, providers, report, scaling, stats
from benchmarks.cases import CASES, Case, Job, UnknownName
from benchmarks.cli import main
from benchmarks.floor import operations
from benchmarks.gate import Gate
from benchmarks.problem import DTYPES, make_problem, torch_calls
from benchmarks.progress import Progress
from benchmarks.session import run_job
from benchmarks.timing import MIN_PASSES, interleave, threads

TINY = Case("tiny", "case", 3, 2, 4, 5)


def tiny(cell="LSTM", mode="inference", dtype="float32", **changes):
    return Job(replace(TINY, **changes), cell, mode, dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    with threads(1):
        yield


class Wrong(providers.TorchProvider):
    """torch.nn with one value of one result off."""

    name = "wrong"

    def __init__(self, tensor="y", by=1e-3):
        self.tensor, self.by = tensor, by

    def prepare(self, problem):
        runner = super().prepare(problem)
        right = runner.results

        def results():
            values = right()
            values[self.tensor].view(-1)[1] += self.by
            return values

        runner.results = results
        return runner


# Registry


def test_registry_names_are_unique_and_cover_every_use():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert not any(case.quick for case in CASES if case.use == cases.GPU)
    uses = {case.use for case in CASES} - {cases.GPU}
    assert {"streaming", "online", "reinforcement_learning", "tagging"} <= uses
    assert {"time_series", "language_model", "ragged", "speech"} <= uses
    for use in uses:
        quick = {cell for case in CASES if case.use == use for cell in case.quick}
        assert quick >= {"LSTM", "GRU"}, use


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_registry_cases_are_valid(case):
    assert set(case.quick) <= set(case.cells)
    small = replace(case, T=min(case.T, 4), B=min(case.B, 3), H=9, proj=min(case.proj, 4))
    for cell in case.cells:
        problem = make_problem(Job(small, cell, case.modes[0]))
        results = providers.TorchProvider().prepare(problem).results()
        assert all(torch.isfinite(value).all() for value in results.values())


def test_invalid_cases_are_refused():
    for wrong in ({"T": 0}, {"proj": 2}, {"modes": ("fast",)}, {"min_length": 0.0}):
        with pytest.raises(ValueError):
            replace(TINY, **wrong)


def test_selection():
    quick = cases.select()
    assert {job.case.use for job in quick} == {case.use for case in CASES} - {cases.GPU}
    assert cases.GPU not in {job.case.use for job in cases.select(full=True)}
    assert cases.GPU in {job.case.use for job in cases.select(full=True, device="cuda")}
    shapes = {case.name for case in CASES if case.use == cases.GPU}
    assert {job.case.name for job in cases.select([cases.GPU])} == shapes
    assert len(cases.select(full=True)) > len(quick)
    assert all(
        j.case.use == "speech" and j.cell == "GRU" for j in cases.select(["speech"], cells=["gru"])
    )
    uses = [job.case.use for job in cases.select(["ragged", "gpu", "ragged/h128"])]
    assert list(dict.fromkeys(uses)) == ["ragged", "gpu"] and uses[-1] == "gpu"
    resized = cases.select(["speech/h512"], modes=["training"], sizes={"H": [8, 16], "T": [2]})
    assert {(job.case.T, job.case.H) for job in resized} == {(2, 8), (2, 16)}
    assert len({job.case.name for job in resized}) == 2


@pytest.mark.parametrize(
    ("call", "listed"),
    [
        (lambda: cases.select(["speach"]), "speech"),
        (lambda: cases.select(cells=["QRNN"]), "GRU"),
        (lambda: cases.select(modes=["eval"]), "inference"),
        (lambda: providers.find(["cudnn"]), "onnxruntime"),
    ],
)
def test_unknown_names_say_what_there_is(call, listed):
    with pytest.raises(UnknownName, match=listed):
        call()


# Problems and the gate


def test_a_problem_is_the_same_every_time():
    first, second = make_problem(tiny(state=True)), make_problem(tiny(state=True))
    for a, b in zip((*first.xs, *first.hx), (*second.xs, *second.hx), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("layers", [1, 2])
def test_both_idioms_for_resets_agree(cell, layers):
    job = tiny(cell, dtype="float64", T=12, B=5, state=True, reset_rate=0.2, layers=layers)
    problem = make_problem(job)
    problem.reset[0, 1] = True  # a reset before the first step drops the given state
    with torch.no_grad():
        results = [
            c(problem.module, problem.xs[0], problem.hx) for c in torch_calls(problem).values()
        ]
    (y1, state1), (y2, state2) = results
    torch.testing.assert_close(y1, y2)
    torch.testing.assert_close(state1, state2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_passes_torch_itself(dtype):
    problem = make_problem(tiny("GRU", "training", dtype))
    torch_runner = providers.TorchProvider().prepare
    verdict = Gate(problem, torch_runner).judge(torch_runner(problem).results())
    assert verdict.passed, verdict


@pytest.mark.parametrize("by", [1e-5, float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["y", "h_n", "c_n", "grad x", "grad weight_hh_l0"])
def test_gate_catches_a_wrong_provider(tensor, by):
    rows = run_job(tiny(mode="training"), [providers.TorchProvider(), Wrong(tensor, by)], 0.01)
    torch_row, wrong_row = rows
    assert torch_row["status"] == "ok"
    assert wrong_row["status"] == "WRONG" and tensor in wrong_row["reason"]
    assert wrong_row["median_us_per_step"] is None and wrong_row["ratio"] is None


def test_gate_catches_a_missing_result_and_a_wrong_shape():
    problem = make_problem(tiny())
    torch_runner = providers.TorchProvider().prepare
    gate, results = Gate(problem, torch_runner), torch_runner(problem).results()
    assert not gate.judge({k: v for k, v in results.items() if k != "c_n"}).passed
    assert not gate.judge(results | {"y": results["y"][:1]}).passed


def test_a_provider_that_raises_is_a_row_and_not_the_end():
    class Raises(providers.TorchProvider):
        name = "raises"

        def prepare(self, problem):
            raise RuntimeError("no such instruction")

    rows = run_job(tiny(), [providers.TorchProvider(), Raises()], 0.01)
    assert [row["status"] for row in rows] == ["ok", "ERROR"]
    assert "no such instruction" in rows[1]["reason"]


@pytest.mark.parametrize(
    "changes", [{}, {"min_length": 0.3}, {"reset_rate": 0.3}, {"bidirectional": True, "layers": 2}]
)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_ours_passes_the_gate(cell, changes):
    pytest.importorskip("fused_rnn")
    job = tiny(cell, "training", T=6, state=True, **changes)
    for row in run_job(job, [providers.TorchProvider(), providers.OursProvider()], 0.01):
        assert row["status"] == "ok", row["reason"]


def test_a_backend_that_does_not_take_the_call_is_refused_not_wrong():
    pytest.importorskip("fused_rnn")
    (_, row) = run_job(tiny(min_length=0.3), providers.find(["ours:torch"]), 0.01)
    assert row["status"] == "refused" and "cannot run" in row["reason"]


# Statistics and timing


def test_paired_ratio_of_known_data():
    noise = torch.Generator().manual_seed(0)
    drift = torch.linspace(1, 5, 60)  # common to both, so it must not widen the interval
    jitter = 1 + 0.05 * torch.randn(60, generator=noise)
    ratio = stats.paired_ratio(2 * drift * jitter, drift)
    assert ratio.lo < ratio.value < ratio.hi
    assert ratio.lo > 1.95 and ratio.hi < 2.05
    assert ratio.lo <= 2 <= ratio.hi
    assert ratio == stats.paired_ratio(2 * drift * jitter, drift), "seeded"


def test_paired_ratio_is_the_inverse_of_its_inverse_and_exact_without_noise():
    constant = stats.paired_ratio([3.0] * 8, [2.0] * 8)
    assert (constant.lo, constant.value, constant.hi) == pytest.approx((1.5, 1.5, 1.5))
    a, b = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) + 0.5
    forward, backward = stats.paired_ratio(a, b), stats.paired_ratio(b, a)
    assert forward.value == pytest.approx(1 / backward.value)
    assert forward.lo == pytest.approx(1 / backward.hi, rel=0.02)


def test_intervals_cover_the_truth_most_of_the_time():
    random = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(60):
        a, b = torch.exp(0.2 * torch.randn(2, 25, generator=random))
        interval = stats.paired_ratio(1.5 * a, b)
        covered += interval.lo <= 1.5 <= interval.hi
    assert covered >= 50


def test_unpaired_ratio_takes_different_numbers_of_samples():
    ratio = stats.unpaired_ratio([4.0, 4.1, 3.9, 4.0], [2.0, 2.0])
    assert ratio.lo <= ratio.value <= ratio.hi and ratio.value == pytest.approx(2, rel=0.01)


def test_geometric_mean():
    assert stats.geometric_mean([2.0, 8.0]) == pytest.approx(4)


class Recorder:
    """A runner that only writes down that it was called."""

    training, device = True, torch.device("cpu")

    def __init__(self, name, log):
        self.name, self.log = name, log

    def context(self):
        return contextlib.nullcontext()

    def call(self, index):
        self.log.append(self.name)

    def clear(self):
        pass


def test_passes_go_forwards_and_backwards_in_turn():
    log = []
    timings = interleave({name: Recorder(name, log) for name in "AB"}, budget_s=0)
    assert len(timings["A"].blocks) == len(timings["B"].blocks)
    assert 2 <= len(timings["A"].blocks) <= MIN_PASSES
    blocks = "".join(name for name, before in zip(log, ["", *log]) if name != before)
    # The estimates come first (A B), then A B | B A, whose neighbours run together.
    assert blocks.startswith("ABABA")


def test_operations_count_the_weights_of_every_step():
    small = {"T": 5, "B": 3, "I": 7, "H": 4}
    weights = 4 * 4 * (7 + 4)
    assert operations(make_problem(tiny(**small))) == 2 * weights * 15
    assert operations(make_problem(tiny(mode="training", **small))) == 6 * weights * 15
    both = make_problem(tiny("GRU", bidirectional=True, layers=2, **small))
    assert operations(both) == 2 * 2 * (3 * 4 * (7 + 4) + 3 * 4 * (8 + 4)) * 15
    ragged = make_problem(tiny(min_length=0.2, **small))
    assert operations(ragged) == 2 * weights * int(ragged.lengths.sum())


# ONNX


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_onnx_models_compute_what_torch_computes(cell, layers, bidirectional):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for changes in ({}, {"state": True}, {"min_length": 0.2}):
        job = tiny(cell, layers=layers, bidirectional=bidirectional, T=7, B=3, **changes)
        problem = make_problem(job)
        truth = providers.TorchProvider().prepare(problem).results()
        results = onnx_model.OnnxRunner(problem, threads=1).results()
        assert truth.keys() == results.keys()
        for name in truth:
            torch.testing.assert_close(results[name], truth[name], atol=1e-6, rtol=1e-5)


def test_onnx_gate_order():
    torch_gates = torch.arange(4.0).repeat_interleave(2)  # i i f f g g o o
    assert onnx_model.reorder(torch_gates, "LSTM").tolist() == [0, 0, 3, 3, 1, 1, 2, 2]
    assert onnx_model.reorder(torch_gates[:6], "GRU").tolist() == [1, 1, 0, 0, 2, 2]


# Command line and results


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    for option in (
        "--cells",
        "--providers",
        "--dtypes",
        "--threads",
        "--budget",
        "--out",
        "compare",
    ):
        assert option in said


def test_list_names_cases_and_providers(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(case.name in said for case in CASES)
    assert all(name in said for name in providers.DEFAULT)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["spech"], "did you mean 'speech'"),
        (["--cells", "foo"], "LSTM, GRU, RNN"),
        (["--providers", "keras"], "there are: torch, ours"),
        (["--dtypes", "int8"], "float32"),
        (["streaming", "--modes", "training"], "no case has"),
        (["compare", "absent.json", "absent.json"], "absent.json"),
    ],
)
def test_errors_are_one_clear_line(arguments, complaint, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and len(said.splitlines()) == 1


SMALL_RUN = [
    "streaming/h128",
    "tagging/h128",
    "--cells",
    "LSTM,GRU",
    "-H",
    "8",
    "-I",
    "4",
    "-T",
    "3",
]
COLUMNS = [
    "case",
    "cell",
    "mode",
    "provider",
    "backend",
    "T",
    "B",
    "I",
    "H",
    "layers",
    "bidirectional",
    "proj",
    "dtype",
    "threads",
    "median_us_per_step",
    "q25",
    "q75",
    "ratio",
    "ci_lo",
    "ci_hi",
    "floor_us",
    "error",
    "torch",
    "triton",
    "onnxruntime",
    "python",
    "fused_rnn",
    "cpu",
    "instruction_set",
    "commit",
    "kernel_hash",
    "date",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two small runs, the second with one case more."""
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    names = ",".join(
        p for p in providers.DEFAULT if providers.find([p])[-1].unavailable("cpu") is None
    )
    for folder, cases_ in zip(folders, (SMALL_RUN, [*SMALL_RUN, "online/b4"]), strict=True):
        arguments = [*cases_, "--providers", names, "--budget", "0.02", "--out", str(folder)]
        assert main(arguments) == 0
    return folders


def test_a_run_leaves_csv_json_and_a_picture(results):
    with open(results[0] / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(COLUMNS) <= set(rows[0])
    assert {row["provider"] for row in rows} >= {"torch"}
    timed = [row for row in rows if row["status"] == "ok"]
    assert len(timed) >= 6
    for row in timed:
        assert 0 < float(row["q25"]) <= float(row["median_us_per_step"]) <= float(row["q75"])
        assert float(row["ci_lo"]) <= float(row["ratio"]) <= float(row["ci_hi"])
        assert float(row["floor_us"]) > 0 and math.isfinite(float(row["error"]))
    result = report.read_json(results[0] / "results.json")
    assert len(result["rows"]) == len(rows)
    assert result["rows"][0]["torch"] == torch.__version__
    if {row["provider"] for row in timed} > {"torch"}:
        pytest.importorskip("matplotlib")
        assert (results[0] / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_results_name_no_path_and_no_host(results):
    text = (results[0] / "results.json").read_text()
    assert str(pathlib.Path.home()) not in text and str(results[0]) not in text
    assert f'"{socket.gethostname()}"' not in text


def test_a_limit_of_time_leaves_rows_out_and_says_so(tmp_path, capsys):
    arguments = [*SMALL_RUN, "--providers", "torch", "--budget", "0", "--out", str(tmp_path)]
    assert main([*arguments, "--limit", "0"]) == 0
    assert "left out" in capsys.readouterr().err
    assert report.read_json(tmp_path / "results.json")["rows"] == []


def test_the_automatic_choice_is_named_by_what_ran(monkeypatch):
    """On a GPU it depends on sizes, layer by layer; a call is watched."""
    from fused_rnn import backends

    choices = iter(["reference", "cpu"])
    monkeypatch.setattr(backends, "choose", lambda *_: next(choices, "cpu"))
    ragged = tiny(mode="training", layers=2, min_length=0.3)
    runner = providers.OursProvider().prepare(make_problem(ragged))
    assert runner.backend == "auto:reference+cpu"
    runner = providers.OursProvider().prepare(make_problem(tiny(mode="inference", layers=2)))
    assert runner.backend == "auto:cpu"


def test_compare_of_two_files(results, capsys):
    paths = [str(folder / "results.json") for folder in results]
    for command in (["compare", *paths], ["--compare", *paths]):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert "absent" in said and "online/b4@" in said and "geometric mean A/B" in said
    first, second = map(report.read_json, paths)
    entries = compare.compare(first, second)
    assert any(entry["a"] is None for entry in entries)
    assert any(entry["b"] is None for entry in compare.compare(second, first))
    slower = json.loads(json.dumps(first))
    for row in slower["rows"]:
        row["blocks"] = [2 * block for block in row.get("blocks", [])]
    for entry in compare.compare(first, slower):
        assert entry["speedup"].value == pytest.approx(0.5)


def test_a_wrong_provider_makes_the_exit_status_non_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(providers._FACTORIES, "wrong", Wrong)
    arguments = ["streaming/h128", "--cells", "LSTM", "-H", "8", "--providers", "torch,wrong"]
    assert main([*arguments, "--budget", "0.01", "--out", str(tmp_path)]) == 1
    assert "WRONG: wrong: y: error" in capsys.readouterr().out


def test_missing_packages_are_reported_with_the_remedy(tmp_path, monkeypatch, capsys):
    for package in ("matplotlib", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plot.PlotUnavailable, match="pip install matplotlib"):
        plot.draw({"rows": []}, tmp_path / "picture.png")
    monkeypatch.setitem(providers._FACTORIES, "ours", providers.TorchProvider)
    arguments = ["streaming/h128", "--cells", "RNN", "-H", "4", "--budget", "0.01"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "without onnxruntime: not installed" in capsys.readouterr().err
    assert main([*arguments, "--providers", "onnxruntime"]) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(2, stream)
        for what in ("first", "second"):
            progress.start(what)
        progress.note("remark")
        progress.close()
        said = stream.getvalue()
        assert "first" in said and "remark\n" in said
        assert ("\r" in said) == stream.isatty()


# The sweep.


def test_a_sweep_is_the_same_for_a_seed_and_within_bounds():
    sweep = cases.sweep
    jobs = sweep(200, 3)
    assert jobs == sweep(200, 3) != sweep(200, 4)
    assert len({job.key for job in jobs}) == 200
    assert {job.cell for job in jobs} == set(cases.CELLS)
    assert {job.mode for job in jobs} == set(cases.MODES)
    for job in jobs:
        assert 0 < cases.operations(job.case, job.cell) <= cases.SWEEP_OPERATIONS
    assert {job.cell for job in sweep(20, 0, cells=["gru"])} == {"GRU"}


def test_a_sweep_leaves_a_picture(tmp_path, capsys):
    arguments = ["--sweep", "3", "--seed", "1", "--budget", "0.01", "--out", str(tmp_path)]
    assert main([*arguments, "--providers", "torch,ours", "-T", "3"]) == 2
    assert "draws its own shapes" in capsys.readouterr().err
    assert main(["--sweep", "0"]) == 2
    assert main([*arguments, "--providers", "torch", "--graph"]) == 2
    assert main([*arguments, "--providers", "torch,ours"]) == 0
    assert "sweep/1_t" in capsys.readouterr().out
    assert (tmp_path / "ratios.png").read_bytes()[:4] == b"\x89PNG"


def test_scaling_is_a_table(capsys):
    scaling.main(["--steps", "1", "3", "--rows", "2", "--hidden", "8", "--budget", "0.01"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == len(scaling.COLUMNS) + 1
    assert [row.split("|")[1:3] for row in rows] == [
        [" 1 ", " 16 "],
        [" 3 ", " 16 "],
        [" 100 ", " 2 "],
    ]
    seconds, training, extra = scaling.measure("ours", "GRU", 8, 5, 2, budget_s=0.01)
    assert seconds > 0 and training > 0 and extra >= 0

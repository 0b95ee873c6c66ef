"""examples/char_lm.py: same losses with both implementations, shared checkpoints, two processes."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydoc_data.topics", reason="this Python comes without its language reference")

SCRIPT = Path(__file__).parents[1] / "examples" / "char_lm.py"
TINY = ["--embed=8", "--hidden=24", "--batch=4", "--bptt=16", "--sample=0", "--device=cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(char_lm, tmp_path_factory):
    """The beginning of the language reference, short enough to validate in a moment."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text(char_lm.python_reference()[:8000])
    return str(path)


@pytest.fixture
def run(char_lm, text):
    """Call the script's main; later options win over the tiny ones."""
    return lambda *options: char_lm.main([*TINY, f"--text={text}", *options])


def refused(run, capsys, *options):
    """What the script says when it refuses these options."""
    with pytest.raises(SystemExit) as exit:
        run("--impl=nn", "--steps=1", *options)
    assert exit.value.code == 2
    return capsys.readouterr().err


def close(a, b, tolerance=1e-4):
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def test_language_reference_is_clean(char_lm):
    text = char_lm.python_reference()
    assert len(text) > 100_000
    assert text == char_lm.python_reference()
    assert not any(line != line.rstrip() for line in text.splitlines())
    paragraphs = text.rstrip("\n").split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_rows_cover_the_text_in_order(char_lm):
    rows = char_lm.Rows(torch.arange(50, dtype=torch.uint8), 4, 3, "cpu")
    assert rows.steps == 4
    inputs, targets = zip(*(rows.step(i) for i in range(rows.steps)), strict=True)
    inputs, targets = torch.cat(inputs), torch.cat(targets)
    assert inputs[:, 1].tolist() == list(range(12, 24))
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(rows.step(1, slice(2, 4))[0], rows.step(1)[0][:, 2:])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_same_losses_for_50_steps(run, cell):
    # the clipping bites at every step: it works in place, so no two gradients may share memory
    options = [f"--cell={cell}", "--steps=50", "--seed=3", "--clip=0.1"]
    logs = [run(f"--impl={impl}", *options) for impl in ("nn", "fused")]
    close(logs[0]["train"], logs[1]["train"])
    close(*([loss for _, loss in log["valid"]] for log in logs))
    assert logs[0]["train"][-1] < logs[0]["train"][0] - 1  # it learns, so the curves could part


def test_dropout_trains_in_both(run):
    for impl in ("nn", "fused"):
        log = run(f"--impl={impl}", "--steps=30", "--dropout=0.3", "--lr=0.01")
        assert log["valid"][-1][1] < log["valid"][0][1] - 1


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("first, second", [("nn", "fused"), ("fused", "nn")])
def test_checkpoint_crosses_over(run, tmp_path, cell, first, second):
    path = str(tmp_path / "model.pt")
    before = run(f"--impl={first}", f"--cell={cell}", "--layers=1", "--steps=5", "--save", path)
    names = set(torch.load(path, weights_only=True))
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"} <= names

    tuned = [run(f"--impl={impl}", "--load", path, "--steps=5") for impl in (first, second)]
    assert tuned[1]["config"]["cell"] == cell  # read from the checkpoint
    assert tuned[1]["config"]["layers"] == 1
    assert tuned[1]["valid"][0][1] == pytest.approx(before["valid"][-1][1], abs=1e-5)
    close(tuned[0]["train"], tuned[1]["train"])
    assert tuned[1]["valid"][-1][1] < tuned[1]["valid"][0][1]


def test_log_curves_and_sample(run, tmp_path, capsys):
    options = [
        "--steps=4",
        "--eval-every=2",
        "--sample=20",
        "--prompt=def ",
        f"--out={tmp_path / 'new' / 'run'}",
    ]
    logs = [run(f"--impl={impl}", *options, "--seed=1") for impl in ("nn", "fused")]
    assert logs[0]["sample"] == logs[1]["sample"]
    assert logs[0]["sample"].startswith("def ")
    assert logs[0]["sample"] in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "run" / "log.json").read_text())
    assert written["train"] == logs[1]["train"]
    assert [step for step, _ in written["valid"]] == [0, 2, 4]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "new" / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_no_matplotlib_is_said(char_lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    char_lm.write_log(tmp_path, {"train": [1.0]})
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "log.json").exists()


def test_sampling_temperature(char_lm):
    torch.manual_seed(0)
    model = char_lm.CharLM(torch.nn.LSTM, 4, 8, 1, 0.0)

    def draw(temperature, seed):
        return char_lm.generate(model, "a", 12, temperature, seed, torch.device("cpu"))

    assert draw(0, 1) == draw(0, 2)
    assert draw(1.0, 1) == draw(1.0, 1) != draw(1.0, 2)


def test_learning_rate_schedule(char_lm):
    factors = [char_lm.learning_rate(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0.05 <= factors[-1] < 0.06
    assert math.isfinite(char_lm.learning_rate(0, 1, 5))


@pytest.mark.parametrize("impl", ["nn", "fused"])
def test_bfloat16(run, impl):
    if impl == "nn" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch.nn's LSTM has no backward in bfloat16 on this processor")
    losses = run(f"--impl={impl}", "--steps=10", "--dtype=bfloat16")["train"]
    close(losses, run("--impl=nn", "--steps=10")["train"], 0.05)


@pytest.mark.parametrize("impl", ["nn", "fused"])
def test_two_processes(run, text, tmp_path, impl):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT),
    ]
    options = [
        f"--impl={impl}",
        "--steps=6",
        "--sample=5",
        f"--out={tmp_path}",
        f"--save={tmp_path / 'm.pt'}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(
            [*command, *TINY, f"--text={text}", *options],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        # A thread of torch's that ends as late as the process, seen on an overloaded machine.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final validation") == 1  # rank 0 alone speaks
    assert "Traceback" not in done.stderr
    assert "destroy_process_group" not in done.stderr  # torch warns so after an unclean end
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["world"] == 2
    # the rows are dealt out, so two processes compute what one does
    close(log["train"], run(f"--impl={impl}", "--steps=6")["train"])
    assert run("--impl=nn", "--steps=0", f"--load={tmp_path / 'm.pt'}")["valid"][0][
        1
    ] == pytest.approx(log["valid"][-1][1], abs=1e-4)


@pytest.mark.parametrize(
    "option, message",
    [
        ("--steps=-1", "at least 0"),
        ("--batch=0", "at least 1"),
        ("--lr=0", "above 0"),
        ("--lr=nan", "above 0"),
        ("--dropout=1", "[0, 1)"),
        ("--cell=tree", "invalid choice"),
        ("--prompt=", "--prompt"),
        ("--text=/no/such/file", "cannot read --text"),
        ("--load=/no/such/file", "cannot read --load"),
        ("--save=/no/such/folder/m.pt", "the folder does not exist"),
        ("--batch=4000", "too few"),
    ],
)
def test_refuses(run, capsys, option, message):
    assert message in refused(run, capsys, option)


def test_refuses_a_contradiction_or_a_stranger(run, tmp_path, capsys):
    path = tmp_path / "model.pt"
    run("--impl=nn", "--steps=0", f"--save={path}")
    assert "contradicts" in refused(run, capsys, f"--load={path}", "--cell=gru")
    path.write_bytes(b"no checkpoint")
    assert "not a checkpoint" in refused(run, capsys, f"--load={path}")
    torch.save({"weight": torch.zeros(2)}, path)
    assert "not a checkpoint" in refused(run, capsys, f"--load={path}")


def test_refuses_an_occupied_out(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "--out" in refused(run, capsys, f"--out={tmp_path / 'file'}")


def test_refuses_uneven_shares(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "divide evenly" in refused(run, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_refuses_cuda_without_a_gpu(run, capsys):
    assert "--device cuda" in refused(run, capsys, "--device=cuda")


def test_says_what_is_missing(char_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_rnn", None)
    with pytest.raises(char_lm.UsageError, match="pip install"):
        char_lm.recurrent_layer("fused", "lstm")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(char_lm.UsageError, match="--text"):
        char_lm.read_text(None)

"""Choosing a backend, saying why, and the command line."""

import pytest
import torch

import fused_rnn
from fused_rnn import __main__ as command
from fused_rnn import backends


def test_use_backend_sets_and_restores():
    assert fused_rnn.current_backend() == "auto"
    with fused_rnn.use_backend("reference"):
        assert fused_rnn.current_backend() == "reference"
        with fused_rnn.use_backend("auto"):
            assert fused_rnn.current_backend() == "auto"
        assert fused_rnn.current_backend() == "reference"
    assert fused_rnn.current_backend() == "auto"
    setter = fused_rnn.use_backend("torch")
    assert fused_rnn.current_backend() == "torch"
    setter.__exit__()
    with pytest.raises(ValueError, match="name must be one of .* got 'cudnn'"):
        fused_rnn.use_backend("cudnn")
    assert fused_rnn.current_backend() == "auto"


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_every_backend_runs_a_module(name):
    torch.manual_seed(0)
    module = fused_rnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    x = torch.randn(4, 2, 3)
    wanted = module(x)
    with fused_rnn.use_backend(name):
        torch.testing.assert_close(module(x), wanted)


def test_packages_are_looked_for_once(monkeypatch):
    """A call asks which backends there are; torch.compile cannot trace a look for a package (it
    refuses importlib's functions of Python 3.12)."""

    def look(name):
        raise AssertionError(f"{name} is looked for again")

    monkeypatch.setattr(backends.importlib.util, "find_spec", look)
    fused_rnn.available_backends()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"lengths": torch.tensor([1, 2])}, "no lengths or reset"),
        ({"return_cells": True}, "does not return all cell states"),
    ],
    ids=["lengths", "cells"],
)
def test_an_explicit_backend_never_falls_back(given, reason):
    module = fused_rnn.LSTM(3, 5)
    with (
        fused_rnn.use_backend("torch"),
        pytest.raises(RuntimeError, match=f"'torch' cannot run this lstm: .*{reason}.*What would"),
    ):
        module(torch.randn(4, 2, 3), **given)


def test_a_wrong_device_is_refused_by_name():
    module = fused_rnn.GRU(3, 5, device="meta")
    with (
        fused_rnn.use_backend("cpu"),
        pytest.raises(RuntimeError, match="it runs on CPU tensors, the input is on meta"),
    ):
        module(torch.randn(4, 2, 3, device="meta"))


def test_a_wrong_dtype_is_refused():
    weight = torch.zeros(4, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="torch.complex64"):
        fused_rnn.lstm(torch.zeros(1, 1, 1), None, weight, weight)


def test_explain():
    module = fused_rnn.LSTM(3, 5, bidirectional=True)
    assert fused_rnn.explain(module).startswith("lstm on cpu, float32: cpu (chosen by itself)")
    text = fused_rnn.explain(torch.nn.GRUCell(2, 3), lengths=True, dtype=torch.bfloat16)
    assert text.startswith("gru on cpu, bfloat16: cpu")
    assert "torch: torch.nn's path has no lengths or reset" in text
    assert "cpu: it runs on CPU tensors, the input is on cuda" in fused_rnn.explain(
        "lstm", device="cuda"
    )
    with pytest.raises(ValueError, match="got 'transformer'"):
        fused_rnn.explain("transformer")
    with pytest.raises(TypeError, match="got Linear"):
        fused_rnn.explain(torch.nn.Linear(1, 1))


def test_info(capsys):
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("fused_rnn", "torch", "cpu runs", *backends.BACKENDS):
        assert word in text


def test_verify(capsys, monkeypatch):
    monkeypatch.setattr(command, "grid", lambda dtypes: full(dtypes)[:6])
    assert command.main(["verify", "--backend", "cpu", "--dtype", "float32"]) == 0
    assert "all results hold" in capsys.readouterr().out
    assert command.main(["verify", "--backend", "cudnn"]) == 2
    assert "no such backend" in capsys.readouterr().err


def test_verify_on_a_device(capsys, monkeypatch):
    """--device decides where backends run; one that cannot run there is not counted as holding."""
    monkeypatch.setattr(command, "grid", lambda dtypes: full(dtypes)[:4])
    ran = []

    def recording(case, name, **options):
        ran.append(options["device"])
        return []

    monkeypatch.setattr(command, "check", recording)
    arguments = ["verify", "--backend", "reference", "--dtype", "float32"]
    command.main([*arguments, "--device", "cpu", "--every", "2"])
    assert ran == ["cpu"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*arguments, "--device", "cuda"]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.main([*arguments, "--device", "cuda"])
    assert ran[2:] == ["cuda"] * 4
    assert command.main(["verify", "--backend", "cpu", "--device", "cuda"]) == 2
    said = capsys.readouterr().out
    assert "cpu: 4 of 4 cases are not for it on cuda" in said and "nothing was checked" in said


@pytest.mark.parametrize("interpreting", [False, True])
def test_where_verify_runs_a_backend_by_itself(interpreting, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreting)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.device_for("triton") == ("cpu" if interpreting else "cuda")
    assert command.device_for("cpu") == command.device_for("reference") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.device_for("triton") == "cpu"


full = command.grid


def test_verify_sees_a_wrong_backend(capsys, monkeypatch):
    monkeypatch.setattr(command, "grid", lambda dtypes: full(dtypes)[:3])
    true = command.check

    def wrong(case, name, **options):
        from fused_rnn import autograd

        forward = autograd.forward
        monkeypatch.setattr(
            autograd, "forward", lambda *a, **k: tuple(t * (1 + 1e-4) for t in forward(*a, **k))
        )
        try:
            return true(case, name, **options)
        finally:
            monkeypatch.setattr(autograd, "forward", forward)

    monkeypatch.setattr(command, "check", wrong)
    assert command.main(["verify", "--backend", "cpu", "--dtype", "float64"]) == 1
    assert "FAULT cpu: " in capsys.readouterr().out

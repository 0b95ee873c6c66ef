"""Fresh interpreters: the package imports without the extension, Triton, or anything but torch."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run_python(code, **environment):
    """(exit status, stdout, stderr) of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=900,
    )
    return done.returncode, done.stdout, done.stderr


BLOCK = """
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED or name in BLOCKED:
                raise ImportError(f"{name} is blocked")
    BLOCKED = %r
    sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    "blocked",
    [
        ["triton", "onnx", "onnxruntime", "keras", "matplotlib", "pytest"],
        ["fused_rnn._C"],
        ["fused_rnn._C", "triton"],
    ],
    ids=" ".join,
)
def test_imports_and_runs_with_these_blocked(blocked):
    status, out, err = run_python(
        BLOCK % blocked
        + """
    import warnings
    import torch, fused_rnn
    lstm, twin = fused_rnn.LSTM(3, 4), torch.nn.LSTM(3, 4)
    twin.load_state_dict(lstm.state_dict())
    x = torch.randn(5, 2, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = lstm(x)[0]
        lstm(x, lengths=torch.tensor([2, 5]))
    assert torch.allclose(ours, twin(x)[0], atol=1e-6)
    print(len([w for w in caught if "fused_rnn" in str(w.message)]))
    print(fused_rnn.available_backends()["cpu"])
    """
    )
    assert status == 0, err
    warnings, reason = out.splitlines()
    if "fused_rnn._C" in blocked:
        assert warnings == "1", "the missing extension is reported once, at the call"
        assert "could not be loaded" in reason and "pip install --no-build-isolation" in reason
    else:
        assert (warnings, reason) == ("0", "None")


def test_an_explicit_backend_that_is_missing_raises_with_the_remedy():
    status, out, err = run_python(
        BLOCK % ["fused_rnn._C"]
        + """
    import torch, fused_rnn
    try:
        fused_rnn.use_backend("cpu")
    except RuntimeError as error:
        print(error)
    try:
        x, w_ih, w_hh = torch.randn(2, 1, 3), torch.randn(8, 3), torch.randn(8, 2)
        fused_rnn.lstm(x, None, w_ih, w_hh, backend="cpu")
    except RuntimeError as error:
        print(error)
    """,
        TRITON_INTERPRET="0",
        FUSED_RNN_CUDA_LIBRARY="",
    )
    assert status == 0, err
    assert out.count("pip install --no-build-isolation") == 2
    assert "What would: torch, reference" in out


def test_nothing_optional_is_imported():
    status, out, err = run_python(
        "import sys, fused_rnn;"
        "print([m for m in ('triton', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    assert (status, out.strip()) == (0, "[]"), err


def test_environment_chooses_the_backend():
    code = "import fused_rnn; print(fused_rnn.current_backend())"
    assert run_python(code, FUSED_RNN_BACKEND="reference")[1].strip() == "reference"
    assert run_python(code, FUSED_RNN_BACKEND="")[1].strip() == "auto"
    status, _, err = run_python(code, FUSED_RNN_BACKEND="cuddn")
    assert status != 0 and "FUSED_RNN_BACKEND must be one of" in err and "'cuddn'" in err


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_holds(isa):
    """`verify` in an interpreter that computes with another instruction set."""
    status, out, err = run_python(
        "import sys; from fused_rnn.__main__ import main;"
        "dtypes = ['--dtype', 'float32', '--dtype', 'float16'];"
        "sys.exit(main(['verify', '--backend', 'cpu', *dtypes]))",
        FUSED_RNN_CPU_ISA=isa,
    )
    if "which this processor does not have" in err:
        pytest.skip(f"this processor has no {isa}")
    assert status == 0, out + err
    assert "all results hold" in out


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_reads_bfloat16(isa):
    """Which each does with code of its own, in pairs of columns."""
    status, out, err = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from test_infer import test_16_bits_are_float32_of_the_same_numbers as check
        for cell in ("LSTM", "GRU", "RNN"):
            for size, hidden in ((1, 57), (37, 150), (530, 24)):
                check(cell, size, hidden, torch.bfloat16)
        """,
        FUSED_RNN_CPU_ISA=isa,
    )
    if "which this processor does not have" in err:
        pytest.skip(f"this processor has no {isa}")
    assert status == 0, out + err


def test_an_unknown_instruction_set_is_refused():
    status, _, err = run_python(
        "import torch, fused_rnn; torch.ops.fused_rnn.cpu_isa()", FUSED_RNN_CPU_ISA="avx3"
    )
    assert status != 0 and "it can be amx, avx512, avx2 or portable" in err

"""The sdist and the wheel: what they hold, that one builds the other, and that the wheel works."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "*.so", "__pycache__", "build", "dist"
)


def run(*command, cwd, **env):
    """Output of a command, which has to succeed."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}"
    return process.stdout


def version():
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def git_files():
    """What git holds or would take in; None where this is no checkout that git will read."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        return None
    return [name for name in listing.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project, without what was built in it."""
    copy = tmp_path_factory.mktemp("source tree") / "fused_rnn"  # a path with a space in it
    names = git_files()
    if names is None:
        return shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def archives(source, tmp_path_factory):
    """The sdist, and the wheel built from the unpacked sdist. The only compilation in this file."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    run(*build, cwd=source, FUSED_RNN_SKIP_EXTENSION="0")
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_sdist_holds_the_whole_project(archives, source):
    sdist, _ = archives
    assert sdist.name == f"fused_rnn-{version()}.tar.gz"
    with tarfile.open(sdist) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    held = {name.partition("/")[2] for name in files}
    here = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    made = {name for name in here | held if name.startswith(("build/", "fused_rnn.egg-info/"))}
    assert here - made - held == set()
    assert held - made - here == {"PKG-INFO", "setup.cfg"}
    for name in ("LICENSE", "CHANGELOG.md", "README.md", "Makefile", "setup.py", "pyproject.toml"):
        assert name in held
    for folder in ("benchmarks", "csrc", "docs", "examples", "fused_rnn", "tests"):
        assert any(name.startswith(f"{folder}/") for name in held), folder


def test_wheel_holds_the_package_and_one_binary_for_all_pythons(archives):
    _, wheel = archives
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"fused_rnn-{version()}-cp310-abi3-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        metadata = Parser().parsestr(
            archive.read(f"fused_rnn-{version()}.dist-info/METADATA").decode()
        )
        binary = archive.read("fused_rnn/_C.abi3.so")

    info = f"fused_rnn-{version()}.dist-info/"
    package = {name for name in names if not name.startswith(info)}
    assert all(name.startswith("fused_rnn/") for name in package), package
    kinds = {name for name in package if not name.endswith((".py", "/py.typed"))}
    assert kinds == {"fused_rnn/_C.abi3.so"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_rnn").rglob("*.py")}
    assert package - kinds >= modules
    assert f"{info}licenses/LICENSE" in names

    assert metadata["Version"] == version()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.10"]

    # It finds torch because torch was imported before it, not by where either was installed.
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("include"), str(ROOT)):
        assert folder.encode() not in binary, folder


def test_a_wheel_without_the_extension_is_pure(source, tmp_path):
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--wheel-dir", tmp_path, source),
        cwd=tmp_path,
        FUSED_RNN_SKIP_EXTENSION="1",
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fused_rnn-{version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The Python of an environment that sees this one's packages, with the wheel installed."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Plain path entries: .pth files in those folders, such as an editable install's, are not read.
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "outer.pth").write_text("\n".join(seen) + "\n")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", archives[1], cwd=folder)
    return python


TRAIN = """
import copy, importlib.metadata, pathlib, sys
import torch
import fused_rnn

folder = pathlib.Path(fused_rnn.__file__).resolve().parent
assert folder.is_relative_to(pathlib.Path(sys.prefix).resolve()), folder
assert (folder / "_C.abi3.so").is_file()
assert fused_rnn.__version__ == importlib.metadata.version("fused_rnn") == sys.argv[1]

torch.manual_seed(0)
theirs = torch.nn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours = fused_rnn.LSTM(5, 7, num_layers=2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(11, 3, 5)

def run(module):
    inputs = x.clone().requires_grad_()
    y, (h_n, c_n) = module(inputs)
    (y.sin().sum() + h_n.sum() + c_n.cos().sum()).backward()
    return [y, h_n, c_n, inputs.grad, *(p.grad for p in module.parameters())]

for got, want in zip(run(ours), run(theirs), strict=True):
    torch.testing.assert_close(got, want)
with {backend}:
    ours(x)
print("trained")
"""


def test_the_installed_wheel_trains_as_torch_nn_does(installed, tmp_path):
    script = TRAIN.format(backend='fused_rnn.use_backend("cpu")')
    assert "trained" in run(installed, "-c", script, version(), cwd=tmp_path, PYTHONPATH="")

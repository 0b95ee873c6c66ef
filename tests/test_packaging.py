"""The sdist and the wheel: what they hold, that one builds the other, and that the wheel works,
without the CUDA library and with it."""

import importlib.util
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
    """The sdist, and the wheel built from the unpacked sdist, without the CUDA library."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    # What is in them and whether it works is the question here, not how fast it is.
    environ = {"FUSED_RNN_SKIP_EXTENSION": "0", "FUSED_RNN_CUDA": "0", "CXXFLAGS": "-O1"}
    run(*build, cwd=source, **environ)
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


def install(wheel, folder):
    """The Python of an environment that sees this one's packages, with the wheel installed."""
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Plain path entries: .pth files in those folders, such as an editable install's, are not read.
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "outer.pth").write_text("\n".join(seen) + "\n")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
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


def test_the_installed_wheel_trains_as_torch_nn_does(archives, tmp_path):
    installed = install(archives[1], tmp_path)
    script = TRAIN.format(backend='fused_rnn.use_backend("cpu")')
    assert "trained" in run(installed, "-c", script, version(), cwd=tmp_path, PYTHONPATH="")


# --- the CUDA library: whether it is built

spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "tools" / "build_cuda.py")
build_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_cuda)

# Says what nvcc says, and compiles by the C++ compiler.
NVCC = """#!/bin/sh
toolkit=$(dirname "$0")/..
case "$1" in
--version) echo "Cuda compilation tools, release VERSION, V VERSION.1" ;;
--list-gpu-code) printf "sm_%s\\n" KNOWN ;;
--dryrun)
    echo "#$ TOP=$toolkit" >&2
    echo "#$ INCLUDES=\\"-I$toolkit/include\\"  " >&2
    echo "#$ LIBRARIES=  \\"-L$toolkit/lib64/stubs\\" \\"-L$toolkit/lib64\\"" >&2
    ;;
*)
    for word; do
        shift
        if [ -n "$skip" ]; then
            skip=
            continue
        fi
        case "$word" in
        -Xptxas | -ccbin | -Xcompiler) skip=1 ;;
        -gencode=* | -fmad=*) ;;
        *) set -- "$@" "$word" ;;
        esac
    done
    exec c++ -x c++ -fPIC -fvisibility=hidden "$@"
    ;;
esac
"""


def make_toolkit(folder, version="13.0", known="75 80 86 90 100 120"):
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    (folder / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("VERSION", version).replace("KNOWN", known))
    nvcc.chmod(0o755)
    return nvcc


def make_torch(folder, cuda):
    folder.mkdir()
    (folder / "version.py").write_text(
        "from typing import Optional\n\n"
        "__all__ = ['__version__', 'debug', 'cuda', 'hip']\n__version__ = '2.11.0'\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    )
    return folder


@pytest.fixture
def decide(tmp_path, monkeypatch):
    """decide(environ, cuda=of torch, **make_toolkit's): (the toolkit to build with, why)."""
    monkeypatch.setattr(build_cuda, "DEFAULT_TOOLKIT", str(tmp_path / "none"))

    def decide(environ, cuda=None, toolkit=True, **about):
        path = "/nowhere"
        if toolkit:
            path = f"{make_toolkit(tmp_path / 'cuda', **about).parent}:/usr/bin:/bin"
        torch = make_torch(tmp_path / "torch", cuda)
        return build_cuda.decide(torch, "2.11.0", {"PATH": path, **environ})

    return decide


ALL = ("sm_80", "compute_80", "sm_90a", "sm_100", "sm_120")


@pytest.mark.parametrize("wanted", [{}, {"FUSED_RNN_CUDA": ""}, {"FUSED_RNN_CUDA": "auto"}])
def test_auto_builds_for_a_torch_with_cuda_where_nvcc_is(decide, tmp_path, wanted):
    toolkit, why = decide(wanted, cuda="13.2")
    assert toolkit.nvcc == str(tmp_path / "cuda/bin/nvcc")
    assert (toolkit.version, toolkit.codes) == ((13, 0), ALL)
    assert os.path.samefile(toolkit.include, tmp_path / "cuda/include")
    assert os.path.samefile(toolkit.cudart, tmp_path / "cuda/lib64/libcudart_static.a")
    assert why == (
        f"built with {toolkit.nvcc} 13.0 for sm_80 compute_80 sm_90a sm_100 sm_120"
        " (torch 2.11.0 has CUDA 13.2)"
    )


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({}, r"torch 2.11.0 is not a CUDA build; FUSED_RNN_CUDA=1 builds it all the same"),
        ({"cuda": "13.0", "toolkit": False}, r"nvcc is not found; .*CUDA_HOME"),
        (
            {"cuda": "12.8"},
            r".*nvcc 13.0 may need a newer driver than torch with CUDA 12.8; FUSED_RNN_CUDA=1",
        ),
        ({"cuda": "12.8", "version": "11.8"}, r".*nvcc 11.8 is too old; .*CUDA toolkit >= 12.0"),
    ],
    ids=["torch without CUDA", "no nvcc", "nvcc newer than torch's CUDA", "old nvcc"],
)
def test_auto_says_why_it_does_not_build(decide, case, says):
    toolkit, why = decide({}, **case)
    assert toolkit is None
    assert re.fullmatch(rf"not built \({says}.*\)", why), why


def test_an_older_toolkit_will_do(decide):
    toolkit, why = decide({}, cuda="13.0", version="12.4", known="80 90")
    assert toolkit.codes == ("sm_80", "compute_80", "sm_90a")
    assert "sm_100 left out, which this nvcc does not know" in why
    assert "sm_120 left out" in why


def test_0_never_builds(decide):
    assert decide({"FUSED_RNN_CUDA": "0"}, cuda="13.0") == (None, "not built (FUSED_RNN_CUDA=0)")


@pytest.mark.parametrize("cuda", [None, "12.8", "13.0"])
def test_1_builds_whatever_torch_is(decide, cuda):
    toolkit, why = decide({"FUSED_RNN_CUDA": "1"}, cuda=cuda)
    assert toolkit.codes == ALL
    assert why.endswith("(FUSED_RNN_CUDA=1)")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({"toolkit": False}, "nvcc is not found install the CUDA toolkit, or set CUDA_HOME"),
        ({"version": "11.8"}, r"nvcc 11.8 is too old install a CUDA toolkit >= 12.0"),
    ],
    ids=["no nvcc", "old nvcc"],
)
def test_1_without_a_toolkit_fails_and_says_what_to_do(decide, case, says):
    with pytest.raises(build_cuda.CannotBuild) as error:
        decide({"FUSED_RNN_CUDA": "1"}, **case)
    assert re.search(f"{says}.* or set FUSED_RNN_CUDA=0", " ".join(error.value.args))


@pytest.mark.parametrize("file", ["include/cuda_runtime_api.h", "lib64/libcudart_static.a"])
def test_1_with_half_a_toolkit_names_what_it_lacks(tmp_path, file):
    nvcc = make_toolkit(tmp_path / "cuda")
    (tmp_path / "cuda" / file).unlink()
    with pytest.raises(build_cuda.CannotBuild, match=Path(file).name):
        build_cuda.find_toolkit({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": os.defpath})
    assert nvcc.is_file()


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    names = ("home", "path", "on_path", "default")
    nvcc = {name: make_toolkit(tmp_path / name) for name in names}
    monkeypatch.setattr(build_cuda, "DEFAULT_TOOLKIT", str(tmp_path / "default"))
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": f"/nowhere:{tmp_path / 'on_path' / 'bin'}",
    }
    for name in names:
        assert build_cuda.find_nvcc(environ) == str(nvcc[name])
        nvcc[name].unlink()
    assert build_cuda.find_nvcc(environ) is None


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = '12.8'\n", "12.8"),
        ("cuda = '13.0'\nhip = None\n", "13.0"),
        ('cuda: str | None = "13.0"\n', "13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.1'\n", None),
        ("cuda_version = '13.0'\n", None),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path, text, cuda):
    (tmp_path / "version.py").write_text(f"from typing import Optional\n{text}")
    assert build_cuda.torch_cuda(tmp_path) == cuda


def test_the_cuda_of_this_torch():
    import torch

    assert build_cuda.torch_cuda(Path(torch.__file__).parent) == torch.version.cuda


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        ("8.0", "sm_80"),
        ("8.0;9.0a;10.0+PTX", "sm_80 sm_90a sm_100 compute_100"),
        ("8.0 9.0a 10.0a+PTX", "sm_80 sm_90a sm_100a compute_100a"),
        ("9.0; 8.6 ;9.0+PTX", "sm_90 sm_86 compute_90"),
        ("10.0f", "sm_100f"),
        ("12.0+PTX", "sm_120 compute_120"),
    ],
)
def test_torch_cuda_arch_list(decide, wanted, codes):
    toolkit, _ = decide({"FUSED_RNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted})
    assert toolkit.codes == tuple(codes.split())
    ((_, _, command),) = toolkit.compilations("csrc/cuda/pointwise.cu", ["c++"])
    numbers = [(code.partition("_")[2], code) for code in codes.split()]
    assert [word for word in command if "gencode" in word] == [
        f"-gencode=arch=compute_{number},code={code}" for number, code in numbers
    ]


def test_gpus_older_than_the_kernels_are_left_out(decide):
    toolkit, why = decide({"FUSED_RNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0"})
    assert toolkit.codes == ("sm_80", "sm_90")
    assert "no kernels for sm_75" in why


@pytest.mark.parametrize("wanted", ["7.5", "Ampere", "8.0,9.0", "80", "8.0+ptx", "13.7"])
def test_an_arch_list_that_cannot_be_built(decide, wanted):
    environ = {"FUSED_RNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}
    with pytest.raises(build_cuda.CannotBuild) as error:
        decide(environ)
    assert wanted in error.value.args[0]
    assert "TORCH_CUDA_ARCH_LIST" in " ".join(error.value.args)


@pytest.mark.parametrize("source", build_cuda.SCANS)
def test_scans_are_compiled_for_every_cell_and_product(decide, source):
    toolkit, _ = decide({"FUSED_RNN_CUDA": "1"})
    objects = toolkit.compilations(f"csrc/cuda/{source}", ["ccache", "g++", "-pthread"])
    params = (ROOT / "csrc" / "cuda" / "params.h").read_text()
    cells, products = (
        [
            word.strip()
            for word in re.search(rf"enum class {name}\b.*?{{(.*?)}}", params)[1].split(",")
        ]
        for name in ("Cell", "Product")
    )
    assert [name for _, name, _ in objects] == [f"_{c}_{p}" for c in cells for p in products]
    for _, name, command in objects:
        _, cell, kind = name.split("_")
        assert command[-2:] == [f"-DFUSED_RNN_CELL={cell}", f"-DFUSED_RNN_PRODUCT={kind}"]
        line = " ".join(command)
        assert "-ccbin g++ -Xcompiler -pthread" in line
        assert "-Xptxas -v" not in line


# --- the CUDA library: what becomes of it, with stand-ins for its sources and nvcc

SCAN_STAND_IN = """\
#include "cuda/params.h"
#define JOIN(a, b, c) a##_##b##_##c
#define NAME(a, b, c) JOIN(a, b, c)
int NAME({}, FUSED_RNN_CELL, FUSED_RNN_PRODUCT)() {{ return 0; }}
"""
STAND_INS = {
    "csrc/cpu/module.cpp": "int cpu() { return 0; }\n",
    "csrc/cuda/params.h": "#pragma once\n",
    "csrc/cuda/operators.cpp": '#include "cuda/params.h"\nint operators() { return 0; }\n',
    "csrc/cuda/pointwise.cu": "int pointwise() { return 0; }\n",
    **{f"csrc/cuda/{name}": SCAN_STAND_IN.format(Path(name).stem) for name in build_cuda.SCANS},
    "fused_rnn/__init__.py": "",
}
ALL_FILES = 2 + len(build_cuda.SCANS) * 15  # of the CUDA library, compiled


@pytest.fixture
def small(tmp_path):
    """build(FUSED_RNN_CUDA, command...): a build of a project small enough to build many times."""
    if sys.platform != "linux":
        pytest.skip("there is no CUDA here")
    project = tmp_path / "small project"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tools/build_cuda.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, project / name)
    for name, text in STAND_INS.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    make_toolkit(tmp_path / "a toolkit")

    def build(cuda, *command):
        home = str(tmp_path / "a toolkit")
        environ = {"FUSED_RNN_SKIP_EXTENSION": "0", "FUSED_RNN_CUDA": cuda, "CUDA_HOME": home}
        setup = (sys.executable, "setup.py", "-q", *command)
        output = run(*setup, cwd=project, TORCH_CUDA_ARCH_LIST="", **environ)
        assert output.count("CUDA library:") == 1, output
        return output

    build.project = project
    return build


LIBRARY = "fused_rnn/libfused_rnn_cuda.so"


def wheel_of(project):
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wheel.unlink()
    assert "-cp310-abi3-" in wheel.name
    assert "fused_rnn/_C.abi3.so" in names
    return names


def compiled(output):
    """How many files were compiled for the CUDA library, of how many."""
    found = re.search(r"libfused_rnn_cuda with .*: (\d+) of (\d+) files", output)
    return tuple(map(int, found.groups()))


def test_a_wheel_has_the_cuda_library_only_if_it_was_built_for_it(small):
    built_before = small.project / LIBRARY
    built_before.write_text("the user's own")
    assert compiled(small("1", "bdist_wheel")) == (ALL_FILES, ALL_FILES)
    assert LIBRARY in wheel_of(small.project)
    (in_build,) = small.project.glob(f"build/lib*/{LIBRARY}")
    assert in_build.stat().st_size > 1000

    output = small("0", "bdist_wheel")
    assert "CUDA library: not built (FUSED_RNN_CUDA=0)" in output
    assert LIBRARY not in wheel_of(small.project)
    assert built_before.read_text() == "the user's own"


def test_only_what_changed_is_compiled_for_the_cuda_library(small):
    inplace = ("build_ext", "--inplace")
    assert compiled(small("1", *inplace)) == (ALL_FILES, ALL_FILES)
    library = small.project / LIBRARY
    first = library.stat().st_mtime_ns
    assert compiled(small("1", *inplace)) == (0, ALL_FILES)
    os.utime(small.project / "csrc/cuda/params.h")
    assert compiled(small("1", *inplace)) == (ALL_FILES - 1, ALL_FILES)  # all but pointwise.cu
    assert library.stat().st_mtime_ns > first
    os.utime(small.project / "csrc/cuda/pointwise.cu")
    assert compiled(small("1", *inplace)) == (1, ALL_FILES)
    last = library.stat().st_mtime_ns
    small("0", *inplace)
    assert library.stat().st_mtime_ns == last


def test_a_wrong_choice_fails_before_anything_is_compiled(small):
    with pytest.raises(AssertionError, match="FUSED_RNN_CUDA=yes is no choice"):
        small("yes", "build_ext")
    assert not list(small.project.rglob("*.o"))


# --- the CUDA library itself


def dynamic(library, *options):
    if not shutil.which("readelf"):
        pytest.skip("readelf is not found")
    return run("readelf", "--wide", *options, library, cwd=library.parent)


LOAD = """
import pathlib, sys
import torch
import fused_rnn

def operators():
    names = torch._C._dispatch_get_all_op_names()
    return {name for name in names if name.startswith("fused_rnn::")}

library = pathlib.Path(fused_rnn.__file__).resolve().parent / "libfused_rnn_cuda.so"
assert library.is_relative_to(pathlib.Path(sys.prefix).resolve()), library
torch.ops.load_library(str(library))
assert [n for n in operators() if n.startswith("fused_rnn::cuda_")], operators()
assert not torch.cuda.is_initialized()
print(library)
"""


@pytest.mark.slow
@pytest.mark.skipif(not build_cuda.find_nvcc(os.environ), reason="nvcc is not found")
def test_the_cuda_library_needs_only_libtorch_cpu_and_loads_without_a_gpu(source, tmp_path):
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    environ = {
        "FUSED_RNN_SKIP_EXTENSION": "0",
        "FUSED_RNN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0",
        # Nothing here runs a kernel (tests/test_cuda_compile.py compiles them as they are meant).
        "NVCC_APPEND_FLAGS": "-Xcicc -O1 -Xptxas -O0",
        "CXXFLAGS": "-O1",
    }
    output = run(*build, "--outdir", tmp_path, source, cwd=source, **environ)
    assert len(re.findall(r"CUDA library: built with .* for sm_80 \(", output)) == 1
    (wheel,) = tmp_path.glob("*.whl")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"fused_rnn-{version()}-cp310-abi3-{platform}.whl"

    python = install(wheel, tmp_path / "environment")
    environ = {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    library = Path(run(python, "-c", LOAD, cwd=tmp_path, **environ).splitlines()[-1])

    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic(library, "--dynamic")))
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
    assert "libtorch_cpu" in needed
    assert {name for name in needed - system if not name.startswith("ld-linux")} == {"libtorch_cpu"}
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic(library, "--dynamic"))

    # Templates of the standard library are weak in whatever uses them. CUDA's runtime stays inside.
    symbols = [line.split() for line in dynamic(library, "--dyn-syms").splitlines()]
    exported = {
        words[7]
        for words in symbols
        if len(words) == 8 and words[6].isdigit() and words[4] in ("GLOBAL", "WEAK", "UNIQUE")
    }
    edges = {"__bss_start", "_edata", "_end"}
    of_std = re.compile(r"_Z(T[ISV]|Z?NK?)?(S[tabsiod]|9__gnu_cxx)")
    ours = {name for name in exported - edges if not of_std.match(name)}
    assert ours == set()

    binary = library.read_bytes()
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("include"), str(ROOT)):
        assert folder.encode() not in binary, folder

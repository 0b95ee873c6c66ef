"""Compiles fused_rnn._C and libfused_rnn_cuda.so: which sources, which flags. The metadata is in
pyproject.toml, whether and how there is a CUDA library in tools/build_cuda.py.

The environment has a say:
    FUSED_RNN_SKIP_EXTENSION=1   a pure Python package; needs no compiler and no torch
    MAX_JOBS=n                   compile n files at a time (default: one per core)
    CXX, CXXFLAGS, LDFLAGS       the compiler, and flags put after ours
    FUSED_RNN_CUDA=auto|0|1      the CUDA library, and more for it: tools/build_cuda.py
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_cuda

# The oldest versions the one binary serves; pyproject.toml asks for the same.
TORCH, PYTHON = (2, 10), (3, 10)
MAC = sys.platform == "darwin"
CUDA_LIBRARY = "fused_rnn.libfused_rnn_cuda"  # no Python module; torch.ops.load_library loads it

COMPILE_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"),
    "-ffp-contract=off",  # which products are fused with a sum is ours to say, not the compiler's
    "-fno-tree-slp-vectorize",  # GCC packs addresses into vectors to add them, and out again
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH),
    "-DPy_LIMITED_API=0x{:02x}{:02x}0000".format(*PYTHON),
]
# No rpath: `import torch` comes first, and the loader then knows libtorch_cpu by its name.
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if MAC else ["-shared", "-Wl,--as-needed"]

WITHOUT = "or set FUSED_RNN_SKIP_EXTENSION=1 to install without the compiled kernels"


def refuse(missing, remedy, without=WITHOUT):
    raise SystemExit(f"\nfused_rnn: {missing}\n    {remedy}\n    {without}\n")


def find_torch():
    """The folder of the installed torch, and its version."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        first = "pip install torch    first, and give    --no-build-isolation    to pip when it"
        refuse(f"torch is not installed for {sys.executable}", f"{first} installs fused_rnn")
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH:
        refuse(f"torch {version} is too old", "pip install 'torch>={}.{}'".format(*TORCH))
    return Path(spec.origin).parent, version


def find_compiler():
    """$CXX, else the compiler this Python was built with, else any that is here."""
    wanted = os.environ.get("CXX")
    builtin = sysconfig.get_config_var("CXX") or "c++"
    for command in [wanted] if wanted else [builtin, "c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    remedy = "xcode-select --install" if MAC else "apt install g++    (Fedora: dnf install gcc-c++)"
    refuse(f"no C++ compiler: CXX={wanted} is not there" if wanted else "no C++ compiler", remedy)


def find_python_headers():
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        remedy = "apt install python3-dev    (Fedora: dnf install python3-devel)"
        refuse(f"no Python.h in {include}", remedy)
    return include


def made_from(depfile):
    """The files a compiler's dependency file names; None when there is no such file."""
    if not depfile.is_file():
        return None
    names = depfile.read_text().replace("\\\n", " ").partition(": ")[2]
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", names) if name]


def is_current(target, inputs, command):
    """Whether target was made by this very command and is newer than all its inputs."""
    record = Path(f"{target}.cmd")
    if inputs is None or not all(map(os.path.isfile, [target, record, *inputs])):
        return False
    newest_input = max(os.stat(name).st_mtime_ns for name in inputs)
    return record.read_text() == shlex.join(command) and newest_input <= os.stat(target).st_mtime_ns


def run(command, target):
    """Run a compiler command that makes target, and record it beside the target."""
    record = Path(f"{target}.cmd")
    record.unlink(missing_ok=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"\nfused_rnn: this command failed:\n    {shlex.join(command)}\n")
    record.write_text(shlex.join(command))


class BuildExtension(build_ext):
    """Compiles in parallel, and only what changed; setuptools alone does neither."""

    def run(self):
        if sys.platform == "win32":
            refuse("the kernels do not build on Windows", "use WSL")
        self.torch, self.torch_version = find_torch()
        try:
            self.toolkit, decision = build_cuda.decide(self.torch, self.torch_version, os.environ)
        except build_cuda.CannotBuild as error:
            refuse(*error.args)
        print(f"fused_rnn: CUDA library: {decision}", flush=True)
        if self.toolkit is None:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_LIBRARY]
            # One that an earlier run built here would go into the wheel.
            Path(self.build_lib, self.get_ext_filename(CUDA_LIBRARY)).unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, name):
        if name in (CUDA_LIBRARY, CUDA_LIBRARY.rpartition(".")[2]):
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext):
        cxx, python_headers = find_compiler(), find_python_headers()
        # __FILE__ in torch's headers is not to name a folder of the building machine.
        flags = [*COMPILE_FLAGS, f"-ffile-prefix-map={self.torch / 'include'}{os.sep}=", "-Icsrc"]
        flags += ["-isystem", str(self.torch / "include"), "-isystem", str(python_headers)]
        libraries = [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]
        if ext.name == CUDA_LIBRARY:
            flags += ["-isystem", self.toolkit.include]
            libraries += [self.toolkit.cudart, *build_cuda.LINK_FLAGS]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))

        # (source, what its object's name ends with, command)
        compilations = []
        for source in ext.sources:
            if source.endswith(".cu"):
                compilations += self.toolkit.compilations(source, cxx)
            else:
                compilations.append((source, "", [*cxx, *flags]))
        objects, stale = [], []
        for source, ending, command in compilations:
            target = Path(self.build_temp, f"{os.path.splitext(source)[0]}{ending}.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            depfile = target.with_suffix(".d")
            command = [*command, "-MD", "-MF", str(depfile), "-c", source, "-o", str(target)]
            objects.append(str(target))
            if self.force or not is_current(target, made_from(depfile), command):
                stale.append((command, target))

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = int(os.environ.get("MAX_JOBS") or cores)
        todo = f"{len(stale)} of {len(objects)} files to compile, {jobs} at a time"
        about = f"{ext.name} with {cxx[0]} for torch {self.torch_version}"
        print(f"fused_rnn: {about}: {todo}", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: run(*job), stale))

        library = Path(self.build_temp, Path(self.get_ext_fullpath(ext.name)).name)
        command = [*cxx, *LINK_FLAGS, *objects, *libraries]
        command += [*shlex.split(os.environ.get("LDFLAGS", "")), "-o", str(library)]
        if not is_current(library, objects, command):
            run(command, library)
        self.mkpath(str(Path(self.get_ext_fullpath(ext.name)).parent))
        self.copy_file(str(library), self.get_ext_fullpath(ext.name))


if os.environ.get("FUSED_RNN_SKIP_EXTENSION", "0") not in ("", "0"):
    print("fused_rnn: FUSED_RNN_SKIP_EXTENSION is set: pure Python, no compiled kernels")
    setup()
else:
    sources, operators, kernels = (
        sorted(map(str, Path("csrc").glob(f))) for f in ("cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu")
    )
    setup(
        ext_modules=[
            Extension("fused_rnn._C", sources, py_limited_api=True),
            Extension(CUDA_LIBRARY, [*operators, *kernels]),
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*PYTHON)}},
    )

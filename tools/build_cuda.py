"""Whether and how fused_rnn/libfused_rnn_cuda.so is built; setup.py compiles and links it.

The environment has a say:
    FUSED_RNN_CUDA=auto          build it where nvcc and a CUDA build of torch are; the default
    FUSED_RNN_CUDA=0, =1         never; always, also for a torch without CUDA
    CUDA_HOME, CUDA_PATH         the toolkit; else that of nvcc on PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST         "8.0;9.0a;10.0+PTX", as for torch's own extensions

As a program it prints the FUSED_RNN_CUDA that builds all there can be: 1 where nvcc is, else auto.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

DEFAULT_TOOLKIT = "/usr/local/cuda"
OLDEST_NVCC = (12, 0)  # the first with C++20 and sm_90a

# Code for one GPU runs on later ones of its major version: 8.0 on 8.6 and 8.9, 10.0 on 10.3, 12.0
# on 12.1. 9.0a is Hopper, with what only Hopper has. The driver compiles the PTX of 8.0 for all the
# others, also those to come; PTX of a later version would leave out the ones between.
ARCHITECTURES = "8.0+PTX 9.0a 10.0 12.0"
OLDEST_ARCHITECTURE = 80

# The enums of csrc/cuda/params.h. Of these sources each pair is an object of its own, as it takes
# nvcc a while.
SCANS = ("block_scan.cu", "grid_scan.cu")
CELLS = ("kLstm", "kGru", "kRnn")
PRODUCTS = ("kBf16", "kF16", "kTf32", "kTf32x3", "kIeee")

NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xptxas", "--warn-on-spills"),
    "-fmad=false",  # which products are fused with a sum is ours to say, as on the CPU
]
# Of the CUDA libraries only the runtime is linked, and statically: any torch will do, with CUDA of
# another version or none. Hence nothing of libtorch_cuda may be referred to, which -z defs checks.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-Wl,-z,defs", "-ldl", "-lrt", "-lpthread"]


class CannotBuild(Exception):
    """What is missing, the remedy, and how to do without."""

    def __init__(self, missing, remedy):
        super().__init__(missing, remedy, "or set FUSED_RNN_CUDA=0 to build no CUDA library")


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: tuple[int, int]
    include: str
    cudart: str
    codes: tuple[str, ...]  # sm_80, compute_80 (PTX) ...
    remarks: tuple[str, ...] = ()

    def compilations(self, source, cxx):
        """(source, what its object's name ends with, command) of each object nvcc makes of it."""
        launchers = ("ccache", "sccache", "distcc")  # nvcc takes a compiler, not a command
        host, *host_flags = [word for word in cxx if Path(word).name not in launchers]
        command = [self.nvcc, *NVCC_FLAGS, "-ccbin", host]
        for flag in host_flags:
            command += ["-Xcompiler", flag]
        for code in self.codes:
            command.append(f"-gencode=arch=compute_{code.partition('_')[2]},code={code}")
        if Path(source).name not in SCANS:
            return [(source, "", command)]
        return [
            (
                source,
                f"_{cell}_{kind}",
                [*command, f"-DFUSED_RNN_CELL={cell}", f"-DFUSED_RNN_PRODUCT={kind}"],
            )
            for cell, kind in product(CELLS, PRODUCTS)
        ]


def torch_cuda(torch):
    """torch.version.cuda of the torch in that folder, read without importing it."""
    text = (torch / "version.py").read_text()
    found = re.search(r"^cuda\b[^=\n]*=\s*(None|'[^'\n]*'|\"[^\"\n]*\")", text, re.M)
    return ast.literal_eval(found[1]) if found else None


def find_nvcc(environ):
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [environ.get("PATH", os.defpath), os.path.join(DEFAULT_TOOLKIT, "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def gpu_codes(wanted, nvcc, known):
    """What to make code for by a TORCH_CUDA_ARCH_LIST, or by ours, and what is left out and why."""
    codes, remarks = [], []
    for entry in (wanted or ARCHITECTURES).replace(";", " ").split():
        parsed = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not parsed:
            remedy = 'name architectures by number: TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0+PTX"'
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST has {entry}, no architecture", remedy)
        major, minor, suffix, ptx = parsed.groups()
        number = major + minor
        if int(number) < OLDEST_ARCHITECTURE:
            remarks.append(f"no kernels for sm_{number}, sm_{OLDEST_ARCHITECTURE} is the oldest")
        elif number in known:
            codes += [f"sm_{number}{suffix}"] + ([f"compute_{number}{suffix}"] if ptx else [])
        elif wanted:
            remedy = "install a newer CUDA toolkit, or leave it out of TORCH_CUDA_ARCH_LIST"
            raise CannotBuild(f"{nvcc} makes no code for {entry}", remedy)
        else:
            remarks.append(f"sm_{number} left out, which this nvcc does not know")
    if not codes:
        remedy = f'TORCH_CUDA_ARCH_LIST="{ARCHITECTURES.replace(" ", ";")}" is the default'
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST={wanted} leaves nothing to build", remedy)
    return tuple(dict.fromkeys(codes)), tuple(remarks)


def find_toolkit(environ):
    nvcc = find_nvcc(environ)
    if nvcc is None:
        remedy = "install the CUDA toolkit, or set CUDA_HOME to where it is"
        raise CannotBuild("nvcc is not found", remedy)

    def ask(*arguments):
        asked = subprocess.run([nvcc, *arguments], capture_output=True, text=True, env=environ)
        return asked.stdout + asked.stderr

    newer = "install a CUDA toolkit >= {}.{}, or set CUDA_HOME to where one is".format(*OLDEST_NVCC)
    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    if not release:
        raise CannotBuild(f"{nvcc} --version does not tell its version", newer)
    version = int(release[1]), int(release[2])
    if version < OLDEST_NVCC:
        raise CannotBuild("{} {}.{} is too old".format(nvcc, *version), newer)

    # nvcc may be a script somewhere else, so it is asked for its toolkit's folders.
    settings = dict(
        re.findall(r"^#\$ (\w+)=(.*)$", ask("--dryrun", "-c", "-x", "cu", os.devnull), re.M)
    )
    include = [word[2:] for word in shlex.split(settings.get("INCLUDES", "")) if word[:2] == "-I"]
    lib = [word[2:] for word in shlex.split(settings.get("LIBRARIES", "")) if word[:2] == "-L"]
    lib += [os.path.join(settings.get("TOP", ""), name) for name in ("lib64", "lib")]
    headers = [folder for folder in include if Path(folder, "cuda_runtime_api.h").is_file()]
    cudart = [name for folder in lib if Path(name := f"{folder}/libcudart_static.a").is_file()]
    for missing, found in (("cuda_runtime_api.h", headers), ("libcudart_static.a", cudart)):
        if not found:
            remedy = "install all of the CUDA toolkit, or set CUDA_HOME to where it is"
            raise CannotBuild(f"the toolkit of {nvcc} has no {missing}", remedy)

    known = re.findall(r"\bsm_(\d+)", ask("--list-gpu-code"))
    codes = gpu_codes(environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;"), nvcc, known)
    return Toolkit(nvcc, version, headers[0], cudart[0], *codes)


def decide(torch, torch_version, environ):
    """The toolkit to build with, None if it is not to be built, and a phrase that says why."""
    wanted = environ.get("FUSED_RNN_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise CannotBuild(f"FUSED_RNN_CUDA={wanted} is no choice", "it can be auto, 0 or 1")
    if wanted == "0":
        return None, "not built (FUSED_RNN_CUDA=0)"

    theirs, all_the_same = torch_cuda(torch), "FUSED_RNN_CUDA=1 builds it all the same"
    if wanted == "auto" and theirs is None:
        return None, f"not built (torch {torch_version} is not a CUDA build; {all_the_same})"
    try:
        toolkit = find_toolkit(environ)
    except CannotBuild as error:
        if wanted == "1":
            raise
        return None, f"not built ({error.args[0]}; {error.args[1]})"
    nvcc = "{} {}.{}".format(toolkit.nvcc, *toolkit.version)
    # An older toolkit's library, or one of another minor version, runs wherever torch does.
    if wanted == "auto" and toolkit.version[0] > int(theirs.split(".")[0]):
        reason = f"{nvcc} may need a newer driver than torch with CUDA {theirs}"
        return None, f"not built ({reason}; {all_the_same})"
    reason = "FUSED_RNN_CUDA=1" if wanted == "1" else f"torch {torch_version} has CUDA {theirs}"
    reason = "; ".join([reason, *toolkit.remarks])
    return toolkit, f"built with {nvcc} for {' '.join(toolkit.codes)} ({reason})"


if __name__ == "__main__":
    print("1" if find_nvcc(os.environ) else "auto")

"""What a result was measured with: versions, processor, commit, kernels, date. No host names, no
paths."""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the kernels of a GPU are made of.
KERNELS = ("fused_rnn/triton", "fused_rnn/cuda", "csrc/cuda", "csrc/math", "csrc/waist")
SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h", ".inl"}


def version_of(package):
    """Version of an installed package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit():
    """Hash of the checked-out commit, with -dirty where files differ; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def kernel_hash(root=ROOT):
    """A hash of the GPU kernels' sources and of the plans that choose among them, under `root`.

    Results keep it, so that one sees without git whether the kernels are newer than the results.
    """
    digest = hashlib.sha256()
    sources = [root / "fused_rnn" / "plan.py"]
    for folder in KERNELS:
        found = (root / folder).iterdir() if (root / folder).is_dir() else ()
        sources += [path for path in found if path.suffix in SOURCES]
    for path in sorted(sources):
        content = path.read_bytes()
        # The length keeps the end of one file apart from the beginning of the next.
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def load():
    """Runnable tasks over the last minute, or 0 where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return 0.0


def busy(before, after=0.0):
    """A warning where other work took this machine's time during a run, else None.

    before, after: the load at the start, which is all others', and at the end, which has our own.
    """
    cores = os.cpu_count() or 1
    if before < 0.5 * cores and after < cores + 1:
        return None
    return (
        f"the machine was busy (load {before:.1f} before, {after:.1f} after, {cores} cores):"
        " these times say little; repeat on a quiet one"
    )


def describe(device):
    """Metadata of a run, in the columns every row repeats."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    versions = ("torch", "triton", "onnxruntime", "fused_rnn")
    toolkit = torch.version.hip or torch.version.cuda
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: torch.__version__ if name == "torch" else version_of(name) for name in versions},
        "gpu_toolkit": toolkit if on_gpu else "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else "",
        "commit": commit(),
        "kernel_hash": kernel_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

"""What a result was measured with: versions, processor, commit, date. No host names, no paths."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import torch


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
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: torch.__version__ if name == "torch" else version_of(name) for name in versions},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

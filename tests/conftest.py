"""Fixtures shared by the tests: the backends under test, and threads put back as they were."""

import itertools
import os
import re

import pytest
import torch

GPU = torch.cuda.is_available()
if GPU:  # the step path's products are cuBLAS's, which are deterministic by this setting
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:  # kernels then run on the CPU; this is read when they are first loaded
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "FUSED_RNN_CUDA_LIBRARY" not in os.environ:
        import emulation

        os.environ["FUSED_RNN_CUDA_LIBRARY"] = str(emulation.build_cuda_library())

from fused_rnn import backends  # noqa: E402

# A new backend joins the whole matrix by its name and the device its tensors live on.
_GPU = "cuda" if GPU else "cpu"
UNDER_TEST = {"cpu": "cpu", "reference": "cpu", "cuda": _GPU, "triton": _GPU}


def interpreted(backend: str) -> bool:
    """Whether a backend's kernels run in an interpreter, some thousand times slower."""
    return backend == "triton" and UNDER_TEST[backend] == "cpu"


def each_backend(*values):
    """Rows (backend, *values) of every combination, for parametrize with ``indirect=["backend"]``.
    Where kernels are interpreted each other combination has one of the last values, in turn."""
    rows = []
    for backend in UNDER_TEST:
        for places in itertools.product(*(range(len(each)) for each in values)):
            if not interpreted(backend) or places[-1] == sum(places[:-1]) % len(values[-1]):
                rows.append((backend, *(each[i] for each, i in zip(values, places))))
    return rows


def keeps_bits(backend: str) -> bool:
    """Whether a row's bits depend on the row alone: not where a library multiplies, torch's for the
    reference and the CUDA backend's step path, NumPy for the interpreter."""
    return backend not in ("reference", "cuda") and not interpreted(backend)


@pytest.fixture(params=list(UNDER_TEST))
def backend(request):
    """The name of each backend under test; a missing one is a failure, not a skip."""
    assert backends.available_backends()[request.param] is None
    return request.param


@pytest.fixture
def device(backend):
    return UNDER_TEST[backend]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``--dist loadgroup`` the tests that share a float64 truth, those of a cell and shape in
    tests/test_gpu.py, run in one process. (xdist 3.8's own groups are lost with pytest 9.2.)"""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByCase(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return ByCase(config, log)


def group_of(nodeid: str) -> str:
    """What a test shares with others: its id without backend and number; elsewhere all of it."""
    names = "test_numerics|test_every_kind_of_plan"
    found = re.search(rf"::({names})\[(?:triton|cuda)-(.+?)-b?float[\w-]+\]$", nodeid)
    if found is None:
        return nodeid
    kinds = r"^(block|grid|streamed|step)-"
    return f"{found[1]} {re.sub(kinds, '', found[2])}"

"""Providers: who computes a problem. A backend of fused_rnn joins by its name only.

- torch: torch.nn, eager (on a GPU: cuDNN)
- ours: fused_rnn, its own choice of backend
- ours:NAME: fused_rnn on that backend and no other; ours:all is every available one
- ours+compile: fused_rnn under torch.compile(fullgraph=True)
- onnxruntime: ONNX Runtime on the CPU, inference only
"""

import contextlib
import functools
import importlib
import importlib.util

import torch

from benchmarks import onnx_model
from benchmarks.cases import UnknownName, choose
from benchmarks.problem import ROTATED_INPUTS, make_module, torch_calls
from benchmarks.timing import quick_estimate


class Refused(Exception):
    """The provider does not do this kind of problem; says why. Not a failure."""


def state_names(hx):
    """State tensors by name, from h or (h, c)."""
    return dict(zip(("h_n", "c_n"), hx if isinstance(hx, tuple) else (hx,), strict=False))


class ModuleRunner:
    """Calls a module with torch.nn's parameters; `forward(x, hx)` returns (y, state)."""

    def __init__(self, problem, module, forward, context=contextlib.nullcontext):
        self.problem, self.module, self.forward = problem, module, forward
        self.training = problem.training
        self.device = problem.device
        self._context = context
        if self.training:
            # Leaves of its own: the inputs' gradients are part of the work, as under another layer.
            self.xs = [x.detach().requires_grad_() for x in problem.xs]
            self.call = self._train
        else:
            self.xs = problem.xs
            self.call = self._infer

    @contextlib.contextmanager
    def context(self):
        """Entered once around many calls."""
        with self._context(), contextlib.nullcontext() if self.training else torch.inference_mode():
            yield

    def _infer(self, index):
        return self.forward(self.xs[index % ROTATED_INPUTS], self.problem.hx)

    def _train(self, index):
        index %= ROTATED_INPUTS
        y, state = self.forward(self.xs[index], self.problem.hx)
        y.backward(self.problem.dys[index])
        return y, state

    def clear(self):
        """Drop the gradients; outside the clock."""
        if self.training:
            self.module.zero_grad(set_to_none=True)
            for x in self.xs:
                x.grad = None

    def results(self):
        """Outputs, and gradients in training, by name: what the gate judges."""
        with self.context():
            y, state = self.call(0)
        results = {"y": y.detach()}
        results |= {name: part.detach() for name, part in state_names(state).items()}
        if self.training:
            results["grad x"] = self.xs[0].grad
            for name, parameter in self.module.named_parameters():
                results[f"grad {name}"] = parameter.grad
            self.clear()
        return {name: None if r is None else r.clone() for name, r in results.items()}


class TorchProvider:
    """torch.nn; where it has several idioms for a problem, the one that is faster here."""

    name = "torch"
    backend = "eager"

    def unavailable(self, device):
        return None

    def prepare(self, problem):
        runners = self._runners(problem)
        return runners[0] if len(runners) == 1 else min(runners, key=quick_estimate)

    def yardstick(self, problem):
        """Any idiom's runner: for values, not for time."""
        return self._runners(problem)[0]

    def _runners(self, problem):
        runners = []
        for idiom, forward in torch_calls(problem).items():
            called = functools.partial(forward, problem.module)
            runners.append(ModuleRunner(problem, problem.module, called))
            runners[-1].backend = f"{self.backend} {idiom}"
        return runners


def _fused_rnn():
    """The package, imported when first needed."""
    return importlib.import_module("fused_rnn")


def ours_backends():
    """Backends of fused_rnn: name -> None or why it is not available; {} without the package."""
    try:
        return dict(_fused_rnn().available_backends())
    except (ImportError, AttributeError):
        return {}


@contextlib.contextmanager
def _choices():
    """The names of the backends that calls of fused_rnn get while the context lasts."""
    backends = importlib.import_module("fused_rnn.backends")
    choose, names = backends.choose, []

    def recording(*args, **options):
        names.append(choose(*args, **options))
        return names[-1]

    backends.choose = recording
    try:
        yield names
    finally:
        backends.choose = choose


class OursProvider:
    """fused_rnn, by its own choice or on one backend."""

    def __init__(self, backend="auto", compiled=False):
        self.backend, self.compiled = backend, compiled
        suffix = "" if backend == "auto" else f":{backend}"
        self.name = f"ours{suffix}{'+compile' if compiled else ''}"

    def unavailable(self, device):
        try:
            package = _fused_rnn()
            package.LSTM  # noqa: B018 -- a namespace without it is not the package
        except (ImportError, AttributeError) as error:
            return f"fused_rnn cannot be imported ({error}); remedy: pip install -e ."
        return None if self.backend == "auto" else ours_backends()[self.backend]

    def prepare(self, problem):
        package = _fused_rnn()
        module = make_module(package, problem.job, problem.dtype, problem.device)
        module.load_state_dict(problem.module.state_dict())
        options = {}
        if problem.lengths is not None:
            options["lengths"] = problem.lengths.to(problem.device)
        if problem.reset is not None:
            options["reset"] = problem.reset
        called = torch.compile(module, fullgraph=True) if self.compiled else module

        def forward(x, hx):
            return called(x, hx, **options)

        context = contextlib.nullcontext
        if self.backend != "auto":

            def context():
                return package.use_backend(self.backend)

        runner = ModuleRunner(problem, module, forward, context)
        runner.backend = self._chosen(package, module, options, runner)
        return runner

    def _chosen(self, package, module, options, runner):
        """The backend by name; for the automatic choice also what it is for this problem. On a GPU
        it depends on sizes and may differ from layer to layer, so a call is watched."""
        if self.backend != "auto":
            return self.backend
        if self.compiled:  # a call that is watched would be compiled otherwise
            said = package.explain(module, **dict.fromkeys(options, True))
            return f"auto:{said.splitlines()[0].rpartition(': ')[2].split()[0]}"
        with _choices() as names:
            runner.results()
        # (None where nobody had to choose: a plain call on a CPU.)
        return f"auto:{'+'.join(dict.fromkeys(names or ['cpu']))}"

    def refuses(self, error):
        """Whether an exception says that the backend does not take such a call."""
        return isinstance(error, RuntimeError) and f"{self.backend!r} cannot run" in str(error)


class OnnxRuntimeProvider:
    """ONNX Runtime's LSTM, GRU and RNN operators, from the same weights."""

    name = "onnxruntime"
    backend = "CPUExecutionProvider"

    def unavailable(self, device):
        missing = [m for m in ("onnx", "onnxruntime") if importlib.util.find_spec(m) is None]
        if missing:
            return f"not installed: {', '.join(missing)}; remedy: pip install {' '.join(missing)}"
        return None if torch.device(device).type == "cpu" else "timed on the CPU only"

    def prepare(self, problem):
        case = problem.job.case
        if problem.training:
            raise Refused("inference only")
        if problem.dtype != torch.float32:
            raise Refused("its CPU kernels take float32 only")
        if problem.reset is not None:
            raise Refused("no resets inside a sequence")
        if case.proj:
            raise Refused("no projection")
        return onnx_model.OnnxRunner(problem, threads=torch.get_num_threads())


_FACTORIES = {
    "torch": TorchProvider,
    "ours": OursProvider,
    "ours+compile": lambda: OursProvider(compiled=True),
    "onnxruntime": OnnxRuntimeProvider,
}
DEFAULT = ("torch", "ours", "onnxruntime")


def register(name, factory):
    """Add a provider: factory() has name, backend, unavailable(device) and prepare(problem)."""
    _FACTORIES[name] = factory


def existing():
    """All names that `find` takes."""
    named = [f"ours:{backend}" for backend in ours_backends()]
    return list(_FACTORIES) + named + ["ours:all"]


def find(names):
    """Providers by name, in that order, torch first: it is the yardstick of every ratio."""
    names = ["onnxruntime" if name.lower() == "ort" else name for name in names]
    chosen = choose("provider", names, existing())
    if "ours:all" in chosen:
        every = [f"ours:{b}" for b, reason in ours_backends().items() if reason is None]
        if not every:
            raise UnknownName("ours:all: fused_rnn has no backend available here")
        chosen = list(dict.fromkeys(n for c in chosen for n in (every if c == "ours:all" else [c])))
    chosen = ["torch"] + [name for name in chosen if name != "torch"]
    return [
        _FACTORIES[name]() if name in _FACTORIES else OursProvider(name.removeprefix("ours:"))
        for name in chosen
    ]

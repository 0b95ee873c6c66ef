"""Input factories, the error budget, and checks; used by the tests, the benchmarks and `verify`.

A ``Case`` describes one layer call; ``evaluate`` runs it on a backend and returns every output and
every gradient by name; ``check`` holds them against the reference in float64. Tolerances are
computed from the error that plain PyTorch makes in the same dtype, never picked.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_rnn import autograd, functional
from fused_rnn.ops import GATES


@dataclass(frozen=True)
class Case:
    """One layer call: cell, sizes, dtype and options. ``lengths`` and ``reset`` say whether the
    call has them; ``proj`` is the LSTM's projection size, 0 for none."""

    cell: str = "lstm"
    steps: int = 5
    rows: int = 3
    inputs: int = 4
    hidden: int = 7
    reverse: tuple[bool, ...] = (False,)
    dtype: torch.dtype = torch.float32
    proj: int = 0
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    reset_after: bool = True
    relu: bool = False
    cells: bool = False
    tape: str = "keep"
    strided: bool = False
    seed: int = 0

    def __str__(self):
        parts = [self.cell, f"T{self.steps} B{self.rows} I{self.inputs} H{self.hidden}"]
        parts.append("reverse=" + "".join("01"[r] for r in self.reverse))
        for name in ("bias", "lengths", "reset", "cells", "relu", "strided"):
            if getattr(self, name) != Case.__dataclass_fields__[name].default:
                parts.append(name if getattr(self, name) else f"no {name}")
        if self.proj:
            parts.append(f"proj{self.proj}")
        if not self.reset_after:
            parts.append("reset-before")
        if self.tape != "keep":
            parts.append(self.tape)
        return f"{' '.join(parts)} {str(self.dtype)[6:]}"


def make_inputs(case: Case, device: str = "cpu") -> dict[str, Tensor | None]:
    """Random float64 tensors for a case, rounded to its dtype so that every run starts from the
    same numbers: input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr (stacked), lengths, reset, and the
    cotangents dy, dh_n, dc_n, dcells."""
    generator = torch.Generator().manual_seed(case.seed)
    stack, width = len(case.reverse), GATES[case.cell] * case.hidden
    size = case.proj or case.hidden
    steps, rows = case.steps, case.rows

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        if case.strided and values.dim() > 1:  # the same values, no axis contiguous
            values = values.repeat_interleave(2, -1)[..., ::2]
        return values.to(case.dtype).to(torch.float64).to(device)

    scale = case.hidden**-0.5
    lstm = case.cell == "lstm"
    tensors: dict[str, Tensor | None] = {
        "input": normal(steps, rows, case.inputs),
        "h0": normal(stack, rows, size, scale=0.5),
        "c0": normal(stack, rows, case.hidden, scale=0.5) if lstm else None,
        "w_ih": normal(stack, width, case.inputs, scale=scale),
        "w_hh": normal(stack, width, size, scale=scale),
        "b_ih": normal(stack, width, scale=scale) if case.bias else None,
        "b_hh": normal(stack, width, scale=scale) if case.bias else None,
        "w_hr": normal(stack, size, case.hidden, scale=scale) if case.proj else None,
        "dy": normal(steps, rows, stack, size),
        "dh_n": normal(stack, rows, size),
        "dc_n": normal(stack, rows, case.hidden) if lstm else None,
        "dcells": normal(steps, rows, stack, case.hidden) if lstm and case.cells else None,
    }
    lengths = torch.randint(0, steps + 1, (rows,), generator=generator)
    if rows:
        lengths[0] = steps
    reset = torch.rand(steps, rows, generator=generator) < 0.3
    tensors["lengths"] = lengths.to(device) if case.lengths else None
    tensors["reset"] = reset.to(device) if case.reset else None
    return tensors


PARAMETERS = ("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def run(case: Case, tensors: dict[str, Tensor | None], backend: str, **options):
    """The functional call of a case on prepared tensors: y, (h_n[, c_n][, cells]) as one tuple."""
    hx = (tensors["h0"], tensors["c0"]) if case.cell == "lstm" else tensors["h0"]
    arguments = [tensors["input"], hx, *(tensors[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh"))]
    options |= {
        "lengths": tensors["lengths"],
        "reset": tensors["reset"],
        "reverse": case.reverse,
        "tape": case.tape,
        "backend": backend,
    }
    if case.cell == "lstm":
        result = functional.lstm(
            *arguments, w_hr=tensors["w_hr"], return_cells=case.cells, **options
        )
        return (result[0], *result[1], *result[2:])
    if case.cell == "gru":
        return functional.gru(*arguments, reset_after=case.reset_after, **options)
    return functional.rnn(*arguments, nonlinearity="relu" if case.relu else "tanh", **options)


def evaluate(
    case: Case,
    backend: str,
    device: str = "cpu",
    gradients: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Every output and, with ``gradients``, every gradient of a case on a backend, by name.

    ``dtype`` computes the same numbers in another dtype than the case's. The backend "plain" is
    the reference with every operation in that dtype: what a user's own loop would do.
    """
    dtype = dtype or case.dtype
    tensors = make_inputs(case, device)
    leaves = {}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if gradients and name in PARAMETERS:
                tensor = leaves[name] = tensor.detach().requires_grad_()
            tensors[name] = tensor
    with torch.set_grad_enabled(gradients):
        outputs = _plain(case, tensors) if backend == "plain" else run(case, tensors, backend)
    names = ("y", "h_n", "c_n", "cells") if case.cell == "lstm" else ("y", "h_n")
    results = {n: o.detach() for n, o in zip(names, outputs, strict=False)}
    if gradients:
        cotangents = [tensors[f"d{n}"] for n in names[: len(outputs)]]
        found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        for name, leaf, grad in zip(leaves, leaves.values(), found, strict=True):
            if grad is None:
                raise AssertionError(f"{case}: no gradient for {name} on {backend}")
            if grad.shape != leaf.shape or grad.dtype != leaf.dtype:
                raise AssertionError(f"{case}: gradient of {name} is {grad.dtype} {grad.shape}")
            results[f"d{name}"] = grad
    return results


def _plain(case: Case, tensors: dict[str, Tensor | None]):
    """The case by the reference in the tensors' own dtype."""
    flags = functional.make_flags(
        case.steps, tensors["input"].device, tensors["lengths"], tensors["reset"]
    )
    spec = autograd.LayerSpec(case.cell, "reference", case.reverse, case.reset_after, case.relu)
    inputs = autograd.LayerInputs(
        *(tensors[k] for k in ("input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h0", "c0")), flags
    )
    outputs = autograd.reference_scan(spec, inputs)
    return outputs if case.cells or case.cell != "lstm" else outputs[:3]


def grain(exact: Tensor, dtype: torch.dtype) -> float:
    """The rounding grain: one unit in the last place, in dtype, of the largest exact value."""
    return torch.finfo(dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0


def error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite where got has NaN and exact has not."""
    if not exact.numel():
        return 0.0
    difference = float((got.double() - exact).abs().max())
    return float("inf") if difference != difference else difference


def budget(exact: Tensor, plain_error: float, dtype: torch.dtype) -> float:
    """What an error may be: bfloat16 and float16, the error of plain PyTorch in that dtype plus
    the grain; float32, twice that error plus the grain; float64, where plain PyTorch is itself the
    truth, four times what float32's error scales to."""
    if dtype == torch.float64:
        plain_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    factor = {torch.float64: 4, torch.float32: 2}.get(dtype, 1)
    return factor * plain_error + grain(exact, dtype)


@dataclass(frozen=True)
class Verdict:
    """How one named result compares: its error, what it may be, and what is wrong if anything."""

    name: str
    error: float
    budget: float
    fault: str = ""


def compare(
    name: str, got: Tensor, exact: Tensor, plain_error: float, dtype: torch.dtype
) -> Verdict:
    """Hold a result against float64: element bound, and for gradients direction and sparsity, so
    that a gradient which is zero where the bound would let it pass is seen."""
    if got.shape != exact.shape:
        return Verdict(name, float("inf"), 0.0, f"shape {list(got.shape)}, not {list(exact.shape)}")
    off, allowed = error(got, exact), budget(exact, plain_error, dtype)
    fault = "" if off <= allowed else "over the budget"
    if not fault and exact.numel() and float(exact.norm()) > 0:
        got64 = got.double()
        relative = float((got64 - exact).norm() / exact.norm())
        cosine = float((got64 * exact).sum() / (got64.norm() * exact.norm()))
        bound = allowed * exact.numel() ** 0.5 / float(exact.norm())
        if relative > bound or not cosine > 1 - bound:
            fault = f"relative L2 error {relative:.1e}, cosine {cosine:.9f}"
        tiny = torch.finfo(dtype).tiny * 8
        missing = (got64 == 0) & (exact.abs() > max(tiny, allowed))
        extra = (exact == 0) & (got64 != 0)
        if bool(missing.any()) or bool(extra.any()):
            fault = f"{int(missing.sum())} entries wrongly zero, {int(extra.sum())} wrongly not"
    return Verdict(name, off, allowed, fault)


# How often plain PyTorch's error is sampled: that of one small tensor may be luck. The second
# number is for results that would be over the budget with the first.
DRAWS = (6, 30)


@functools.lru_cache(maxsize=512)  # each backend under test asks for the same
def yardsticks(
    case: Case, gradients: bool = True, draws: int = DRAWS[0]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(exact, plain_errors): the case in float64, and the largest error of plain PyTorch in the
    case's dtype (float32 for a float64 case: see ``budget``) over a number of draws."""
    low = torch.float32 if case.dtype == torch.float64 else case.dtype
    errors: dict[str, float] = {}
    for draw in reversed(range(draws)):
        drawn = replace(case, seed=case.seed + 1000 * draw)
        exact = evaluate(drawn, "plain", "cpu", gradients, torch.float64)
        plain = evaluate(drawn, "plain", "cpu", gradients, low)
        for name in exact:
            errors[name] = max(errors.get(name, 0.0), error(plain[name], exact[name]))
    return exact, errors


def check(case: Case, backend: str, device: str = "cpu", gradients: bool = True) -> list[Verdict]:
    """Run a case on a backend and hold every output and gradient against float64."""
    got = evaluate(case, backend, device, gradients)
    verdicts: list[Verdict] = []
    for draws in DRAWS:
        exact, errors = yardsticks(case, gradients, draws)
        verdicts = [compare(n, got[n].cpu(), exact[n], errors[n], case.dtype) for n in exact]
        if not any(verdict.fault for verdict in verdicts):
            break
    return verdicts


@contextlib.contextmanager
def poisoned_memory():
    """Fill every freshly allocated tensor with NaN, so that reading one before writing it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before, warn_only=warn)

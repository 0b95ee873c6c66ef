"""One run: every job through the gate, the clock and into rows."""

import time

import torch

from benchmarks import machine
from benchmarks.cases import operations
from benchmarks.floor import floor_s
from benchmarks.gate import Gate
from benchmarks.graphs import Replayed
from benchmarks.problem import make_problem
from benchmarks.providers import Refused, TorchProvider
from benchmarks.stats import median, paired_ratio, quantile
from benchmarks.timing import interleave, threads

# A row's status. The first two are ordinary; the others make the exit status non-zero.
OK, REFUSED, WRONG, ERROR = "ok", "refused", "WRONG", "ERROR"
FAILURES = (WRONG, ERROR)


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def blank_row(job, provider, metadata):
    """A row with everything known before timing. One row, one provider, one job: tidy."""
    case = job.case
    return {
        "case": case.name,
        "cell": job.cell,
        "mode": job.mode,
        "provider": provider.name,
        "backend": provider.backend,
        "status": OK,
        "reason": "",
        "T": case.T,
        "B": case.B,
        "I": case.I,
        "H": case.H,
        "layers": case.layers,
        "bidirectional": case.bidirectional,
        "proj": case.proj,
        "min_length": case.min_length,
        "reset_rate": case.reset_rate,
        "dtype": job.dtype,
        "operations": operations(case, job.cell),
        "median_us_per_step": None,
        "q25": None,
        "q75": None,
        "ratio": None,
        "ci_lo": None,
        "ci_hi": None,
        "floor_us": None,
        "error": None,
        "error_budget": None,
        "peak_memory": None,
        **metadata,
    }


def _admit(provider, problem, gate, row, graph):
    """The provider's runner if it passes the gate, else None and the reason in its row."""
    try:
        runner = provider.prepare(problem)
        verdict = gate.judge(runner.results())
        if graph and verdict.passed:
            runner = Replayed(runner)
    except Refused as refusal:
        row.update(status=REFUSED, reason=str(refusal))
        return None
    except Exception as error:  # whatever a provider raises is a finding, not the end of the run
        refused = getattr(provider, "refuses", lambda error: False)(error)
        row.update(status=REFUSED if refused else ERROR, reason=first_line(error))
        return None
    row["backend"] = getattr(runner, "backend", provider.backend)
    row.update(error=verdict.error, error_budget=verdict.budget)
    if not verdict.passed:
        row.update(status=WRONG, reason=str(verdict))
        return None
    return runner


def run_job(job, providers, budget_s, device="cpu", metadata=None, graph=False):
    """Rows of one job, one a provider, with `blocks`: medians in us a step, by pass. graph: of
    calls replayed as CUDA graphs."""
    rows = {p.name: blank_row(job, p, metadata or {}) for p in providers}
    problem = make_problem(job, device)
    try:
        with threads(1):  # values only; on a busy machine one thread is the fastest number
            gate = Gate(problem, TorchProvider().yardstick)
    except Exception as error:  # torch.nn cannot do this dtype or shape here
        for row in rows.values():
            row.update(status=REFUSED, reason=f"no yardstick, torch.nn: {first_line(error)}")
        return list(rows.values())
    admitted = {p.name: _admit(p, problem, gate, rows[p.name], graph) for p in providers}
    runners = {name: runner for name, runner in admitted.items() if runner is not None}
    timings = interleave(runners, budget_s, device) if runners else {}
    floor = floor_s(problem) * 1e6 / job.case.T
    for name, timing in timings.items():
        scale = 1e6 / job.case.T
        rows[name].update(
            median_us_per_step=median(timing.samples) * scale,
            q25=quantile(timing.samples, 0.25) * scale,
            q75=quantile(timing.samples, 0.75) * scale,
            floor_us=floor,
            peak_memory=timing.peak_memory,
            blocks=[block * scale for block in timing.blocks],
        )
        if "torch" in timings:
            ratio = paired_ratio(timings["torch"].blocks, timing.blocks)
            rows[name].update(ratio=ratio.value, ci_lo=ratio.lo, ci_hi=ratio.hi)
    return list(rows.values())


def run(jobs, providers, *, budget_s, device, progress, limit_s=None, graph=False):
    """All jobs, or those that begin within `limit_s`; returns {"meta": ..., "rows": [...]}."""
    metadata = machine.describe(device)
    before = machine.load()
    if machine.busy(before):
        progress.note(f"note: the machine is busy (load {before}); times will say little")
    rows, begin = [], time.perf_counter()
    for number, job in enumerate(jobs):
        if limit_s is not None and time.perf_counter() - begin >= limit_s:
            left_out = len(jobs) - number
            progress.note(f"note: {left_out} of {len(jobs)} jobs are left out: {limit_s:g} s over")
            break
        progress.start(f"{job.case.name} {job.cell} {job.mode} {job.dtype}")
        new = run_job(job, providers, budget_s, device, metadata, graph)
        for row in new:
            if row["status"] in FAILURES:
                progress.note(f"{row['status']}: {row['provider']}: {row['reason']}")
        rows += new
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    progress.close()
    after = machine.load()
    about = {"budget_s": budget_s, "graph": graph, "load_before": before, "load_after": after}
    return {"meta": metadata | about | {"warning": machine.busy(before, after)}, "rows": rows}

"""A picture of the ratios: one panel a mode, one bar a job, longer is faster."""

import math

from benchmarks.report import by_key, number, ours_of
from benchmarks.stats import geometric_mean

COLOURS = {"LSTM": "#2f6db3", "GRU": "#2a9d6f", "RNN": "#c2703d"}
GREY = "#555555"


class PlotUnavailable(RuntimeError):
    """matplotlib is missing; the message says how to get it."""


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        reason = "no picture: matplotlib is not installed; remedy: pip install matplotlib"
        raise PlotUnavailable(reason) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _bars(result, provider, mode):
    """Jobs of a mode with a ratio, as (label, cell, row, onnxruntime's row)."""
    many_dtypes = len({row["dtype"] for row in result["rows"]}) > 1
    bars = []
    for (case, cell, job_mode, dtype), rows in by_key(result).items():
        row = rows.get(provider)
        if job_mode == mode and row and row["ratio"]:
            label = f"{case}  {dtype}" if many_dtypes else case
            bars.append((label, cell, row, rows.get("onnxruntime")))
    return bars


def _ticks(lo, hi):
    """Round ratios from lo to hi, evenly enough on a log axis."""
    steps = [1, 2, 5] if hi / lo < 200 else [1]
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    return [s * 10**d for d in decades for s in steps if lo <= s * 10**d <= hi]


def _panel(axes, bars, mode, provider, limits, tallest):
    """Bars of one mode, top to bottom in the order of the run, cases set apart by space."""
    places, place, before = [], 0.0, None
    for label, *_ in bars:
        place += 1.0 if label == before else 1.5
        places.append(place)
        before = label
    groups = {}
    for at, (label, cell, row, ort) in zip(places, bars, strict=True):
        groups.setdefault(label, []).append(at)
        whiskers = [[row["ratio"] - row["ci_lo"]], [row["ci_hi"] - row["ratio"]]]
        axes.barh(at, row["ratio"] - 1, left=1, height=0.82, color=COLOURS[cell], zorder=2)
        axes.errorbar(row["ratio"], at, xerr=whiskers, color="black", lw=1, capsize=2.5, zorder=4)
        edge = max(row["ci_hi"], ort["ratio"] if ort and ort["ratio"] else 0, 1)
        axes.annotate(
            f"{cell} {number(row['ratio'])}x",
            (edge, at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=GREY,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            zorder=1.5,
        )
        if ort and ort["ratio"] and provider != "onnxruntime":
            axes.plot(ort["ratio"], at, "D", ms=5, mfc="white", mec="black", mew=1, zorder=5)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(tallest + 0.9, 0.6)  # bars are as thick in every panel
    axes.set_xticks(_ticks(*limits), [f"{tick:g}" for tick in _ticks(*limits)])
    axes.xaxis.minorticks_off()
    axes.set_yticks([sum(at) / len(at) for at in groups.values()], list(groups), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="black", lw=1.2, zorder=3)
    mean = geometric_mean([row["ratio"] for _, _, row, _ in bars])
    axes.axvline(mean, color=GREY, ls=(0, (4, 3)), lw=1, zorder=1)
    axes.set_title(f"{mode}: geometric mean {mean:.2f}", fontsize=11, loc="left", weight="bold")
    axes.grid(axis="x", color="#dddddd", lw=0.7, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("times as fast as torch.nn (log scale)")


def _legend(figure, pyplot, cells, with_ort):
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[cell], label=cell) for cell in cells]
    line = pyplot.Line2D
    handles.append(line([], [], color="black", marker="|", ms=7, label="95 % interval"))
    handles.append(line([], [], color=GREY, ls=(0, (4, 3)), label="geometric mean"))
    if with_ort:
        marker = {"marker": "D", "mfc": "white", "mec": "black", "ls": ""}
        handles.append(line([], [], label="ONNX Runtime", **marker))
    figure.legend(handles=handles, loc="outside lower center", ncol=len(handles), frameon=False)


def _title(result, provider):
    meta = result["meta"]
    place = meta["cpu"] if meta["device"] == "cpu" else meta["device"]
    conditions = f"{meta['instruction_set']}, {meta['threads']} threads, torch {meta['torch']}"
    if meta.get("warning"):
        conditions += "  --  MEASURED ON A BUSY MACHINE"
    return f"{provider.replace('ours', 'fused_rnn')} against torch.nn\n{place}, {conditions}"


def draw_sweep(result, path):
    """Write the picture of a sweep, ratio against operations, a panel a mode; False where nothing
    has a ratio."""
    pyplot = _pyplot()
    provider = (ours_of(result) or [""])[0]
    rows = [r for r in result["rows"] if r["provider"] == provider and r["ratio"]]
    modes = [m for m in ("inference", "training") if any(row["mode"] == m for row in rows)]
    if not modes:
        return False
    figure, axes = pyplot.subplots(
        1,
        len(modes),
        figsize=(1.2 + 5.6 * len(modes), 5),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for mode, one in zip(modes, axes[0], strict=True):
        ours = [row for row in rows if row["mode"] == mode]
        for cell, colour in COLOURS.items():
            of_cell = [row for row in ours if row["cell"] == cell]
            x, y = [row["operations"] for row in of_cell], [row["ratio"] for row in of_cell]
            one.scatter(x, y, color=colour, s=18, label=cell, zorder=2)
        one.set_xscale("log")
        one.set_yscale("log")
        one.axhline(1, color="black", lw=1.2, zorder=1)
        mean = geometric_mean([row["ratio"] for row in ours])
        one.set_title(f"{mode}: geometric mean {mean:.2f}", fontsize=11, loc="left", weight="bold")
        one.set_xlabel("operations of a forward pass")
        one.grid(color="#dddddd", lw=0.7, zorder=0)
    axes[0][0].set_ylabel("times as fast as torch.nn")
    axes[0][0].legend(frameon=False)
    figure.suptitle(_title(result, provider), fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def draw(result, path):
    """Write the picture of the first fused_rnn provider; False where nothing has a ratio."""
    pyplot = _pyplot()
    provider = (ours_of(result) or [""])[0]
    modes = [m for m in ("inference", "training") if _bars(result, provider, m)]
    if not modes:
        return False
    panels = {mode: _bars(result, provider, mode) for mode in modes}
    rows = [row for bars in panels.values() for _, _, row, _ in bars]
    orts = [o["ratio"] for bars in panels.values() for *_, o in bars if o and o["ratio"]]
    lowest = min([row["ci_lo"] for row in rows] + orts + [1])
    highest = max([row["ci_hi"] for row in rows] + orts + [1])
    limits = (min(lowest / 1.15, 0.8), highest * (highest / lowest) ** 0.22 * 1.3)
    tallest = max(len(bars) + 0.5 * len({b[0] for b in bars}) for bars in panels.values())
    figure, axes = pyplot.subplots(
        1,
        len(modes),
        figsize=(1.2 + 5.6 * len(modes), 1.9 + 0.27 * tallest),
        layout="constrained",
        squeeze=False,
    )
    for mode, one in zip(modes, axes[0], strict=True):
        _panel(one, panels[mode], mode, provider, limits, tallest)
    figure.suptitle(_title(result, provider), fontsize=11)
    cells = [cell for cell in COLOURS if any(row["cell"] == cell for row in rows)]
    _legend(figure, pyplot, cells, bool(orts) and provider != "onnxruntime")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True

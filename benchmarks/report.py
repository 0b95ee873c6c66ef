"""Results as a table for the eye, CSV for a spreadsheet and JSON for the next run."""

import csv
import json

from benchmarks.stats import Interval, geometric_mean

KEY = ("case", "cell", "mode", "dtype")


def key_of(row):
    return tuple(row[column] for column in KEY)


def ours_of(result):
    """Names of the providers that are fused_rnn; without any, the others but torch."""
    names = list(dict.fromkeys(row["provider"] for row in result["rows"]))
    others = [name for name in names if name not in ("torch", "onnxruntime")]
    return others or [name for name in names if name != "torch"]


def by_key(result):
    """Rows grouped: key -> provider -> row, in the order of the run."""
    groups = {}
    for row in result["rows"]:
        groups.setdefault(key_of(row), {})[row["provider"]] = row
    return groups


def number(value):
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(row):
    if row is None:
        return ""
    return number(row["median_us_per_step"]) if row["status"] == "ok" else row["status"]


def ratio_of(row):
    """The interval of torch / provider, or None."""
    if row is None or row["ratio"] is None:
        return None
    return Interval(row["ratio"], row["ci_lo"], row["ci_hi"])


def align(lines, left=()):
    """Rows of cells as text: names to the left, figures to the right; the first row is the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text_columns = {i for i, name in enumerate(lines[0]) if name in (*KEY, "provider", *left)}

    def render(line):
        cells = [
            cell.ljust(width) if i in text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rendered = [render(line) for line in lines]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([rendered[0], rule, *rendered[1:]])


def table(result):
    """Final table: one line a job (and fused_rnn provider), then geometric means and reasons."""
    ours = ours_of(result)
    groups = by_key(result)
    many_dtypes = len({key[3] for key in groups}) > 1
    head = ["case", "cell", "mode"] + ["dtype"] * many_dtypes + ["provider"] * (ours != ["ours"])
    head += ["ours us/step", "torch us/step", "ratio torch/ours [lo, hi]"]
    with_ort = any("onnxruntime" in rows for rows in groups.values())
    head += ["onnxruntime us/step"] * with_ort + ["floor us/step", "ours/floor"]
    lines = [head]
    for key, rows in groups.items():
        for name in ours or [""]:
            row = rows.get(name)
            ratio = ratio_of(row)
            line = list(key if many_dtypes else key[:3]) + [name] * (ours != ["ours"])
            floor = next((r["floor_us"] for r in rows.values() if r["floor_us"]), None)
            over = row and row["median_us_per_step"] and row["median_us_per_step"] / floor
            line += [_time(row), _time(rows.get("torch")), str(ratio or "")]
            line += [_time(rows.get("onnxruntime"))] * with_ort
            line += [number(floor), number(over or None)]
            lines.append(line)
    warning = result["meta"].get("warning")
    notes = [f"warning: {warning}"] if warning else []
    return "\n".join([align(lines), "", *means(result), *reasons(result), *notes])


def means(result):
    """Lines with the geometric mean of torch/provider, by provider and mode."""
    lines = []
    for name in dict.fromkeys(row["provider"] for row in result["rows"]):
        timed = [r for r in result["rows"] if r["provider"] == name and r["ratio"] is not None]
        if name == "torch" or not timed:
            continue
        parts = [f"{geometric_mean([r['ratio'] for r in timed]):.2f} over {len(timed)} rows"]
        for mode in dict.fromkeys(row["mode"] for row in timed):
            mean = geometric_mean([r["ratio"] for r in timed if r["mode"] == mode])
            parts.append(f"{mode} {mean:.2f}")
        lines.append(f"geometric mean torch/{name}: {', '.join(parts)}")
    return lines


def reasons(result):
    """Why rows have no time, each reason once, with the number of rows it took."""
    counts = {}
    for row in result["rows"]:
        if row["status"] != "ok":
            label = (row["status"], row["provider"], row["reason"])
            counts.setdefault(label, []).append(" ".join(key_of(row)[:3]))
    lines = []
    for (status, provider, reason), where in counts.items():
        place = where[0] if len(where) == 1 else f"{len(where)} rows, such as {where[0]}"
        lines.append(f"{status}: {provider}: {reason} ({place})")
    return lines


def write_csv(result, path):
    columns = [c for c in dict.fromkeys(c for r in result["rows"] for c in r) if c != "blocks"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result["rows"])


def write_json(result, path):
    """Metadata once, rows without what it already says."""
    rows = [{k: v for k, v in row.items() if k not in result["meta"]} for row in result["rows"]]
    with open(path, "w") as file:
        json.dump({"meta": result["meta"], "rows": rows}, file, indent=1)
        file.write("\n")


def read_json(path):
    """A result as `run` gave it."""
    with open(path) as file:
        result = json.load(file)
    if not isinstance(result, dict) or "rows" not in result:
        raise ValueError(f"{path} is not a result of python -m benchmarks")
    of_the_run = ("budget_s", "load_before", "load_after", "warning")
    meta = {k: v for k, v in result["meta"].items() if k not in of_the_run}
    result["rows"] = [meta | row for row in result["rows"]]
    return result

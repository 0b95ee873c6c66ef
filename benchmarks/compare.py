"""Two results side by side: has a change made anything faster or slower?"""

from benchmarks.report import KEY, align, key_of, number
from benchmarks.stats import Interval, geometric_mean, unpaired_ratio


def _timed(result):
    rows = {(*key_of(row), row["provider"]): row for row in result["rows"]}
    return {key: row for key, row in rows.items() if row.get("blocks")}


def _order(row_keys, *results):
    """Keys in the order of the results, first come first."""
    order = [(*key_of(row), row["provider"]) for result in results for row in result["rows"]]
    return [key for key in dict.fromkeys(order) if key in row_keys]


def compare(a, b):
    """Entries, one a (job, provider) timed in either result.

    speedup: interval of time(A) / time(B), above 1 where B is faster; None where one lacks the row
    relative: the same of both times over torch's of their own run, so that another machine or a
    busier hour cancels; None for torch itself
    """
    rows_a, rows_b = _timed(a), _timed(b)
    entries = []
    for key in _order(rows_a.keys() | rows_b.keys(), a, b):
        row_a, row_b = rows_a.get(key), rows_b.get(key)
        entry = dict(zip((*KEY, "provider"), key, strict=True))
        entry |= {"a": row_a, "b": row_b, "speedup": None, "relative": None}
        if row_a and row_b:
            entry["speedup"] = unpaired_ratio(row_a["blocks"], row_b["blocks"])
            if row_a["ratio"] and row_b["ratio"] and key[-1] != "torch":
                entry["relative"] = row_b["ratio"] / row_a["ratio"]
        entries.append(entry)
    return entries


def verdict(speedup: Interval):
    """In one word; nothing is said where the interval holds 1."""
    return "faster" if speedup.lo > 1 else "slower" if speedup.hi < 1 else ""


def text(a, b):
    """The comparison as a table."""
    entries = compare(a, b)
    if not entries:
        return "neither result has a timed row"
    head = [*KEY, "provider", "A us/step", "B us/step", "speedup A/B [lo, hi]"]
    lines = [head + ["over torch's", ""]]
    for entry in entries:
        line = [entry[column] for column in (*KEY, "provider")]
        for side in "ab":
            line.append(number(entry[side]["median_us_per_step"]) if entry[side] else "absent")
        speedup, relative = entry["speedup"], entry["relative"]
        line += [str(speedup or ""), f"{relative:.2f}" if relative else ""]
        lines.append(line + [verdict(speedup) if speedup else ""])
    out = [align(lines), ""]
    for name in dict.fromkeys(entry["provider"] for entry in entries):
        both = [e["speedup"].value for e in entries if e["provider"] == name and e["speedup"]]
        if both:
            out.append(f"geometric mean A/B, {name}: {geometric_mean(both):.2f}, {len(both)} rows")
    out.append("above 1: B is faster; intervals of 95 % within each run, not between machines")
    for side, result in zip("AB", (a, b), strict=True):
        meta = result["meta"]
        named = [meta.get(k) or "?" for k in ("date", "commit", "torch", "cpu", "threads")]
        out.append("{}: {}, commit {}, torch {}, {}, {} threads".format(side, *named))
        if meta.get("warning"):
            out.append(f"   warning: {meta['warning']}")
    return "\n".join(out)

"""Measurements as lines of JSON, as means, as tables and as a plot."""
from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from .cases import BOUNDARY

GROUPS = {"1-127": range(1, 128), "128-512": range(128, 1024), "1024-2048": range(1024, 4096), "4096-": range(4096, 1 << 62)}
"""Token counts that are averaged together."""
BOUNDS = ("gemm", "norm", "push", "copy", "all_gather_matmul")  # candidates that do less than the op
MATMULS = ("all_gather_matmul", "matmul_reduce_scatter")  # whose means are taken together
OP_ALONE = ("op:unfused", "op:fused")  # what a decode step has twice a layer, measured beside it
CELL = ("op", "format", "K", "N", "M")  # what a line's time can be compared within


def about(device: torch.device) -> dict[str, str]:
    """Where and when a line was measured."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"gpu": gpu, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def write(lines: Sequence[dict], out: Path) -> None:
    """Append lines of JSON to a file."""
    with out.open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def check_writable(out: Path | None, plot: Path | None) -> None:
    """InputError, before anything is measured, if the results could not be written or plotted."""
    for path in filter(None, (out, plot)):
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path} cannot be written: {path.absolute().parent} is not a folder; give a path in one")
    if plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise InputError(f"--plot {plot} needs matplotlib, which is not installed; pip install 'fusewire[bench]'") from None


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def cells(lines: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, format, K, N, M) -> candidate -> its line."""
    found: dict[tuple, dict[str, dict]] = {}
    for line in lines:
        found.setdefault(tuple(line[k] for k in CELL), {})[line["candidate"]] = line
    return found


def means(lines: Iterable[dict]) -> list[dict[str, Any]]:
    """For each (op kind, format, group of token counts) and candidate the geometric mean of time / ideal, and of its time over
    Fusewire's. Only for candidates that took part at every size. MATMULS are one kind."""
    grouped: dict[tuple, list[dict[str, dict]]] = {}
    for (op, fmt, _, _, m), by_name in cells(lines).items():
        tokens = next(name for name, r in GROUPS.items() if m in r)
        grouped.setdefault(("matmuls" if op in MATMULS else op, fmt, tokens), []).append(by_name)
    found = []
    for (kind, fmt, tokens), rows in grouped.items():
        for name in dict.fromkeys(n for row in rows for n in row):
            if all(name in row for row in rows):
                found.append({
                    "op": kind, "format": fmt, "tokens": tokens, "candidate": name,
                    "over_ideal": geometric_mean(row[name]["us"] / row[name]["ideal_us"] for row in rows),
                    "over_fusewire": geometric_mean(row[name]["us"] / row["fusewire"]["us"] for row in rows)
                    if all("fusewire" in row for row in rows) else math.nan,
                })
    return found


def table(console: Console, title: str, names: list[str], rows: list[list[str]], left: int = 1) -> None:
    """A table whose first `left` columns are text and the others numbers."""
    console.print(f"\n[bold]{title}[/]")
    t = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        t.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        t.add_row(*row)
    console.print(t)


def print_ops(console: Console, lines: list[dict], names_of: dict[tuple[str, int, int], str]) -> None:
    """Microseconds of every candidate with its time / ideal, a table for each op and format; then the means.

    names_of  (op, K, N) -> what the model calls it
    """
    tables: dict[tuple[str, str], list[tuple[tuple, dict[str, dict]]]] = {}
    for cell, by_name in cells(lines).items():
        tables.setdefault(cell[:2], []).append((cell, by_name))
    for (op, fmt), rows in tables.items():
        names = list(dict.fromkeys(n for _, by_name in rows for n in by_name))
        shown = []
        for (_, _, k, n, m), by_name in rows:
            ideal = next(iter(by_name.values()))["ideal_us"]
            times = [f"{by_name[c]['us']:.1f} {by_name[c]['us'] / ideal:.2f}" if c in by_name else "-" for c in names]
            shown.append([names_of[op, k, n], str(m), f"{ideal:.1f}", *times])
        table(console, f"{op}, {fmt}: us, time / ideal", ["", "M", "ideal", *names], shown)
    print_boundary(console, lines, names_of)
    found: dict[tuple, dict[str, dict]] = {}
    for row in means(lines):
        found.setdefault((row["op"], row["format"], row["tokens"]), {})[row["candidate"]] = row
    for kind in dict.fromkeys(k for k, _, _ in found):
        of_kind = {key: by_name for key, by_name in found.items() if key[0] == kind}
        names = list(dict.fromkeys(n for by_name in of_kind.values() for n in by_name))
        shown = [[fmt, tokens, *(_mean(by_name.get(n)) for n in names)] for (_, fmt, tokens), by_name in of_kind.items()]
        table(console, f"{kind}: geometric means of time / ideal, and fusewire's speed-up", ["", "M", *names], shown, left=2)


def print_boundary(console: Console, lines: list[dict], names_of: dict[tuple[str, int, int], str]) -> None:
    """The boundary of the sharded plan over what it cannot do without: the gather and matmul alone, and the bytes of the norm at
    the speed of a copy; and how near to a copy of their bytes our kernels come, the one that sends in loopback alone."""
    def share(us: dict[str, float], kernel: str) -> str:
        return f"{us[f'copy:{kernel}'] / us[f'{kernel}:fusewire']:.0%}" if f"{kernel}:fusewire" in us else "-"

    rows = []
    for (op, fmt, k, n, m), by_name in cells(lines).items():
        if op == BOUNDARY and {"fusewire", "all_gather_matmul", "copy:norm"} <= by_name.keys():
            us = {name: line["us"] for name, line in by_name.items()}
            least = us["all_gather_matmul"] + us["copy:norm"]
            rows.append([names_of[op, k, n], fmt, str(m), *(f"{us[c]:.1f}" for c in ("fusewire", "all_gather_matmul", "copy:norm")),
                         f"{us['fusewire'] / least:.3f}", share(us, "norm"), share(us, "push")])
    if rows:
        table(console, f"{BOUNDARY} over all_gather_matmul + the norm's bytes; the kernels' share of a copy's bandwidth", [
            "", "", "M", "fusewire", "all_gather_matmul", "copy:norm", "over both", "norm", "push"], rows, left=2)


def _mean(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    speed_up = "" if row["candidate"].split(":")[0] in BOUNDS else f" {row['over_fusewire']:.2f}x"
    return f"{row['over_ideal']:.2f}{speed_up}"


def plot_ops(path: Path, lines: list[dict], names_of: dict[tuple[str, int, int], str]) -> None:
    """time / ideal over the token count as a PNG: a panel for each projection and format, a line for each candidate that does
    the whole op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    for (op, fmt, k, n, m), row in cells(lines).items():
        for name, line in row.items():
            if name.split(":")[0] not in BOUNDS:
                panels.setdefault((names_of[op, k, n], fmt), {}).setdefault(name, []).append((m, line["us"] / line["ideal_us"]))
    columns = min(4, len(panels))
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, squeeze=False, layout="constrained",
                                   figsize=(4.2 * columns, 3.2 * -(-len(panels) // columns)))
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, ((what, fmt), by_name) in zip(axes.flat, panels.items(), strict=False):
        for name, points in by_name.items():
            axis.plot(*zip(*sorted(points), strict=True), marker=".", label=name, linewidth=2 if name == "fusewire" else 1)
        axis.set(xscale="log", title=f"{what}, {fmt}", xlabel="tokens", ylabel="time / ideal")
        axis.axhline(1, color="grey", linewidth=0.5)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def exposed(us: dict[str, float], floor: str = "floor", fused: str = "fused") -> float:
    """How much of the communication is still seen: (fused - floor) / (unfused - floor); NaN where there is none, or no floor."""
    hidden = us["unfused"] - us.get(floor, math.inf)
    return (us[fused] - us[floor]) / hidden if hidden > 0 else math.nan


def saved(us: dict[str, float], layers: int) -> float:
    """What a decode step saves, over what two of its ops a layer save when they are measured alone; NaN where they were not."""
    if not set(OP_ALONE) <= us.keys():
        return math.nan
    return (us["unfused"] - us["fused"]) / (2 * layers * (us[OP_ALONE[0]] - us[OP_ALONE[1]]))


def stacks(lines: Iterable[dict]) -> dict[tuple[str, int], tuple[dict[str, float], str]]:
    """(format, tokens) -> (candidate -> microseconds, the fused one's plan) of one stack's lines."""
    found: dict[tuple[str, int], tuple[dict[str, float], str]] = {}
    for line in lines:
        found.setdefault((line["format"], line["tokens"]), ({}, line["plan"]))[0][line["candidate"]] = line["us"]
    return found


def print_model(console: Console, lines: list[dict]) -> None:
    """A line for each token count: milliseconds, tokens a second, gain and exposed communication; of decode steps then the ops'."""
    rows = [[fmt, str(tokens), plan, *(f"{us.get(c, math.nan) / 1e3:.3f}" for c in ("unfused", "fused", "floor", "floor:sharded")),
             *(f"{tokens / us[c] * 1e6:.0f}" for c in ("unfused", "fused")), f"{us['unfused'] / us['fused'] - 1:+.1%}",
             f"{exposed(us):.1%}", f"{exposed(us, 'floor:sharded'):.1%}"] for (fmt, tokens), (us, plan) in stacks(lines).items()]
    table(console, "ms, tokens/s, gain, exposed communication (over the floor, and over the sharded plan's)",
          ["", "tokens", "plan", "unfused", "fused", "floor", "sharded", "unfused/s", "fused/s", "gain", "exposed", "sharded"],
          rows)
    rows = [[name, fmt, str(tokens), f"{t / 1e3:.3f}", f"{us['unfused'] / t - 1:+.1%}", f"{exposed(us, fused=name):.1%}"]
            for (fmt, tokens), (us, _) in stacks(lines).items() for name, t in us.items() if name.startswith("fused:")]
    if rows:
        table(console, "with other tiles", ["", "", "tokens", "ms", "gain", "exposed"], rows, left=2)
    decoded = {line["format"]: line["layers"] for line in lines if line["candidate"] in OP_ALONE}
    rows = [[fmt, str(tokens), *(f"{us[c]:.2f}" for c in OP_ALONE), f"{us['unfused'] - us['fused']:.0f}",
             f"{saved(us, decoded[fmt]):.0%}", f"{1 - us['fused'] / us['unfused']:.1%}"]
            for (fmt, tokens), (us, _) in stacks(lines).items() if fmt in decoded]
    if rows:
        table(console, "all_reduce_norm_quant alone, us; what a step saves, us, over what two a layer save, and over its time",
              ["", "tokens", "unfused", "fused", "saved", "of the ops'", "of a step"], rows)


def print_experts(console: Console, lines: list[dict]) -> None:
    """A line for each prompt length: milliseconds, tokens of all ranks a second, gain; and the dispatch that is still seen, each
    program's time over its own without a dispatch, in milliseconds, with how much less that is than the library's."""
    rows = []
    for (fmt, tokens), (us, _) in stacks(lines).items():
        ranks = next(line["world_size"] for line in lines if line["format"] == fmt)
        seen = [us["unfused"] - us["floor:unfused"], us["fused"] - us["floor"]]
        rows.append([fmt, str(tokens), *(f"{us[c] / 1e3:.3f}" for c in ("unfused", "fused", "floor:unfused", "floor")),
                     *(f"{ranks * tokens / us[c] * 1e6:.0f}" for c in ("unfused", "fused")),
                     f"{us['unfused'] / us['fused'] - 1:+.1%}",
                     *(f"{t / 1e3:.3f}" for t in seen), f"{1 - seen[1] / seen[0]:.0%}" if seen[0] > 0 else "-"])
    table(console, "ms, tokens/s, gain, exposed dispatch in ms", [
        "", "tokens of a rank", "unfused", "fused", "unfused floor", "floor", "unfused/s", "fused/s", "gain", "unfused dispatch",
        "dispatch", "less"], rows)


def plot_model(path: Path, lines: list[dict]) -> None:
    """Time over the floor's, by token count, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(layout="constrained")
    points: dict[str, list[tuple[int, float]]] = {}
    for (fmt, tokens), (us, _) in stacks(lines).items():
        for name in ("unfused", "fused"):
            points.setdefault(f"{name}, {fmt}", []).append((tokens, us[name] / us["floor"]))
    for name, of_name in points.items():
        axis.plot(*zip(*sorted(of_name), strict=True), marker=".", label=name)
    axis.set(xscale="log", xlabel="tokens", ylabel="time / floor")
    axis.axhline(1, color="grey", linewidth=0.5)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""What the command shows: tables and sentences, with rich."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .compiler.explain import Report
from .tuning import Tuning

MARK = {"fused": "[green]fused[/]", "missed": "[yellow]missed[/]"}


def size(n: float) -> str:
    """Bytes in the unit that keeps the number short: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def share(after: int, before: int) -> str:
    return f"{after / before:.1%}" if before else "-"


def sites(console: Console, report: Report) -> None:
    """One line for each collective of the model, then who runs them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("module", "was", "verdict", "why", "before", "after", *["backend"] * _chosen(report)):
        table.add_column(name, justify="right" if name in ("before", "after") else "left", overflow="fold")
    for s in report.sites:
        names = ", ".join(name.partition(".")[2] for name in s.backends)  # of which op each is, the reason tells
        table.add_row(s.module or "?", s.what, MARK[s.verdict], s.why, size(s.sent_before), size(s.sent_after),
                      *[names] * _chosen(report))
    console.print(table)
    backends(console, [report])
    summary(console, report)


def _chosen(report: Report) -> bool:
    """Whether there is something to say of backends: on a CPU only if one runs that is not a reference."""
    return report.device != "cpu" or any(not name.endswith(".reference") for s in report.sites for name in s.backends)


def backends(console: Console, reports: Iterable[Report]) -> None:
    """Who runs how many collectives at which token counts, how it was chosen, and why others were not to be had."""
    told = [r for r in reports if _chosen(r)]
    if not told:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("backend", "tokens", "sites", "chosen"):
        table.add_column(name, justify="right" if name in ("tokens", "sites") else "left", overflow="fold")
    refused: Counter[str] = Counter()
    for r in told:
        runs = Counter(pair for s in r.sites for pair in (*zip(s.backends, s.chosen, strict=True), *s.inside))
        for (name, how), sites in sorted(runs.items()):
            table.add_row(name, str(r.tokens), str(sites), how or "the only one")
        refused.update(why for s in r.sites for why in s.refused)
    console.print()
    console.print(table)
    for why, times in refused.items():
        console.print(f"[dim]not {why} ({times} sites)[/]", highlight=False)


def where(context: Any) -> str:
    """Where the ranks of a `RankContext` run, as part of a sentence: nothing for a CPU."""
    if context.device.type != "cuda":
        return ""
    name = torch.cuda.get_device_name(context.device)
    return f" on one {name}, so that their times mean nothing" if context.shared else f" on {name}"


def first_difference(a: Tensor, b: Tensor) -> str:
    """Which of two (1, n) texts' tokens is the first that differs: "token 5"."""
    pairs = enumerate(zip(a[0].tolist(), b[0].tolist(), strict=False), 1)
    return f"token {next((i for i, (x, y) in pairs if x != y), 1 + min(a.shape[1], b.shape[1]))}"


def summary(console: Console, report: Report) -> None:
    """Plan, why, and the totals."""
    console.print(f"\n[bold]{report.plan}[/] plan for {report.tokens} tokens ({report.why})")
    console.print(f"{report.fused} of {len(report.sites)} collectives fused; a rank sends {size(report.sent_after)} instead of "
                  f"{size(report.sent_before)} ({share(report.sent_after, report.sent_before)})")


def runs(console: Console, reports: Iterable[tuple[Report, int]]) -> None:
    """What ran in a generation: one line for each plan and token count, then the misses with their reasons."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "plan", "fused", "sent before", "sent after", ""):
        table.add_column(name, justify="left" if name in ("step", "plan") else "right")
    before = after = 0
    misses: dict[tuple[str, str], set[str]] = {}
    told = []
    for r, times in reports:
        told.append(r)
        step = f"{times} x {r.tokens} token{'s' * (r.tokens != 1)}"
        table.add_row(step, r.plan, f"{r.fused}/{len(r.sites)}", size(times * r.sent_before), size(times * r.sent_after),
                      share(r.sent_after, r.sent_before))
        before, after = before + times * r.sent_before, after + times * r.sent_after
        for s in r.sites:
            if s.verdict == "missed":
                misses.setdefault((s.module, s.why), set()).add(r.plan)
    console.print(table)
    backends(console, told)
    for (module, why), plans in misses.items():
        console.print(f"not fused: {module} ({' and '.join(sorted(plans))}): {why}", highlight=False)
    console.print(f"a rank sent {size(after)} instead of {size(before)} ({share(after, before)} of the unfused model's bytes)")


def tuned(console: Console, found: Tuning) -> None:
    """One table for each call: the candidates' microseconds, the fastest in bold."""
    for call, sizes in found.us.items():
        names = list(dict.fromkeys(name for us in sizes.values() for name in us))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("tokens", *names):
            table.add_column(name, justify="right")
        for tokens, us in sizes.items():
            best = min(us, key=us.__getitem__)
            cells = ["" if n not in us else f"[bold green]{us[n]:.1f}[/]" if n == best else f"{us[n]:.1f}" for n in names]
            table.add_row(str(tokens), *cells)
        console.print(f"[bold]{call}[/], {found.world_size} ranks, us{', loopback' if found.loopback else ''}", highlight=False)
        console.print(table)
        console.print()


def timings(console: Console, report: Report) -> None:
    """Seconds of each pass."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass")
    table.add_column("seconds", justify="right")
    for name, seconds in sorted(report.timings.items(), key=lambda t: -t[1]):
        table.add_row(name, f"{seconds:.3f}")
    console.print(table)

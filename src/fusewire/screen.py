"""What the command shows: tables and sentences, with rich."""
from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .compiler.explain import Report, SiteReport

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
    """One line for each collective of the model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("module", "was", "verdict", "why", "before", "after", "backend"):
        table.add_column(name, justify="right" if name in ("before", "after") else "left", overflow="fold")
    for s in report.sites:
        table.add_row(s.module or "?", s.what, MARK[s.verdict], s.why, size(s.sent_before), size(s.sent_after), _backend(s))
    console.print(table)
    summary(console, report)


def _backend(s: SiteReport) -> str:
    return s.backend + "".join(f"\n[dim]not {r}[/]" for r in s.refused)


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
    for r, times in reports:
        step = f"{times} x {r.tokens} token{'s' * (r.tokens != 1)}"
        table.add_row(step, r.plan, f"{r.fused}/{len(r.sites)}", size(times * r.sent_before), size(times * r.sent_after),
                      share(r.sent_after, r.sent_before))
        before, after = before + times * r.sent_before, after + times * r.sent_after
        for s in r.sites:
            if s.verdict == "missed":
                misses.setdefault((s.module, s.why), set()).add(r.plan)
    console.print(table)
    for (module, why), plans in misses.items():
        console.print(f"not fused: {module} ({' and '.join(sorted(plans))}): {why}", highlight=False)
    console.print(f"a rank sent {size(after)} instead of {size(before)} ({share(after, before)} of the unfused model's bytes)")


def timings(console: Console, report: Report) -> None:
    """Seconds of each pass."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass")
    table.add_column("seconds", justify="right")
    for name, seconds in sorted(report.timings.items(), key=lambda t: -t[1]):
        table.add_row(name, f"{seconds:.3f}")
    console.print(table)

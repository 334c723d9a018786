"""What was fused, what was not, and why: the report of a compiled model."""
from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

from ..errors import InputError, StrictError
from ..op import op_of
from ..ops.collectives import all_gather, all_reduce, reduce_scatter
from .plan import Capture, Plan, Site
from .rewrite import Verdict

FUSING = {"fuse_all_gather_matmul", "fuse_matmul_reduce_scatter", "fuse_all_reduce_norm_quant"}


@dataclass(frozen=True)
class SiteReport:
    """One collective of the model: what became of it.

    verdict    "fused" or "missed"; a site is fused when none of its halves is left on its own beside a matmul
    avoidable  a miss that the user's choices or the graph caused, not the lack of a matmul to fuse with
    sent       bytes a rank sends for it, before and after, ring-equivalent
    backend    who runs what it became, and why each backend tried earlier was refused
    """

    module: str
    what: str
    verdict: str
    why: str
    avoidable: bool
    sent_before: int
    sent_after: int
    backend: str
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """One plan of one captured graph at one token count. `why` says why this plan."""

    plan: str
    why: str
    tokens: int
    sites: tuple[SiteReport, ...]
    messages_before: int
    messages_after: int
    timings: dict[str, float]

    @property
    def sent_before(self) -> int:
        return sum(s.sent_before for s in self.sites)

    @property
    def sent_after(self) -> int:
        return sum(s.sent_after for s in self.sites)

    @property
    def fused(self) -> int:
        return sum(s.verdict == "fused" for s in self.sites)

    @property
    def avoidable_misses(self) -> list[SiteReport]:
        return [s for s in self.sites if s.verdict == "missed" and s.avoidable]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        totals = {"fused": self.fused, "sent_before": self.sent_before, "sent_after": self.sent_after}
        return {**asdict(self), **totals}


def explain(compiled: Any, tokens: int | None = None) -> Report:
    """The report of a model compiled with `fusewire.compile` that has run at least once.

    tokens  report the run with that many tokens; by default the run that came last
    """
    if compiled.last is None and not compiled.captures:
        raise InputError("explain: the model has not been captured yet; call the compiled model once")
    if tokens is None:
        found, size = (compiled.last[0], compiled.last[1]) if compiled.last else (compiled.captures[-1], 1)
        return report(found, size)
    for found in reversed(compiled.captures):
        if (size := found.size_at(tokens)) is not None:
            return report(found, size)
    raise InputError(f"explain: no captured graph runs {tokens} tokens; call the compiled model with as many once")


def report(found: Capture, size: int, plan: Plan | None = None) -> Report:
    """The report of a capture where the token symbol is `size`, for the plan that would run or the given one."""
    chosen = found.choose(size)
    plan = plan or chosen
    why = _why(found, size, plan, chosen)
    before, after = _by_site(found.unfused, size), _by_site(plan, size)
    rows = []
    for s in found.sites:
        row = _site(found, plan, s, size)
        rows.append(replace(row, sent_before=before.get(s.index, 0), sent_after=after.get(s.index, 0)))
    return Report(plan.name, why, found.tokens(size), tuple(rows), found.unfused.sent(size)[1], plan.sent(size)[1], found.timings)


def _why(found: Capture, size: int, plan: Plan, chosen: Plan) -> str:
    if plan is not chosen:
        return f"{plan.name} was asked about; {chosen.name} would run"
    if plan.name == "replicated" and (why := found.why_not_sharded(size)):
        return why
    if found.config.plan != "auto":
        return f"plan={found.config.plan} was asked for"
    costs = {p.name: p.sent(size) for p in found.range_of(size).plans.values()}
    return "cost model: " + ", ".join(f"{name} sends {sent} bytes in {messages} messages" for name, (sent, messages) in costs.items())


def _by_site(plan: Plan, size: int) -> dict[int, int]:
    """Site -> bytes; what several sites share counts for the newest."""
    sent: dict[int, int] = {}
    for n, nbytes, _ in plan.wire(size):
        site = max(n.meta.get("sites", ()), default=-1)
        sent[site] = sent.get(site, 0) + nbytes
    return sent


def _site(found: Capture, plan: Plan, site: Site, size: int) -> SiteReport:
    nodes = [n for n in plan.gm.graph.nodes if op_of(n) and site.index in n.meta.get("sites", ())[-1:]
             and "group" in op_of(n).params]
    verdicts = [v for v in plan.verdicts if site.index in v.sites[-1:]]
    made = [n for n in nodes if op_of(n) not in (all_reduce, all_gather, reduce_scatter)]
    whys, missed, avoidable = [], False, False
    for n in nodes:
        if (o := op_of(n)) in (all_reduce, all_gather, reduce_scatter):
            why, can = _leftover(found, plan, n, verdicts, size)
            whys.append(f"{o.name} stays: {why}")
            avoidable |= can
            missed |= can or o is not reduce_scatter
    fusions = list(dict.fromkeys(v.why for v in verdicts if v.kind == "fused" and v.rule in FUSING))
    why = "; ".join([*(f"into {f}" for f in fusions), *whys]) or "nothing of it is left"
    runs = made or nodes
    return SiteReport(site.module, site.what, "missed" if missed else "fused", why, avoidable, 0, 0,
                      ", ".join(dict.fromkeys(f"{op_of(n).name}.{n.meta['backend']}" for n in runs)),
                      tuple(dict.fromkeys(r for n in runs for r in n.meta["refused"])))


def _leftover(found: Capture, plan: Plan, n: fx.Node, verdicts: list[Verdict], size: int) -> tuple[str, bool]:
    """Why a primitive collective is still there, and whether that could have been avoided."""
    anchored = {all_reduce: ("fuse_all_reduce_norm_quant", "split_all_reduce"),
                all_gather: ("fuse_all_gather_matmul",), reduce_scatter: ("fuse_matmul_reduce_scatter",)}[op_of(n)]
    if plan.name == "unfused":
        return "nothing was to be fused", False
    if plan.refused:
        return plan.refused, True
    misses = [v for v in verdicts if v.kind == "missed" and v.rule in anchored]
    if misses:
        return misses[-1].why, misses[-1].avoidable
    off = [r for r in anchored if not found.config.allows(r, found.tokens(size))]
    if off:
        return f"the rule {off[0]} is switched off at {found.tokens(size)} tokens", False
    above = [v for v in verdicts if v.kind == "missed"]
    return (above[-1].why, above[-1].avoidable) if above else ("no rule looked at it", True)


def check_strict(found: Capture) -> None:
    """Raise StrictError if a plan of the capture leaves something unfused that could have been fused."""
    size = found.size_at(None)
    for plan in found.range_of(size).plans.values():
        if bad := report(found, size, plan).avoidable_misses:
            raise StrictError(f"strict: {len(bad)} of {len(found.sites)} collectives are not fused in the {plan.name} plan, the first "
                              f"in {bad[0].module or 'the model'}: {bad[0].why}; fix that, or switch the rule off to accept it")

"""What was fused, what was not, and why: the report of a compiled model."""
from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

from ..config import Link
from ..errors import InputError, StrictError
from ..op import At, op_of
from ..ops.collectives import all_gather, all_reduce, reduce_scatter
from ..ops.moe import combine, combine_all, experts
from .cost import seconds
from .lower import choice
from .plan import COLLECTIVES, Capture, Plan, Site, module_of
from .rewrite import Verdict, val

FUSING = {"fuse_all_gather_matmul", "fuse_matmul_reduce_scatter", "fuse_all_reduce_norm_quant", "fuse_dispatch",
          "fuse_expert_parallel"}


@dataclass(frozen=True)
class SiteReport:
    """One collective of the model: what became of it.

    verdict    "fused" or "missed"; a site is fused when none of its halves is left on its own beside a matmul
    avoidable  a miss that the user's choices or the graph caused, not the lack of a matmul to fuse with
    sent       bytes a rank sends for it, before and after, ring-equivalent; in so many messages after
    backend    who runs what it became
    chosen     for each of these, how it was chosen where there were several: "measured ..." or "modelled"
    refused    the other backends, and why they were not to be had
    inside     (backend, in what and how) of ops with backends of their own that these call, or the experts whose shares they add
    """

    module: str
    what: str
    verdict: str
    why: str
    avoidable: bool
    sent_before: int
    sent_after: int
    messages: int
    backend: str
    chosen: tuple[str, ...]
    refused: tuple[str, ...]
    inside: tuple[tuple[str, str], ...] = ()

    @property
    def backends(self) -> list[str]:
        return self.backend.split(", ") if self.backend else []


@dataclass(frozen=True)
class Report:
    """One plan of one captured graph at one token count. `why` says why this plan, `device` where it runs ("cuda", "cpu")."""

    plan: str
    why: str
    tokens: int
    device: str
    sites: tuple[SiteReport, ...]
    timings: dict[str, float]

    @property
    def sent_before(self) -> int:
        return sum(s.sent_before for s in self.sites)

    @property
    def sent_after(self) -> int:
        return sum(s.sent_after for s in self.sites)

    @property
    def messages(self) -> int:
        return sum(s.messages for s in self.sites)

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
        found, size = compiled.last or (compiled.captures[-1], compiled.captures[-1].size_at(None))
        return report(found, size, found.choose(size, compiled.plan))
    for found in reversed(compiled.captures):
        if (size := found.size_at(tokens)) is not None:
            return report(found, size, found.choose(size, compiled.plan))
    raise InputError(f"explain: no captured graph runs {tokens} tokens; call the compiled model with as many once")


def report(found: Capture, size: int, plan: Plan) -> Report:
    """The report of one plan of a capture where the token symbol is `size`."""
    why = _why(found, size, plan)
    before, after = _by_site(found.unfused, size), _by_site(plan, size)
    text = _Numbers(plan, size)
    rows = []
    for s in found.sites:
        row = _site(found, plan, s, size)
        sent, messages = after.get(s.index, (0, 0))
        rows.append(replace(row, why=text.sub(row.why), sent_before=before.get(s.index, (0, 0))[0], sent_after=sent,
                            messages=messages))
    return Report(plan.name, why, found.tokens(size), found.device.type, tuple(rows), found.timings)


class _Numbers:
    """Puts the numbers of one run into a sentence about symbolic shapes: "2*s5" becomes "4096"."""

    def __init__(self, plan: Plan, size: int):
        self.pattern = re.compile(rf"(?:(\d+)\*)?\b{plan.symbol}\b") if plan.symbol is not None else None
        self.value = size // plan.multiple

    def sub(self, text: str) -> str:
        return self.pattern.sub(lambda m: str(int(m[1] or 1) * self.value), text) if self.pattern else text


def _why(found: Capture, size: int, plan: Plan) -> str:
    if plan.name == "replicated" and (why := found.why_not_sharded(size)):
        return why
    if plan is not found.choose(size, "auto") or found.config.plan != "auto":
        return f"plan={plan.name} was asked for"
    return costs_sentence({p.name: p.sent(size) for p in found.range_of(size).plans.values()}, found.link)


def costs_sentence(costs: dict[str, tuple[int, int]], link: Link) -> str:
    """Why the cost model prefers a plan; plan name -> (bytes, messages)."""
    each = (f"{name} {seconds(sent, n, link) * 1e6:.0f} us for {sent} bytes in {n} messages" for name, (sent, n) in costs.items())
    return "nothing was measured here; the cost model says " + ", ".join(each)


def _by_site(plan: Plan, size: int) -> dict[int, tuple[int, int]]:
    """Site -> (bytes, messages); what several sites share counts for the newest."""
    found: dict[int, tuple[int, int]] = {}
    for n, nbytes, messages in plan.wire(size):
        site = max(n.meta.get("sites", ()), default=-1)
        sent, before = found.get(site, (0, 0))
        found[site] = sent + nbytes, before + messages
    return found


def _site(found: Capture, plan: Plan, site: Site, size: int) -> SiteReport:
    nodes = [n for n in plan.gm.graph.nodes if op_of(n) and site.index in n.meta.get("sites", ())[-1:]
             and "group" in op_of(n).params]
    verdicts = [v for v in plan.verdicts if site.index in v.sites[-1:]]
    made = [n for n in nodes if op_of(n) not in COLLECTIVES]
    whys, missed, avoidable = [], False, False
    for n in nodes:
        if (o := op_of(n)) in COLLECTIVES:
            why, can = _leftover(found, plan, n, verdicts, size)
            whys.append(f"{o.name} stays: {why}")
            avoidable |= can
            missed |= can or o not in (reduce_scatter, combine)
    fusions = list(dict.fromkeys(v.why for v in verdicts if v.kind == "fused" and v.rule in FUSING))
    why = "; ".join([*(f"into {f}" for f in fusions), *whys]) or "nothing of it is left"
    runs = {n: choice(n, plan.at(size)) for n in made or nodes}
    chosen = {f"{op_of(n).name}.{c.backend.name}": c.how for n, c in runs.items()}
    calls = [(op_of(n), val(n.args)) for n in (*nodes, *_experts_of(plan, site))]
    inside = [told for o, args in calls for told in _inside(o, args, plan.at(size))]
    refused = [f"{op_of(n).name}.{r}" for n, c in runs.items() for r in c.refused] + [r for _, _, rs in inside for r in rs]
    return SiteReport(site.module, site.what, "missed" if missed else "fused", why, avoidable, 0, 0, 0, ", ".join(chosen),
                      tuple(chosen.values()), tuple(dict.fromkeys(refused)),
                      tuple(dict.fromkeys((name, how) for name, how, _ in inside)))


def _experts_of(plan: Plan, site: Site) -> list[fx.Node]:
    """The experts, as an op of their own, of the module that makes a sum."""
    if site.what == all_gather.name:
        return []
    return [n for n in plan.gm.graph.nodes if op_of(n) is experts and module_of(n) == site.module]


def _inside(o: Any, args: tuple, at: At) -> list[tuple[str, str, list[str]]]:
    """(backend, in what and how, why not others) of the calls that a call makes, and of those that they make."""
    found = []
    for called, given in o.inside(*args) if o.inside else ():
        c = called.select(*given, at=at)
        how = [f"inside {o.name}", c.how, c.backend.note(*given) if c.backend.note else ""]
        found.append((f"{called.name}.{c.backend.name}", ", ".join(filter(None, how)), [f"{called.name}.{r}" for r in c.refused]))
        found += _inside(called, given, at)
    return found


def _leftover(found: Capture, plan: Plan, n: fx.Node, verdicts: list[Verdict], size: int) -> tuple[str, bool]:
    """Why a primitive collective is still there, and whether that could have been avoided."""
    all_reduces = "fuse_all_reduce_norm_quant", "split_all_reduce"
    anchored = {all_reduce: all_reduces, combine_all: all_reduces, combine: ("fuse_expert_parallel",),
                all_gather: ("fuse_dispatch", "fuse_all_gather_matmul"),
                reduce_scatter: ("fuse_expert_parallel", "fuse_matmul_reduce_scatter")}[op_of(n)]
    if plan.name == "unfused":
        return "nothing was to be fused", False
    if plan.refused:
        return plan.refused, True
    misses = sorted((v for v in verdicts if v.kind == "missed" and v.rule in anchored), key=lambda v: anchored.index(v.rule))
    if misses:  # the most particular rule's, and its last word
        last = [v for v in misses if v.rule == misses[0].rule][-1]
        return last.why, last.avoidable
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
            raise StrictError(f"strict: {len(bad)} of {len(found.sites)} collectives are not fused in the "
                              f"{plan.name} plan, the first in {bad[0].module or 'the model'}: {bad[0].why}; fix that, or switch "
                              "the rule off to accept it")

"""Explain a model from its config alone: no weights, no ranks."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from .. import compat
from ..compiler.capture import Compiled, compile
from ..compiler.cost import seconds
from ..compiler.explain import Report, SiteReport, costs_sentence, report
from ..config import Config
from ..errors import FusewireError
from ..group import close, fake_group
from ..models.skeleton import Skeleton, skeleton

LAYER = re.compile(r"(?<=\.layers\.)\d+")


def explain_model(path: str | Path, world_size: int, tokens: int, quantization: str | None = None, config: Config | None = None,
                  all_logits: bool = False, full: bool = False, device: str | None = None,
                  combine: str | None = None) -> Report:
    """What `compile` would do to the model of a folder or hub name on `world_size` ranks, for one prompt of `tokens` tokens.

    all_logits  the head computes every token's logits, not the last one's alone
    full        capture every layer instead of one of each kind
    device      "cuda", "cpu", or None: whose backends are shown; CUDA's if there is a CUDA device
    combine     as for `parallelize`

    The wire is taken to be NVLink, unless the config says otherwise. InputError as `load` raises it; only config.json is read.
    """
    group = fake_group(world_size)
    try:
        model = skeleton(path, group, quantization, full, combine)
        compiled = compile(model.model, config or Config())
        capture_prompt(compiled, tokens, all_logits, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        found = compiled.captures[-1]
        if (size := found.size_at(tokens)) is None:
            raise FusewireError(f"explain: the captured graph cannot run {tokens} tokens")
        chosen = found.choose(size, compiled.plan)
        reports = {p.name: expand(report(found, size, p), model) for p in (*found.range_of(size).plans.values(), found.unfused)}
        if compiled.config.plan != "auto" or found.why_not_sharded(size):
            return reports[chosen.name]
        costs = {name: (r.sent_after, r.messages) for name, r in reports.items() if name != "unfused"}
        best = min(costs, key=lambda name: seconds(*costs[name], found.link))
        return replace(reports[best], why=costs_sentence(costs, found.link))
    finally:
        close(group)


def capture_prompt(compiled: Compiled, tokens: int, all_logits: bool, device: torch.device) -> None:
    """Capture a skeleton's graph for a prompt of `tokens` tokens, as it would run on a device; any other number runs it too."""
    compiled.capture_only, compiled.device = True, device
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    positions = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    compat.reset_compiler()
    with torch.device("meta"):  # for what the model makes itself, masks and the like
        compiled(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=0 if all_logits else 1)
    if not compiled.captures:
        raise FusewireError("explain: torch.compile captured nothing")


def expand(report: Report, model: Skeleton) -> Report:
    """The report of the whole model: a kept layer's sites, once for each layer that it stands for."""
    by_layer: dict[int, list[SiteReport]] = {}
    before: list[SiteReport] = []
    after: list[SiteReport] = []
    for s in report.sites:
        if m := LAYER.search(s.module):
            by_layer.setdefault(int(m[0]), []).append(s)
        else:
            (after if by_layer else before).append(s)
    whole = {layer: kept for kept, layers in model.stands_for.items() for layer in layers}
    rows = [_renumbered(s, layer) for layer in range(model.layers) for s in by_layer.get(whole[layer], [])]
    return replace(report, sites=(*before, *rows, *after))


def _renumbered(s: SiteReport, layer: int) -> SiteReport:
    return replace(s, module=LAYER.sub(str(layer), s.module))

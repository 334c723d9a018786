"""Measure, on this machine, every backend that a model's calls could run by."""
from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import group as groups
from .. import timing, tuning
from ..backends import workspace
from ..compiler.capture import compile
from ..compiler.plan import Plan
from ..compiler.rewrite import val
from ..config import Config
from ..group import Group
from ..models.skeleton import skeleton
from ..op import Op, op_of
from ..ops.moe import place
from .explain import capture_prompt

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROTATE_BYTES = 160 << 20  # well over an L2 cache: the layers of a model do not find their weights there either
MOST_SETS = 20


@dataclass(frozen=True)
class Call:
    """One call of an op in a plan, with fake args of symbolic sizes."""

    op: Op
    args: tuple
    plan: Plan


def calls_of(path: str | Path, world_size: int, quantization: str | None, device: torch.device,
             tokens: int) -> tuple[int, dict[str, Call]]:
    """(bytes of the workspace that a run of `tokens` needs, `Op.call` -> that call), of a model's config alone: the calls that
    could run by several backends."""
    group = groups.fake_group(world_size)
    try:
        compiled = compile(skeleton(path, group, quantization).model, Config())
        capture_prompt(compiled, max(TOKENS), False, device)
        found = compiled.captures[-1]
        calls: dict[str, Call] = {}
        for plan in found.plans():
            for n in plan.calls():
                o, args = op_of(n), val(n.args)
                if any(b.supports(*args) is None for b in o.backends):
                    calls.setdefault(o.call(*args, at=plan.at(plan.multiple))[0], Call(o, args, plan))
        return max(found.workspace_bytes(tokens).values(), default=0), calls
    finally:
        groups.close(group)


def tune(path: str | Path, group: Group, quantization: str | None, device: torch.device, tokens: Iterable[int] = TOKENS,
         tell: Callable[[str], object] = lambda text: None) -> tuning.Tuning:
    """What the backends of a model's calls took, at each of the `tokens` (of all ranks together) that a plan can run.

    group  the ranks, which all call this alike and get the same answer; a loopback group's is marked
    tell   told what is measured next

    Where an op has one candidate only, there is nothing to measure. Where a candidate asks the device for sizes, all are called one
    by one, else as CUDA graphs. InputError as `explain_model` raises it.
    """
    tokens = sorted(tokens)
    need, calls = calls_of(path, group.world_size, quantization, device, tokens[-1])
    if need:
        workspace.try_open(group.name, need, device)
    us: dict[str, dict[int, dict[str, float]]] = {}
    for (text, call), size in itertools.product(calls.items(), tokens):
        if size % call.plan.multiple:
            continue
        sets = list(inputs(call, size, group, device))
        able, _ = call.op.candidates(*sets[0])
        if len(able) > 1:
            tell(f"{call.op.name}, {size} tokens")
            at = call.op.call(*sets[0])[1]
            us.setdefault(text, {})[at] = timing.measure({b.name: _in_turns(b.run, sets) for b in able}, group, device=device,
                                                         graph=not any(b.asks for b in able))
    return tuning.Tuning(tuning.gpu_name(device), group.world_size, groups.kind(group.name) == "loopback", torch.__version__,
                         datetime.date.today().isoformat(), us)


def inputs(call: Call, tokens: int, group: Group, device: torch.device) -> Iterator[tuple]:
    """Random args for a call, again and again until they do not fit a cache."""
    at = call.plan.at(tokens)
    total = 0
    for _ in range(MOST_SETS if device.type == "cuda" else 1):
        made: list[Tensor] = []

        def real(value: Any, made: list[Tensor] = made) -> Any:
            if isinstance(value, Tensor):
                made.append(random(value, at, device))
                return made[-1]
            return [real(v) for v in value] if isinstance(value, (list, tuple)) else value

        args = [real(a) for a in call.args]
        args[call.op.params.index("group")] = group.name
        if "first" in call.op.params:  # a rank's own experts: with a random number no token would be for anybody
            args[call.op.params.index("first")] = place(call.args[call.op.params.index("gate")][0].shape[0], group.name, device)
        yield tuple(args)
        total += sum(t.numel() * t.element_size() for t in made)
        if total > ROTATE_BYTES:
            return


def random(like: Tensor, at: Callable[[Any], int], device: torch.device) -> Tensor:
    """A tensor of that (symbolic) shape, strides and dtype: normal numbers; positive ones where it may hold scales; any codes."""
    out = torch.empty_strided([at(n) for n in like.shape], [at(n) for n in like.stride()], dtype=like.dtype, device=device)
    if not like.is_floating_point():
        return out.copy_(torch.randint(0, 127, out.shape, device=device))
    if like.dtype in (torch.float32, torch.float8_e8m0fnu):
        return out.copy_(torch.rand(out.shape, device=device) + 0.5)
    return out.copy_(torch.randn(out.shape, device=device))


def _in_turns(run: Callable, sets: list[tuple]) -> Callable[[], object]:
    turn = itertools.cycle(sets)
    return lambda: run(*next(turn))

"""`fusewire bench ops`: our ops against everybody else, in one process group, numbers first."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import backends, formats, timing, tuning  # noqa: F401  (backends register themselves)
from .. import group as groups
from ..backends import workspace
from ..config import GLOO, NVLINK
from ..errors import FusewireError, InputError
from ..group import Group
from . import peers, results, shapes
from .cases import NORM, OPS_MEASURED, Case, cases, inputs, versions
from .checks import Check, fast_sums
from .peers import FOREIGN, candidates, puller, turning
from .ranks import meet, start

LINK_BYTES = 256 << 20
SETTLED_ROUNDS = 5


class Measured(NamedTuple):
    """What one case gave: lines for JSON, why some were left out, and whose numbers were wrong."""

    lines: list[dict[str, Any]]
    out: list[str]
    wrong: list[str]


def command(args: argparse.Namespace) -> int:
    """`fusewire bench ops`: check what was asked for, then measure on every rank."""
    for fmt in args.formats:
        formats.get(fmt)
    if unknown := [op for op in args.ops if op not in OPS_MEASURED]:
        raise InputError(f"unknown op {unknown[0]!r}; known: {', '.join(OPS_MEASURED)}")
    peers.check_tiles(args.tiles)
    shapes.projections(shapes.get(args.shape), args.tensor_parallel_size)
    if args.tensor_parallel_size < 2:
        raise InputError(f"{args.tensor_parallel_size} rank exchanges nothing; give -tp 2 or more")
    return start(rank, args)


def rank(context: Any, args: argparse.Namespace) -> None:
    """All of it on one rank; rank 0 prints and writes. FusewireError, at the end, if anybody's numbers were wrong."""
    group, console = meet(context, args)
    try:
        found, refused = cases(args.ops, args.formats, args.tokens, shapes.get(args.shape), group)
        open_workspace(found, context.device)
        link = None if args.loopback else measured_link(group, context.device)
        tuning.use(group, tuning.load(args.tuning, group, context.device), NVLINK if context.device.type == "cuda" else GLOO)
        about = results.about(context.device) | ({"loopback": True} if args.loopback else {})
        about |= {"settle_s": args.settle} if args.settle else {}
        where = "loopback" if args.loopback else f"link {link / 1e9:.3g} GB/s" if link else "no link measured"
        console.print(f"{args.shape}, {group.world_size} ranks, {about['gpu']}, torch {about['torch']}, {where}")
        lines, wrong = [], []
        out = {sentence: ["the sizes"] for sentence in refused}
        for case in found:
            context.phase(f"measuring {case.what} in {case.fmt}, {case.M} tokens")
            done = measure(case, context.device, link, about, args.tiles, args.settle)
            lines += done.lines
            for sentence in done.out:
                out.setdefault(sentence, []).append(f"{case.what} {case.fmt} {case.M}")
            wrong += done.wrong
            if args.out and context.rank == 0:
                results.write(done.lines, args.out)
        names = {(c.op.name, c.K, c.N): c.what for c in found}
        results.print_ops(console, lines, names)
        for why, places in out.items():
            console.print(f"not measured: {why} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})")
        if args.plot and context.rank == 0:
            results.plot_ops(args.plot, lines, names)
        if wrong:
            raise FusewireError(f"wrong numbers, which were not measured: {'; '.join(wrong)}")
    finally:
        groups.close(group)


def open_workspace(found: list[Case], device: torch.device) -> None:
    """As large as the neediest backend of the neediest case wants it."""
    if device.type != "cuda":
        return
    wants = [(case, b.nbytes) for case in found for b in case.op.backends if b.nbytes]
    needs = [int(nbytes(*inputs(case, 0, torch.device("meta")))) for case, nbytes in wants]
    if needs:
        workspace.open(found[0].group.name, max(needs), device)


def measured_link(group: Group, device: torch.device) -> float | None:
    """Bytes a second that this rank reads from its peers while they read from it; the slower rank's. None without a GPU."""
    if device.type != "cuda":
        return None
    us = timing.measure({"pull": puller(group.name, LINK_BYTES, device)}, group, device=device)
    return LINK_BYTES / us["pull"] * 1e6


def measure(case: Case, device: torch.device, link: float | None, about: dict[str, Any], tiles: Sequence[tuple[int, bool]] = (),
            settle_s: float = 0.0) -> Measured:
    """Check every candidate's numbers, then time those that are right, each at its own clock if they may settle."""
    sets = [inputs(case, v, device) for v in range(versions(case, device))]
    taking_part, out = candidates(case, sets, device, tiles)
    right, wrong = [], []
    check = Check(case, sets[1], device)
    for c in taking_part:
        try:
            c.run(0)
            why = check.why_wrong(c.run(1), c.does)
        except Exception as e:
            if not isinstance(e, FusewireError) and c.name not in FOREIGN:
                raise
            out.append(f"{c.name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
            continue
        if why:
            wrong.append(f"{c.name} of {case.what} in {case.fmt}, {case.M} tokens: {why}")
        else:
            right.append(c)
    del check  # gigabytes of float64
    if not {"norm" if case.op.name == NORM else "gemm"} <= {c.name for c in right}:
        return Measured([], [*out, "the ideal is not known"], wrong)
    us = timing.measure({c.name: turning(c, len(sets)) for c in right}, case.group, SETTLED_ROUNDS if settle_s else None,
                        device=device, settle_s=settle_s)
    fast = fast_sums(case.fmt, device)
    ideal = ideal_us(case, us, link, fast)
    cell = {"suite": "ops", "op": case.op.name, "format": case.fmt, "world_size": case.group.world_size, "M": case.M, "K": case.K,
            "N": case.N, "accumulation": "fast" if fast else "float32"}
    lines = [{**cell, "candidate": name, "us": round(t, 3), "ideal_us": round(ideal, 3), **about} for name, t in us.items()]
    return Measured(lines, out, wrong)


def ideal_us(case: Case, us: dict[str, float], link: float | None, fast: bool = False) -> float:
    """The longer of computing and sending, if one hid the other: the best matmul alone that adds up as ours do, or the norm alone;
    the wire bytes over the measured link. Of all_reduce_norm_quant in loopback it is the copy of as many bytes; of an op with a
    norm before the matmul it has the norm alone on top."""
    if case.op.name == NORM and link is None:
        return us["copy"]
    cublas = "gemm:fast" if fast and "gemm:fast" in us else "gemm"
    wire, norm = case.wire / link * 1e6 if link else 0.0, us.get("norm", 0.0)
    if case.op.name == NORM:
        return max(norm, wire)
    return max(min(t for name, t in us.items() if name in (cublas, "gemm:fusewire")), wire) + norm

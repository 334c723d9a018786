"""`fusewire bench moe`: dispatch and combine of a mixture of experts with DeepSeek-R1's shapes, and on one GPU its kernels."""
from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from .. import backends, compat, formats, timing  # noqa: F401  (backends register themselves)
from .. import group as groups
from ..backends import workspace
from ..backends.triton import expert_parallel as transport
from ..errors import FusewireError, InputError
from ..group import Group
from ..ops import moe
from ..ops.collectives import all_gather, reduce_scatter
from ..ops.moe import dispatch, unpack
from . import moe_kernels, results
from .cases import ROTATED_BYTES, params
from .experts import records
from .moe_kernels import CHOSEN, EXPERTS, GROUPS, HIDDEN, HOW, SCALE, TOP_GROUPS
from .ops import measured_link
from .ranks import meet, start

PARTS = ("exchange", "pack", "grouped_matmul")
MORE_ERROR = 1.5  # than the reference's, of sums that are not in rank order
MOST_VERSIONS = 20


class Way(NamedTuple):
    """One way to exchange tokens or shares.

    what             "dispatch" of tokens whose logits are known, "router + dispatch", or "combine" of the experts' shares
    bytes_per_token  that go to each peer
    run              version of the inputs -> the outputs
    exact            its bits must be those of the first way to do the same in the same format
    """

    what: str
    fmt: str
    candidate: str
    bytes_per_token: int
    run: Callable[[int], list[Tensor]]
    exact: bool = True


def command(args: argparse.Namespace) -> int:
    """`fusewire bench moe`: check what was asked for, then measure on every rank."""
    for fmt in args.formats:
        if formats.get(fmt).layout != "linear":
            raise InputError(f"{fmt} does not travel: its scales are swizzled; give a format with linear ones")
    args.combine = [fmt for fmt in map(moe.combine_format, args.combine) if fmt != "bf16"]  # which is measured anyway
    if unknown := [p for p in args.parts or () if p not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    args.parts = args.parts or (PARTS if args.loopback else PARTS[:1])
    if not args.loopback and (alone := [p for p in args.parts if p != PARTS[0]]):
        raise InputError(f"{alone[0]} is measured on one GPU; add --loopback")
    if args.tensor_parallel_size < 2:
        raise InputError(f"{args.tensor_parallel_size} rank exchanges nothing; give -tp 2 or more")
    return start(rank, args)


def rank(context: Any, args: argparse.Namespace) -> None:
    """All of it on one rank; rank 0 prints and writes. FusewireError, at the end, if anybody's numbers were wrong."""
    group, console = meet(context, args)
    device, lines, out, wrong = context.device, list[dict[str, Any]](), dict[str, None](), list[str]()

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        if args.out and context.rank == 0:
            results.write([line], args.out)

    try:
        link = None if args.loopback else measured_link(group, device)
        about = results.about(device) | ({"loopback": True} if args.loopback else {})
        where = "loopback" if args.loopback else f"link {link / 1e9:.3g} GB/s" if link else "no link measured"
        console.print(f"deepseek-r1, {group.world_size} ranks, {about['gpu']}, torch {about['torch']}, {where}")
        if device.type == "cuda":
            wrong += moe_kernels.check(device, "grouped_matmul" in args.parts)
        for part, measured in (("pack", moe_kernels.pack_lines), ("grouped_matmul", moe_kernels.grouped_lines)):
            if part in args.parts and device.type != "cuda":
                out[f"{part}: its kernels run on CUDA devices, not on {device.type}"] = None
            elif part in args.parts:
                context.phase(f"measuring {part}")
                for line in measured(device, out):
                    keep(line | about)
        if "exchange" in args.parts:
            open_workspace(group, max(args.tokens), args.formats, device)
            for tokens in args.tokens:
                context.phase(f"measuring the exchange of {tokens} tokens")
                for line in exchange(group, device, tokens, args.formats, args.combine, link, out, wrong):
                    keep(line | about)
        print_lines(console, lines)
        for line in lines:
            if "combine_error" in line:
                console.print(f"combine in {line['format']}, {line['tokens']} tokens: off by {line['combine_error']:.1e} of its "
                              "size (root mean square)", highlight=False)
        for why in out:
            console.print(f"not measured: {why}")
        if wrong:
            raise FusewireError(f"wrong numbers, which were not measured: {'; '.join(wrong)}")
    finally:
        groups.close(group)


def open_workspace(group: Group, tokens: int, fmts: list[str], device: torch.device) -> None:
    """As large as the neediest format wants it."""
    if device.type == "cuda":
        x, weight = (torch.empty(n, HIDDEN, dtype=torch.bfloat16, device="meta") for n in (tokens, EXPERTS))
        pushed = max(transport.push_bytes(x, weight, CHOSEN, fmt, [], group.name) for fmt in fmts)
        workspace.open(group.name, max(pushed, group.world_size * tokens * HIDDEN * 2), device)


def exchange(group: Group, device: torch.device, tokens: int, fmts: list[str], homes: list[str], link: float | None,
             out: dict[str, None], wrong: list[str]) -> Iterator[dict[str, Any]]:
    """Lines of all ways that are right, `tokens` being those of each rank, `homes` formats of quantized combines; others get a
    sentence in `out` or `wrong`."""
    sets = inputs(group, tokens, device)
    found: dict[tuple[str, str], list[Way]] = {}
    for way in [*dispatches(group, sets, fmts, out), *combines(group, sets, homes, out)]:
        found.setdefault((way.what, way.fmt), []).append(way)
    for (what, fmt), same in found.items():
        with moe.watch_combine() as seen:
            expected, right = same[0].run(1), list[Way]()
        off = {"combine_error": (seen[0][0] / seen[0][1]) ** 0.5} if seen else {}
        for way in same:
            if why := why_wrong(way, expected, sets, group, device):
                wrong.append(f"{way.candidate} of {what} in {fmt}, {tokens} tokens: {why}")
            else:
                right.append(way)
        del expected
        us = timing.measure({w.candidate: _turning(w, len(sets)) for w in right}, group, device=device)
        for w in right:
            wire = (group.world_size - 1) * tokens * w.bytes_per_token
            yield {"suite": "moe", "what": what, "format": fmt, "world_size": group.world_size, "tokens": tokens,
                   "candidate": w.candidate, "us": round(us[w.candidate], 2), "bytes_per_token": w.bytes_per_token,
                   "wire_us": round(wire / link * 1e6, 2) if link else None} | off


def inputs(group: Group, tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(x, its logits, the router's weight and bias, shares) of this rank, version by version, more than a cache holds. What a rank
    keeps of its shares is what it sends, so that loopback has one meaning."""
    g = torch.Generator(device=device).manual_seed(7919 * group.rank())
    of_all = torch.Generator(device=device).manual_seed(99)
    weight = torch.randn(EXPERTS, HIDDEN, device=device, generator=of_all).bfloat16() / HIDDEN**0.5
    bias = 0.1 * torch.randn(EXPERTS, device=device, generator=of_all)
    versions = max(2, min(MOST_VERSIONS, ROTATED_BYTES // (2 * tokens * HIDDEN))) if device.type == "cuda" else 2
    sets = []
    for _ in range(versions):
        x = torch.randn(tokens, HIDDEN, device=device, generator=g).bfloat16()
        sets.append((x, x.float() @ weight.float().t(), weight, bias, x.repeat(group.world_size, 1)))
    return sets


def dispatches(group: Group, sets: list[tuple], fmts: list[str], out: dict[str, None]) -> Iterator[Way]:
    """Ours in every format, as the reference has it and over the workspace; and the library's gathers of bf16 and logits."""
    x, _, weight, bias, _ = sets[0]
    both = 2 * HIDDEN + 4 * EXPERTS
    yield Way("dispatch", "unfused", "reference", both, lambda i: all_gather(list(sets[i][:2]), group.name))
    if (gather := library_gather(group, out)) is not None:
        yield Way("dispatch", "unfused", gather[0], both, lambda i: [gather[1](t) for t in sets[i][:2]])
    for fmt in fmts:
        static = params(fmt, x.device)
        routing: tuple[Any, ...] = CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt
        nbytes = moe.record_bytes(x, weight, CHOSEN, fmt)
        like = moe.record_like(x, weight, CHOSEN, fmt)

        def by_records(i: int, routing=routing, static=static, like=like) -> list[Tensor]:
            x, scores, *_ = sets[i]
            [got] = all_gather([records(x, scores, static, weight, bias, *routing)], group.name)
            *parts, weights, ids = unpack(got, like)
            return [*parts, ids, weights]

        def by_push(i: int, fmt=fmt, static=static) -> list[Tensor]:
            x, scores, *_ = sets[i]
            return transport.push(x, scores, static, weight, bias, CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt, [], group.name)

        def whole(i: int, run=None, static=static, routing=routing) -> list[Tensor]:
            return run(sets[i][0], static, weight, bias, *routing, group.name)

        yield Way("dispatch", fmt, "reference", nbytes, by_records)
        able, refused = dispatch.candidates(x, static, weight, bias, *routing, group.name)
        for b in able:
            if b.name == "pushed":
                yield Way("dispatch", fmt, b.name, nbytes, by_push)
            yield Way("router + dispatch", fmt, b.name, nbytes, functools.partial(whole, run=b.run))
        out.update({f"dispatch, {why}": None for why in refused})


def combines(group: Group, sets: list[tuple], homes: list[str], out: dict[str, None]) -> Iterator[Way]:
    """The experts' shares, added in rank order as the reference has it and over the workspace; by the library; and quantized."""
    nbytes = 2 * HIDDEN
    yield Way("combine", "bf16", "reference", nbytes, lambda i: [reduce_scatter(sets[i][4], group.name)])
    if group.name in groups.workspaces:
        yield Way("combine", "bf16", "pushed", nbytes, lambda i: [transport.combine(sets[i][4], [], group.name)])
    if (name := library(group)) is not None:
        pg = compat.process_group(group.name)

        def scatter(i: int) -> list[Tensor]:
            y = torch.empty_like(sets[i][0])
            compat.reduce_scatter_into(y, sets[i][4], pg)
            return [y]

        yield Way("combine", "bf16", name, nbytes, scatter, exact=False)
    for fmt in homes:
        def quantized(i: int, fmt: str = fmt) -> list[Tensor]:
            return [moe.combine(sets[i][4], fmt, [], group.name)]

        yield Way("combine", fmt, "reference", moe.share_bytes(sets[0][0], fmt), quantized)


def library(group: Group) -> str | None:
    """What a process group's own collectives are called; None for a group that was made here."""
    if group.name in groups._made:
        return None
    return "nccl" if torch.cuda.is_available() else "gloo"


def library_gather(group: Group, out: dict[str, None]) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    if (name := library(group)) is None:
        out["the library: a loopback group has no collectives"] = None
        return None
    pg = compat.process_group(group.name)

    def gather(x: Tensor) -> Tensor:
        y = x.new_empty((group.world_size * x.shape[0], *x.shape[1:]))
        compat.all_gather_into(y.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8), pg)
        return y

    return name, gather


def why_wrong(way: Way, expected: list[Tensor], sets: list[tuple], group: Group, device: torch.device) -> str | None:
    """The same on every rank."""
    way.run(0)
    got = way.run(1)
    if way.exact:
        same = [a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in zip(got, expected, strict=True)]
        bad = timing.slowest([float(not s) for s in same], group, device)
        return None if not any(bad) else f"outputs {[i for i, b in enumerate(bad) if b]} differ from the first way's"
    truth = reduce_scatter(sets[1][4].double(), group.name)
    errors = timing.slowest([float((y.double() - truth).abs().max()) for y in (got[0], expected[0])], group, device)
    return None if errors[0] <= MORE_ERROR * errors[1] else f"its largest error is {errors[0]:.3g}, the reference's {errors[1]:.3g}"


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def _turning(way: Way, versions: int) -> Callable[[], object]:
    calls = count()
    return lambda: way.run(next(calls) % versions)


def print_lines(console: Console, lines: list[dict[str, Any]]) -> None:
    """Microseconds: the kernels', then every way's beside what the wire alone takes, then dispatch and combine together."""
    moe_kernels.print_lines(console, [line for line in lines if line["what"] in PARTS])
    lines = [line for line in lines if line["what"] not in PARTS]
    cells: dict[tuple[str, str], dict[int, dict[str, dict]]] = {}
    for line in lines:
        cells.setdefault((line["what"], line["format"]), {}).setdefault(line["tokens"], {})[line["candidate"]] = line
    for (what, fmt), by_tokens in cells.items():
        names = list(dict.fromkeys(n for row in by_tokens.values() for n in row))
        first = next(iter(next(iter(by_tokens.values())).values()))
        unfused = cells.get(("dispatch", "unfused"), {}) if what == "dispatch" else by_tokens
        rows = []
        for tokens, row in by_tokens.items():
            wire = next(iter(row.values()))["wire_us"]
            best = min(line["us"] for line in row.values())
            by_library = next((line["us"] for n, line in unfused.get(tokens, {}).items() if n in ("nccl", "gloo")), None)
            rows.append([str(tokens), f"{wire:.1f}" if wire else "-", *(f"{row[n]['us']:.1f}" if n in row else "-" for n in names),
                         f"{best / wire:.2f}" if wire else "-", f"{by_library / best:.2f}x" if by_library else "-"])
        results.table(console, f"{what}, {fmt}: us, {first['bytes_per_token']} bytes a token", [
            "tokens of a rank", "wire", *names, "best / wire", "library / best"], rows, left=0)
    pairs = [(fmt, tokens) for what, fmt in cells if what == "dispatch" for tokens in cells[what, fmt]]
    best = {k: {t: min(line["us"] for line in row.values()) for t, row in rows.items()} for k, rows in cells.items()}
    if pairs and ("combine", "bf16") in best:
        results.table(console, "dispatch + combine, the best ways: us", ["", "tokens of a rank", "us"], [
            [fmt, str(t), f"{best['dispatch', fmt][t] + best['combine', 'bf16'][t]:.1f}"] for fmt, t in pairs])

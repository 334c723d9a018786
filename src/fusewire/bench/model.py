"""`fusewire bench model`: a model-shaped stack, unfused, fused and without its collectives."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import group as groups
from .. import timing
from ..backends.cuda import gemm
from ..compiler.capture import TOKEN_DIMS
from ..config import Config
from ..errors import FusewireError, InputError
from ..models.layers import VocabParallelEmbedding
from ..models.parallelize import format_name
from ..op import OPS
from . import experts, floor, peers, results, shapes
from .cases import NORM, Case, inputs, versions
from .ranks import meet, start
from .repeat import Repeating, repeating
from .stack import stack

SHARDED_FLOOR = "floor:sharded"  # the sharded plan without its collectives
PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 5
# The programs of a row, or more rounds than 5 if they take less: what is exposed is a few percent of a program, a dispatch one.
SECONDS_OF_PROMPTS, SECONDS_OF_EXPERTS, SECONDS_OF_STEPS = 20.0, 60.0, 5.0
# On H200s, 24 layers of 4,096 tokens took 83 ms over and over again, at 1,370 MHz, and 86 in turns with programs that leave the GPU
# another clock. Prompts come one after the other: each program is timed at its own clock.
SETTLE_S = 0.5
FAR = 0.25  # root mean square of the difference of logits, over that of the logits: random weights make small errors large


def command(args: argparse.Namespace) -> int:
    """`fusewire bench model`: check what was asked for, then measure on every rank."""
    for fmt in args.formats:
        format_name(fmt)
    peers.check_tiles(args.tiles)
    if experts := args.shape in shapes.EXPERTS:
        for what, wrong in (("--decode", args.decode), ("--loopback", args.loopback), ("--codegen inductor", args.codegen != "fx"),
                            ("--tiles", args.tiles)):
            if wrong:
                raise InputError(f"{args.shape} has experts, of which a prompt is measured between ranks, as FX runs it; leave "
                                 f"{what} out")
    else:
        shapes.projections(shapes.get(args.shape, *shapes.EXPERTS), args.tensor_parallel_size)
    args.tokens = args.tokens or list(BATCHES if args.decode else PROMPTS[:4] if experts else PROMPTS)
    for what, least in (("layers", 1), ("context", 2), ("tensor_parallel_size", 2)):
        if (n := getattr(args, what)) < least:
            raise InputError(f"--{what.replace('_', '-')} {n} is too small; give {least} or more")
    return start(rank, args)


def rank(context: Any, args: argparse.Namespace) -> None:
    """All of it on one rank; rank 0 prints and writes. FusewireError if the fused model's logits are not the unfused one's."""
    group, console = meet(context, args)
    about: dict[str, Any] = results.about(context.device) | ({"loopback": True} if args.loopback else {})
    about |= {"settle_s": settle_s} if (settle_s := settles(args, context.device)) else {}
    console.print(f"{args.shape}, {args.layers} layers, {group.world_size} ranks, {args.codegen} code, {about['gpu']}, "
                  f"torch {about['torch']}{', loopback' if args.loopback else ''}")
    lines: list[dict[str, Any]] = []
    try:
        for fmt in map(format_name, args.formats):
            cache = (max(args.tokens), args.context) if args.decode else None
            context.phase(f"making {args.layers} layers in {fmt}")
            model = stack(shape_of(args), args.layers, fmt, group, context.device, cache)
            config = Config(plan=args.plan, codegen=args.codegen, tuning=args.tuning,
                            max_tokens=most_tokens(args, group.world_size))
            compiled = repeating(model, config, {"input_ids": 0} if args.decode else TOKEN_DIMS)
            head = {"suite": "decode" if args.decode else "model", "shape": args.shape, "layers": args.layers, "format": fmt,
                    "world_size": group.world_size, **({"context": args.context} if args.decode else {}), "codegen": args.codegen}
            for tokens in args.tokens:
                context.phase(f"measuring {fmt}, {tokens} tokens")
                given = decode_inputs(tokens, args, context.device) if args.decode else prompt_inputs(
                    tokens, args, context.device, context.rank if args.shape in shapes.EXPERTS else 0)
                us, plan = measure(compiled, given, args, group, context.device)
                if args.decode and not args.loopback:
                    us |= op_alone(Case(OPS[NORM], "norm", fmt, tokens, hidden := shapes.get(args.shape).hidden, hidden, group),
                                   context.device, not args.eager)
                lines += [{**head, "tokens": tokens, "candidate": name, "us": round(t, 3), "plan": plan, **about}
                          for name, t in us.items()]
                if args.out and context.rank == 0:
                    results.write(lines[-len(us):], args.out)
            del model, compiled
        (results.print_experts if args.shape in shapes.EXPERTS else results.print_model)(console, lines)
        if args.plot and context.rank == 0:
            results.plot_model(args.plot, lines)
    finally:
        groups.close(group)


def most_tokens(args: argparse.Namespace, world_size: int) -> int:
    """Of a run, of all ranks together: where there are experts, each rank has tokens of its own."""
    return max(args.tokens) * (world_size if args.shape in shapes.EXPERTS else 1)


def shape_of(args: argparse.Namespace) -> shapes.Shape | shapes.Experts:
    return shapes.EXPERTS.get(args.shape) or shapes.get(args.shape)


def prompt_inputs(tokens: int, args: argparse.Namespace, device: torch.device, number: int = 0) -> dict[str, Any]:
    """One prompt of so many tokens; another for each `number`."""
    return {"input_ids": _ids(1, tokens, args, device, number), "position_ids": torch.arange(tokens, device=device)[None],
            "use_cache": False, "logits_to_keep": 1}


def decode_inputs(batch: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One new token for each of so many sequences."""
    return {"input_ids": _ids(batch, 1, args, device), "position_ids": torch.full((1, 1), args.context - 1, device=device),
            "use_cache": False, "logits_to_keep": 1}


def _ids(batch: int, tokens: int, args: argparse.Namespace, device: torch.device, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * number + batch + tokens)  # else the same on every rank
    return torch.randint(shape_of(args).vocab, (batch, tokens), generator=generator).to(device)


def measure(compiled: Repeating, inputs: dict[str, Any], args: argparse.Namespace, group: groups.Group,
            device: torch.device) -> tuple[dict[str, float], str]:
    """(candidate -> microseconds, the plan of the fused one), once the fused logits are known to be the unfused ones."""
    alone = inputs | {"input_ids": held(compiled.model, inputs["input_ids"])}
    if args.loopback:
        inputs = alone  # there is nobody else

    def call(plan: str, given: dict[str, Any] = inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            compiled.plan = plan
            return compiled.run(**given).logits  # ranks hold as many tokens, so that they need not say so in each call
        return run

    config, compiled.shallow = compiled.config, True
    if not args.loopback:  # it is not timed, so that nobody need compile it
        compiled.config = replace(config, codegen="fx")
    want = call("unfused")()
    compiled.config = config
    assert compiled.last is not None
    found, size = compiled.last
    if args.shape in shapes.EXPERTS:
        found.others = found.others or experts.programs(found.choose(size, args.plan), max(args.tokens), device)
        runs = {"unfused": call("library"), "fused": call(args.plan), "floor": call("floor"),
                "floor:unfused": call("floor:library")}
        for name in runs:  # the unfused one first: its experts' tokens are the floors'
            check(runs[name](), want, args, group, device)
        compiled.shallow = False
        return timed(runs, SECONDS_OF_EXPERTS, args, group, device), found.choose(size, args.plan).name
    runs = {"unfused": call("unfused"), "fused": call(args.plan), "floor": call("floor", alone)}
    if "floor" not in found.others:
        found.others["floor"] = floor.without_wire(found.unfused)
    if not args.loopback:  # whose unfused collectives are the reference's, without a wire
        if "library" not in found.others:
            found.others["library"] = floor.by_library(found.unfused)
        runs["unfused"] = call("library")
    if found.why_not_sharded(size) is None and not args.decode:
        if SHARDED_FLOOR not in found.others:
            found.others[SHARDED_FLOOR] = floor.without_wire(found.choose(size, "sharded"))
        runs[SHARDED_FLOOR] = call(SHARDED_FLOOR, alone)
    runs |= {f"fused:{peers.named(*tile)}": gemm.tile(*tile)(call(args.plan)) for tile in args.tiles}
    for name in runs:
        if name.startswith("fused"):
            check(runs[name](), want, args, group, device)
    compiled.shallow = False
    us = timed(runs, SECONDS_OF_STEPS if args.decode else SECONDS_OF_PROMPTS, args, group, device)
    return us, found.choose(size, args.plan).name


def held(model: Any, ids: Tensor) -> Tensor:
    """As many ids of tokens whose embeddings this rank holds: what a rank alone can work on.

    Of the others, which the missing sum would bring, it would get zeros. Their rows, all alike from then on, take a GPU less power
    to multiply, so that at its power limit its clock would be one that no real prompt has.
    """
    for m in model.modules():
        if isinstance(m, VocabParallelEmbedding):
            return m.rows.start + ids % (m.rows.stop - m.rows.start)
    return ids  # all of them


def settles(args: argparse.Namespace, device: torch.device) -> float:
    """For how many seconds a program runs before it is timed: a prompt's, without experts."""
    return SETTLE_S if device.type == "cuda" and not args.decode and args.shape not in shapes.EXPERTS else 0.0


def timed(runs: dict[str, Callable[[], Tensor]], seconds: float, args: argparse.Namespace, group: groups.Group,
          device: torch.device) -> dict[str, float]:
    """Microseconds of each; on CPUs, which are for numbers, in few rounds."""
    return timing.measure(runs, group, ROUNDS, not args.eager, device, seconds if device.type == "cuda" else 0.0,
                          settles(args, device))


def op_alone(case: Case, device: torch.device, graph: bool) -> dict[str, float]:
    """Microseconds of the op that a decode step has twice a layer: as the library's sum and what follows it, and as it is fused."""
    sets = [inputs(case, v, device) for v in range(versions(case, device))]
    found = [next(c for c in peer(case, sets, device) if isinstance(c, peers.Candidate))
             for peer in (peers.collectives, peers.fusewire)]
    calls = {name: peers.turning(c, len(sets)) for name, c in zip(results.OP_ALONE, found, strict=True)}
    return timing.measure(calls, case.group, graph=graph, device=device)


def check(got: Tensor, want: Tensor, args: argparse.Namespace, group: groups.Group, device: torch.device) -> None:
    """On CPUs the fused logits are the unfused ones, bit for bit, unless Inductor made the code; on GPUs, where backends add up in
    other orders, near them. In loopback sums mean nothing, so they have only to be numbers."""
    difference = float((got.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt())
    [difference] = timing.slowest([difference], group, device)
    limit = 1e9 if args.loopback else 0.0 if args.codegen == "fx" and device.type == "cpu" else FAR
    if not difference <= limit:  # never true of NaN
        raise FusewireError(f"the fused logits of {tuple(got.shape)} are off by {difference:.3g} of their size, and at most "
                            f"{limit:g} is allowed; run `fusewire verify` to see in which plan")


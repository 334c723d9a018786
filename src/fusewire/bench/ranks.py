"""How a measurement starts: on ranks of its own, or in loopback on this process alone."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from .. import group as groups
from ..errors import InputError
from ..group import Group
from ..launch import NO_MULTICAST, RankContext, launch
from ..models.parallelize import resolve
from . import results


def start(rank: Callable[[Any, argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `rank` on every rank, or in loopback once, in this process; what the files could not take is refused before."""
    results.check_writable(args.out, args.plot)
    os.environ |= NO_MULTICAST
    if not args.loopback:
        return launch(rank, args.tensor_parallel_size, args)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rank(RankContext(0, 1, 0, device, lambda text: None), args)
    return 0


def meet(context: Any, args: argparse.Namespace) -> tuple[Group, Console]:
    """The group to measure, and where to print: rank 0 alone does."""
    refuse_shared(context)
    group = groups.loopback_group(args.tensor_parallel_size) if args.loopback else resolve(None)
    return group, Console(width=None if os.isatty(1) else 240, soft_wrap=False, quiet=context.rank != 0, highlight=False)


def refuse_shared(context: Any) -> None:
    """InputError if several ranks run on this rank's device: they would take each other's time."""
    if context.shared:
        raise InputError(f"{context.world_size} ranks share {context.device}, so their times mean nothing; give each a GPU, or use "
                         "--loopback")

"""The flags of `fusewire bench`."""
from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from .shapes import EXPERTS, SHAPES


def names(text: str) -> list[str]:
    """a,b,c"""
    return [name.strip() for name in text.split(",") if name.strip()]


def counts(text: str) -> list[int]:
    """1,2,3: positive whole numbers"""
    try:
        found = [int(n) for n in names(text)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive whole numbers like 128,1024")
    return found


def tiles(text: str) -> list[tuple[int, bool]]:
    """256,160t: columns, and whether warpgroups take such tiles in turns"""
    found = [re.fullmatch(r"(\d+)(t?)", name) for name in names(text)]
    if not found or None in found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of columns of tiles like 256,160t")
    return [(int(m[1]), bool(m[2])) for m in found if m]


def seconds(text: str) -> float:
    """0.3: no negative number"""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds like 0.3")
    return found


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    bench = commands.add_parser("bench", help="measure ops, a model-shaped stack or experts against others and the ideal")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="{ops,model,moe}")

    ops = kinds.add_parser("ops", help="our ops against NCCL, PyTorch's fused ops and the matmul alone; numbers are checked first")
    ops.add_argument("--ops", type=names, default="all_gather_matmul,matmul_reduce_scatter", metavar="OP,...",
                     help="of all_gather_matmul, matmul_reduce_scatter, all_reduce_norm_quant, norm_quant_all_gather_matmul "
                          "(default: the first two)")
    ops.add_argument("--tokens", type=counts, default="128,256,512,1024,2048,4096,8192,16384", metavar="N,...",
                     help="tokens of all ranks together (default 128,256,...,16384)")
    ops.add_argument("--settle", type=seconds, default=0.0, metavar="S",
                     help="run each for S seconds before it is timed, and as long then, so that at a GPU's power limit each finds "
                          "its own clock (default 0: short turns, at one clock)")
    ops.set_defaults(main=_ops)

    model = kinds.add_parser("model", help="a stack of decoder layers: unfused, fused, and without its collectives")
    model.add_argument("--layers", type=int, default=8, help="how many (default 8)")
    model.add_argument("--tokens", type=counts, metavar="N,...",
                       help="prompt lengths, of each rank for a shape with experts; with --decode batch sizes (default "
                            "1024,...,32768; with experts 1024,...,8192; with --decode 1,2,...,256)")
    model.add_argument("--decode", action="store_true", help="time one step of a batch with a full cache, instead of a prompt")
    model.add_argument("--context", type=int, default=1024, help="with --decode: tokens of a sequence in the cache (default 1024)")
    model.add_argument("--plan", default="auto", choices=("auto", "replicated", "sharded"), help="of the fused model")
    model.add_argument("--codegen", default="fx", choices=("fx", "inductor"), help="how all of them run (default fx)")
    model.add_argument("--eager", action="store_true", help="call by call, not as CUDA graphs")
    model.set_defaults(main=_model)
    for p in (ops, model):
        p.add_argument("--tiles", type=tiles, default=[], metavar="COLUMNS,...",
                       help="our CUDA kernels with these tiles too, as 256 or, if warpgroups take them in turns, 160t")

    moe = kinds.add_parser("moe", help="dispatch and combine of DeepSeek-R1's experts against NCCL, and on one GPU its kernels")
    moe.add_argument("--tokens", type=counts, default="1,4,16,64,256,512,1024,2048,4096,8192", metavar="N,...",
                     help="tokens of each rank (default 1,4,16,64,256,512,...,8192)")
    moe.add_argument("--parts", type=names, metavar="PART,...",
                     help="of exchange, and, on one GPU, pack, grouped_matmul (default: the first; with --loopback all)")
    moe.add_argument("--combine", type=names, default="", metavar="FORMAT,...",
                     help="also bring shares home quantized, in these: fp8_token, fp8_block, mxfp8")
    moe.set_defaults(main=_moe, plot=None)

    for p in (ops, model, moe):
        default = "bf16,fp8_block,nvfp4" if p is moe else "fp8_tensor"
        p.add_argument("--formats", type=names, default=default, metavar="FORMAT,...", help=f"default {default}")
        if p is not moe:
            known = ", ".join([*SHAPES, *(EXPERTS if p is model else [])])
            p.add_argument("--shape", default="llama-3-70b", help=f"of {known} (default llama-3-70b)")
        p.add_argument("--tensor-parallel-size", "-tp", type=int, default=2, metavar="N", help="how many ranks (default 2)")
        p.add_argument("--loopback", action="store_true",
                       help="one process plays all ranks: kernels and protocol without the wire; results are marked")
        p.add_argument("--tuning", metavar="FILE", help="choose backends by what `fusewire tune` measured")
        p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line of JSON for each measurement")
        if p is not moe:
            p.add_argument("--plot", type=Path, metavar="FILE.png", help="needs the extra `bench`")


def _ops(args: argparse.Namespace) -> int:
    from .ops import command

    return command(args)


def _moe(args: argparse.Namespace) -> int:
    from .moe import command

    return command(args)


def _model(args: argparse.Namespace) -> int:
    from .model import command

    return command(args)

"""Time all_reduce_norm_quant on one GPU, in loopback: kernel and protocol without the wire.

    python -m bench.ops [--tokens 1,8,32] [--formats fp8_tensor,nvfp4] [--hidden 8192] [--world 2] [--json results.jsonl]

Every candidate is captured as a CUDA graph of 20 calls on random data; graphs are replayed in turns, and the median is taken.
Inputs rotate so that large ones come from memory and not from the L2 cache. The candidates:

    fusewire   the op
    unfused    what it replaces, without the wire: the sum of the ranks' rows (an add here), residual add, RMSNorm, quantize,
               one PyTorch kernel for each
    compiled   the same through torch.compile
    copy       a plain copy that reads and writes as many bytes together as the op does: its bandwidth is the op's ceiling

Numbers are checked first: the op's against the unfused program's, where each peer pushed what this rank pushed.
"""
from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fusewire.backends  # noqa: F401  (registers them)
from fusewire import formats, group
from fusewire.backends import workspace
from fusewire.ops.dense import quantize
from fusewire.ops.fused import all_reduce_norm_quant
from fusewire.ops.norm import add_rms_norm, rms_norm

TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096)
CALLS, ROUNDS, REPLAYS = 20, 5, 5
ROTATE_BYTES = 160 << 20  # well over the L2 cache
MOST_SETS = 20


def timed(candidates: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Candidate (a function of the call's number) -> microseconds a call: medians of rounds in which they take turns."""
    graphs = {}
    for name, call in candidates.items():
        call(0)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(CALLS):
                call(i)
        graphs[name].replay()
    us: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            us[name].append(start.elapsed_time(end) * 1e3 / REPLAYS / CALLS)
    return {name: sorted(t)[len(t) // 2] for name, t in us.items()}


def moved(tokens: int, hidden: int, world: int, fmt: str) -> int:
    """Bytes that the op reads and writes in loopback: x, residual and sum, each peer's row written and read, the parts."""
    row = 2 * hidden
    parts = 0 if fmt == "bf16" else sum(math.prod(p.shape(tokens, hidden)) * p.dtype.itemsize for p in formats.get(fmt).parts)
    return tokens * row * (3 + 2 * (world - 1)) + parts


def measure(tokens: int, hidden: int, world: int, fmt: str, name: str) -> dict[str, float]:
    """Candidate -> microseconds, `name` being an open loopback group."""
    sets = max(1, min(MOST_SETS, ROTATE_BYTES // (tokens * hidden * 2)))
    xs, residuals = ([torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(sets)] for _ in range(2))
    weight = (torch.rand(hidden, device="cuda") + 0.5).bfloat16()
    make = formats.get(fmt).params_from_amax
    params = make(torch.tensor(9.0, device="cuda")) if make else []
    nbytes = moved(tokens, hidden, world, fmt)
    sources = [torch.randint(0, 255, (nbytes // 2,), dtype=torch.uint8, device="cuda") for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]

    def fused(i: int) -> list[Tensor]:
        return all_reduce_norm_quant(xs[i % sets], residuals[i % sets], weight, 1e-6, 0.0, False, params, fmt, fmt == "bf16", name)

    def program(x: Tensor, residual: Tensor) -> list[Tensor]:
        total = x.float()
        for _ in range(world - 1):
            total = total + x
        y, total = add_rms_norm.reference(total.bfloat16(), residual, weight, 1e-6, 0.0, False)
        return [total, *([y] if fmt == "bf16" else formats.get(fmt).quantize(y, params))]

    def unfused(x: Tensor, residual: Tensor) -> list[Tensor]:
        total = x + x
        for _ in range(world - 2):
            total = total + x
        y, total = add_rms_norm(total, residual, weight, 1e-6, 0.0, False)
        return [total, *([y] if fmt == "bf16" else quantize(y, params, fmt))]

    checked = all_reduce_norm_quant(xs[0], residuals[0], weight, 1e-6, 0.0, False, params, fmt, True, name)
    total, norm = program(xs[0], residuals[0])[0], rms_norm(checked[0], weight, 1e-6, 0.0, False)
    parts = [] if fmt == "bf16" else quantize(checked[1], params, fmt)
    if not (torch.equal(checked[0], total) and torch.allclose(checked[1].float(), norm.float(), rtol=2**-7)
            and all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(checked[2:], parts, strict=True))):
        raise SystemExit(f"the outputs for {tokens} tokens in {fmt} are wrong")
    torch.compiler.reset()  # each size is compiled for itself
    compiled = torch.compile(program, dynamic=False)
    return timed({
        "copy": lambda i: targets[i % sets].copy_(sources[i % sets]), "fusewire": fused,
        "unfused": lambda i: unfused(xs[i % sets], residuals[i % sets]),
        "compiled": lambda i: compiled(xs[i % sets], residuals[i % sets]),
    })


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--formats", default="fp8_tensor,fp8_token,nvfp4")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line for each measurement")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    g = group.loopback_group(args.world)
    workspace.open(g.name, args.world * max(tokens) * args.hidden * 2)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    print(f"all_reduce_norm_quant, hidden {args.hidden}, world {args.world}, loopback; us a call; % = of the copy's bandwidth")
    print(f"{'format':>12} {'tokens':>6} {'fusewire':>9} {'%':>4} {'unfused':>9} {'compiled':>9} {'copy':>9} {'copy GB/s':>9}")
    for fmt in args.formats.split(","):
        for m in tokens:
            us = measure(m, args.hidden, args.world, fmt, g.name)
            share = us["copy"] / us["fusewire"]
            print(f"{fmt:>12} {m:>6} {us['fusewire']:>9.2f} {share * 100:>4.0f} {us['unfused']:>9.2f} {us['compiled']:>9.2f} "
                  f"{us['copy']:>9.2f} {moved(m, args.hidden, args.world, fmt) / us['copy'] / 1e3:>9.0f}", flush=True)
            if args.json:
                with args.json.open("a") as f:
                    for candidate, t in us.items():
                        f.write(json.dumps({
                            "suite": "ops", "op": "all_reduce_norm_quant", "format": fmt, "world_size": args.world, "M": m,
                            "K": args.hidden, "N": args.hidden, "candidate": candidate, "us": round(t, 3),
                            "ideal_us": round(us["copy"], 3), "loopback": True, **about}) + "\n")
    group.close(g)


if __name__ == "__main__":
    main()

"""Mixture of experts on one GPU, by the shapes of DeepSeek-R1: `python -m fusewire.bench.moe` prints lines of JSON and tables."""
from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import formats, timing
from ..backends.triton import moe as triton
from ..group import Group, close, loopback_group
from ..ops import moe
from ..ops.collectives import all_gather, reduce_scatter
from ..ops.moe import dispatch, route_quantize_pack
from .results import about

HIDDEN, MID, EXPERTS, CHOSEN, GROUPS, TOP_GROUPS, SCALE = 7168, 2048, 256, 8, 8, 4, 2.5
HOW = "grouped_sigmoid_renormalized"
PACK_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
LOCAL = 8  # experts of a rank whose matmuls are timed; 32 ranks would hold all
ROWS_AN_EXPERT = (8, 32, 128, 512, 1024, 2048, 4096)


def _copy(nbytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `nbytes` in all."""
    a = torch.empty(nbytes // 2, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


def pack_lines(device: torch.device, tokens: tuple[int, ...] = PACK_TOKENS) -> Iterator[dict]:
    """Route + quantize + pack of known logits, beside a copy that moves as many bytes; `share` is of the copy's bandwidth."""
    group = loopback_group(1)
    weight = torch.randn(EXPERTS, HIDDEN, device=device).bfloat16()
    bias = 0.1 * torch.randn(EXPERTS, device=device)
    try:
        for fmt in ("nvfp4", "fp8_block"):
            make = formats.get(fmt).params_from_amax
            params = [p.to(device) for p in make(torch.tensor(5.0))] if make else []
            for n in tokens:
                x = torch.randn(n, HIDDEN, device=device).bfloat16()
                scores = triton.logits(x, weight)
                args = (params, weight, bias, CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt)
                record = moe.record_bytes(x, weight, CHOSEN, fmt)
                moved = n * (2 * HIDDEN + 4 * EXPERTS + record)
                us = timing.measure({"pack": partial(triton.pack, x, scores, *args),
                                     "op": partial(triton.route_quantize_pack, x, *args),
                                     "logits": partial(triton.logits, x, weight),
                                     "copy": _copy(moved, device)}, group, device=device)
                yield {"suite": "moe", "what": "pack", "format": fmt, "tokens": n, "us": {k: round(v, 2) for k, v in us.items()},
                       "share": round(us["copy"] / us["pack"], 3), "bytes_per_token": record, **about(device)}
    finally:
        close(group)


def _sizes(rows: int, skewed: bool) -> list[int]:
    """Rows of each expert, `rows` on average; skewed: each has half of what its predecessor has."""
    if not skewed:
        return [rows] * LOCAL
    total = rows * LOCAL
    sizes = [total >> (i + 1) for i in range(LOCAL)]
    return [sizes[0] + total - sum(sizes), *sizes[1:]]


def _candidates(fmt: str, sizes: list[int], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The grouped matmul and what it is compared with: a loop over experts, and one matmul of as many operations."""
    total = sum(sizes)
    f = formats.get(fmt)
    x = [p.to(device) for p in f.quantize(torch.randn(total, HIDDEN, device=device).bfloat16(), [])]
    ws = [f.quantize_weight(torch.randn(MID, HIDDEN, device=device).bfloat16() / HIDDEN**0.5) for _ in range(LOCAL)]
    w = [torch.stack(p) for p in zip(*ws, strict=True)]
    ends = torch.tensor(sizes, device=device).cumsum(0)
    spans = list(itertools.pairwise([0, *ends.tolist()]))
    found: dict[str, Callable[[], Tensor]] = {"triton": lambda: triton.grouped_matmul(x, [], w, ends, fmt, torch.bfloat16)}
    if fmt == "bf16":
        found["loop"] = lambda: [torch.mm(x[0][a:b], v.t()) for (a, b), v in zip(spans, w[0], strict=True)][-1]
        found["single"] = lambda: torch.mm(x[0], w[0][0].t())
        if hasattr(torch.nn.functional, "grouped_mm"):
            offsets, wide = ends.int(), w[0].transpose(1, 2)
            found["grouped_mm"] = lambda: torch.nn.functional.grouped_mm(x[0], wide, offs=offsets)
    elif fmt == "fp8_token":
        def scaled(a: int, b: int, e: int) -> Tensor:
            return torch._scaled_mm(x[0][a:b], w[0][e].t(), scale_a=x[1][a:b], scale_b=w[1][e].t(), out_dtype=torch.bfloat16)

        found["loop"] = lambda: [scaled(a, b, e) for e, (a, b) in enumerate(spans) if a < b][-1]
        found["single"] = lambda: scaled(0, total, 0)
    return found


def grouped_lines(device: torch.device, rows: tuple[int, ...] = ROWS_AN_EXPERT) -> Iterator[dict]:
    """The grouped matmul of one rank's experts (gate or up: 7168 to 2048), balanced and skewed."""
    group = loopback_group(1)
    try:
        for fmt in ("bf16", "fp8_token", "fp8_block"):
            for n in rows:
                for skewed in (False, True):
                    sizes = _sizes(n, skewed)
                    us = timing.measure(_candidates(fmt, sizes, device), group, rounds=3, device=device)
                    yield {"suite": "moe", "what": "grouped_matmul", "format": fmt, "rows_an_expert": n, "skewed": skewed,
                           "us": {k: round(v, 2) for k, v in us.items()},
                           "tflops": round(2e-6 * sum(sizes) * HIDDEN * MID / us["triton"], 1), **about(device)}
    finally:
        close(group)


def _check_rows(device: torch.device) -> str:
    x, weight = (torch.randn(n, HIDDEN, device=device).bfloat16() for n in (77, EXPERTS))
    return "" if torch.equal(triton.logits(x[5:9], weight), triton.logits(x, weight)[5:9]) else "a token's depend on the others"


def _check_pack(device: torch.device, fmt: str) -> str:
    f, g = formats.get(fmt), torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, HIDDEN, device=device, generator=g).bfloat16() for n in (77, EXPERTS))
    params = [p.to(device) for p in f.params_from_amax(torch.tensor(5.0))] if f.params_from_amax else []
    args = (params, weight, 0.1 * torch.randn(EXPERTS, device=device, generator=g), CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt)
    like = moe.record_like(x, weight, CHOSEN, fmt)
    *parts, w, ids = moe.unpack(triton.route_quantize_pack(x, *args), like)
    *want, want_w, want_ids = moe.unpack(route_quantize_pack.reference(x, *args), like)
    if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(parts, want, strict=True)):
        return "the parts are not the reference's"
    same = (ids == want_ids).all(1)
    if same.float().mean() < 0.95:
        return f"{int(same.sum())} of {len(same)} tokens have the reference's experts"
    off = float((w[same] - want_w[same]).abs().max())
    return "" if off <= 1e-4 else f"weights are off by up to {off:.2e}"


def _check_grouped(device: torch.device, fmt: str) -> str:
    f, sizes, k, n = formats.get(fmt), [0, 5, 130, 0, 1, 64], 512, 384
    y = torch.randn(sum(sizes) + 9, k, device=device).bfloat16()
    params = [p.to(device) for p in f.params_from_amax(y.abs().amax().float())] if f.params_from_amax else []
    ws = [f.quantize_weight(torch.randn(n, k, device=device).bfloat16()) for _ in sizes]
    stacked = [torch.stack(p) for p in zip(*ws, strict=True)]
    call = (f.quantize(y, params), params, stacked, torch.tensor(sizes, device=device).cumsum(0), fmt, torch.bfloat16)
    got, ref = triton.grouped_matmul(*call).double(), moe.grouped_matmul.reference(*call).double()
    if got[sum(sizes):].abs().max() > 0:
        return "rows of no expert are not zero"
    off = float((got - ref).norm() / ref.norm())
    return "" if off <= 0.01 else f"{off:.2e} from the reference"


def check(device: torch.device) -> list[str]:
    """What is wrong with the kernels' numbers, before any time is worth something."""
    checks: dict[str, Callable[[], str]] = {"logits": lambda: _check_rows(device)}
    checks |= {f"pack {name}": partial(_check_pack, device, name) for name, f in formats.FORMATS.items() if f.layout == "linear"}
    checks |= {f"grouped_matmul {name}": partial(_check_grouped, device, name) for name in triton.TILE}
    found = []
    for name, run in checks.items():
        try:
            why = run()
        except Exception as e:  # a kernel that does not compile, whatever Triton raises: the others are still worth a look
            why = f"{type(e).__name__}: {e}"
        if why:
            found.append(f"{name}: {why}")
    return found


def exchange_lines(group: Group, device: torch.device, tokens: int) -> list[dict]:
    """Dispatch by all-gather and the combine of `tokens` tokens of every rank, and the dispatch as it was: bf16 and logits. All
    ranks call it; numbers are the slowest rank's."""
    g = torch.Generator(device).manual_seed(group.rank())
    x = torch.randn(tokens, HIDDEN, device=device, generator=g).bfloat16()
    weight = torch.randn(EXPERTS, HIDDEN, device=device, generator=torch.Generator(device).manual_seed(99)).bfloat16()
    shares, scores = x.repeat(group.world_size, 1), torch.zeros(tokens, EXPERTS, device=device)
    calls = {"combine": (2 * HIDDEN, partial(reduce_scatter, shares, group.name)),
             "gather bf16 and logits": (2 * HIDDEN + 4 * EXPERTS, partial(all_gather, [x, scores], group.name))}
    for fmt in ("bf16", "fp8_block", "nvfp4"):
        make = formats.get(fmt).params_from_amax
        params = [p.to(device) for p in make(torch.tensor(5.0))] if make else []
        calls[f"dispatch {fmt}"] = (moe.record_bytes(x, weight, CHOSEN, fmt), partial(
            dispatch, x, params, weight, None, CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt, group.name))
    us = timing.measure({name: call for name, (_, call) in calls.items()}, group, rounds=3, graph=False, device=device)
    return [{"suite": "moe", "what": name, "tokens": tokens, "world_size": group.world_size, "us": round(us[name], 1),
             "bytes_per_token": nbytes, **about(device)} for name, (nbytes, _) in calls.items()]


def main() -> int:
    device = torch.device("cuda")
    wrong = check(device)
    print("\n".join(wrong) or "numbers: as the references'", flush=True)
    rows = []
    for lines in (pack_lines(device), grouped_lines(device)):
        try:
            for line in lines:
                print(json.dumps(line), flush=True)
                rows.append(_row(line))
        except Exception as e:  # as above
            rows.append(f"{type(e).__name__}: {e}")
    print("\n".join(rows))
    return 1 if wrong else 0


def _row(line: dict) -> str:
    first = f"{line['what']:15}{line['format']:10}{line.get('tokens', line.get('rows_an_expert')):6}"
    times = "  ".join(f"{k} {v}" for k, v in line["us"].items())
    last = f"share {line['share']}" if "share" in line else f"{line['tflops']} TFLOP/s"
    return f"{first}{' skewed' if line.get('skewed') else '':8}{times}  {last}"


if __name__ == "__main__":
    sys.exit(main())

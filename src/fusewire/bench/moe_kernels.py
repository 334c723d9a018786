"""The kernels of a mixture of experts on one GPU, with DeepSeek-R1's shapes: whether their numbers are right, and their times."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from .. import formats, timing
from ..backends.triton import moe as triton
from ..errors import FusewireError
from ..group import close, loopback_group
from ..ops import moe
from ..ops.moe import route_quantize_pack
from . import results
from .cases import MOST_VERSIONS, ROTATED_BYTES

HIDDEN, MID, EXPERTS, CHOSEN, GROUPS, TOP_GROUPS, SCALE = 7168, 2048, 256, 8, 8, 4, 2.5
HOW = "grouped_sigmoid_renormalized"
PACK_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
LOCAL = 8  # experts of a rank whose matmuls are timed; 32 ranks would hold all
ROWS_AN_EXPERT = (8, 32, 128, 512, 1024, 2048, 4096)
_PADDING = (32, 128, 256)  # rows to which an expert's are padded for cuBLAS, which does not take all numbers with scales


def _in_turns(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that works on other data each time, so that it comes from memory and not from a cache."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _copy(nbytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `nbytes` in all."""
    a = torch.empty(nbytes // 2, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a)


def pack_lines(device: torch.device, out: dict[str, None], tokens: tuple[int, ...] = PACK_TOKENS) -> Iterator[dict]:
    """Route + quantize + pack of known logits, beside a copy that moves as many bytes; `share` is of the copy's bandwidth."""
    group = loopback_group(1)
    weight = torch.randn(EXPERTS, HIDDEN, device=device).bfloat16()
    bias = 0.1 * torch.randn(EXPERTS, device=device)
    try:
        for fmt in ("nvfp4", "fp8_block"):
            make = formats.get(fmt).params_from_amax
            params = [p.to(device) for p in make(torch.tensor(5.0))] if make else []
            for n in tokens:
                args = (params, weight, bias, CHOSEN, GROUPS, TOP_GROUPS, SCALE, HOW, fmt)
                record = moe.record_bytes(weight, weight, CHOSEN, fmt)
                moved = n * (2 * HIDDEN + 4 * EXPERTS + record)
                versions = min(MOST_VERSIONS, 1 + ROTATED_BYTES // moved)
                xs = [torch.randn(n, HIDDEN, device=device).bfloat16() for _ in range(versions)]
                known = [(x, triton.logits(x, weight)) for x in xs]
                us = timing.measure({"pack": _in_turns([partial(triton.pack, x, scores, *args) for x, scores in known]),
                                     "op": _in_turns([partial(triton.route_quantize_pack, x, *args) for x in xs]),
                                     "logits": _in_turns([partial(triton.logits, x, weight) for x in xs]),
                                     "copy": _in_turns([_copy(moved, device) for _ in xs])}, group, device=device)
                yield {"suite": "moe", "what": "pack", "format": fmt, "tokens": n, "us": {k: round(v, 2) for k, v in us.items()},
                       "share": round(us["copy"] / us["pack"], 3), "bytes_per_token": record}
    finally:
        close(group)


def _sizes(rows: int, skewed: bool) -> list[int]:
    """Rows of each expert, `rows` on average; skewed: each has half of what its predecessor has."""
    if not skewed:
        return [rows] * LOCAL
    total = rows * LOCAL
    sizes = [total >> (i + 1) for i in range(LOCAL)]
    return [sizes[0] + total - sum(sizes), *sizes[1:]]


def _candidates(fmt: str, sizes: list[int], device: torch.device, out: dict[str, None]) -> dict[str, Callable[[], Tensor]]:
    """The grouped matmul and what it is compared with: a loop over experts, and one matmul of as many operations."""
    total = sum(sizes)
    f = formats.get(fmt)
    padded = [p.to(device) for p in f.quantize(torch.randn(total + _PADDING[-1], HIDDEN, device=device).bfloat16(), [])]
    x = [p[:total] for p in padded]
    ws = [f.quantize_weight(torch.randn(MID, HIDDEN, device=device).bfloat16() / HIDDEN**0.5) for _ in range(LOCAL)]
    w = [torch.stack(p) for p in zip(*ws, strict=True)]
    ends = torch.tensor(sizes, device=device).cumsum(0)
    spans = list(itertools.pairwise([0, *ends.tolist()]))
    found: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: triton.grouped_matmul(x, [], w, ends, fmt, torch.bfloat16)}
    if fmt == "bf16":
        found["loop"] = lambda: [torch.mm(x[0][a:b], v.t()) for (a, b), v in zip(spans, w[0], strict=True)][-1]
        found["single"] = lambda: torch.mm(x[0], w[0][0].t())
        if hasattr(torch.nn.functional, "grouped_mm"):
            offsets, wide = ends.int(), w[0].transpose(1, 2)
            found["grouped_mm"] = lambda: torch.nn.functional.grouped_mm(x[0], wide, offs=offsets)
        return found

    def scaled(start: int, n: int, e: int, of_x: Tensor) -> Tensor:
        rows, of_w = padded[0][start:start + n], w[1][e].t()
        return torch._scaled_mm(rows, w[0][e].t(), scale_a=of_x, scale_b=of_w, out_dtype=torch.bfloat16)

    def scales(start: int, n: int) -> Tensor:
        """Of rows, where cuBLAS takes them: aligned, and by blocks column by column."""
        of_x = padded[1][start:start + n]
        return of_x.clone() if fmt == "fp8_token" else of_x.t().contiguous().t()

    def taken(start: int, n: int, e: int) -> tuple[int, int, int, Tensor]:
        """The first matmul of n rows or a few more that cuBLAS does; a RuntimeError if there is none."""
        for rows in (n, *(p for p in _PADDING if p > n)):
            try:
                call = start, rows, e, scales(start, rows)
                scaled(*call)
                return call
            except RuntimeError as why:
                refused = why
        raise refused

    try:
        single = taken(0, total, 0)
        each = [taken(a, b - a, e) for e, (a, b) in enumerate(spans) if a < b]
    except RuntimeError as why:
        out[f"loop and single of {fmt}: {str(why).splitlines()[0]}"] = None
        return found
    found["loop"] = lambda: [scaled(*call) for call in each][-1]
    found["single"] = lambda: scaled(*single)
    return found


def grouped_lines(device: torch.device, out: dict[str, None], rows: tuple[int, ...] = ROWS_AN_EXPERT) -> Iterator[dict]:
    """The grouped matmul of one rank's experts (gate or up: 7168 to 2048), balanced and skewed."""
    group = loopback_group(1)
    try:
        for fmt in ("bf16", "fp8_token", "fp8_block"):
            for n in rows:
                for skewed in (False, True):
                    sizes = _sizes(n, skewed)
                    calls = _candidates(fmt, sizes, device, out)
                    for name, call in list(calls.items()):
                        try:
                            call()
                        except RuntimeError as e:
                            out[f"{name} of {fmt}: {str(e).splitlines()[0]}"] = None
                            del calls[name]
                    us = timing.measure(calls, group, device=device)
                    yield {"suite": "moe", "what": "grouped_matmul", "format": fmt, "rows_an_expert": n, "skewed": skewed,
                           "us": {k: round(v, 2) for k, v in us.items()},
                           "tflops": round(2e-6 * sum(sizes) * HIDDEN * MID / us["triton"], 1)}
    finally:
        close(group)


def _check_rows(device: torch.device) -> str:
    x, weight = (torch.randn(n, HIDDEN, device=device).bfloat16() for n in (8192, EXPERTS))
    few = triton.logits(x[5:9], weight)
    off = [n for n in (9, 77, 600, 2000, 4000, 8192) if not torch.equal(few, triton.logits(x[:n], weight)[5:9])]
    return "" if not off else f"a token's are others among {off} of them"


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


def _check_grouped(device: torch.device, fmt: str, sizes: list[int]) -> str:
    f, k, n = formats.get(fmt), 512, 1920
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


def check(device: torch.device, grouped: bool = True) -> list[str]:
    """What is wrong with the kernels' numbers, before any time is worth something; grouped: those of the grouped matmul too."""
    checks: dict[str, Callable[[], str]] = {"logits": lambda: _check_rows(device)}
    checks |= {f"pack {name}": partial(_check_pack, device, name) for name, f in formats.FORMATS.items() if f.layout == "linear"}
    for name in triton.TILE if grouped else ():  # each kind of tile, of the last more than programs
        for how, sizes in (("few", [0, 5, 130, 0, 1]), ("some", [0, 200, 300, 0, 1]), ("many", [0, 700, 2300, 0, 1, 2000])):
            checks[f"grouped_matmul {name}, {how}"] = partial(_check_grouped, device, name, sizes)
    found = []
    for name, run in checks.items():
        try:
            why = run()
        except Exception as e:  # a kernel that does not compile, whatever Triton raises: the others are still worth a look
            why = str(e) if isinstance(e, FusewireError) else f"{type(e).__name__}: {e}"
        if why:
            found.append(f"{name}: {why}")
    return found


def print_lines(console: Console, lines: list[dict]) -> None:
    """A line for each measurement."""
    for what, size, last in (("pack", "tokens", "share"), ("grouped_matmul", "rows_an_expert", "tflops")):
        mine = [line for line in lines if line["what"] == what]
        if names := list(dict.fromkeys(name for line in mine for name in line["us"])):
            results.table(console, f"{what}: us", ["", size, *names, last], [
                [f"{line['format']}{' skewed' if line.get('skewed') else ''}", str(line[size]),
                 *(f"{line['us'][n]:.1f}" if n in line["us"] else "-" for n in names), str(line[last])] for line in mine])

"""Mixture of experts: choose experts, send tokens to the ranks that hold them, multiply, and bring the results home.

A *record* is all that travels of one token, as bytes in a row: its parts (see `formats`), then the weights of its experts
(float32 each), then their ids. The all-gather transport sends every record to every rank; each rank multiplies what its
own experts were chosen for, and a reduce_scatter adds the ranks' shares. The all-to-all transport sends a record only to the
ranks whose experts it names, and gets one row back from each of them. Both give the same bits: an expert sees the same rows
in the same order, and shares are added in rank order. On request shares are quantized row by row for their way home.
"""
from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..group import resolve
from ..op import Op, op
from .collectives import all_gather, nbytes, reduce_scatter, world_size
from .dense import matmul, quantize

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_LOGIT_BYTES = 1 << 28  # of float32 products at once


# --- which experts


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (tokens, hidden) times a router's weight (experts, hidden), float32 (tokens, experts).

    Row by row the same bits whatever the other rows are, which a matmul's are not: elementwise products, added by halves.
    """
    n, k = weight.shape
    width = 1 << (k - 1).bit_length()
    w = F.pad(weight.float(), (0, width - k))
    rows = max(1, _LOGIT_BYTES // (4 * n * width))
    out = []
    for piece in x.split(rows) if x.shape[0] else [x]:
        p = F.pad(piece.float(), (0, width - k)).unsqueeze(1) * w
        while p.shape[-1] > 1:
            half = p.shape[-1] // 2
            p = p[..., :half] + p[..., half:]
        out.append(p.squeeze(-1))
    return torch.cat(out)


def _top(scores: Tensor, k: int) -> Tensor:
    """The ids of the k largest of each row, largest first; of equal ones the first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _softmax(scores: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    p = scores.softmax(-1)
    ids = _top(p, k)
    return ids, p.gather(1, ids)


def _softmax_renormalized(scores: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    ids, w = _softmax(scores, bias, k, groups, top_groups)
    return ids, w / w.sum(-1, keepdim=True)


def _grouped_sigmoid(scores: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: the bias counts in the choice and not in the weights; only experts of the best groups can be chosen, where
    a group is as good as its two best experts."""
    p = scores.sigmoid()
    c = p if bias is None else p + bias
    grouped = c.view(-1, groups, c.shape[1] // groups)
    best = _top(grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1), top_groups)
    open_ = torch.zeros(c.shape[0], groups, dtype=torch.bool, device=c.device).scatter_(1, best, True)
    ids = _top(c.masked_fill(~open_.repeat_interleave(c.shape[1] // groups, 1), -math.inf), k)
    return ids, p.gather(1, ids)


def _grouped_sigmoid_renormalized(scores: Tensor, bias: Tensor | None, k: int, groups: int,
                                  top_groups: int) -> tuple[Tensor, Tensor]:
    ids, w = _grouped_sigmoid(scores, bias, k, groups, top_groups)
    return ids, w / (w.sum(-1, keepdim=True) + 1e-20)


CHOICES: dict[str, Callable[[Tensor, Tensor | None, int, int, int], tuple[Tensor, Tensor]]] = {
    "softmax": _softmax, "softmax_renormalized": _softmax_renormalized,
    "grouped_sigmoid": _grouped_sigmoid, "grouped_sigmoid_renormalized": _grouped_sigmoid_renormalized,
}
"""How experts are chosen: (logits, bias, k, groups, top_groups) -> (ids int64 (tokens, k), weights float32 (tokens, k))."""


def id_dtype(experts: int) -> torch.dtype:
    """The smallest dtype that holds an expert's id."""
    return torch.uint8 if experts <= 256 else torch.int16


def _routed(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_) -> list[Tensor]:
    return [x.new_empty((x.shape[0], k), dtype=id_dtype(weight.shape[0])), x.new_empty((x.shape[0], k), dtype=torch.float32)]


@op(tokens=("x",), fake=_routed, opaque=True)
def route(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int, scale: float,
          how: str) -> list[Tensor]:
    """Choose k experts for each token.

    x           (tokens, hidden); weight (experts, hidden) and bias (experts,) of the router, any float dtype
    groups      of experts, of which only the best `top_groups` can be chosen; 1 and 1 where there are none
    scale       the weights are multiplied by it
    how         a name of CHOICES
    -> [ids (tokens, k) uint8 (int16 for more than 256 experts), weights (tokens, k) float32], the best expert first
    """
    ids, weights = CHOICES[how](logits(x, weight), None if bias is None else bias.float(), k, groups, top_groups)
    return [ids.to(id_dtype(weight.shape[0])), weights * scale]


# --- records


def _row_bytes(x: Tensor) -> Tensor:
    """(tokens, n) of any dtype as uint8 (tokens, bytes)."""
    # through one dimension: an empty tensor keeps odd strides, which cannot be viewed
    return x.reshape(-1).contiguous().view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())


def pack(tensors: list[Tensor]) -> Tensor:
    """Tensors of (tokens, ...) as one record a token: uint8 (tokens, bytes)."""
    return torch.cat([_row_bytes(t) for t in tensors], 1)


def unpack(records: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What `pack` was given, for any number of tokens; `like` has its dtypes and widths."""
    sizes = [t.shape[1] * t.element_size() for t in like]
    pieces = records.split(sizes, 1)
    # clone: a view as a wider dtype needs an aligned start
    return [p.clone(memory_format=torch.contiguous_format).view(t.dtype) for p, t in zip(pieces, like, strict=True)]


def _quantized(x: Tensor, params: list[Tensor], fmt: str) -> list[Tensor]:
    return [x] if fmt == "bf16" else quantize(x, params, fmt)


def _parts_like(x: Tensor, fmt: str) -> list[Tensor]:
    """Empty tensors of no token with the dtypes and widths of the parts of x."""
    f = formats.get(fmt)
    return [x.new_empty((0, p.shape(1, x.shape[1])[1]), dtype=x.dtype if fmt == "bf16" else p.dtype) for p in f.parts]


def record_like(x: Tensor, weight: Tensor, k: int, fmt: str) -> list[Tensor]:
    """Empty tensors of no token with the dtypes and widths of a record's fields."""
    return [*_parts_like(x, fmt), x.new_empty((0, k), dtype=torch.float32), x.new_empty((0, k), dtype=id_dtype(weight.shape[0]))]


def record_bytes(x: Tensor, weight: Tensor, k: int, fmt: str) -> int:
    """Bytes of one token's record."""
    return sum(t.shape[1] * t.element_size() for t in record_like(x, weight, k, fmt))


def _records(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, fmt: str) -> Tensor:
    return x.new_empty((x.shape[0], record_bytes(x, weight, k, fmt)), dtype=torch.uint8)


@op(tokens=("x",), fake=_records, opaque=True)
def route_quantize_pack(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int,
                        top_groups: int, scale: float, how: str, fmt: str) -> Tensor:
    """`route` and `quantize` (see there) of x (tokens, hidden) -> records, uint8 (tokens, bytes)."""
    ids, weights = route(x, weight, bias, k, groups, top_groups, scale, how)
    return pack([*_quantized(x, params, fmt), weights, ids])


# --- collectives of unequal token counts


def _check_counts(x: list[Tensor], counts: list[int], group: str, what: str, whole: bool) -> None:
    g = resolve(group)
    if len(counts) != g.world_size:
        raise InputError(f"{what}: {len(counts)} token counts were given for {g.world_size} ranks; give one for each")
    if (n := x[0].shape[0]) != (expected := sum(counts) if whole else counts[g.rank()]):
        raise InputError(f"{what}: this rank has {n} rows and the counts {counts} say {expected}; exchange the counts again")


def _total(x: list[Tensor], counts: list[int], group: str) -> list[Tensor]:
    return [t.new_empty((sum(counts), *t.shape[1:])) for t in x]


def sent(rows: int, row_bytes: int, world: int) -> int:
    """Bytes that a rank sends if all ranks together have so many rows and each of them goes to all others: the mean, where some
    have more. It is the same number on every rank, for what ranks decide by it they must decide alike."""
    return (world - 1) * rows * row_bytes // world


def _row_nbytes(x: list[Tensor]) -> int:
    return nbytes([t.new_empty((1, *t.shape[1:])) for t in x])


@op(fake=_total, wire=lambda x, counts, group: sent(sum(counts), _row_nbytes(x), len(counts)))
def all_gather_v(x: list[Tensor], counts: list[int], group: str) -> list[Tensor]:
    """Each (counts[rank], n) -> (sum of counts, n), in rank order: `all_gather` for ranks that hold different numbers of tokens.

    All tensors travel in one message, and no padding does. counts: the same list on every rank.
    """
    _check_counts(x, counts, group, "all_gather_v", whole=False)
    g, mine = resolve(group), pack(x)
    width = mine.shape[1]
    got = g.exchange(mine.view(-1).repeat(g.world_size), [mine.numel()] * g.world_size, [c * width for c in counts])
    return unpack(got.view(-1, width), x)


@op(fake=lambda x, counts, group: x.new_empty((counts[resolve(group).rank()], *x.shape[1:])),
    wire=lambda x, counts, group: sent(sum(counts), _row_nbytes([x]), len(counts)))
def reduce_scatter_v(x: Tensor, counts: list[int], group: str) -> Tensor:
    """(sum of counts, n) -> (counts[rank], n): the sum over ranks of this rank's rows, the bits of `reduce_scatter`."""
    _check_counts([x], counts, group, "reduce_scatter_v", whole=True)
    return _added(x, "bf16", counts, group).to(x.dtype)


def _added(x: Tensor, fmt: str, counts: list[int], group: str) -> Tensor:
    """`reduce_scatter_v` of shares that travel in a format, before it rounds: float32 at least."""
    g, rows = resolve(group), packed_shares(x, fmt)
    width, mine = rows.shape[1], counts[g.rank()]
    got = g.exchange(rows.view(-1), [c * width for c in counts], [mine * width] * g.world_size)
    first, *others = got.view(g.world_size, mine, width)
    total = unpacked_shares(first, x, fmt).to(torch.promote_types(x.dtype, torch.float32), copy=True)
    for share in others:
        total += unpacked_shares(share, x, fmt)
    return total


def exchange_counts(tokens: int, group: str) -> list[int]:
    """How many tokens each rank holds, on every rank: 8 bytes from each, once a step."""
    return [n for [n] in exchange([tokens], group)]


def exchange(numbers: list[int], group: str) -> list[list[int]]:
    """Every rank's numbers, on every rank: as many from each, of 8 bytes."""
    return resolve(group).all_gather(torch.tensor(numbers).view(torch.uint8)).view(-1, 8 * len(numbers)).view(torch.int64).tolist()


# --- shares on their way home


def combine_format(name: str | None) -> str:
    """The format in which shares travel that a `combine` argument means, None being bf16; InputError lists them."""
    known = [f.name for f in formats.FORMATS.values() if f.layout == "linear" and not f.params]
    if (name or "bf16") not in known:
        raise InputError(f"combine={name!r}: experts' shares travel in a format that quantizes row by row, with linear scales and "
                         f"no static one; choose one of {', '.join(known)}")
    return name or "bf16"


def packed_shares(x: Tensor, fmt: str) -> Tensor:
    """Shares (rows, n) as they travel, codes and scales of a row together: uint8 (rows, bytes)."""
    return _row_bytes(x) if fmt == "bf16" else pack(quantize(x, [], combine_format(fmt)))


def unpacked_shares(rows: Tensor, like: Tensor, fmt: str) -> Tensor:
    """The shares in rows of `packed_shares`: float32, or in bf16 of the dtype of `like`, which has their width."""
    if fmt == "bf16":
        return rows.view(like.dtype)
    return formats.get(fmt).dequantize(unpack(rows, _parts_like(like, fmt)), [])


def share_bytes(x: Tensor, fmt: str) -> int:
    """Bytes of one row of shares."""
    return x.shape[1] * x.element_size() if fmt == "bf16" else formats.nbytes(formats.get(fmt), 1, x.shape[1])


_watched: ContextVar[list[tuple[float, float]] | None] = ContextVar("watched", default=None)


@contextlib.contextmanager
def watch_combine() -> Iterator[list[tuple[float, float]]]:
    """Within it each combine that travels quantized sends its shares as they are, too, and adds to the list, before either sum is
    rounded: (the squares of what it is off by, the squares of the unquantized sum), each added up over the ranks of its group.
    For this thread; every rank of the group does it alike."""
    seen: list[tuple[float, float]] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def brought_home(add: Callable[[str], Tensor], fmt: str, group: str) -> Tensor:
    """add(fmt), the sum of shares that travelled in a format; `watch_combine` compares it with add("bf16")."""
    total = add(fmt)
    if fmt != "bf16" and (seen := _watched.get()) is not None:
        exact = add("bf16").double()
        mine = torch.stack([(total - exact).square().sum(), exact.square().sum()])
        off, size = resolve(group).all_gather(mine.view(torch.uint8)).view(torch.float64).view(-1, 2).sum(0).tolist()
        seen.append((off, size))
    return total


def _combined(x: Tensor, fmt: str, counts: list[int], group: str) -> Tensor:
    g = resolve(group)
    return x.new_empty((counts[g.rank()] if counts else x.shape[0] // g.world_size, *x.shape[1:]))


def _combine_bytes(x: Tensor, fmt: str, counts: list[int], group: str) -> int:
    return sent(sum(counts) if counts else x.shape[0], share_bytes(x, fmt), world_size(group))


@op(fake=_combined, wire=_combine_bytes)
def combine(x: Tensor, fmt: str, counts: list[int], group: str) -> Tensor:
    """`reduce_scatter` of experts' shares, or `reduce_scatter_v` if there are counts, each quantized row by row before it travels.

    x    (tokens of all ranks, n); where its rows are zero, nothing is added
    fmt  see `combine_format`
    -> (tokens of this rank, n): dequantized, added in rank order in float32, rounded once
    """
    if not counts and x.shape[0] % (w := world_size(group)):
        raise InputError(f"combine: {x.shape[0]} tokens do not divide over {w} ranks; give the counts of the ranks")
    counts = counts or [x.shape[0] // w] * w
    _check_counts([x], counts, group, "combine", whole=True)
    return brought_home(lambda f: _added(x, f, counts, group), fmt, group).to(x.dtype)


@op(fake=lambda x, fmt, group: torch.empty_like(x, memory_format=torch.contiguous_format),
    wire=lambda x, fmt, group: (world_size(group) - 1) * -(-x.shape[0] // world_size(group))
    * (share_bytes(x, fmt) + share_bytes(x, "bf16")))
def combine_all(x: Tensor, fmt: str, group: str) -> Tensor:
    """`all_reduce` of (tokens, n) shares: `combine` and `all_gather`, of as many rows more as the ranks need to divide them."""
    rows = F.pad(x, (0, 0, 0, -x.shape[0] % world_size(group)))
    return all_gather([combine(rows, fmt, [], group)], group)[0][:x.shape[0]]


# --- experts


@op(fake=lambda n, group, device: torch.empty((), dtype=torch.int64, device=device))
def place(n: int, group: str, device: torch.device) -> Tensor:
    """n * rank, an int64 scalar: the first of n things that each rank of a group holds. The rank is
    looked up when it runs, so graphs of different ranks are the same graph."""
    # filled there, not copied from here, which a CUDA graph would refuse
    return torch.full((), n * resolve(group).rank(), dtype=torch.int64, device=device)


def _grouped(x: list[Tensor], params: list[Tensor], w: list[Tensor], ends: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    return x[0].new_empty((x[0].shape[0], w[0].shape[1]), dtype=dtype)


@op(fake=_grouped)
def grouped_matmul(x: list[Tensor], params: list[Tensor], w: list[Tensor], ends: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    """Each expert's rows times its own weight.

    x       the parts of (rows, k), sorted by expert: expert e has rows ends[e - 1] to ends[e]; those behind the last give zeros
    params  of the format; each a scalar for all rows or (experts,)
    w       `[*weight_parts, *weight_params]` of the format for weights (n, k), each with the experts as an additional first dim
    ends    (experts,) int64
    -> (rows, n) of `dtype`
    """
    out = x[0].new_zeros((x[0].shape[0], w[0].shape[1]), dtype=dtype)
    for e, (start, end) in enumerate(_spans(ends)):
        if start < end:
            out[start:end] = matmul([p[start:end] for p in x], _of_expert(params, e), [t[e] for t in w], None, fmt, dtype)
    return out


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *ends.tolist()]))


def _of_expert(params: list[Tensor], e: int) -> list[Tensor]:
    return [p[e] if p.dim() else p for p in params]


def sort_by_expert(ids: Tensor, first: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The (token, slot) pairs of ids (tokens, k), numbered token * k + slot, in the order of the experts `first`, first + 1, ...

    -> (order (tokens * k,) int64: pairs of these experts, in the order of tokens within one, then all other pairs;
        ends (experts,) int64, see `grouped_matmul`)
    """
    local = ids.reshape(-1).long() - first
    local = torch.where((local < 0) | (local >= experts), experts, local)
    order = local.sort(stable=True).indices
    return order, (local.unsqueeze(0) <= torch.arange(experts, device=ids.device).unsqueeze(1)).sum(1)


def quantize_rows(x: Tensor, params: list[Tensor], ends: Tensor, fmt: str) -> tuple[list[Tensor], list[Tensor]]:
    """Rows (rows, k) sorted by expert -> (their parts, params, each (experts,)): the given ones, or, if there are none, those of
    the largest magnitude among each expert's rows. What lies behind the last expert's rows must be zero."""
    f = formats.get(fmt)
    if fmt == "bf16":
        return [x], []
    if not f.params:
        return quantize(x, [], fmt), []
    expert = torch.bucketize(torch.arange(x.shape[0], device=x.device), ends, right=True).clamp(max=ends.shape[0] - 1)
    if not params:
        assert f.params_from_amax, fmt
        largest = x.new_zeros(ends.shape[0], dtype=torch.float32)
        params = f.params_from_amax(largest.scatter_reduce(0, expert, x.abs().amax(1).float(), "amax"))
    return quantize(x, [p[expert].unsqueeze(1) for p in params], fmt), params


def _shares(x: list[Tensor], params: list[Tensor], ids: Tensor, weights: Tensor, first: Tensor, gate: list[Tensor],
            up: list[Tensor], down: list[Tensor], mid_params: list[Tensor], act: str, fmt: str, dtype: torch.dtype) -> Tensor:
    return x[0].new_empty((x[0].shape[0], down[0].shape[1]), dtype=dtype)


def _matmuls(x: list[Tensor], params: list[Tensor], ids: Tensor, weights: Tensor, first: Tensor, gate: list[Tensor],
             up: list[Tensor], down: list[Tensor], mid_params: list[Tensor], act: str, fmt: str,
             dtype: torch.dtype) -> list[tuple[Op, tuple]]:
    n, intermediate = gate[0].shape[:2]
    ends = ids.new_empty(n, dtype=torch.int64)
    mid = _parts_like(x[0].new_empty((0, intermediate), dtype=dtype), fmt)
    return [(grouped_matmul, (parts, params, w, ends, fmt, dtype)) for parts, w in ((x, gate), (x, up), (mid, down))]


@op(fake=_shares, inside=_matmuls)
def experts(x: list[Tensor], params: list[Tensor], ids: Tensor, weights: Tensor, first: Tensor, gate: list[Tensor],
            up: list[Tensor], down: list[Tensor], mid_params: list[Tensor], act: str, fmt: str, dtype: torch.dtype) -> Tensor:
    """What the experts of this rank add to each token: the weighted sum of down(act(gate(x)) * up(x)) over those chosen.

    x            the parts of (tokens, hidden), with params
    ids, weights (tokens, k) as from `route`
    first        int64 scalar (see `place`): this rank's experts are this one and those that follow, as many as there are weights
    gate, up     weights (intermediate, hidden), down (hidden, intermediate), stacked by expert as `grouped_matmul` takes them
    mid_params   of down's input, static, each (experts,); empty: dynamic, of each expert's own rows
    act          a name of ACTIVATIONS
    -> (tokens, hidden) of `dtype`, added in float32 in the order of slots and rounded once; zero for a token that chose none
    """
    k, n = ids.shape[1], gate[0].shape[0]
    order, ends = sort_by_expert(ids, first, n)
    order = order[:int(ends[-1])] if n else order[:0]
    token = order // k
    rows = [p.view(torch.uint8)[token].view(p.dtype) if p.element_size() == 1 else p[token] for p in x]
    mid = ACTIVATIONS[act](grouped_matmul(rows, params, gate, ends, fmt, dtype))
    mid = mid * grouped_matmul(rows, params, up, ends, fmt, dtype)
    parts, used = quantize_rows(mid, mid_params, ends, fmt)
    y = grouped_matmul(parts, used, down, ends, fmt, dtype)
    total = y.new_zeros((x[0].shape[0], y.shape[1]), dtype=torch.promote_types(dtype, torch.float32))
    for slot in range(k):
        at = (order % k == slot).nonzero().squeeze(1)
        total[token[at]] += y[at] * weights[token[at], slot].unsqueeze(1)
    return total.to(dtype)


# --- fused


@op(rows=("x",))
def dispatch(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, fmt: str, group: str) -> list[Tensor]:
    """`route_quantize_pack` (see there), then an all_gather of the records -> [*parts, ids, weights] of every rank's tokens."""
    [records] = all_gather([route_quantize_pack(x, params, weight, bias, k, groups, top_groups, scale, how, fmt)], group)
    *parts, weights, ids = unpack(records, record_like(x, weight, k, fmt))
    return [*parts, ids, weights]


def _experts(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
             scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
             mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> list[tuple[Op, tuple]]:
    *parts, weights, ids = record_like(x, weight, k, fmt)
    return [(experts, (parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype))]


@op(rows=("x",), inside=_experts)
def expert_parallel(x: Tensor, params: list[Tensor], weight: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int,
                    scale: float, how: str, first: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor],
                    mid_params: list[Tensor], act: str, fmt: str, home: str, counts: list[int], group: str) -> Tensor:
    """`dispatch`, `experts` of the ranks and `reduce_scatter` (see there): (tokens, hidden) -> (tokens, hidden) of x's dtype.

    first   of this rank r; the others of the group hold the experts first + n * (s - r), n being how many this rank has
    home    the format in which shares travel: bf16, or `combine` instead of the reduce_scatter
    counts  tokens of each rank; empty: all hold as many
    """
    if counts:
        records = route_quantize_pack(x, params, weight, bias, k, groups, top_groups, scale, how, fmt)
        [records] = all_gather_v([records], counts, group)
        *parts, weights, ids = unpack(records, record_like(x, weight, k, fmt))
    else:
        *parts, ids, weights = dispatch(x, params, weight, bias, k, groups, top_groups, scale, how, fmt, group)
    shares = experts(parts, params, ids, weights, first, gate, up, down, mid_params, act, fmt, x.dtype)
    if home != "bf16":
        return combine(shares, home, counts, group)
    return reduce_scatter_v(shares, counts, group) if counts else reduce_scatter(shares, group)


def ranks_reached(experts_in_all: int, experts_a_rank: int, k: int) -> float:
    """The chance that a token goes to a given rank, if all sets of k experts are as likely."""
    return 1 - math.comb(experts_in_all - experts_a_rank, k) / math.comb(experts_in_all, k)


def transports(x: Tensor, weight: Tensor, k: int, n: int, fmt: str, tokens: int, world: int,
               home: str = "bf16") -> dict[str, tuple[int, int]]:
    """Transport -> (bytes, messages) that a rank sends, dispatch and combine, if all ranks together have so many `tokens`; `home`
    as for `expert_parallel`.

    The bytes of the all-to-all are those that are expected if every set of k experts is as likely.
    """
    a_token = record_bytes(x, weight, k, fmt) + share_bytes(x, home)
    reached = round(ranks_reached(weight.shape[0], n, k) * 2**20)
    return {"all_gather": (sent(tokens, a_token, world), 2),
            "all_to_all": (sent(tokens, a_token * reached, world) // 2**20 + 8 * (world - 1), 3)}

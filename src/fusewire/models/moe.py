"""Mixture of experts for Hugging Face models: which block is one, and the modules that take its place.

Experts are spread over all ranks. Where ranks hold different tokens (`dp`), those are brought together for the experts and
their results brought back; where ranks hold the same ones (`tp`), their shares are added.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import formats
from ..errors import FormatError, InputError
from ..group import Group, grid
from ..ops.collectives import all_gather, all_reduce, all_reduce_max, reduce_scatter
from ..ops.dense import amax, params_from_amax, quantize
from ..ops.moe import (
    ACTIVATIONS,
    combine,
    combine_all,
    combine_format,
    exchange,
    exchange_counts,
    expert_parallel,
    experts,
    place,
    route,
    watch_combine,
)
from .padding import Step, common_size, padded, why_not, zeroed
from .slices import Slice, cut, even, has_data, whole

PROJECTIONS = ("gate", "up", "down")


class Routing(NamedTuple):
    """`ops.moe.route`'s constants (see there)."""

    k: int
    how: str
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


class Family(NamedTuple):
    """A kind of MoE block: how its config routes, and how a checkpoint calls its parts.

    routing  (config) -> Routing
    block    what checkpoints call the block where the module tree says "mlp"
    names    the checkpoint's names of an expert's gate, up and down projections
    """

    routing: Callable[[Any], Routing]
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def _qwen(c: Any) -> Routing:
    return Routing(c.num_experts_per_tok, "softmax_renormalized" if c.norm_topk_prob else "softmax")


def _deepseek(c: Any) -> Routing:
    how = "grouped_sigmoid_renormalized" if c.norm_topk_prob else "grouped_sigmoid"
    return Routing(c.num_experts_per_tok, how, c.n_group, c.topk_group, c.routed_scaling_factor)


FAMILIES = {
    "Qwen3MoeSparseMoeBlock": Family(_qwen),
    "MixtralSparseMoeBlock": Family(lambda c: Routing(c.num_experts_per_tok, "softmax_renormalized"), "block_sparse_moe",
                                    ("w1", "w3", "w2")),
    "DeepseekV3MoE": Family(_deepseek),
}


@dataclass
class Layout:
    """How a model's ranks share the work: dp * tp ranks, all of which hold experts.

    tp      the group over which heads and dense layers are cut, whose ranks hold the same tokens; None: nothing of that is cut
    dp      the group of ranks that hold different tokens and the same part of everything else; None: all hold the same tokens
    place   which part of the experts this rank holds, of `parts`: consecutive over `dp`
    home    the format in which experts' shares travel to the ranks that hold their tokens: over `dp`, or else over `tp`
    counts  tokens of each rank of `dp` in this step; empty: as many on each
    padding (own, length), int64: of each `length` rows of tokens the first `own` are this rank's, others are there only for
            ranks to hold as many; None: all are its own
    """

    tp: Group | None
    dp: Group | None
    place: int
    parts: int
    home: str = "bf16"
    counts: list[int] = field(default_factory=list)
    padding: Tensor | None = None
    own: Tensor | None = None  # where padding is kept: a CUDA graph reads what is there when it is replayed

    def first(self, n: int, device: torch.device) -> Tensor:
        """The first expert of this rank, where each has n: an int64 scalar."""
        if self.dp is None or self.tp is None:
            return place(n, (self.dp or self.tp).name, device)  # type: ignore[union-attr]
        return place(n, self.dp.name, device) + place(n * self.dp.world_size, self.tp.name, device)

    def begin(self, tokens: int) -> None:
        """Ask the other ranks of `dp` how many tokens they hold: a collective, once a step."""
        self.padding = None
        if self.dp is not None:
            self.counts = exchange_counts(tokens, self.dp.name)

    def begin_compiled(self, given: dict[str, Any], token_dims: dict[str, int], sizes: tuple[int, ...], always: bool) -> Step:
        """The same for a step of compiled code, whose tokens must be as many on each rank: it is padded where they are not.

        given          a Hugging Face decoder's arguments by name, and which dimension of which of them counts its tokens
        sizes, always  see `padding.common_size`, and the errors
        """
        assert self.dp is not None
        ids = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        held = exchange([*ids.shape[:2], why_not(given, token_dims)], self.dp.name)
        self.counts, self.padding = [], None
        if (size := common_size(held, sizes, always)) is None:
            return Step(given)
        if self.own is None:
            self.own = torch.empty(2, dtype=torch.int64, device=ids.device)
        self.padding = self.own.copy_(torch.tensor([ids.shape[1], size]))
        return padded(given, token_dims, ids, size)


def layout(group: Group, dp: int | None, tp: int | None, ep: int | None, combine: str | None = None) -> Layout:
    """The layout of `dp` * `tp` ranks. InputError unless the group has as many, and `ep` says the same, or for a `combine` that
    cannot be."""
    n, home = group.world_size, combine_format(combine)
    if home != "bf16" and n == 1:
        raise InputError(f"combine={combine!r}: on one rank no experts' shares travel; leave combine out, or start more ranks")
    for name, size in (("dp", dp), ("tp", tp)):
        if size is not None and (size < 1 or n % size):
            raise InputError(f"{n} ranks do not divide into {name}={size}; give {name} a divisor of {n}, or start other ranks")
    dp = (1 if tp is None else n // tp) if dp is None else dp
    tp = n // dp if tp is None else tp
    if dp * tp != n:
        raise InputError(f"dp={dp} times tp={tp} is not the number of ranks, {n}; start dp * tp ranks")
    if ep not in (None, n):
        raise InputError(f"ep={ep}: experts are spread over all {n} ranks; leave ep out, or give ep={n}")
    if dp == 1 or tp == 1:
        return Layout(group if dp == 1 else None, group if dp > 1 else None, group.rank(), n, home)
    column, row = grid(group, tp)
    return Layout(row, column, row.rank() * dp + column.rank(), n, home)


class Router(nn.Module):
    """A router's weight (experts, hidden) and correction bias (experts,) or None, whole on every rank."""

    def __init__(self, weight: nn.Parameter, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.register_buffer("e_score_correction_bias", None if bias is None else bias.float())


class Experts(nn.Module):
    """This rank's experts, `mine` of `total`: three weights each, held in a format.

    `stored(expert, projection)` is the name that a checkpoint gives a linear layer, `expert` counting all of them.

    Buffers, for each of gate, up and down: `<name>_<part>` for each weight part and weight param of the format, stacked by
    expert, and `<name>_input_<param>`, or None where it is dynamic: a scalar for gate and up, which read the same tokens, and
    (experts,) for down.
    """

    def __init__(self, name: str, family: Family, mine: Slice, total: int, hidden: int, intermediate: int, fmt: str, like: Tensor):
        super().__init__()
        f = formats.get(fmt)
        self.mine, self.total, self.fmt, self.dtype = mine, total, fmt, like.dtype
        self.stored = functools.partial(stored_name, name, family)
        self.shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        for projection, (n, k) in self.shapes.items():
            if k % f.k_multiple:
                raise FormatError(f"{name}: {fmt} needs a multiple of {f.k_multiple} input features and the {projection} "
                                  f"projections have {k}; use another quantization")
            for part in f.weight_parts:
                dtype = like.dtype if fmt == "bf16" else part.dtype
                self.register_buffer(f"{projection}_{part.name}", like.new_empty((mine.size, *part.shape(n, k)), dtype=dtype))
            for param in f.weight_params:
                self.register_buffer(f"{projection}_{param}", like.new_empty(mine.size, dtype=torch.float32))
        self.parts = [*(p.name for p in f.weight_parts), *f.weight_params]
        self.params = f.params
        for param in f.params:
            self.register_buffer(f"input_{param}", None)
            self.register_buffer(f"down_input_{param}", None)

    def weights(self, projection: str) -> list[Tensor]:
        return [getattr(self, f"{projection}_{part}") for part in self.parts]

    def set_expert(self, e: int, projection: str, parts: list[Tensor]) -> None:
        """Take `[*weight_parts, *weight_params]` of the e-th expert of this rank."""
        for name, part in zip(self.parts, parts, strict=True):
            getattr(self, f"{projection}_{name}")[e].copy_(part)

    def fill(self, gate_up: Tensor, down: Tensor) -> None:
        """Cut and quantize whole weights: (experts, 2 * intermediate, hidden), gate first, and (experts, hidden, intermediate)."""
        if not has_data(gate_up):
            return
        for e, i in enumerate(range(self.mine.start, self.mine.stop)):
            for projection, w in zip(PROJECTIONS, (*gate_up[i].chunk(2), down[i]), strict=True):
                self.set_expert(e, projection, formats.get(self.fmt).quantize_weight(cut(w, whole(w.shape[0]))))

    def static(self, prefix: str) -> list[Tensor]:
        """The static params of an input, none if they are dynamic."""
        found = [getattr(self, f"{prefix}_{param}") for param in self.params]
        return [] if not found or found[0] is None else found

    def set_inputs(self, shared: list[Tensor], down: list[Tensor]) -> None:
        """Take static params: scalars for the tokens, and (experts,) of this rank's for down's inputs."""
        for param, x, y in zip(self.params, shared, down, strict=True):
            setattr(self, f"input_{param}", x)
            setattr(self, f"down_input_{param}", y)

    def extra_repr(self) -> str:
        return f"{self.fmt}, experts {tuple(self.mine)} of {self.total}"


def stored_name(name: str, family: Family, expert: int, projection: str) -> str:
    """What a checkpoint calls a projection of an expert of the module `name` ("...mlp.experts")."""
    return f"{in_files(name, family)}.{expert}.{family.names[PROJECTIONS.index(projection)]}"


def in_files(name: str, family: Family) -> str:
    """What a checkpoint calls a module of a block."""
    return name.replace(".mlp.", f".{family.block}.")


class MoE(nn.Module):
    """(..., hidden) -> the same: every token's experts, and those that all tokens share, whose last layer leaves its sum to us."""

    def __init__(self, gate: Router, experts: Experts, shared_experts: nn.Module | None, routing: Routing, act: str,
                 layout: Layout):
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self.routing, self.act, self.layout = routing, act, layout

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = self.routed(flat)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        if (over := self.layout).tp is not None:
            quantized = over.dp is None and over.home != "bf16"
            y = combine_all(y, over.home, over.tp.name) if quantized else all_reduce(y, over.tp.name)
        return y.view(x.shape)

    def routed(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> the share of the experts of this rank's `dp` group."""
        e, r, dp, home = self.experts, self.routing, self.layout.dp, self.layout.home
        params = e.static("input")
        if e.params and not params:
            x = zeroed(x, self.layout.padding)  # for all that follows: an expert's scale is of all rows that it gets
            params = params_from_amax(amax(x) if dp is None else all_reduce_max(amax(x), dp.name), e.fmt)
        routed = self.gate.weight, self.gate.e_score_correction_bias, r.k, r.groups, r.top_groups, r.scale, r.how
        first = self.layout.first(e.mine.size, x.device)
        mine = first, *map(e.weights, PROJECTIONS), e.static("down_input"), self.act, e.fmt
        if dp is not None and self.layout.counts:
            return expert_parallel(x, params, *routed, *mine, home, self.layout.counts, dp.name)
        parts = [x] if e.fmt == "bf16" else quantize(x, params, e.fmt)
        ids, weights = route(x, *routed)
        if dp is None:
            return experts(parts, params, ids, weights, *mine, x.dtype)
        *parts, ids, weights = all_gather([*parts, ids, weights], dp.name)
        shares = experts(parts, params, ids, weights, *mine, x.dtype)
        return reduce_scatter(shares, dp.name) if home == "bf16" else combine(shares, home, [], dp.name)


def idle(model: nn.Module) -> None:
    """Take part in a step for which this rank has no tokens (`parallelize` with dp): its experts work for those of the others.

    InputError for a compiled model: that is called with inputs of no tokens, as the other ranks call it with theirs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"idle was given a {type(model).__name__}, not a module; call a compiled model with inputs of no tokens "
                         "instead, such as input_ids of shape (1, 0)")
    model.layout.begin(0)
    for block in model.modules():
        if isinstance(block, MoE):
            block(block.gate.weight.new_empty((0, block.gate.weight.shape[1]), dtype=block.experts.dtype))


@dataclass(frozen=True)
class CombineError:
    """How far experts' sums are off because their shares travelled in `fmt`: root mean square over that of the sums of unquantized
    shares, both before they are rounded, of all the `layers` with experts and `tokens`."""

    fmt: str
    error: float
    tokens: int
    layers: int

    def sentence(self) -> str:
        return (f"combine in {self.fmt}: off by {self.error:.1e} of its size (root mean square) over {self.tokens} tokens "
                f"in {self.layers} layers")


def combine_error(model: nn.Module, pieces: list[Tensor]) -> CombineError | None:
    """Run a model (not a compiled one) on (1, n) token ids, piece by piece, and compare its combines with unquantized ones; None if
    they are not quantized. All ranks do it together, each with tokens; where they hold their own, those of the `dp` group count."""
    blocks = [m for m in model.modules() if isinstance(m, MoE)]
    if not blocks or (over := blocks[0].layout).home == "bf16":
        return None
    with torch.no_grad(), watch_combine() as seen:
        for ids in pieces:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    off, size = sum(o for o, _ in seen), sum(s for _, s in seen)
    tokens = sum(ids.shape[1] for ids in pieces)
    if over.dp is not None:
        tokens = sum(exchange_counts(tokens, over.dp.name))
    return CombineError(over.home, math.sqrt(off / size) if size else 0.0, tokens, len(blocks))


def is_moe(module: nn.Module) -> bool:
    """Does a module choose among experts?"""
    return isinstance(getattr(module, "experts", None), nn.Module)


def replace_blocks(model: nn.Module, over: Layout, format_of: Callable[[str], str]) -> list[str]:
    """Put `MoE` in the place of every block that chooses among experts; -> the names of the blocks.

    InputError for a block, an activation or a number of experts that is not supported.
    """
    config = model.config.get_text_config()
    found = []
    for name, block in list(model.named_modules()):
        if not is_moe(block):
            continue
        if (family := FAMILIES.get(type(block).__name__)) is None:
            raise InputError(f"{name}: {type(block).__name__} is not a mixture of experts that is known here; known are "
                             f"{', '.join(FAMILIES)}")
        if config.hidden_act not in ACTIVATIONS:
            raise InputError(f"{name}: the activation {config.hidden_act!r} of its experts is not supported; supported are "
                             f"{', '.join(ACTIVATIONS)}")
        n, hidden, intermediate = block.experts.down_proj.shape
        if n % over.parts:
            raise InputError(f"{name}: {n} experts do not divide over {over.parts} ranks; use another number of ranks")
        held = format_of(stored_name(f"{name}.experts", family, 0, "gate"))
        if hidden % (needed := formats.get(over.home).k_multiple):
            raise FormatError(f"{name}: combine={over.home!r} needs a multiple of {needed} hidden features and there are {hidden}; "
                              "use another format")
        own = Experts(f"{name}.experts", family, even(n, over.place, over.parts), n, hidden, intermediate, held,
                      block.experts.down_proj)
        own.fill(block.experts.gate_up_proj, block.experts.down_proj)
        router = Router(block.gate.weight, getattr(block.gate, "e_score_correction_bias", None))
        router.stored = in_files(f"{name}.gate", family)
        model.set_submodule(name, MoE(router, own, getattr(block, "shared_experts", None), family.routing(config),
                                      config.hidden_act, over))
        found.append(name)
    return found

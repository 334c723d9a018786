"""Random tensor-parallel programs: an aten + fusewire graph, its inputs on every rank, and two ways to evaluate it.

A program is what a tensor-parallel decoder is made of (norms, column- and row-parallel matmuls, all_reduces, a residual),
with everything a real capture may do to confuse a rule: views, transposes, several readers, odd token counts, operands that
are computed late. Inputs obey the contract of a tensor-parallel model: activations, norm weights and scales of replicated
tensors are equal on all ranks; the weights of matmuls differ, and so does whatever is computed from them before an all_reduce.
"""
from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusewire import formats, group
from fusewire.compiler.rewrite import is_aten
from fusewire.group import Group
from fusewire.op import Op, op_of
from fusewire.ops.collectives import all_reduce
from fusewire.ops.dense import amax, matmul, params_from_amax, quantize, relayout
from fusewire.ops.moe import experts, place, route
from fusewire.ops.norm import add_rms_norm, rms_norm

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

FORMATS = ("bf16", "fp8_tensor", "fp8_token", "fp8_block", "nvfp4", "mxfp8", "nvfp4:128x4", "mxfp8:128x4")
WORLDS = (2, 3, 4, 8)
E4M3 = torch.float8_e4m3fn
STRIDED_NORM = "norm of a strided tensor by hand"  # our norm sums contiguous rows: another order of the sum


# --- groups

sent: dict[int, int] = {}  # rank -> bytes it really sent through the groups below


@functools.cache
def groups(world: int) -> tuple[Group, Group, Group]:
    """For `world` simulated ranks: all of them, all of them again, and (where that divides) this rank's half."""
    a, b = group.simulated_group(world), group.simulated_group(world)
    return _counted(a), _counted(b), _counted(_parts_of(a, world // 2 if world % 2 == 0 and world > 2 else world))


def _counted(g: Group) -> Group:
    """The group, with what its ranks send added up in `sent`."""

    def count(exchange: Callable[[Tensor], Tensor], share: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            rank = group._thread.rank
            sent[rank] = sent.get(rank, 0) + (g.world_size - 1) * x.numel() // share
            return exchange(x)

        return run

    return group._register(replace(g, all_gather=count(g.all_gather, 1), all_to_all=count(g.all_to_all, g.world_size)))


def members(g: Group, rank: int) -> range:
    """The ranks that exchange with `rank` , itself included."""
    first = rank // g.world_size * g.world_size
    return range(first, first + g.world_size)


def _parts_of(g: Group, size: int) -> Group:
    """Disjoint groups of `size` neighbours, on top of a group whose ranks all come to the same collectives."""
    first = lambda: g.rank() // size * size  # noqa: E731

    def all_gather(x: Tensor) -> Tensor:
        return g.all_gather(x).view(g.world_size, -1)[first():first() + size].reshape(-1)

    def all_to_all(x: Tensor) -> Tensor:
        every = g.all_gather(x).view(g.world_size, size, -1)
        return every[first():first() + size, g.rank() % size].reshape(-1)

    return Group(f"{g.name}/{size}", size, lambda: g.rank() % size, all_gather, all_to_all)


# --- a program


@dataclass
class Program:
    """A captured graph and its inputs.

    sizes   the token symbol's values to run it for; one, not used, if the shapes are static
    inputs  (rank, size) -> the values of the placeholders
    full    the graph is to go through `plan.capture`; its fake values are on the CPU, otherwise on "meta"
    exact   nothing is quantized, so it can be compared with float64
    notes   what the generator put in, for a reader of a failure
    """

    seed: int
    world: int
    group: Group
    gm: fx.GraphModule
    fakes: list
    sizes: list[int]
    symbolic: bool
    full: bool
    exact: bool
    notes: list[str]
    makers: list[Callable] = field(default_factory=list)

    def inputs(self, rank: int, size: int) -> list:
        return [make(rank, size) for make in self.makers]


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**63)  # integers only: their hash is the same in every process


@functools.lru_cache(4096)
def weight(fmt: str, n: int, k: int, dtype: torch.dtype, index: int, rank: int) -> list[Tensor]:
    """One of a few weights of each kind and rank, as its flat list of parts and params."""
    w = torch.randn(n, k, generator=generator(n, k, index, rank)) / k**0.5
    return [w.to(dtype)] if fmt == "bf16" else formats.get(fmt).quantize_weight(w.to(dtype))


class Builder:
    """Writes a graph node by node, each with its fake value; `build` is the whole of it."""

    def __init__(self, seed: int):
        self.seed, self.rng, self.side = seed, random.Random(seed), random.Random(-1 - seed)
        r = self.rng
        self.world = r.choices(WORLDS, (40, 20, 25, 15))[0]
        self.groups = groups(self.world)
        self.group = self.groups[0]
        self.dtype = r.choices((torch.bfloat16, torch.float32, torch.float16), (70, 20, 10))[0]
        self.hidden, self.inner = r.choice((32, 64, 96)), r.choice((32, 64))
        self.special = r.choices(("", "nan", "zero", "huge"), (90, 4, 3, 3))[0]
        self.graph, self.makers, self.notes, self.outputs = fx.Graph(), [], [], []
        self.formats_used: set[str] = set()
        self.several_groups = self.chance(0.12)
        self.weights = 0
        self._sizes()

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _sizes(self) -> None:
        r, w = self.rng, self.world
        self.symbolic = self.chance(0.08)
        self.wide = self.chance(0.4)  # activations are (batch, sequence, hidden)
        self.batch = r.choice((1, 1, 2, 3)) if self.wide else 1
        if self.symbolic:
            self.sizes = [w * r.randint(2, 5), r.choice((w + 1, 2 * w + 1, 5))]
            self.env = ShapeEnv()
            self.mode = FakeTensorMode(shape_env=self.env)
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            like = self.mode.from_tensor(torch.zeros(self.sizes[0]), source=ConstantSource("s"), symbolic_context=context)
            self.size = like.shape[0]
            self.seq = self.graph.placeholder("s")
            self.seq.meta["val"] = self.size
            self.makers.append(lambda rank, size: size)
        else:
            seqs = [w, 2 * w, 3 * w, 4 * w] * 5 + [0, 1, w - 1, w + 1, 2 * w + 1, 5, self.hidden, self.hidden, 33, 130]
            self.size = self.seq = r.choice(seqs)
            self.sizes = [self.size]
            self.mode = torch.device("meta")  # shapes alone, several times quicker than a FakeTensorMode
        self.tokens = self.batch * self.size
        self.rows = self.seq if self.batch == 1 else self.call(operator.mul, self.seq, self.batch) if self.symbolic else self.tokens

    # --- nodes

    def input(self, name: str, shape: tuple, dtype: torch.dtype, make: Callable[[int, int], Tensor]) -> fx.Node:
        """A placeholder; `make(rank, size)` is its value. Placeholders come first, wherever they are asked for."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            n = self.graph.placeholder(f"{name}_{len(self.makers)}")
        with self.mode:
            n.meta["val"] = torch.empty(shape, dtype=dtype)
        self.makers.append(make)
        return n

    def call(self, target: Op | Callable, *args, **kwargs):
        """A call: its node, or for several outputs the list of their getitem nodes."""
        overload = target.target if isinstance(target, Op) else target
        n = self.graph.call_function(overload, args, kwargs)
        n.meta["val"] = value = overload(*fx.map_arg(args, lambda a: a.meta["val"]), **kwargs)
        if not isinstance(value, (list, tuple)):
            return n
        parts = [self.graph.call_function(operator.getitem, (n, i)) for i in range(len(value))]
        for p, v in zip(parts, value, strict=True):
            p.meta["val"] = v
        return parts

    def random(self, name: str, shape: tuple, dtype: torch.dtype | None = None, *, same: bool, spread: float = 1.0,
               centre: float = 0.0) -> fx.Node:
        """A random input; `same` on all ranks or not. Where the shape has the token count, it follows the size."""
        index, seed, dtype, special = len(self.makers), self.seed, dtype or self.dtype, self.special
        token_dims = [d for d, s in enumerate(shape) if s is self.tokens or s is self.size]
        factors = {d: self.batch if shape[d] is self.tokens and not self.wide else 1 for d in token_dims} if self.symbolic else {}

        def make(rank: int, size: int) -> Tensor:
            real = [factors[d] * size if d in factors else int(s) for d, s in enumerate(shape)]
            x = torch.randn(real, generator=generator(seed, index, size, -1 if same else rank)) * spread + centre
            if special and x.numel() > 3 and name == "h":
                x.view(-1)[0 if special != "zero" else slice(None)] = {"nan": float("nan"), "zero": 0.0, "huge": 3e4}[special]
            return x.to(dtype)

        return self.input(name, shape, dtype, make)

    def activation(self, name: str, width: int, *, same: bool) -> fx.Node:
        """(tokens, width) or (batch, sequence, width), sometimes strided."""
        if self.chance(0.1):
            self.note("strided activation")
            if self.wide:
                x = self.random(name, (self.size, self.batch, width), same=same)
                return self.call(aten.permute.default, x, [1, 0, 2])
            x = self.random(name, (width, self.tokens), same=same)
            return self.call(aten.t.default, x)
        return self.random(name, (self.batch, self.size, width) if self.wide else (self.tokens, width), same=same)

    def flat(self, x: fx.Node) -> fx.Node:
        if x.meta["val"].dim() == 2:
            return x
        view = aten.view.default if x.meta["val"].is_contiguous() and self.chance(0.5) else aten.reshape.default
        return self.call(view, x, [self.rows, x.meta["val"].shape[-1]])

    def like_activation(self, y: fx.Node) -> fx.Node:
        """(tokens, n) as activations are shaped here."""
        if not self.wide:
            return y
        view = self.rng.choice((aten.view.default, aten.reshape.default, aten._unsafe_view.default))
        return self.call(view, y, [self.batch, self.seq, y.meta["val"].shape[-1]])

    # --- parts of a decoder

    def norm_weight(self, n: int) -> fx.Node:
        dtype = torch.float32 if self.chance(0.3) else self.dtype
        return self.random("norm", (n,), dtype, same=True, spread=0.2, centre=1.0)

    def norm(self, x: fx.Node, residual: fx.Node | None) -> tuple[fx.Node, fx.Node]:
        """-> (normed, sum), by our op or spelled by hand."""
        r, n = self.rng, x.meta["val"].shape[-1]
        weight, eps = self.norm_weight(n), r.choice((1e-5, 1e-6, 1e-3, r.uniform(1e-7, 1e-2)))
        offset, cast_first = r.choice((0.0, 0.0, 1.0)), self.chance(0.5)
        if residual is None:
            total = x
        elif self.chance(0.5):
            self.note("add_rms_norm")
            args = (x, residual) if self.chance(0.5) else (residual, x)
            normed, total = self.call(add_rms_norm, *args, weight, eps, 0.0 if cast_first else offset, cast_first)
            return normed, total
        else:
            total = self.call(aten.add.Tensor, *((x, residual) if self.chance(0.5) else (residual, x)))
        if self.chance(0.5):
            return self.call(rms_norm, total, weight, eps, 0.0 if cast_first else offset, cast_first), total
        self.note("norm by hand" if total.meta["val"].is_contiguous() else STRIDED_NORM)
        return self.norm_by_hand(total, weight, eps, offset, cast_first), total

    def norm_by_hand(self, x: fx.Node, weight: fx.Node, eps: float, offset: float, cast_first: bool) -> fx.Node:
        dtype = x.meta["val"].dtype
        y = self.cast(x, torch.float32)
        square = self.call(aten.pow.Tensor_Scalar, y, 2) if self.chance(0.7) else self.call(aten.mul.Tensor, y, y)
        root = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, self.call(aten.mean.dim, square, [-1], True), eps))
        y = self.call(aten.mul.Tensor, y, root)
        if cast_first:
            return self.cast(self.call(aten.mul.Tensor, weight, self.cast(y, dtype)), dtype)
        w = self.cast(weight, torch.float32)
        w = self.call(aten.add.Tensor, w, offset) if offset else w
        return self.cast(self.call(aten.mul.Tensor, y, w), dtype)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["val"].dtype == dtype else self.call(aten._to_copy.default, x, dtype=dtype)

    def params(self, x: fx.Node, fmt: str, *, same: bool) -> list[fx.Node]:
        """Static or dynamic."""
        if not formats.get(fmt).params:
            return []
        if self.chance(0.5):
            self.note("dynamic scale")
            made = self.call(params_from_amax, self.call(amax, x), fmt)
            return made
        index, seed = len(self.makers), self.seed

        def make(rank: int, size: int) -> Tensor:
            top = 2 + 3 * torch.rand((), generator=generator(seed, index, -1 if same else rank))
            return formats.get(fmt).params_from_amax(top)[0]

        return [self.input("scale", (), torch.float32, make)]

    def quantize(self, x: fx.Node, fmt: str, *, same: bool = True) -> tuple[list[fx.Node], list[fx.Node]]:
        """x (tokens, k) -> (parts, params); `same`: x is equal on all ranks."""
        self.formats_used.add(fmt)
        if fmt == "bf16":
            return [x], []
        if fmt == "fp8_token" and self.chance(0.7):
            self.note("quantize by hand")
            y = self.cast(x, torch.float32)
            if self.chance(0.3):
                y = self.call(aten.clone.default, y)
            top = self.call(aten.amax.default, self.call(aten.abs.default, y), [-1], True)
            scale = self.call(aten.clamp.default, self.call(aten.div.Tensor, top, 448.0), 2.0**-126)
            return [self.to_e4m3(self.call(aten.div.Tensor, y, scale)), scale], []
        params = self.params(x, fmt, same=same)
        if fmt == "fp8_tensor" and self.chance(0.3):
            self.note("quantize by hand")
            return [self.to_e4m3(self.call(aten.div.Tensor, self.cast(x, torch.float32), params[0]))], params
        if ":" in fmt and self.chance(0.3):
            linear = fmt.partition(":")[0]
            parts = self.call(quantize, x, params, linear)
            return self.call(relayout, parts, linear, fmt, x.meta["val"].shape[1]), params
        return self.call(quantize, x, params, fmt), params

    def to_e4m3(self, x: fx.Node) -> fx.Node:
        return self.call(aten._to_copy.default, self.call(aten.clamp.default, x, -448.0, 448.0), dtype=E4M3)

    def matmul(self, x: list[fx.Node], params: list[fx.Node], k: int, n: int, fmt: str, *, same: bool = False,
               bias: bool = False) -> fx.Node:
        """(tokens, k) parts @ weight (n, k).T: our op, or aten's where nothing is quantized."""
        index = self.weights % 3
        self.weights += 1
        dtype = self.dtype
        made = weight(fmt, n, k, dtype, index, 0)

        def part(i: int) -> Callable[[int, int], Tensor]:
            return lambda rank, size: weight(fmt, n, k, dtype, index, -1 if same else rank)[i]

        w = [self.input("w", t.shape, t.dtype, part(i)) for i, t in enumerate(made)]
        b = self.random("bias", (n,), same=same) if bias else None
        if fmt != "bf16" and self.chance(0.1):
            self.note("float32 result")
            return self.cast(self.call(matmul, x, params, w, b, fmt, torch.float32), dtype)
        if fmt != "bf16":
            if self.chance(0.15):  # an operand that exists only from here on
                self.note("late weight")
                w[-1] = self.call(aten.clone.default, w[-1])
            return self.call(matmul, x, params, w, b, fmt, dtype)
        if self.chance(0.2):
            self.note("late weight")
            w = [self.call(aten.mul.Tensor, w[0], 0.5)]
        if self.chance(0.4):
            return self.call(matmul, x, [], w, b, fmt, dtype)
        t = self.rng.choice((lambda a: self.call(aten.t.default, a), lambda a: self.call(aten.permute.default, a, [1, 0]),
                             lambda a: self.call(aten.transpose.int, a, 0, 1)))
        if self.chance(0.15):  # a weight that is stored (k, n)
            w = [self.call(aten.clone.default, t(w[0]))]
            return self.call(aten.mm.default, x[0], w[0]) if b is None else self.call(aten.addmm.default, b, x[0], w[0])
        return self.call(aten.mm.default, x[0], t(w[0])) if b is None else self.call(aten.addmm.default, b, x[0], t(w[0]))

    def all_reduce(self, x: fx.Node) -> fx.Node:
        g = self.group
        if self.several_groups and self.chance(0.4):
            self.note("another group")
            g = self.rng.choice(self.groups[1:])
        if self.chance(0.3):
            self.note("functional all_reduce")
            return self.call(c10d.wait_tensor.default, self.call(c10d.all_reduce.default, x, "sum", g.name))
        return self.call(all_reduce, x, g.name)

    def row_parallel(self, x: fx.Node, fmt: str, n: int) -> tuple[fx.Node, fx.Node]:
        """x (tokens, k), different on every rank -> (all_reduce(x @ w.T), x @ w.T) as activations."""
        parts, params = self.quantize(x, fmt, same=False)
        y = self.matmul(parts, params, x.meta["val"].shape[1], n, fmt, bias=self.chance(0.3))
        if self.chance(0.5):
            wide = self.like_activation(y)
            return self.all_reduce(wide), wide
        return self.like_activation(self.all_reduce(y)), self.like_activation(y) if self.chance(0.1) else y

    def column_parallel(self, normed: fx.Node, fmt: str) -> list[fx.Node]:
        """One to three matmuls that share what they read, and now and then a router that reads the norm itself."""
        x, k = self.flat(normed), normed.meta["val"].shape[-1]
        shared = self.chance(0.8)
        ys, parts, params = [], None, None
        for _ in range(self.rng.choice((1, 2, 2, 3))):
            if parts is None or not shared:
                parts, params = self.quantize(x, fmt)
            ys.append(self.matmul(parts, params, k, self.inner, fmt, bias=self.chance(0.3)))
        if self.chance(0.15):
            self.note("router")
            logits = self.matmul([x], [], k, 8, "bf16", same=True)
            self.outputs.append(self.like_activation(logits))
        return ys

    def mixture(self, x: fx.Node, residual: fx.Node | None, fmt: str) -> tuple[fx.Node, fx.Node]:
        """A mixture of experts behind a norm: (the ranks' shares added up, the new residual)."""
        self.note("experts")
        normed, residual = self.norm(x, residual)
        flat, per, n = self.flat(normed), 2, 2 * self.world
        hidden, mid = flat.meta["val"].shape[1], 32
        self.formats_used |= {fmt, "experts"}
        params = self.params(flat, fmt, same=True)
        parts = [flat] if fmt == "bf16" else self.call(quantize, flat, params, fmt)
        router = self.random("router", (n, hidden), same=True)
        ids, weights = self.call(route, flat, router, None, 2, 1, 1, 1.0, "softmax_renormalized")
        dtype, stacks = self.dtype, []
        for index, shape in enumerate(((mid, hidden), (mid, hidden), (hidden, mid))):
            like = weight(fmt, *shape, dtype, index, 0)

            def part(i: int, shape: tuple = shape, index: int = index) -> Callable[[int, int], Tensor]:
                return lambda rank, size: torch.stack([weight(fmt, *shape, dtype, index, rank * per + e)[i] for e in range(per)])

            stacks.append([self.input("w", (per, *t.shape), t.dtype, part(i)) for i, t in enumerate(like)])
        first = self.call(place, per, self.group.name, torch.device("cpu"))
        with self.mode:  # nothing among its arguments was fake
            first.meta["val"] = torch.empty((), dtype=torch.int64)
        y = self.call(experts, parts, params, ids, weights, first, *stacks, [], "silu", fmt, dtype)
        return self.like_activation(self.call(all_reduce, y, self.group.name)), residual

    def combined(self, ys: list[fx.Node]) -> fx.Node:
        """The part between column- and row-parallel matmuls: any function of one rank's values."""
        y = self.call(aten.silu.default, ys[0]) if self.chance(0.7) else self.call(aten.relu.default, ys[0])
        if len(ys) > 1:
            y = self.call(aten.mul.Tensor, y, ys[1])
        if len(ys) > 2:  # tokens are mixed, as attention does
            y = self.call(aten.add.Tensor, y, self.call(aten.flip.default, ys[2], [0]))
        return y

    # --- what may confuse a rule

    def look_alike(self, h: fx.Node) -> fx.Node:
        """h, a replicated activation, after something that is, or only looks, token-local; of h's shape."""
        v = h.meta["val"]
        width, dim = v.shape[-1], v.dim()
        choices = {
            "scaled": lambda: self.call(aten.mul.Tensor, h, 0.5),
            "bias": lambda: self.call(aten.add.Tensor, h, self.random("b", (width,), same=True)),
            "tanh": lambda: self.call(aten.tanh.default, h),
            "centred": lambda: self.call(aten.sub.Tensor, h, self.call(aten.mean.dim, h, [dim - 1], True)),
            "batch mean": lambda: self.call(aten.add.Tensor, h, self.call(aten.mean.dim, h, [0], True)),
            "batch sum": lambda: self.call(aten.sub.Tensor, h, self.call(aten.sum.dim_IntList, h, [0, dim - 1], True)),
            "flipped": lambda: self.call(aten.flip.default, h, [0]),
            "rolled": lambda: self.call(aten.roll.default, h, [1], [dim - 2]),
            "first column": lambda: self.call(aten.mul.Tensor, h, self.call(
                aten.expand.default, self.call(aten.slice.Tensor, h, dim - 1, 0, 1), [*self.shape_of(h)])),
            "halves": lambda: self.call(aten.cat.default, [self.call(aten.slice.Tensor, h, -1, width // 2, width),
                                                           self.call(aten.slice.Tensor, h, -1, 0, width // 2)], -1),
            "heads": lambda: self.through(h, lambda x: self.call(aten.amax.default, x, [-1], True), [4, width // 4]),
            "softmax": lambda: self.call(aten._softmax.default, h, dim - 1, False),
            "replicated gate": lambda: self.call(aten.mul.Tensor, h, self.random(
                "gate", (self.batch, self.size, width) if dim == 3 else (self.tokens, width), same=True)),
            "twice": lambda: self.call(aten.add.Tensor, h, h),
            "cast": lambda: self.cast(self.cast(h, torch.float32), v.dtype) if v.dtype != torch.float32 else h,
        }
        if dim == 3:  # its rows are not the first dim's
            choices["positions"] = lambda: self.call(aten.add.Tensor, h, self.random("pos", (self.size, width), same=True))
        if not self.symbolic and self.tokens:
            choices["rows changed"] = lambda: self.call(aten.reshape.default, self.call(aten.cumsum.default, self.call(
                aten.reshape.default, h, [2 * self.tokens, width // 2]), 1, dtype=v.dtype), list(v.shape))
            choices["other rows"] = lambda: self.call(aten.reshape.default, self.call(aten.relu.default, self.call(
                aten.reshape.default, h, [width, self.tokens])), list(v.shape))
            choices["reads as transposed"] = lambda: self.call(aten.reshape.default, self.call(aten.t.default, self.call(
                aten.reshape.default, h, [self.tokens, width])), list(v.shape))
            if dim == 2 and self.tokens == width:
                choices = {"square": lambda: self.call(aten.add.Tensor, h, self.call(aten.t.default, h))} | choices
                if self.chance(0.5):
                    self.note("square")
                    return choices["square"]()
            if dim == 3 and self.batch == self.size:
                choices["batch swapped"] = lambda: self.call(aten.add.Tensor, h, self.call(aten.permute.default, h, [1, 0, 2]))
        name = self.rng.choice(list(choices))
        self.note(name)
        return choices[name]()

    def shape_of(self, h: fx.Node) -> list:
        return [self.batch, self.seq, h.meta["val"].shape[-1]] if h.meta["val"].dim() == 3 else [self.rows, h.meta["val"].shape[-1]]

    def through(self, h: fx.Node, f: Callable, tail: list[int]) -> fx.Node:
        """h minus f of h with its last dim split into `tail`."""
        shape = self.shape_of(h)
        split = self.call(aten.reshape.default, h, [*shape[:-1], *tail])
        return self.call(aten.reshape.default, self.call(aten.sub.Tensor, split, f(split)), shape)

    def mixed_with_partial(self, h: fx.Node) -> fx.Node:
        """h goes through another all_reduce beside something that differs between ranks, as in a residual that is divided
        by the world size and added to the partial sums of a parallel branch."""
        self.note("partial sum")
        n = h.meta["val"].shape[-1]
        branch = h if self.chance(0.3) else self.activation("branch", n, same=True)
        partial = self.like_activation(self.matmul([self.flat(branch)], [], n, n, "bf16"))
        if self.chance(0.5):
            gate = self.call(aten.sigmoid.default, partial)
            return self.all_reduce(self.call(aten.mul.Tensor, h, gate))
        return self.all_reduce(self.call(aten.add.Tensor, partial, self.call(aten.div.Tensor, h, float(self.world))))

    # --- the whole

    def build(self) -> Program:
        r = self.rng
        # fp8_token more often than the others, as it is also spelled by hand
        fmt = r.choices(FORMATS, (20, 8, 28, 8, 10, 8, 10, 8))[0]
        if self.chance(0.5):
            residual, x = None, self.all_reduce(self.activation("h", self.hidden, same=False))  # a vocab-parallel embedding
        else:
            self.note("embeddings given")
            residual, x = None, self.activation("h", self.hidden, same=True)
        for layer in range(r.choice((1, 1, 2, 2, 3))):
            if layer and self.chance(0.2):
                fmt = r.choice(FORMATS)
            if self.chance(0.12):
                x = self.look_alike(x)
            if self.chance(0.06):
                x = self.mixed_with_partial(x)
            normed, residual = self.norm(x, residual)
            if self.chance(0.1):
                residual = self.look_alike(residual)
            if self.chance(0.08):
                normed = self.look_alike(normed)
            if self.chance(0.1):
                self.note("hidden states")
                self.outputs.append(r.choice((residual, normed)))
            ys = self.column_parallel(normed, fmt)
            if self.chance(0.05):
                self.outputs.append(r.choice(ys))
            x, partial = self.row_parallel(self.combined(ys), fmt if self.chance(0.85) else r.choice(FORMATS), self.hidden)
            if self.chance(0.05):
                self.note("partial is an output")
                self.outputs.append(partial)
            if self.chance(0.06):
                self.note("reduced is an output")
                self.outputs.append(x)
            if self.chance(0.06):  # as the logits of the last token alone
                self.note("last rows")
                last = self.call(aten.slice.Tensor, r.choice((residual, normed)), 0, -1, 2**63 - 1)
                self.outputs.append(self.call(aten.mul.Tensor, last, 2.0))
            if self.chance(0.06):  # a second reader of the residual, with a norm of its own
                self.outputs.append(self.norm(residual, None)[0])
        if self.side.random() < 0.35:
            x, residual = self.mixture(x, residual, fmt.partition(":")[0])
        end = r.choices(("norm", "sum", "reduced", "head"), (35, 15, 15, 35))[0]
        if end in ("norm", "head"):
            normed, total = self.norm(x, residual)
            if end == "head":
                normed = self.column_parallel(normed, r.choice((fmt, "bf16")))[0]
            elif self.side.random() < 0.85:  # of the last tokens alone, as for their logits
                self.note("last tokens")
                last = (normed, normed.meta["val"].dim() - 2, -self.side.randint(1, 3), 2**63 - 1)
                normed = self.call(aten.mul.Tensor, self.call(aten.slice.Tensor, *last), 2.0)
            self.outputs += [normed, total] if self.chance(0.3) else [normed]
        else:
            self.outputs.append(x if end == "reduced" else self.call(aten.add.Tensor, x, residual))
        return self.finish()

    def finish(self) -> Program:
        self.graph.output(tuple(self.outputs))
        self.graph.lint()
        full = self.symbolic or self.chance(0.07)
        for n in self.graph.nodes:
            if full and not self.symbolic:
                n.meta["val"] = torch.utils._pytree.tree_map_only(
                    Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), n.meta.get("val"))
        fakes = [n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"]
        # a number that all elements of an output share has one rounding error, not many that can be compared in the mean
        exact = self.formats_used == {"bf16"} and not self.special and "batch sum" not in self.notes
        return Program(self.seed, self.world, self.group, fx.GraphModule({}, self.graph), fakes, self.sizes, self.symbolic, full,
                       exact, self.notes, self.makers)


def program(seed: int) -> Program:
    """The random program number `seed`; the same in every process."""
    with torch.no_grad():
        return Builder(seed).build()


class Fixed(Builder):
    """16-bit programs of 8 tokens and width 32 on 4 ranks, made of the same pieces."""

    def __init__(self, tokens: int = 8):
        super().__init__(0)
        self.rng = random.Random(0)
        self.world, self.groups, self.dtype, self.special, self.hidden = 4, groups(4), torch.bfloat16, "", 32
        self.group, self.graph, self.makers, self.notes = self.groups[0], fx.Graph(), [], []
        self.symbolic, self.wide, self.batch, self.mode = False, False, 1, torch.device("meta")
        self.size = self.seq = self.tokens = self.rows = tokens
        self.sizes = [tokens]

    def reduced(self, g: Group | None = None) -> fx.Node:
        return self.call(all_reduce, self.random("x", (self.tokens, self.hidden), same=False), (g or self.group).name)

    def doubled(self, x: fx.Node) -> fx.Node:
        return self.call(aten.mul.Tensor, x, 2.0)


def _flat_halves(b: Fixed, h: fx.Node) -> fx.Node:
    return b.call(aten.reshape.default, h, [2 * b.tokens, b.hidden // 2])


def _normed_sums(b: Fixed, h: fx.Node) -> list:
    """A dynamic scale of a norm: what has to be known before its quantize is made of the norm itself."""
    normed = b.call(rms_norm, h, b.norm_weight(b.hidden), 1e-5, 0.0, False)
    params = b.call(params_from_amax, b.call(amax, normed), "nvfp4")
    return [b.matmul(b.call(quantize, normed, params, "nvfp4"), params, b.hidden, 16, "nvfp4")]


def _matmul_of_sum(b: Fixed, h: fx.Node) -> list:
    residual = b.random("h", (b.tokens, b.hidden), same=True)
    total = b.call(add_rms_norm, h, residual, b.norm_weight(b.hidden), 1e-5, 0.0, False)[1]
    return [b.matmul(b.call(quantize, total, [], "mxfp8"), [], b.hidden, 16, "mxfp8")]


def _quantized_twice(b: Fixed, h: fx.Node) -> list:
    normed = b.call(rms_norm, h, b.norm_weight(b.hidden), 1e-5, 0.0, False)
    return [b.matmul(b.call(quantize, normed, [], fmt), [], b.hidden, 16, fmt) for fmt in ("fp8_token", "mxfp8")]


CRAFTED: dict[str, Callable[[Fixed], list]] = {
    "a sum over half of the ranks meets one over all": lambda b: [b.call(
        aten.add.Tensor, b.reduced(), b.call(aten.flip.default, b.reduced(b.groups[2]), [0]))],
    "what differs between ranks meets a sum": lambda b: [b.call(aten.add.Tensor, b.reduced(), b.matmul(
        [b.random("x", (b.tokens, b.hidden), same=True)], [], b.hidden, b.hidden, "bf16"))],
    "casts to two dtypes": lambda b: (lambda h: [b.cast(h, torch.float32), b.cast(h, torch.float16)])(b.reduced()),
    "a sum over the tokens": lambda b: [b.call(aten.sum.dim_IntList, b.reduced(), [0], True)],
    "the last token": lambda b: [b.doubled(b.call(aten.slice.Tensor, b.reduced(), 0, -1, 2**63 - 1))],
    "a view of other rows": lambda b: [b.call(aten.cumsum.default, _flat_halves(b, b.reduced()), 1)],
    "a square and its transpose": lambda b: (lambda h: [b.call(aten.add.Tensor, h, b.call(aten.t.default, h))])(b.reduced()),
    "a scale that its norm makes": lambda b: _normed_sums(b, b.reduced()),
    "a matmul reads the sum, not the norm": lambda b: _matmul_of_sum(b, b.reduced()),
    "a norm is quantized twice": lambda b: _quantized_twice(b, b.reduced()),
    "a strided residual": lambda b: [b.call(add_rms_norm, b.reduced(), b.call(aten.t.default, b.random(
        "h", (b.hidden, b.tokens), same=True)), b.norm_weight(b.hidden), 1e-5, 1.0, False)[0]],
}


def crafted(name: str) -> Program:
    """A small program around one thing that random ones meet rarely."""
    b = Fixed(32 if "square" in name else 8)
    with torch.no_grad():
        b.outputs = CRAFTED[name](b)
        return replace(b.finish(), full=False, exact=False, notes=[name])


# --- evaluating


def execute(graph: fx.Graph, inputs: list) -> list:
    """One rank's run of a graph, node by node (several times quicker than generating code for a few runs)."""
    env, rest = {}, iter(inputs)
    for n in graph.nodes:
        if n.op == "placeholder":
            env[n] = next(rest)
        elif n.op == "output":
            return list(fx.map_arg(n.args[0], env.__getitem__))
        else:
            env[n] = n.target(*fx.map_arg(n.args, env.__getitem__), **fx.map_arg(n.kwargs, env.__getitem__))


def lockstep(graph: fx.Graph, inputs: list[list], call: Callable = lambda n, args, kwargs: n.target(*args, **kwargs),
             wide: torch.dtype = torch.float32) -> list[list]:
    """All ranks' runs of an unfused graph, side by side and without any group: the outputs by rank.

    Collectives are spelled out here: a sum in rank order of `wide` numbers, rounded once by `call` or to the dtype.
    """
    envs: list[dict] = [{} for _ in inputs]
    for n in graph.nodes:
        if n.op == "output":
            return [list(fx.map_arg(n.args[0], env.__getitem__)) for env in envs]
        if n.op == "placeholder":
            i = len(envs[0])
            for env, given in zip(envs, inputs, strict=True):
                env[n] = given[i]
        elif is_all_reduce(n):
            g = group.resolve(n.args[-1])
            for rank, env in enumerate(envs):
                terms = [envs[r][n.args[0]] for r in members(g, rank)]
                total = terms[0].to(torch.promote_types(wide, terms[0].dtype))
                for t in terms[1:]:
                    total = total + t
                env[n] = total.to(terms[0].dtype).contiguous()
        elif op_of(n) is place:
            for rank, env in enumerate(envs):
                env[n] = torch.tensor(n.args[0] * (rank - members(group.resolve(n.args[1]), rank)[0]))
        else:
            for env in envs:
                look_up = env.__getitem__
                env[n] = call(n, fx.map_arg(n.args, look_up), fx.map_arg(n.kwargs, look_up))
    raise AssertionError("a graph without output")


def is_all_reduce(n: fx.Node) -> bool:
    return op_of(n) is all_reduce or n.target is c10d.all_reduce.default


def float64(n: fx.Node, args: tuple, kwargs: dict) -> object:
    """What a node of an unquantized program means, in float64."""
    o = op_of(n)
    if n.target is c10d.wait_tensor.default:
        return args[0]
    if o is matmul:
        (x,), _, (w,), bias, *_ = args
        return x @ w.t() if bias is None else x @ w.t() + bias
    if o is rms_norm:
        return _norm64(*args)
    if o is add_rms_norm:
        return _norm64(args[0] + args[1], *args[2:]), args[0] + args[1]
    if is_aten(n, "view", "_unsafe_view"):  # of a tensor whose strides our ops would have made contiguous
        return args[0].reshape(args[1])
    if o is not None:
        raise AssertionError(f"{o.name} has no float64 meaning here")
    return n.target(*args, **{k: torch.float64 if isinstance(v, torch.dtype) else v for k, v in kwargs.items()})


def _norm64(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight)


def float64_rounded(n: fx.Node, args: tuple, kwargs: dict) -> object:
    """The same, every result rounded to the dtype that the program gives it and held in float64 again."""
    y, fake = float64(n, args, kwargs), n.meta["val"]
    if isinstance(y, tuple):
        return tuple(v.to(f.dtype).double() for v, f in zip(y, fake, strict=True))
    return y.to(fake.dtype).double() if isinstance(y, Tensor) else y

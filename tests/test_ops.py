"""Every op, in every format: nothing aliases, nothing reads memory that was never written, fakes tell the truth."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fusewire.ops  # noqa: F401  (declares the ops)
from fusewire import formats, group
from fusewire.errors import FormatError, FusewireError, InputError
from fusewire.op import OPS, Op, op
from fusewire.ops.collectives import all_gather, all_reduce, reduce_scatter
from fusewire.ops.dense import amax, linear, matmul
from fusewire.ops.norm import add_rms_norm, rms_norm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORLDS = (1, 2, 4)
TOKENS = (0, 1, 5, 129)
K, N = 160, 48  # a partial block of 128, whole ones of 32 and 16


@dataclass(frozen=True)
class Case:
    """What an op is called with, apart from the op."""

    dtype: torch.dtype
    world: int
    group: str
    rank: int
    tokens: int
    fmt: str = "bf16"
    strided: bool = False

    def generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.tokens, self.rank, *key)) % 2**63)

    def random(self, *shape: int, key: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        return self.lay(torch.randn(shape, generator=self.generator(key)).to(dtype or self.dtype))

    def lay(self, x: Tensor) -> Tensor:
        """x as it is, or as every second column of a wider tensor."""
        if not self.strided or x.dim() < 2 or (x.dtype.is_floating_point and x.dtype.itemsize == 1):
            return x
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]

    @property
    def whole(self) -> int:
        """A token count that divides over the ranks."""
        return self.tokens * self.world

    def params(self) -> list[Tensor]:
        make = formats.get(self.fmt).params_from_amax
        return make(torch.tensor(3.0)) if make else []

    def parts(self, tokens: int, fmt: str | None = None) -> list[Tensor]:
        x = torch.randn(tokens, K, generator=self.generator(1)).to(self.dtype)
        return [self.lay(p) for p in formats.get(fmt or self.fmt).quantize(x, self.params())]

    def weight(self, key: int = 2) -> list[Tensor]:
        return formats.get(self.fmt).quantize_weight(torch.randn(N, K, generator=self.generator(key)).to(self.dtype) / K**0.5)

    def bias(self) -> Tensor:
        return self.random(N, key=3)


def norm_args(c: Case) -> tuple:
    cast_first = c.tokens % 2 == 1
    dtype = torch.float32 if c.strided else c.dtype
    return c.random(K, key=4, dtype=dtype), 1e-5, 0.0 if cast_first else 1.0, cast_first


EXPERTS, CHOSEN, MID = 8, 3, 32  # two experts a rank where there are four


def router_args(c: Case) -> tuple:
    return c.random(EXPERTS, K, key=7), c.random(EXPERTS, key=8), CHOSEN, 4, 2, 1.5, "grouped_sigmoid_renormalized"


def stacked(c: Case, n: int, k: int, key: int) -> list[Tensor]:
    """The weights of this rank's experts."""
    ws = [torch.randn(n, k, generator=c.generator(key, e)).to(c.dtype) / k**0.5 for e in range(EXPERTS // c.world)]
    made = [formats.get(c.fmt).quantize_weight(w) for w in ws]
    return [torch.stack(parts) for parts in zip(*made, strict=True)]


def expert_weights(c: Case) -> tuple:
    mid = [p.expand(EXPERTS // c.world).clone() for p in c.params()] if c.tokens % 2 else []
    first = torch.tensor(c.rank * EXPERTS // c.world)
    return first, stacked(c, MID, K, 9), stacked(c, MID, K, 10), stacked(c, K, MID, 11), mid, "silu"


def chosen(c: Case) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(EXPERTS, generator=c.generator(12, i))[:CHOSEN] for i in range(c.tokens)] or [
        torch.empty(CHOSEN)])[:c.tokens]
    return c.lay(ids.to(torch.uint8)), c.random(c.tokens, CHOSEN, key=13, dtype=torch.float32).abs()


def home(c: Case) -> str:
    """A format in which shares can travel."""
    return "bf16" if formats.get(c.fmt).params else c.fmt


def counts(c: Case) -> list[int]:
    return [c.tokens + r for r in range(c.world)]


@dataclass(frozen=True)
class Sample:
    """Arguments of an op for a case, and whether the format or the ranks matter to it."""

    args: Callable[[Case], Iterator[tuple]]
    formats: tuple[str, ...] = ("bf16",)  # those it is tried with
    collective: bool = False


ALL = tuple(formats.FORMATS)
LINEAR = tuple(name for name, f in formats.FORMATS.items() if f.layout == "linear")
PLAIN = ("bf16",)

SAMPLES = {
    "all_gather": Sample(lambda c: iter([
        ([c.random(c.tokens, 7), c.random(c.tokens, 3, 2, dtype=torch.float32)], c.group),
        (c.parts(c.tokens, linear(c.fmt)), c.group)]), ALL, True),
    "reduce_scatter": Sample(lambda c: iter([(c.random(c.whole, 7), c.group), (c.random(c.whole, 3, 2), c.group)]), PLAIN, True),
    "all_reduce": Sample(lambda c: iter([
        (c.random(c.tokens, 7), c.group), (c.random(2, c.tokens, 3), c.group), (c.random(c.tokens), c.group)]), PLAIN, True),
    "all_reduce_max": Sample(lambda c: iter([
        (c.random(c.tokens, 3), c.group), (amax(c.random(c.tokens, 3)), c.group)]), PLAIN, True),
    "shard": Sample(lambda c: iter([(c.random(c.whole, 7), c.group)]), PLAIN, True),
    "amax": Sample(lambda c: iter([(c.random(c.tokens, 7),), (c.random(2, c.tokens, 3),)])),
    "params_from_amax": Sample(lambda c: iter([(torch.tensor(2.5), c.fmt)]), ALL),
    "quantize": Sample(lambda c: iter([(c.random(c.tokens, K), c.params(), c.fmt)]), ALL),
    "relayout": Sample(lambda c: iter([
        (c.parts(c.tokens), c.fmt, linear(c.fmt), K), (c.parts(c.tokens, linear(c.fmt)), linear(c.fmt), c.fmt, K),
        (c.parts(c.tokens), c.fmt, c.fmt, K)]), ALL),
    "matmul": Sample(lambda c: iter([
        (c.parts(c.tokens), c.params(), c.weight(), None, c.fmt, c.dtype),
        (c.parts(c.tokens), c.params(), c.weight(), c.bias(), c.fmt, c.dtype)]), ALL),
    "rms_norm": Sample(lambda c: iter([(c.random(c.tokens, K), *norm_args(c)), (c.random(2, c.tokens, K), *norm_args(c))])),
    "add_rms_norm": Sample(lambda c: iter([(c.random(c.tokens, K), c.random(c.tokens, K, key=5), *norm_args(c))])),
    "all_gather_matmul": Sample(lambda c: iter([
        (c.parts(c.tokens, linear(c.fmt)), c.params(), [*c.weight(), *c.weight(6)], [None, c.bias()], c.fmt, c.dtype, c.group),
    ]), ALL, True),
    "matmul_reduce_scatter": Sample(lambda c: iter([
        (c.parts(c.whole), c.params(), c.weight(), c.bias(), c.fmt, c.dtype, c.group)]), ALL, True),
    "route": Sample(lambda c: iter([
        (c.random(c.tokens, K), *router_args(c)), (c.random(c.tokens, K), router_args(c)[0], None, CHOSEN, 1, 1, 1.0, "softmax")])),
    "route_quantize_pack": Sample(lambda c: iter([(c.random(c.tokens, K), c.params(), *router_args(c), c.fmt)]), LINEAR),
    "all_gather_v": Sample(lambda c: iter([
        ([c.random(c.tokens + c.rank, 7), c.random(c.tokens + c.rank, 3, dtype=torch.float32)], counts(c), c.group)]), PLAIN, True),
    "reduce_scatter_v": Sample(lambda c: iter([(c.random(sum(counts(c)), 7), counts(c), c.group)]), PLAIN, True),
    "combine": Sample(lambda c: iter([(c.random(c.whole, K), home(c), [], c.group),
                                      (c.random(sum(counts(c)), K), home(c), counts(c), c.group)]), LINEAR, True),
    "combine_all": Sample(lambda c: iter([(c.random(c.tokens, K), home(c), c.group)]), LINEAR, True),
    "place": Sample(lambda c: iter([(3, c.group, torch.device("cpu"))]), PLAIN, True),
    "grouped_matmul": Sample(lambda c: iter([
        (c.parts(c.tokens), c.params(), stacked(c, N, K, 9), torch.tensor([0, 0, *[c.tokens // 2] * 4, c.tokens - 1, c.tokens - 1])
         .clamp(min=0), c.fmt, c.dtype)]), LINEAR),
    "experts": Sample(lambda c: iter([(c.parts(c.tokens), c.params(), *chosen(c), *expert_weights(c), c.fmt, c.dtype)]), LINEAR),
    "dispatch": Sample(lambda c: iter([(c.random(c.tokens, K), c.params(), *router_args(c), c.fmt, c.group)]), LINEAR, True),
    "expert_parallel": Sample(lambda c: iter([
        (c.random(c.tokens, K), c.params(), *router_args(c), *expert_weights(c), c.fmt, home(c), [], c.group),
        (c.random(c.tokens + c.rank, K), c.params(), *router_args(c), *expert_weights(c), c.fmt, home(c), counts(c), c.group)]),
        LINEAR, True),
    "all_reduce_norm_quant": Sample(lambda c: iter([
        (c.random(c.tokens, K), residual, *norm_args(c), c.params(), c.fmt, keep, c.group)
        for residual, keep in ((None, True), (c.random(c.tokens, K, key=5), c.fmt == "bf16"))]), ALL, True),
    "norm_quant_all_gather_matmul": Sample(lambda c: iter([
        (c.random(c.tokens, K), residual, *norm_args(c), keep, c.params(), [*c.weight(), *c.weight(6)], [None, c.bias()], c.fmt,
         c.dtype, c.group)
        for residual, keep in ((None, True), (c.random(c.tokens, K, key=5), False))]), ALL, True),
}


def test_every_op_has_a_sample():
    """An op that is added later must be added here."""
    assert sorted(SAMPLES) == sorted(OPS)


# --- checks, each a function of one op and its arguments on one rank


def tensors(value: object) -> list[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def shared(args: tuple, outputs: object) -> list[str]:
    """Which outputs lie in the memory of an input, or of another output."""
    def where(t: Tensor) -> int:
        return t.untyped_storage().data_ptr()

    outs = [t for t in tensors(outputs) if t.numel()]
    given = {where(t) for t in tensors(args) if t.numel()}
    found = [f"output {i} aliases an input" for i, t in enumerate(outs) if where(t) in given]
    pairs = itertools.combinations(enumerate(outs), 2)
    return found + [f"outputs {i} and {j} share memory" for (i, a), (j, b) in pairs if where(a) == where(b)]


def bits(value: object) -> list[tuple]:
    return [(t.dtype, tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors(value)]


class Poison:
    """Memory that Python asks for and that nobody wrote holds NaN, or the largest byte."""

    def __enter__(self) -> None:
        self.saved = [(o, name, getattr(o, name)) for o, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))]
        for o, name, f in self.saved:
            setattr(o, name, lambda *args, f=f, **kwargs: self.fill(f(*args, **kwargs)))

    def __exit__(self, *_) -> None:
        for o, name, f in self.saved:
            setattr(o, name, f)

    @staticmethod
    def fill(t: Tensor) -> Tensor:
        if t.device.type == "cpu" and t.numel() and not isinstance(t, torch._subclasses.FakeTensor):
            t.untyped_storage().fill_(0xFF)  # NaN in every float format there is
        return t


def described(value: object) -> list[tuple]:
    """What a fake must know. The stride of a dimension of one element, or in an empty tensor, addresses nothing."""
    def stride(t: Tensor) -> list:
        return [hint(s) for s, n in zip(t.stride(), t.shape, strict=True) if hint(n) > 1] if all(map(hint, t.shape)) else []

    return [([hint(n) for n in t.shape], t.dtype, stride(t)) for t in tensors(value)]


def hint(n: int | torch.SymInt) -> int:
    return n.node.hint if isinstance(n, torch.SymInt) else n


def fake_result(o: Op, args: tuple, dynamic: int | None = None) -> object:
    """The op on fake tensors; dimensions of size `dynamic` are symbolic."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    names = itertools.count()

    def fake(t: object) -> object:
        if isinstance(t, (list, tuple)):
            return [fake(v) for v in t]
        if not isinstance(t, Tensor):
            return t
        if dynamic is None:
            return mode.from_tensor(t, static_shapes=True)
        kinds = [DimDynamic.DUCK if n == dynamic else DimDynamic.STATIC for n in t.shape]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return mode.from_tensor(t, source=ConstantSource(f"t{next(names)}"), symbolic_context=context)

    out = o.target(*[fake(a) for a in args])
    assert dynamic is None or not [g for g in env.guards if not str(g.expr).startswith("Ne(")], env.guards
    return out


GROUPS = {w: group.simulated_group(w) for w in WORLDS}


def cases(name: str, world: int, dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS) -> Iterator[Callable[[int], Case]]:
    """One maker of each rank's case for every format, token count and layout in memory."""
    for fmt, n, strided in itertools.product(SAMPLES[name].formats, tokens, (False, True)):
        if strided and n in (1, 129):
            continue
        yield lambda rank, fmt=fmt, n=n, strided=strided: Case(dtype, world, GROUPS[world].name, rank, n, fmt, strided)


def each(names=tuple(SAMPLES)) -> Callable:
    worlds = [(n, w) for n in names for w in (WORLDS if SAMPLES[n].collective else (1,))]
    return lambda f: pytest.mark.parametrize(("name", "world"), worlds)(pytest.mark.parametrize("dtype", DTYPES, ids=str)(f))


@each()
def test_outputs_are_their_own_and_poison_does_not_show(name, world, dtype):
    o = OPS[name]

    def run(make: Callable[[int], Case]) -> Callable[[int], list]:
        def program(rank: int) -> list:
            found = []
            for args in SAMPLES[name].args(make(rank)):
                before = bits(args)
                out = o(*args)
                found.append((shared(args, out), bits(args) == before, bits(out)))
            return found

        return program

    ran = 0
    for make in cases(name, world, dtype):
        clean = group.simulate(GROUPS[world], run(make))
        with Poison():
            poisoned = group.simulate(GROUPS[world], run(make))
        assert clean == poisoned, make(0)
        assert all(not found and kept for rank in clean for found, kept, _ in rank), (make(0), clean[0][0][:2])
        ran += 1
    assert ran >= 6


@each()
def test_a_fake_is_as_the_reference_does(name, world, dtype):
    o = OPS[name]
    for make in cases(name, world, dtype, TOKENS if dtype is torch.bfloat16 and world < 4 else (0, 1, 5)):
        for i in range(len(list(SAMPLES[name].args(make(0))))):
            args = [list(SAMPLES[name].args(make(rank)))[i] for rank in range(world)]
            real = group.simulate(GROUPS[world], lambda rank, args=args: described(o.reference(*args[rank])))
            assert described(fake_result(o, args[0])) == real[0], (make(0), i)
            tokens = make(0).tokens
            if tokens > 1 and dtype is torch.bfloat16:
                for dynamic in {tokens, tokens * world}:
                    assert described(fake_result(o, args[0], dynamic)) == real[0], (make(0), i, dynamic)


def test_poison_poisons():
    """Negative control of the test above."""
    with Poison():
        assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(2, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.uint8)).tolist() == [255] * 3
    a = torch.zeros(4)
    assert shared((a,), [a[1:]]) == ["output 0 aliases an input"]
    b = torch.ones(4)
    assert shared((a,), [b[:2], b[2:]]) == ["outputs 0 and 1 share memory"]


# --- declarations


@pytest.mark.parametrize("name", SAMPLES)
def test_a_backend_of_another_signature_is_refused(name):
    def fewer(x: Tensor) -> Tensor:
        return x.clone()

    def renamed(x: Tensor, other: str, third: int) -> list[Tensor]:
        return [x.clone()]

    for wrong in (fewer, renamed):
        backends = list(OPS[name].backends)
        if name == "amax" and wrong is fewer:
            continue  # this is amax's own signature
        with pytest.raises(TypeError, match=f"{name}.wrong"):
            OPS[name].backend("wrong")(wrong)
        assert OPS[name].backends == backends


def test_an_op_is_declared_once():
    def amax(x: Tensor) -> Tensor:
        return x.abs().amax()

    with pytest.raises((TypeError, RuntimeError)):
        op(amax)
    assert OPS["amax"].reference is not amax


def test_refusals_name_what_is_wrong():
    g = group.simulated_group(2)
    with pytest.raises(InputError, match="reduce_scatter: 3 tokens do not divide over 2 ranks"):
        group.simulate(g, lambda rank: reduce_scatter(torch.zeros(3, 2), g.name))
    with pytest.raises(InputError, match="shard: 5 tokens do not divide over 2 ranks"):
        group.simulate(g, lambda rank: OPS["shard"](torch.zeros(5, 2), g.name))
    with pytest.raises(FormatError, match="160 and the weight has 144"):
        fake_result(matmul, ([torch.zeros(2, 160)], [], [torch.zeros(3, 144)], None, "bf16", torch.float32))
    with pytest.raises(FusewireError, match="fake group"):
        all_reduce(torch.zeros(2), group.fake_group(2).name)


# --- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ALL)
def test_matmul_against_float64(fmt, dtype):
    """|y - exact| <= (k + 2) 2^-24 (|x| |w| + |bias|), a float32 dot product in any order, plus one rounding to the dtype:
    2^-8, 2^-11 or 2^-24 of |y|, and half the smallest number."""
    f = formats.get(fmt)
    for tokens, with_bias in itertools.product((1, 5, 129), (False, True)):
        c = Case(dtype, 1, "", 0, tokens, fmt)
        x, w, b = c.parts(tokens), c.weight(), c.bias() if with_bias else None
        y = matmul(x, c.params(), w, b, fmt, dtype).double()
        xs, ws = f.dequantize(x, c.params()).double(), f.dequantize_weight(w).double()
        if fmt == "bf16":
            xs, ws = x[0].double(), w[0].double()
        bias = b.double() if with_bias else torch.zeros(N).double()
        exact, size = xs @ ws.t() + bias, xs.abs() @ ws.abs().t() + bias.abs()
        info = torch.finfo(dtype)
        allowed = (K + 2) * 2.0**-24 * size + info.eps / 2 * exact.abs() * 1.01 + info.smallest_normal * info.eps
        if fmt == "bf16" and with_bias:  # aten may round the product before it adds the bias
            allowed += info.eps / 2 * (exact - bias).abs()
        assert ((y - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_norms_against_float64(dtype, spread):
    """Relative error at most one rounding to the dtype (three with cast_first: value, product, result) and k + 8 float32 ones."""
    eps = torch.finfo(dtype).eps / 2
    spellings = ((0.0, False), (1.0, False), (0.0, True))
    for tokens, (offset, cast_first), weight_dtype in itertools.product((1, 5, 129), spellings, (dtype, torch.float32)):
        g = torch.Generator().manual_seed(tokens)
        x, residual = ((torch.randn(tokens, K, generator=g) * spread).to(dtype) for _ in range(2))
        w = torch.randn(K, generator=g).to(weight_dtype)
        normed, total = add_rms_norm(x, residual, w, 1e-5, offset, cast_first)
        assert bits(total) == bits(residual + x)
        assert bits(normed) == bits(rms_norm(total, w, 1e-5, offset, cast_first))
        t = total.double()
        exact = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-5) * (offset + w.double())
        relative = (3 if cast_first else 1) * eps * 1.01 + (K + 8) * 2.0**-24
        assert ((normed.double() - exact).abs() <= relative * exact.abs() + 4 * torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_is_all_gather_of_reduce_scatter(world, dtype):
    g = GROUPS[world]

    def program(rank: int) -> list:
        found = []
        for tokens in TOKENS:
            x = Case(dtype, world, g.name, rank, tokens).random(tokens * world, 7)
            found.append((bits(all_reduce(x, g.name)), bits(all_gather([reduce_scatter(x, g.name)], g.name))))
        return found

    ranks = group.simulate(g, program)
    assert all(a == b for found in ranks for a, b in found) and all(r == ranks[0] for r in ranks)

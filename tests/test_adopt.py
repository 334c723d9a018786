"""Models that are tensor-parallel by other means: what `compile` makes of them, on real gloo ranks."""
from __future__ import annotations

import os
from collections import Counter

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from dist import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fusewire import formats
from fusewire.backends import aten as aten_backend
from fusewire.compiler.adopt import _spellings, adopt, from_alpha, insert, matrix, scalar, transposed
from fusewire.compiler.capture import Compiled, compile
from fusewire.compiler.rewrite import arg, val
from fusewire.config import Config
from fusewire.op import op_of
from fusewire.ops.dense import matmul, quantize
from fusewire.ops.fused import all_gather_matmul, norm_quant_all_gather_matmul
from fusewire.ops.norm import add_rms_norm, rms_norm

H, MID, VOCAB = 32, 64, 24
E4M3 = torch.float8_e4m3fn


# --- what is compared


def by_plan(c: Compiled, plan: str, *args, **kwargs):
    """Run a compiled model by one of its plans, without compiling it again."""
    c.plan = plan
    return c(*args, **kwargs)


def same_by_every_plan(c: Compiled, *args) -> torch.Tensor:
    """Assert that the plans agree bit for bit; -> what they made."""
    c(*args)  # compiles, if it has to
    made = by_plan(c, "unfused", *args)
    for plan in ("replicated", "sharded"):
        assert torch.equal(by_plan(c, plan, *args), made), plan
    return made


def as_uncompiled(c: Compiled, *args, tolerance: float = 1e-5) -> None:
    """Assert that the plans agree, and with the model itself."""
    with torch.no_grad():
        want = c.model(*args)
    assert want.float().std() > 1e-2, "a test of nothing but zeros tests nothing"
    torch.testing.assert_close(same_by_every_plan(c, *args), want, rtol=tolerance, atol=tolerance)
    found, size = c.last
    assert found.why_not_sharded(size) is None


def count(c: Compiled, plan: str) -> Counter:
    """How often each op is called by a plan of the newest graph; "gathers" are those fused with matmuls, and maybe with a norm."""
    found = c.captures[-1]
    graph = (found.unfused if plan == "unfused" else found.ranges[0].plans[plan]).gm.graph
    calls = Counter(o.name if (o := op_of(n)) else getattr(n.target, "_opname", str(n.target))
                    for n in graph.nodes if n.op == "call_function")
    calls["gathers"] = calls["all_gather_matmul"] + calls["norm_quant_all_gather_matmul"]
    return calls


def foreign(c: Compiled) -> list[str]:
    """The collectives that were not adopted."""
    return [str(n.target) for n in c.captures[-1].unfused.gm.graph.nodes
            if n.op == "call_function" and str(n.target).startswith(("_c10d_functional", "c10d_functional"))]


def assert_fused(c: Compiled, layers: int) -> None:
    """Every projection of every layer is fused with the collective beside it, in both plans; no guard was needed."""
    assert not foreign(c)
    assert c.captures[-1].new_guards == []
    small, large = count(c, "replicated"), count(c, "sharded")
    assert small["all_reduce"] == 0 and small["all_reduce_norm_quant"] == 2 * layers + 1, small
    assert large["all_reduce"] == 0 and large["matmul_reduce_scatter"] == 2 * layers, large
    assert large["gathers"] == 2 * layers and large["all_gather"] == large["reduce_scatter"] == 1, large


# --- models written by hand


class Llama(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.2 * torch.randn(H)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Gemma(Llama):
    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Functional(Llama):
    def forward(self, x):
        return F.rms_norm(x, (H,), self.weight, self.eps)


class Torch(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(H, eps)

    def forward(self, x):
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, norm, eps: float, bias: bool):
        super().__init__()
        self.n1, self.n2 = norm(eps), norm(eps)
        self.q, self.k, self.v, self.o = (nn.Linear(H, H, bias=bias) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(H, MID, bias=bias), nn.Linear(H, MID, bias=bias), nn.Linear(MID, H, bias=bias)

    def forward(self, x):
        y = self.n1(x)
        x = x + self.o(F.silu(self.q(y)) * self.k(y) + self.v(y))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, norm=Llama, eps: float = 1e-6, bias: bool = False, layers: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, H)
        self.layers = nn.ModuleList(Block(norm, eps, bias) for _ in range(layers))
        self.norm = norm(eps)
        self.requires_grad_(False)

    def forward(self, ids):
        return self.body(self.embed(ids))

    def body(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")


def tensor_parallel(model: Model, mesh) -> Model:
    parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})
    for layer in model.layers:
        parallelize_module(layer, mesh, {**{n: ColwiseParallel() for n in COLUMNS}, **{n: RowwiseParallel() for n in ROWS}})
    return model


def sequence_parallel(model: Model, mesh, dim: int) -> Model:
    """PyTorch's plan with a sharded residual: every column-parallel linear gathers its own input."""
    for layer in model.layers:
        parallelize_module(layer, mesh, {**{n: ColwiseParallel(input_layouts=Shard(dim)) for n in COLUMNS},
                                         **{n: RowwiseParallel(output_layouts=Shard(dim)) for n in ROWS}})
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


# --- DTensor


def _parallelize_module(rank, cases, layers):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for norm, eps, dtype, bias, three in cases:
        torch._dynamo.reset()
        model = tensor_parallel(Model(norm, eps, bias, layers).to(dtype), mesh)
        c = compile(model, Config(), {"ids": 1 if three else 0})

        def tokens(n: int, batch=(2,) if three else ()):
            return ids(*batch, n)

        as_uncompiled(c, tokens(16), tolerance=1e-5 if dtype == torch.float32 else 0.05)
        for n in (4, 7, 32, 33, 64):
            same_by_every_plan(c, tokens(n))
        assert len(c.captures) == 1
        assert_fused(c, layers)
        same_by_every_plan(c, tokens(1))
        assert len(c.captures) == 2 and c.captures[1].new_guards == []
    _given_embeddings(model)


def _given_embeddings(model):
    """The first residual is an input, so no rank gathers it: each has to cut its own rows out, and every row is another."""
    c = compile(model.body, Config(), {"x": 1})
    x = torch.randn(2, 16, H, generator=torch.Generator().manual_seed(5)).to(model.embed.weight.dtype)
    as_uncompiled(c, x, tolerance=0.05)
    y = same_by_every_plan(c, x[:, :12].contiguous())
    everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, y)
    assert all(torch.equal(y, other) for other in everyone) and len(y.flatten(0, 1).unique(dim=0)) == 24
    assert len(c.captures) == 1 and c.captures[0].new_guards == [] and not foreign(c)
    # the residual stays cut from the first layer on; what leaves the model is gathered
    assert count(c, "sharded")["gathers"] == 2 * len(model.layers) - 1, count(c, "sharded")


CASES = [(Llama, 1e-6, torch.float32, False, False), (Gemma, 1e-5, torch.bfloat16, True, True),
         (Functional, 0.001, torch.bfloat16, False, False), (Torch, 1e-6, torch.float32, True, True)]


@pytest.mark.dist
def test_parallelize_module():
    run_ranks(_parallelize_module, 2, CASES, 1)


@pytest.mark.dist
def test_parallelize_module_on_four_ranks():
    run_ranks(_parallelize_module, 4, CASES[1:2], 1)


def _sequence_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    for shape, dim, norm in (((8, H), 0, Llama), ((2, 4, H), 1, Torch)):
        torch._dynamo.reset()
        model = sequence_parallel(Model(norm), mesh, dim)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(rank))  # this rank's tokens, unlike the other's
        c = compile(model.body, Config(), {"x": dim})
        with torch.no_grad():
            torch.testing.assert_close(same_by_every_plan(c, x), model.body(x))
        assert not foreign(c)
        if dim == 0:
            assert count(c, "sharded")["gathers"] == count(c, "sharded")["matmul_reduce_scatter"] == 2
        # q, k, v and gate, up each gathered their input: one gather is left of three, and of two
        assert count(c, "unfused")["all_gather"] == count(c, "unfused")["reduce_scatter"] == 2


@pytest.mark.dist
def test_gathers_of_the_sequence_parallel_plan_merge():
    run_ranks(_sequence_parallel, 2)


# --- functional collectives and in-place ones


class ByHand(nn.Module):
    """Half of an embedding and an MLP with its residual, reduced by `reduce`."""

    def __init__(self, reduce, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.reduce = reduce
        self.embed = nn.Embedding(VOCAB, H, dtype=dtype)
        self.up, self.down = nn.Linear(H, MID, dtype=dtype), nn.Linear(MID, H, False, dtype=dtype)
        torch.manual_seed(0)
        self.n1, self.n2 = Llama(1e-6).to(dtype), Gemma(1e-6).to(dtype)
        self.requires_grad_(False)

    def forward(self, ids):
        x = self.reduce(self.embed(ids))
        x = x + self.reduce(self.down(F.silu(self.up(self.n1(x)))))
        return self.n2(x)


def functional(x):
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def in_place(x):
    dist.all_reduce(x)
    return x


def split_by_hand(x):
    return funcol.all_gather_tensor(funcol.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD), 0, dist.group.WORLD)


def _collectives(rank):
    for reduce, dtype in ((functional, torch.float32), (in_place, torch.bfloat16)):
        torch._dynamo.reset()
        c = compile(ByHand(reduce, dtype), Config(), {"ids": 0})
        as_uncompiled(c, ids(16), tolerance=1e-5 if dtype == torch.float32 else 0.05)
        for n in (4, 7, 33):
            same_by_every_plan(c, ids(n))
        assert len(c.captures) == 1 and c.captures[0].new_guards == [] and not foreign(c)
        assert count(c, "unfused")["copy"] == 0
        assert count(c, "replicated")["all_reduce_norm_quant"] == 2 and count(c, "replicated")["all_reduce"] == 0
        assert count(c, "sharded")["matmul_reduce_scatter"] == count(c, "sharded")["gathers"] == 1
    torch._dynamo.reset()
    c = compile(lambda x: funcol.all_gather_tensor(x, 0, dist.group.WORLD) * 2, Config(), {"x": 0})
    x = torch.randn(6, 4)
    assert torch.equal(c(x), c.model(x)) and not foreign(c)  # nothing to reduce: nothing to split
    torch._dynamo.reset()
    c = compile(ByHand(split_by_hand), Config(), {"ids": 0})
    with torch.no_grad():
        torch.testing.assert_close(c(ids(16)), c.model(ids(16)))
    assert not foreign(c) and count(c, "unfused")["reduce_scatter"] == count(c, "unfused")["all_gather"] == 2
    _stay(rank)


def _stay(rank):
    """Reductions that are not ours run as they are, and the report says why they are alone."""
    def f(x, n):
        total = funcol.all_reduce(x @ x.t(), "max", dist.group.WORLD).sum(1, keepdim=True)
        mean = funcol.all_reduce(x, "avg", dist.group.WORLD)
        number = funcol.all_reduce(x.sum(), "sum", dist.group.WORLD)
        exact = funcol.all_reduce(n, "sum", dist.group.WORLD)
        root = funcol.broadcast(x, 0, dist.group.WORLD)
        return total + mean * number + root + functional(x), exact

    torch._dynamo.reset()
    x, big = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank)), torch.tensor([[2**40 + 1 + rank]])
    c = compile(f, Config(), {"x": 0})
    with torch.no_grad():
        want = f(x, big)
    for plan in ("unfused", "replicated", "sharded"):
        got = by_plan(c, plan, x, big)
        torch.testing.assert_close(got[0], want[0])
        assert got[1].item() == want[1].item() == 2**41 + 3
    assert len(foreign(c)) == 10  # five and their waits
    why = " ".join(v.why for v in c.captures[0].unfused.verdicts if v.rule == "adopt_functional_collective")
    for sentence in ("reduces by 'max', not by 'sum'", "reduces by 'avg'", "moves a single number", "sums torch.int64",
                     "broadcast.default is not one of all_reduce"):
        assert sentence in why


@pytest.mark.dist
def test_collectives_by_hand():
    run_ranks(_collectives, 2)


def test_groups_as_nodes():
    """With compile_on_one_rank the group of a DTensor's collective is a node of the graph."""
    if not hasattr(torch.distributed.config, "compile_on_one_rank"):
        pytest.skip("this torch names groups by strings only")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with torch.distributed.config.patch(compile_on_one_rank=True):
            c = compile(tensor_parallel(Model(), init_device_mesh("cpu", (2,))), Config(), {"ids": 0})
            c(ids(8))
        assert_fused(c, 1)
    finally:
        dist.destroy_process_group()


# --- FP8


def static(x, scale):
    return (x / scale).clamp(-448, 448).to(E4M3)


def per_token(x):
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (x / scale).clamp(-448, 448).to(E4M3), scale


class Fp8(nn.Module):
    """An MLP and a head whose linears are FP8; `linear(x, index)` multiplies by the weight `index`."""

    def __init__(self, linear, columns: bool):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.linear, self.embed = linear, nn.Embedding(VOCAB, H)
        weights = torch.randn(MID, H), torch.randn(H, MID), torch.randn(MID, H)
        self.scales = [w.abs().amax(1, keepdim=True) / 448 if columns else w.abs().amax() / 448 for w in weights]
        self.weights = [(w / s).to(E4M3) for w, s in zip(weights, self.scales, strict=True)]
        self.inputs = [torch.tensor(s) for s in (0.01, 0.1, 0.01)]
        torch.manual_seed(0)
        self.n1, self.n2 = Llama(1e-6), Llama(1e-5)
        self.requires_grad_(False)

    def forward(self, ids):
        x = functional(self.embed(ids))
        x = x + functional(self.linear(self, F.silu(self.linear(self, self.n1(x), 0)), 1))
        return self.linear(self, self.n2(x), 2)


def scaled_static(shape):
    def linear(m, x, i):
        s, sw = m.inputs[i].reshape(shape), m.scales[i].reshape(shape)
        return torch._scaled_mm(static(x, m.inputs[i]), m.weights[i].t(), s, sw, out_dtype=torch.float32)
    return linear


def scaled_rows(m, x, i):
    q, s = per_token(x)
    return torch._scaled_mm(q, m.weights[i].t(), s, m.scales[i].t(), out_dtype=torch.float32)


def scaled_mm(m, x, i):
    q, s = per_token(x)
    row = F.ScalingType.RowWise
    return F.scaled_mm(q, m.weights[i].t(), s, row, m.scales[i].t(), row, output_dtype=torch.float32)


def rows_work() -> bool:
    """Has this CPU torch._scaled_mm with a scale for each row? (torch 2.13 has, 2.11 has not)"""
    try:
        torch._scaled_mm(torch.ones(16, 16).to(E4M3), torch.ones(16, 16).to(E4M3).t(), torch.ones(16, 1), torch.ones(1, 16))
        return True
    except (RuntimeError, NotImplementedError):
        return False


def travels(c: Compiled) -> list[tuple[str, list[str]]]:
    """(format, dtypes of the parts) of every fused gather of the sharded plan, in order."""
    graph = c.captures[-1].ranges[0].plans["sharded"].gm.graph
    found = []
    for n in graph.nodes:
        if op_of(n) is all_gather_matmul:
            parts = val(arg(n, "x"))
        elif op_of(n) is norm_quant_all_gather_matmul:
            x, fmt = val(arg(n, "x")), arg(n, "fmt").partition(":")[0]
            parts = [x] if fmt == "bf16" else quantize.fake(x, [], fmt)
        else:
            continue
        found.append((arg(n, "fmt"), [str(p.dtype).removeprefix("torch.") for p in parts]))
    return found


class Wide(Fp8):
    """Activations are bfloat16 and quantized in float32: for a moment there are more bytes to gather, not less."""

    def forward(self, ids):
        x = functional(self.embed(ids).bfloat16())
        x = x + functional(self.linear(self, F.silu(self.linear(self, self.n1(x).float(), 0)), 1).bfloat16())
        return self.linear(self, self.n2(x).float(), 2)


def _fp8(rank):
    if rows_work():
        model = Wide(scaled_rows, True)
        model.n1.bfloat16(), model.n2.bfloat16()
        c = compile(model, Config(), {"ids": 0})
        as_uncompiled(c, ids(16), tolerance=0.2)
        assert travels(c) == [("fp8_token", ["float8_e4m3fn", "float32"])] * 2
    cases = [(scaled_static(shape), False, "fp8_tensor") for shape in ((), (1,), (1, 1))]
    cases += [(linear, True, "fp8_token") for linear in (scaled_rows, scaled_mm) if rows_work()]
    for linear, columns, fmt in cases:
        torch._dynamo.reset()
        c = compile(Fp8(linear, columns), Config(), {"ids": 0})
        as_uncompiled(c, ids(16), tolerance=1e-4)
        same_by_every_plan(c, ids(7))
        assert len(c.captures) == 1 and c.captures[0].new_guards == [] and not foreign(c)
        assert count(c, "unfused")["matmul"] == 3 and count(c, "replicated")["all_reduce_norm_quant"] == 2
        large = count(c, "sharded")
        assert large["matmul_reduce_scatter"] == 1 and large["reduce_scatter"] == 1 and large["all_gather"] == 0, large
        parts = ["float8_e4m3fn"] if fmt == "fp8_tensor" else ["float8_e4m3fn", "float32"]
        assert travels(c) == [(fmt, parts)] * 2


def _scaled_mm_on_cpu(rank):
    aten_backend.ON_CPU = True  # before any call: what an op chose is remembered
    for linear, columns in [(scaled_static(()), False), *([(scaled_rows, True)] if rows_work() else [])]:
        torch._dynamo.reset()
        c = compile(Fp8(linear, columns), Config(), {"ids": 0})
        with torch.no_grad():
            for n in (7, 16):
                assert torch.equal(same_by_every_plan(c, ids(n)), c.model(ids(n))), "the bits of the original call"
        assert {n.meta["choice"].backend.name for n in c.captures[0].unfused.gm.graph.nodes if op_of(n) is matmul} == {"aten"}


@pytest.mark.dist
def test_fp8_by_hand():
    run_ranks(_fp8, 2)


@pytest.mark.dist
def test_fp8_by_hand_has_the_bits_of_scaled_mm():
    run_ranks(_scaled_mm_on_cpu, 2)


# --- ops of other libraries, each registered by one line


def _define(lib: torch.library.Library, schema: str, run, fake) -> torch._ops.OpOverload:
    lib.define(schema)
    name = schema.partition("(")[0]
    lib.impl(name, run, "CompositeExplicitAutograd")
    lib._register_fake(name, fake)
    return getattr(getattr(torch.ops, lib.ns), name).default


def _nothing(*args) -> None:
    """The fake of an op that only writes to its arguments."""


# Shaped like vLLM's _C ops


def _rms_norm(result, input, weight, epsilon):
    result.copy_(F.rms_norm(input, (H,), weight, epsilon))


def _fused_add_rms_norm(input, residual, weight, epsilon):
    residual.add_(input)
    input.copy_(F.rms_norm(residual, (H,), weight, epsilon))


def _static_scaled_fp8_quant(result, input, scale, group_shape=None):
    result.copy_(static(input, scale))


NVFP4 = formats.get("nvfp4:128x4")


def _scaled_fp4_quant(input, input_scale, is_sf_swizzled_layout):
    data, scale = NVFP4.quantize(input, [input_scale.reshape(())])
    return data, scale.view(torch.int32)  # as vLLM's: four e4m3 scales are one integer


def _scaled_fp4_quant_fake(input, input_scale, is_sf_swizzled_layout):
    m, k = input.shape
    scale = input.new_empty(((m + 127) // 128 * 128, (k // 16 + 3) // 4), dtype=torch.int32)
    return input.new_empty((m, k // 2), dtype=torch.uint8), scale


# Shaped like FlashInfer's


def _bmm_fp8(A, B, A_scale, B_scale, dtype, backend="cublas"):
    return torch.bmm(A.float() * A_scale, B.float() * B_scale).to(dtype)


def _mm_fp4(a, b, a_descale, b_descale, alpha, out_dtype, block_size=16, use_8x4_sf_layout=False, backend="auto"):
    one = torch.ones(())
    x = NVFP4.dequantize([a, a_descale.view(E4M3)], [one])
    w = NVFP4.dequantize_weight([b.t().contiguous(), b_descale.t().contiguous().view(E4M3), one])
    return (x @ w.t() * alpha).to(out_dtype)


@pytest.fixture(scope="module")
def others():
    """The two libraries, and the lines that their owners would write."""
    v, f = torch.library.Library("toyvllm", "DEF"), torch.library.Library("toyflash", "DEF")
    before = dict(_spellings)
    adopt(_define(v, "rms_norm(Tensor(a!) result, Tensor input, Tensor weight, float epsilon) -> ()", _rms_norm, _nothing),
          rms_norm, lambda result, input, weight, epsilon: (input, weight, epsilon, 0.0, False))
    adopt(_define(v, "fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float epsilon) -> ()",
                  _fused_add_rms_norm, _nothing),
          add_rms_norm, lambda input, residual, weight, epsilon: (input, residual, weight, epsilon, 0.0, False))
    adopt(_define(v, "static_scaled_fp8_quant(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
                  _static_scaled_fp8_quant, _nothing),
          quantize, lambda result, input, scale, group_shape: None if group_shape else (input, [scalar(scale)], "fp8_tensor"))
    adopt(_define(v, "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
                  _scaled_fp4_quant, _scaled_fp4_quant_fake),
          quantize, lambda input, input_scale, is_sf_swizzled_layout: (
              input, [scalar(input_scale)], "nvfp4:128x4" if is_sf_swizzled_layout else "nvfp4"))
    adopt(_define(f, "bmm_fp8(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType dtype, "
                     "str backend='cublas') -> Tensor",
                  _bmm_fp8, lambda A, B, s, t, dtype, *_: A.new_empty((*A.shape[:2], B.shape[2]), dtype=dtype)),
          matmul, lambda A, B, A_scale, B_scale, dtype, backend: None if val(B).shape[0] != 1 else (
              [matrix(A)], [scalar(A_scale)], [transposed(matrix(B)), scalar(B_scale)], None, "fp8_tensor", dtype))

    def mm_fp4(a, b, a_descale, b_descale, alpha, out_dtype, block_size, use_8x4_sf_layout, backend):
        if block_size != 16 or use_8x4_sf_layout:
            return None
        one, g = from_alpha(alpha)
        a_descale, b_descale = (insert(torch.ops.aten.view.dtype, s, s, E4M3) for s in (a_descale, transposed(b_descale)))
        return [a, a_descale], [one], [transposed(b), b_descale, g], None, "nvfp4:128x4", out_dtype

    adopt(_define(f, "mm_fp4(Tensor a, Tensor b, Tensor a_descale, Tensor b_descale, Tensor alpha, ScalarType out_dtype, "
                     "int block_size=16, bool use_8x4_sf_layout=False, str backend='auto') -> Tensor",
                  _mm_fp4, lambda a, b, s, t, alpha, dtype, *_: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)),
          matmul, mm_fp4)
    yield torch.ops.toyvllm, torch.ops.toyflash
    _spellings.clear()
    _spellings.update(before)
    v._destroy()
    f._destroy()


class Vllm(nn.Module):
    """An MLP and a head as vLLM writes them, with its mutating ops; gate and up share their input."""

    def __init__(self, fmt: str):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.embed, self.fmt = nn.Embedding(VOCAB, H, dtype=torch.bfloat16), fmt
        weights = [torch.randn(n, k) / k**0.5 for n, k in ((MID, H), (MID, H), (H, MID), (MID, H))]
        self.weights = [formats.get(fmt).quantize_weight(w * (i + 1)) for i, w in enumerate(weights)]
        self.input_scale = torch.tensor([0.02 if fmt == "fp8_tensor" else 500.0])
        torch.manual_seed(0)
        self.n1, self.n2 = (torch.rand(H).add(0.5).bfloat16() for _ in range(2))
        self.requires_grad_(False)

    def quantize(self, x):
        if self.fmt == "fp8_tensor":
            out = torch.empty(x.shape, dtype=E4M3)
            torch.ops.toyvllm.static_scaled_fp8_quant(out, x, self.input_scale)
            return [out]
        data, scale = torch.ops.toyvllm.scaled_fp4_quant(x, self.input_scale, True)
        return [data, scale.view(E4M3)]

    def linear(self, q, i):
        w = self.weights[i]
        if self.fmt == "fp8_tensor":
            y = torch.ops.toyflash.bmm_fp8(q[0].unsqueeze(0), w[0].t().unsqueeze(0), self.input_scale, w[1], torch.bfloat16)
            return y.view(q[0].shape[0], w[0].shape[0])
        alpha = 1 / (self.input_scale * w[2])
        return torch.ops.toyflash.mm_fp4(q[0], w[0].t(), q[1].view(torch.uint8), w[1].view(torch.uint8).t(), alpha, torch.bfloat16)

    def forward(self, ids):
        residual = functional(self.embed(ids))
        y = torch.empty_like(residual)
        torch.ops.toyvllm.rms_norm(y, residual, self.n1, 1e-6)
        q = self.quantize(y)
        x = functional(self.linear(self.quantize(F.silu(self.linear(q, 0)) * self.linear(q, 1)), 2))
        torch.ops.toyvllm.fused_add_rms_norm(x, residual, self.n2, 1e-5)
        return self.linear(self.quantize(x), 3)


def _others(rank):
    import torch._inductor.config as inductor

    for fmt, v2 in (("fp8_tensor", True), ("fp8_tensor", False), ("nvfp4:128x4", True)):
        torch._dynamo.reset()
        with inductor.patch(enable_auto_functionalized_v2=v2):
            c = compile(Vllm(fmt), Config(), {"ids": 0})
            as_uncompiled(c, ids(16), tolerance=0.05)
            same_by_every_plan(c, ids(7))
            same_by_every_plan(c, ids(260))
        assert len(c.captures) == 1 and c.captures[0].new_guards == [] and not foreign(c)
        small, large = count(c, "replicated"), count(c, "sharded")
        left = [name for name in small if name.startswith(("auto_f", "bmm", "mm_", "static_", "scaled_", "fused_"))]
        assert not left and small["matmul"] == 4 and small["all_reduce_norm_quant"] == 2 and small["quantize"] == 1, small
        assert large["matmul_reduce_scatter"] == 1, large
        assert travels(c) == [(fmt, ["float8_e4m3fn"] if fmt == "fp8_tensor" else ["uint8", "float8_e4m3fn"])] * 2
        assert large["all_gather"] == 0, large


@pytest.mark.dist
def test_ops_of_other_libraries(others):
    run_ranks(_others, 2)


def _wrong(rank):
    lib = torch.library.Library("toywrong", "DEF")
    target = _define(lib, "halves(Tensor x, Tensor weight) -> Tensor", lambda x, w: x[:, ::2] * w, lambda x, w: x[:, ::2] * w)
    adopt(target, rms_norm, lambda x, weight: (x, weight, 1e-6, 0.0, False))
    c = compile(lambda x, w: target(functional(x), w), Config(), {"x": 0})
    as_uncompiled(c, torch.ones(6, 4) + torch.arange(6)[:, None], torch.rand(2))
    [miss] = [v for v in c.captures[0].unfused.verdicts if v.rule == "adopt_registered"]
    assert miss.kind == "missed" and "toywrong.halves.default makes" in miss.why and "its registration is wrong" in miss.why


@pytest.mark.dist
def test_a_wrong_registration_leaves_the_call_alone():
    run_ranks(_wrong, 2)


# --- Hugging Face's own tensor parallelism


def _hugging_face(rank, folder):
    from transformers import AutoModelForCausalLM, StaticCache

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun does
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32,
                                                 device_mesh=init_device_mesh("cpu", (2,))).eval().requires_grad_(False)
    config, steps = model.config, tiny.ids(2, 2, seed=7)

    def logits(f, n: int, embeds: bool) -> torch.Tensor:
        """Of a prompt of n tokens and of two more, one at a time, from a static cache."""
        cache = StaticCache(config=config, max_cache_len=32)
        cache.early_initialization(2, config.num_key_value_heads // 2, config.head_dim, torch.float32, torch.device("cpu"))
        x = tiny.ids(2, n)
        first = {"inputs_embeds": model.get_input_embeddings()(x)} if embeds else {"input_ids": x}
        found = [f(**first, past_key_values=cache, use_cache=True).logits]
        for i in range(0 if embeds else 2):
            position = torch.full((2, 1), n + i)
            step = steps[:, i:i + 1].contiguous()
            found.append(f(input_ids=step, position_ids=position, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, 1)

    c = compile(model, Config())
    for n, embeds, captures in ((6, False, 2), (11, False, 2), (12, False, 2), (8, True, 3)):
        with torch.no_grad():
            want = logits(model, n, embeds)
        made = {}
        for c.plan in ("unfused", "replicated", "sharded"):
            made[c.plan] = logits(c, n, embeds)
        assert torch.equal(made["replicated"], made["unfused"]) and torch.equal(made["sharded"], made["unfused"])
        torch.testing.assert_close(made["unfused"], want, rtol=1e-4, atol=1e-4)
        assert len(c.captures) == captures
        assert not foreign(c) and count(c, "unfused")["copy"] == 0 and c.captures[-1].new_guards == []
        small, large = count(c, "replicated"), count(c, "sharded")
        assert small["all_reduce"] == 0 and small["all_reduce_norm_quant"] >= 4 and small["all_gather"] == 1, "the logits"
        assert large["all_reduce"] == 0 and large["matmul_reduce_scatter"] == 4
        if large["reduce_scatter"]:  # the embedding's: since transformers 5.23 it is parallel too
            assert large["gathers"] >= 4 and not embeds  # and the lm_head of a decode


@pytest.mark.dist
def test_hugging_face_tensor_parallelism(tmp_path):
    pytest.importorskip("accelerate")
    tiny.model("qwen3", vocab=102).save_pretrained(tmp_path)
    run_ranks(_hugging_face, 2, str(tmp_path))

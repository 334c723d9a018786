"""Mixture of experts on a GPU: kernels against their references, bit for bit where that can be."""
from __future__ import annotations

import pytest
import torch

import fusewire.backends  # noqa: F401  (registers them)
from fusewire import formats
from fusewire.backends.triton import moe as triton
from fusewire.ops import moe
from fusewire.ops.moe import experts, route_quantize_pack

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]
LINEAR = [name for name, f in formats.FORMATS.items() if f.layout == "linear"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()


def test_kernels_have_their_references_numbers():
    """Parts bit for bit, a token's logits whatever the others are, experts outside of rounding, grouped matmuls to rounding."""
    from fusewire.bench.moe_kernels import check

    assert check(torch.device("cuda")) == []


def test_a_grouped_matmul_into_rows_that_no_descriptor_takes():
    w, ends = random(3, 1924, 512, seed=1) / 512**0.5, torch.tensor([700, 700, 1000]).cuda()
    call = ([random(1000, 512)], [], [w], ends, "bf16", torch.bfloat16)
    got, want = triton.grouped_matmul(*call).double(), moe.grouped_matmul.reference(*call).double()
    assert (got - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("how", list(moe.CHOICES))
@pytest.mark.parametrize(("hidden", "n", "k", "groups", "top"), [(2048, 128, 8, 1, 1), (7168, 256, 8, 8, 4), (640, 16, 4, 4, 2),
                                                                 (1024, 384, 6, 1, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 17, 300, 2500])
def test_choices(how, hidden, n, k, groups, top, tokens):
    from fusewire.backends.triton import moe as triton

    x, w, bias = random(tokens, hidden), random(n, hidden, seed=1), random(n, seed=2).float() / 10
    args = ([], w, bias if "sigmoid" in how else None, k, groups, top, 1.5, how, "fp8_block")
    assert route_quantize_pack.select(x, *args).backend.name == "triton"
    like = moe.record_like(x, w, k, "fp8_block")
    *_, weights, ids = moe.unpack(route_quantize_pack(x, *args), like)
    scores = triton.logits(x, w)
    want_ids, want = moe.CHOICES[how](scores, args[2], k, groups, top)
    same = (ids.long() == want_ids).all(1)
    assert same.sum() >= 0.95 * tokens and torch.allclose(weights[same], 1.5 * want[same], rtol=1e-4, atol=1e-6)
    exact = x.double() @ w.double().t()
    assert ((scores - exact).abs() <= 2.0**-17 * (x.double().abs() @ w.double().abs().t())).all()


@pytest.mark.parametrize("fmt", LINEAR)
def test_experts_on_the_gpu_are_those_of_the_cpu(fmt):
    f, n, hidden, mid = formats.get(fmt), 8, 256, 128
    x = random(50, hidden)
    params = [p.cuda() for p in f.params_from_amax(x.abs().amax().float())] if f.params_from_amax else []
    ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:3] for i in range(50)])
    ids = ids.to(torch.uint8).cuda()
    weights = random(50, 3, seed=3).float().abs()
    stacks = []
    for seed, shape in ((4, (mid, hidden)), (5, (mid, hidden)), (6, (hidden, mid))):
        ws = [f.quantize_weight(random(*shape, seed=seed * 100 + e) / shape[1]**0.5) for e in range(n)]
        stacks.append([torch.stack(p) for p in zip(*ws, strict=True)])
    args = (f.quantize(x, params), params, ids, weights, torch.tensor(4).cuda(), *stacks, [], "silu", fmt, torch.bfloat16)
    on_cpu = torch.utils._pytree.tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, args)
    got, want = experts(*args).double().cpu(), experts(*on_cpu).double()
    assert (got - want).norm() <= 0.02 * want.norm() and want.norm() > 0

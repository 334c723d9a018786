"""Module surgery: every rank's shard together is the whole model."""
from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewire import formats
from fusewire.errors import FormatError, InputError
from fusewire.group import fake_group, simulate
from fusewire.models import check_token_ids, parallelize, static_cache
from fusewire.models.layers import GatheredLinear, RMSNorm, RowParallelLinear, ShardedLinear, VocabParallelEmbedding
from fusewire.models.slices import Slice, cut, even, heads, whole

torch.set_num_threads(1)
QUANTIZED = ["fp8_tensor", "fp8_token", "fp8_block", "nvfp4", "mxfp8"]
BLOCKS = {"head_dim": 32, "intermediate": 256}  # sizes that two ranks can hold in every format


def sharded(group, model: nn.Module, quantization: str | None = None) -> list[nn.Module]:
    """The shards of a copy of the model, in rank order."""
    return simulate(group, lambda rank: parallelize(copy.deepcopy(model), group, quantization))


def logits(group, shards: list[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """The logits, which must be the same bits on every rank."""
    out = simulate(group, lambda rank: shards[rank](ids, use_cache=False).logits)
    assert all(torch.equal(out[0], other) for other in out)
    return out[0]


# ---------------------------------------------------------------------------------------------- slices

HEADS = [(n_q, n_kv, world) for n_kv in (1, 2, 3, 4, 5, 7, 8, 12) for per_kv in (1, 2, 3, 5, 8)
         for world in (1, 2, 3, 4, 6, 7, 8, 16) if (n_q := n_kv * per_kv) >= world]


@pytest.mark.parametrize("n_q,n_kv,world", HEADS)
def test_heads(n_q, n_kv, world):
    """Every query head is on exactly one rank, at a place that reads its own key/value head; all ranks have one shape."""
    seen, shapes = [], set()
    for rank in range(world):
        q, kv = heads(n_q, n_kv, rank, world)
        shapes.add((q.size, kv.size))
        assert q.size % kv.size == 0 and 0 <= q.start <= q.stop <= n_q and q.stop - q.start <= q.size
        for i, head in enumerate(range(q.start, q.stop)):
            own = kv.start + i // (q.size // kv.size)
            assert own < kv.stop and own == head // (n_q // n_kv)
            seen.append(head)
    assert seen == list(range(n_q)) and len(shapes) == 1
    if n_kv % world == 0:
        assert shapes == {(n_q // world, n_kv // world)}


def test_heads_of_smollm2_and_of_fewer_kv_heads_than_ranks():
    assert heads(9, 3, 0, 2) == (Slice(0, 6, 6), Slice(0, 2, 2)) and heads(9, 3, 1, 2) == (Slice(6, 9, 6), Slice(2, 3, 2))
    assert [heads(16, 2, r, 8).kv.start for r in range(8)] == [0] * 4 + [1] * 4
    assert [heads(10, 2, r, 8).q for r in (0, 1, 2, 3, 4)] == [(0, 2, 2), (2, 4, 2), (4, 5, 2), (5, 5, 2), (5, 7, 2)]


@pytest.mark.parametrize("n_q,n_kv,world,sentence", [(4, 2, 8, "at most 4 ranks"), (6, 4, 2, "do not divide"), (0, 0, 1, "broken")])
def test_heads_refused(n_q, n_kv, world, sentence):
    with pytest.raises(InputError, match=sentence):
        heads(n_q, n_kv, 0, world)


def test_cut_pads_with_zeros():
    x = torch.arange(12.0).view(4, 3) + 1
    got = cut(x, Slice(3, 4, 3), Slice(1, 3, 2))
    assert got.tolist() == [[11, 12], [0, 0], [0, 0]] and got.is_contiguous()
    assert [even(5, r, 4) for r in range(4)] == [(0, 2, 2), (2, 4, 2), (4, 5, 2), (5, 5, 2)]
    assert torch.equal(cut(x, whole(4)), x)


# ---------------------------------------------------------------------------------------------- the whole model

SHAPES = {"even": {"heads": 8, "kv_heads": 4}, "padded": {"heads": 9, "kv_heads": 3}, "replicated": {"heads": 8, "kv_heads": 1},
          "split": {"heads": 10, "kv_heads": 2}}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float32_equals_the_whole_model(ranks, family, shape):
    model, ids = tiny.model(family, **SHAPES[shape]), tiny.ids()
    want = model(ids, use_cache=False).logits
    for world in (1, 2, 4, 8):
        group = ranks(world)
        torch.testing.assert_close(logits(group, sharded(group, model), ids), want, rtol=1e-5, atol=1.5e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bf16_is_as_close_as_bf16_is_to_float32(ranks, family):
    model, ids = tiny.model(family, torch.bfloat16, heads=9, kv_heads=3), tiny.ids()
    exact = copy.deepcopy(model).float()(ids, use_cache=False).logits
    error = (model(ids, use_cache=False).logits - exact).norm()
    group = ranks(2)
    got = logits(group, sharded(group, model), ids)
    assert got.dtype == torch.bfloat16 and (got - exact).norm() < 1.5 * error


def test_biases_of_row_parallel_layers_are_added_once(ranks):
    model, ids = tiny.model("llama", attention_bias=True, mlp_bias=True, heads=8, kv_heads=4), tiny.ids()
    group = ranks(4)
    shards = sharded(group, model)
    torch.testing.assert_close(logits(group, shards, ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1.5e-5)
    biases = [s.model.layers[0].mlp.down_proj.bias for s in shards]
    assert torch.equal(biases[0], model.model.layers[0].mlp.down_proj.bias) and not any(b.any() for b in biases[1:])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantized_equals_a_fake_quantized_whole_model(ranks, fmt, family):
    model, ids = tiny.model(family, heads=4, kv_heads=2, **BLOCKS), tiny.ids()
    group = ranks(2)
    shards = sharded(group, model, fmt)
    oracle = tiny.fake_quantized(model, shards)
    for name, module in shards[0].named_modules():
        if isinstance(module, ShardedLinear):
            assert module.fmt == fmt
            pieces = [s.get_submodule(name) for s in shards]
            x = torch.randn(5, module.whole_shape[1], generator=torch.Generator().manual_seed(3))
            got = simulate(group, lambda r, x=x, p=pieces: p[r](x[:, p[r].cols.start:p[r].cols.stop]))
            got = got[0] if isinstance(module, RowParallelLinear) else torch.cat(got, 1)
            torch.testing.assert_close(got, oracle.get_submodule(name)(x), rtol=1e-5, atol=1e-5)
    want, got = oracle(ids, use_cache=False).logits, logits(group, shards, ids)
    assert (got - want).norm() < 0.02 * want.norm()  # a changed order of summation moves some codes by a step
    assert (got - model(ids, use_cache=False).logits).norm() > 0.03 * want.norm()  # and it was quantized at all


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_quantized_weights_are_the_slices_and_padding_is_zero(ranks, fmt):
    model = tiny.model("qwen2", heads=9, kv_heads=3, **BLOCKS)
    f, group = formats.get(fmt), ranks(2)
    for shard in sharded(group, model, fmt):
        for name, module in shard.named_modules():
            if isinstance(module, ShardedLinear):
                w, got = model.get_submodule(name).weight, f.dequantize_weight(module.weights())
                assert torch.equal(got, f.dequantize_weight(f.quantize_weight(cut(w, module.rows, module.cols))))
                rows, cols = module.rows.stop - module.rows.start, module.cols.stop - module.cols.start
                assert not got[rows:].any() and not got[:, cols:].any() and got[:rows, :cols].any()
                if module.bias is not None:
                    assert not module.bias[rows:].any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_static_cache_decodes_as_the_whole_model(ranks, family):
    model, ids = tiny.model(family, heads=9, kv_heads=3), tiny.ids(length=14)  # longer than Gemma's window of 8
    want = model(ids, use_cache=False).logits[:, 10:]
    group = ranks(2)
    shards = sharded(group, model)

    def decode(rank):
        cache = static_cache(shards[rank], 2, 16)
        assert {layer.keys.shape[1] for layer in cache.layers} == {2}
        out = [shards[rank](ids[:, :11], past_key_values=cache).logits[:, -1:]]
        return torch.cat(out + [shards[rank](ids[:, i:i + 1], past_key_values=cache).logits for i in range(11, 14)], 1)

    for got in simulate(group, decode):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1.5e-5)


def test_generate_of_transformers_works_on_every_rank(ranks):
    model, ids = tiny.model("qwen3", heads=9, kv_heads=3), tiny.ids(length=5)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    group = ranks(2)
    shards = sharded(group, model)
    for got in simulate(group, lambda rank: shards[rank].generate(ids, max_new_tokens=6, do_sample=False)):
        assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------- what was replaced

@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_norm_is_ours_with_its_spelling(family):
    model = parallelize(tiny.model(family), fake_group(2))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    gemma = family.startswith("gemma")
    assert len(norms) >= 5 and all(type(m) is RMSNorm for m in norms)
    assert {(m.offset, m.cast_first) for m in norms} == {(1.0, False) if gemma else (0.0, True)}
    assert not any(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_an_unknown_norm_is_left_alone():
    class CubicRMSNorm(nn.Module):
        def __init__(self, like):
            super().__init__()
            self.weight, self.eps = like.weight, 1e-5

        def forward(self, x):
            return x * self.weight * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + self.eps)

    model = tiny.model("llama")
    model.model.norm = CubicRMSNorm(model.model.norm)
    parallelize(model, fake_group(2))
    assert type(model.model.norm) is CubicRMSNorm and type(model.model.layers[0].input_layernorm) is RMSNorm


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_embeddings_share_one_tensor(ranks, family):
    model, ids = tiny.model(family, tie_word_embeddings=True), tiny.ids()
    group = ranks(2)
    shards = sharded(group, model)
    for shard in (*shards, copy.deepcopy(shards[0]), copy.deepcopy(shards[0]).bfloat16()):
        assert shard.lm_head.weight is shard.model.embed_tokens.weight
        assert type(shard.lm_head) is GatheredLinear and type(shard.model.embed_tokens) is VocabParallelEmbedding
    torch.testing.assert_close(logits(group, shards, ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1.5e-5)


def test_ids_outside_the_vocabulary():
    with pytest.raises(InputError, match=r"token id 101 at \(1, 2\) is outside the vocabulary of 101"):
        check_token_ids(torch.tensor([[0, 1, 100], [3, 4, 101]]), 101)
    with pytest.raises(InputError, match="token id -1"):
        check_token_ids(torch.tensor([-1]), 101)
    with pytest.raises(InputError, match=r"float32; give integers"):
        check_token_ids(torch.zeros(2), 101)
    check_token_ids(tiny.ids(), 101)


# ---------------------------------------------------------------------------------------------- shapes only, and graphs

@pytest.mark.parametrize("fmt", [None, *QUANTIZED])
def test_meta_and_fake_models_get_the_same_shapes(fmt):
    sizes = {"heads": 9, "kv_heads": 3, **BLOCKS}
    group = fake_group(2, rank=1)

    def shapes(model):
        parallelize(model, group, fmt)
        return {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}

    want = shapes(tiny.model("qwen2", torch.bfloat16, **sizes))
    assert shapes(tiny.model("qwen2", torch.bfloat16, device="meta", **sizes)) == want
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert shapes(tiny.model("qwen2", torch.bfloat16, **sizes)) == want


@pytest.mark.parametrize("family,fmt", [("llama", None), ("qwen2", "nvfp4"), ("gemma3_text", "fp8_tensor"), ("qwen3", "fp8_token")])
def test_every_rank_captures_the_same_graph_of_our_ops(family, fmt):
    """One full graph, no rank baked in, one node for each op, one all-reduce for each row-parallel layer and the embedding."""
    codes, ids = [], tiny.ids()
    for rank in range(3):
        torch._dynamo.reset()
        group = fake_group(3, rank)
        model = parallelize(tiny.model(family, torch.bfloat16, heads=9, kv_heads=3, head_dim=32, intermediate=192), group, fmt)
        seen = []

        def backend(graph, inputs, seen=seen):
            seen.append(graph)
            return lambda *args: (torch.zeros(1),)

        cache = static_cache(model, 2, 16)
        torch.compile(model.model, backend=backend, fullgraph=True)(ids, past_key_values=cache)
        (graph,) = seen
        codes.append(graph.code.replace(group.name, "GROUP"))
        names = [n.target._opname for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "fusewire"]
        assert names.count("all_reduce") == 1 + 2 * 2 and names.count("matmul") == 7 * 2
        assert names.count("quantize") == (0 if fmt is None else 7 * 2)
    assert codes[0] == codes[1] == codes[2]


# ---------------------------------------------------------------------------------------------- refusals

def test_refusals():
    def refused(sentence, model=None, group=None, quantization=None, error=InputError):
        with pytest.raises(error, match=sentence) as e:
            parallelize(model or tiny.model("llama"), group or fake_group(2), quantization)
        assert "\n" not in str(e.value)

    refused("unknown quantization 'int3'; choose one of fp8, bf16, ", quantization="int3")
    refused("unknown quantization 'nvfp4_128x4'", quantization="nvfp4_128x4")
    refused("layers.0.self_attn: 8 ranks share 4 query heads", group=fake_group(8))
    refused("layers.0.mlp.gate_proj.weight: 97 output features do not divide over 2 ranks", tiny.model("llama", intermediate=97))
    refused("layers.0.mlp.down_proj.weight: nvfp4 needs a multiple of 16 input features .* have 24", group=fake_group(4),
            quantization="nvfp4", error=FormatError)
    strange = tiny.model("llama")
    strange._tp_plan = {**strange._tp_plan, "model.layers.*.mlp.up_proj": "rowwise_split_input"}
    refused("layers.0.mlp.up_proj: the tensor-parallel style 'rowwise_split_input' .* is not supported", strange)
    planless = tiny.model("llama")
    planless._tp_plan = {}
    refused("LlamaForCausalLM has no tensor-parallel plan", planless)
    fused = tiny.model("llama")
    fused.model.layers[0].self_attn.q_proj = nn.Linear(64, 64 + 2 * 32)
    refused("self_attn.q_proj: 128 features are neither 4 query heads nor 2 key/value heads of 16", fused)
    headless = tiny.model("llama")
    del headless.model.layers[0].self_attn.head_dim
    refused("has no head_dim", headless)
    packed = tiny.model("llama")
    packed.model.layers[0].mlp.up_proj = nn.Identity()
    refused("up_proj: colwise is planned for a Identity", packed)
    with pytest.raises(InputError, match="no group was given"):
        parallelize(tiny.model("llama"))


def test_tiny_models_are_far_from_trivial():
    """The oracle must be able to fail: dropping any one layer changes the logits."""
    model, ids = tiny.model("llama"), tiny.ids()
    want = model(ids, use_cache=False).logits
    for name, p in model.named_parameters():
        old = p.clone()
        p.zero_()
        assert (model(ids, use_cache=False).logits - want).norm() > 1e-2 * want.norm() or math.isnan(want.norm()), name
        p.copy_(old)

"""A model-shaped stack of decoder layers with random weights, made on the device in its format; nothing is loaded."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import formats
from ..group import Group
from ..models import moe
from ..models.checkpoint import empty_model
from ..models.layers import GatheredLinear, RMSNorm, ShardedLinear, VocabParallelEmbedding
from ..models.parallelize import shard
from .cases import params
from .shapes import Experts, Shape

ATTENTION = "fusewire_bench"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: object) -> tuple[Tensor, None]:
    """Causal attention of a whole prompt; or, of a module that has a cache, of one new token that is written to the cache's last
    place, over all of it. query (batch, heads, tokens, head_dim), key and value with their own heads; values may be narrower."""
    if (cache := getattr(module, "cache", None)) is not None:
        return attend(query, key, value, cache).transpose(1, 2), None
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))  # flash attention has one width
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return y[..., :width].transpose(1, 2), None


@torch.library.custom_op("fusewire_bench::attend", mutates_args=("cache",))
def attend(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
    """One new token's attention, by an op of its own: of slices of a cache that is written to, compilers copy the whole.

    cache  (2, at least as many sequences, heads of key and value, tokens, head_dim): keys, then values
    """
    keys, values = cache[:, :query.shape[0]]
    keys[:, :, -1:].copy_(key)
    values[:, :, -1:].copy_(value)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def config_of(shape: Shape | Experts, layers: int) -> object:
    """Its Hugging Face config."""
    from transformers import DeepseekV3Config, LlamaConfig

    common = dict(hidden_size=shape.hidden, num_attention_heads=shape.heads, vocab_size=shape.vocab, num_hidden_layers=layers,
                  max_position_embeddings=131072, attn_implementation=ATTENTION, tie_word_embeddings=False, dtype=torch.bfloat16)
    if isinstance(shape, Shape):
        return LlamaConfig(intermediate_size=shape.intermediate, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
                           **common)
    (queries, keys), (plain, placed, values) = shape.latent, shape.head
    return DeepseekV3Config(
        num_key_value_heads=shape.heads, q_lora_rank=queries, kv_lora_rank=keys, qk_nope_head_dim=plain, qk_rope_head_dim=placed,
        v_head_dim=values, n_routed_experts=shape.experts, num_experts_per_tok=shape.chosen, n_group=shape.groups,
        topk_group=shape.top_groups, n_shared_experts=1, moe_intermediate_size=shape.intermediate, first_k_dense_replace=0,
        **common)


def stack(shape: Shape | Experts, layers: int, fmt: str, group: Group, device: torch.device,
          cache: tuple[int, int] | None = None) -> nn.Module:
    """This rank's part of a decoder: bf16, its linear layers in `fmt` with static params. One with experts has these in `fmt` and
    the rest, which every rank has, in bf16, as tokens are the ranks' own.

    cache  (batch, tokens) of a KV cache, full but for the last token, for attention to one new token; None: whole prompts
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    whole = isinstance(shape, Experts)
    model = shard(empty_model(config_of(shape, layers), Path("a shape")), group,
                  lambda name: "bf16" if whole and ".experts." not in name else fmt,
                  moe.layout(group, group.world_size, 1, None) if whole else None)
    generators = [torch.Generator(device=device).manual_seed(seed) for seed in (0 if whole else group.rank(), 1 + group.rank())]

    def random(n: int, k: int, own: bool = False) -> Tensor:
        return torch.randn(n, k, generator=generators[own], device=device, dtype=torch.bfloat16) / k ** 0.5

    static = params(fmt, device)  # one tensor: layers that read one input then quantize it once
    for module in model.modules():
        if isinstance(module, ShardedLinear):
            module.set_weight(formats.get(module.fmt).quantize_weight(random(module.rows.size, module.cols.size)))
            module.set_params(static if module.fmt == fmt else [])
        elif isinstance(module, GatheredLinear | VocabParallelEmbedding | nn.Embedding | nn.Linear | moe.Router):
            module.weight = nn.Parameter(random(*module.weight.shape), False)
            if isinstance(module, VocabParallelEmbedding):
                module.first_row = torch.tensor(module.rows.start, device=device)
            elif isinstance(module, moe.Router):
                module.e_score_correction_bias = torch.zeros(module.weight.shape[0], device=device)
        elif isinstance(module, moe.Experts):
            module.to_empty(device=device)
            for e in range(module.mine.size):
                for name, (n, k) in module.shapes.items():
                    module.set_expert(e, name, formats.get(fmt).quantize_weight(random(n, k, own=True)))
            module.set_inputs(static, [p.repeat(module.mine.size) for p in static])
        elif isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device), False)
        if cache is not None and hasattr(module, "local_kv_heads"):
            batch, tokens = cache
            kv = random(2 * batch * module.local_kv_heads * tokens, module.head_dim)
            module.register_buffer("cache", kv.view(2, batch, module.local_kv_heads, tokens, module.head_dim), persistent=False)
    return model.to(device).requires_grad_(False).eval()

"""A model-shaped stack of decoder layers with random weights, made on the device in its format; nothing is loaded."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import formats
from ..group import Group
from ..models.checkpoint import empty_model
from ..models.layers import GatheredLinear, RMSNorm, ShardedLinear, VocabParallelEmbedding
from ..models.parallelize import shard
from .cases import params
from .shapes import Shape

ATTENTION = "fusewire_bench"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: object) -> tuple[Tensor, None]:
    """Causal attention of a whole prompt; or, of a module that has a cache, of one new token that is written to the cache's last
    place, over all of it. query (batch, heads, tokens, head_dim), key and value with their own heads."""
    if (cache := getattr(module, "cache", None)) is not None:
        batch = query.shape[0]
        cache[0, :batch, :, -1:].copy_(key)
        cache[1, :batch, :, -1:].copy_(value)
        key, value = cache[0, :batch], cache[1, :batch]
    y = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None, enable_gqa=True)
    return y.transpose(1, 2), None


def stack(shape: Shape, layers: int, fmt: str, group: Group, device: torch.device,
          cache: tuple[int, int] | None = None) -> nn.Module:
    """This rank's part of a Llama-like decoder: bf16, its linear layers in `fmt` with static params.

    cache  (batch, tokens) of a KV cache, full but for the last token, for attention to one new token; None: whole prompts
    """
    from transformers import AttentionInterface, LlamaConfig

    AttentionInterface.register(ATTENTION, attention)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocab, num_hidden_layers=layers,
        max_position_embeddings=131072, attn_implementation=ATTENTION, tie_word_embeddings=False, dtype=torch.bfloat16)
    model = shard(empty_model(config, Path("a shape")), group, lambda name: fmt)
    generator = torch.Generator(device=device).manual_seed(group.rank())

    def random(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=generator, device=device, dtype=torch.bfloat16) / k ** 0.5

    static = params(fmt, device)  # one tensor: layers that read one input then quantize it once
    for module in model.modules():
        if isinstance(module, ShardedLinear):
            module.set_weight(formats.get(fmt).quantize_weight(random(module.rows.size, module.cols.size)))
            module.set_params(static)
        elif isinstance(module, GatheredLinear | VocabParallelEmbedding):
            module.weight = nn.Parameter(random(*module.weight.shape), False)
            if isinstance(module, VocabParallelEmbedding):
                module.first_row = torch.tensor(module.rows.start, device=device)
        elif isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device), False)
        if cache is not None and hasattr(module, "local_kv_heads"):
            batch, tokens = cache
            kv = random(2 * batch * module.local_kv_heads * tokens, module.head_dim)
            module.register_buffer("cache", kv.view(2, batch, module.local_kv_heads, tokens, module.head_dim), persistent=False)
    return model.to(device).requires_grad_(False).eval()

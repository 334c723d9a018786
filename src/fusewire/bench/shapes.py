"""The sizes of models, by name."""
from __future__ import annotations

from typing import NamedTuple

from ..errors import InputError


class Shape(NamedTuple):
    """A Llama-like decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class Experts(NamedTuple):
    """A DeepSeek-like decoder: latent attention, and experts in every layer, `intermediate` wide, of whose `groups` groups the best
    `top_groups` are open to a token, which chooses `chosen`; and one that all tokens share. `latent`: the widths of what queries,
    and keys and values, are made of; `head`: of a head's part without a position, its part with one, and its values."""

    hidden: int
    intermediate: int
    heads: int
    latent: tuple[int, int]
    head: tuple[int, int, int]
    vocab: int
    experts: int
    chosen: int
    groups: int
    top_groups: int


EXPERTS = {
    "deepseek-r1": Experts(7168, 2048, 128, (1536, 512), (128, 64, 128), 129280, 256, 8, 8, 4),
    "tiny-experts": Experts(64, 32, 4, (32, 32), (16, 16, 16), 101, 16, 4, 4, 2),
}
SHAPES = {
    "llama-3-70b": Shape(8192, 28672, 64, 8, 128, 128256),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "tiny": Shape(64, 192, 4, 2, 16, 101),
}


def get(name: str, *others: str) -> Shape:
    """The shape called `name`, of a decoder without experts; InputError lists the known ones, and `others` that may be given."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}; known: {', '.join([*SHAPES, *others])}")
    return SHAPES[name]


def projections(shape: Shape, world_size: int) -> dict[str, tuple[str, int, int]]:
    """Name -> (the fused op that it becomes, k, n), both of one rank. InputError for sizes that do not divide."""
    if shape.heads % world_size or shape.intermediate % world_size:
        raise InputError(f"{shape.heads} heads and {shape.intermediate} intermediate features do not divide over {world_size} "
                         "ranks; use another number of ranks")
    q = shape.heads // world_size * shape.head_dim
    kv = max(1, shape.kv_heads // world_size) * shape.head_dim
    mlp = shape.intermediate // world_size
    return {
        "qkv": ("all_gather_matmul", shape.hidden, q + 2 * kv),
        "o": ("matmul_reduce_scatter", q, shape.hidden),
        "gate_up": ("all_gather_matmul", shape.hidden, 2 * mlp),
        "down": ("matmul_reduce_scatter", mlp, shape.hidden),
    }


def config(name: str) -> dict[str, object]:
    """The config.json of a Hugging Face Llama of that shape, with as many layers as `explain` keeps of any."""
    s = get(name)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": s.hidden,
            "intermediate_size": s.intermediate, "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_dim, "vocab_size": s.vocab, "num_hidden_layers": 3, "max_position_embeddings": 131072,
            "tie_word_embeddings": False}

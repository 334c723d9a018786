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


SHAPES = {
    "llama-3-70b": Shape(8192, 28672, 64, 8, 128, 128256),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "tiny": Shape(64, 192, 4, 2, 16, 101),
}


def get(name: str) -> Shape:
    """The shape called `name`; InputError lists the known ones."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
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

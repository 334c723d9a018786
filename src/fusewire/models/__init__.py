"""Hugging Face decoders as tensor-parallel, quantized shards."""
from .checkpoint import load
from .demo import demo_model
from .inputs import check_token_ids
from .moe import combine_error, idle
from .parallelize import parallelize, static_cache

__all__ = ["check_token_ids", "combine_error", "demo_model", "idle", "load", "parallelize", "static_cache"]

"""Hugging Face decoders as tensor-parallel, quantized shards."""
from .inputs import check_token_ids
from .parallelize import parallelize, static_cache

__all__ = ["check_token_ids", "parallelize", "static_cache"]

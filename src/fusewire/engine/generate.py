"""Greedy generation with a static KV cache."""
from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def generate(model: Callable, cache: object, input_ids: Tensor, max_new_tokens: int, eos: Collection[int] = (),
             on_token: Callable[[Tensor], None] | None = None) -> Tensor:
    """Greedy tokens for a batch of prompts of equal length.

    model      called as a Hugging Face decoder (input_ids, position_ids, past_key_values, logits_to_keep)
    cache      an empty transformers StaticCache of the model with room for prompt and new tokens
    input_ids  (batch, prompt) int64
    eos        token ids; generation ends when every sequence has produced one (what follows one is not meaningful)
    on_token   called with the (batch,) tokens of every step
    -> (batch, at most max_new_tokens)
    """
    tokens: list[Tensor] = []
    done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    step, first = input_ids, 0
    for _ in range(max_new_tokens):
        positions = torch.arange(first, first + step.shape[1], device=step.device).unsqueeze(0)
        logits = model(input_ids=step, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        first += step.shape[1]
        token = logits[:, -1].argmax(-1)
        tokens.append(token)
        if on_token:
            on_token(token)
        if eos:
            done |= torch.isin(token, torch.tensor(sorted(eos), device=token.device))
            if bool(done.all()):
                break
        step = token[:, None]
    return torch.stack(tokens, 1) if tokens else input_ids[:, :0]

"""Greedy generation with a static KV cache."""
from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def generate(model: Callable, cache: object, input_ids: Tensor, max_new_tokens: int, eos: Collection[int] = (),
             on_token: Callable[[Tensor], None] | None = None, multiple: int = 1) -> Tensor:
    """Greedy tokens for a batch of prompts of equal length.

    model      called as a Hugging Face decoder (input_ids, position_ids, past_key_values, logits_to_keep)
    cache      an empty transformers StaticCache of the model with room for prompt and new tokens
    input_ids  (batch, prompt) int64
    eos        token ids; generation ends when every sequence has produced one (what follows one is not meaningful)
    on_token   called with the (batch,) tokens of every step
    multiple   of a long prompt, as many tokens as are a multiple of this are read first, then the rest
    -> (batch, at most max_new_tokens)
    """
    tokens: list[Tensor] = []
    done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    position = 0

    def read(ids: Tensor) -> Tensor:
        nonlocal position
        positions = torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)
        position += ids.shape[1]
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    step, rest = input_ids, input_ids.shape[1] % multiple
    if max_new_tokens and rest and input_ids.shape[1] > 2 * multiple:
        read(input_ids[:, :-rest])
        step = input_ids[:, -rest:].clone(memory_format=torch.contiguous_format)  # other strides would be compiled on their own
    for _ in range(max_new_tokens):
        token = read(step)[:, -1].argmax(-1)
        tokens.append(token)
        if on_token:
            on_token(token)
        if eos:
            done |= torch.isin(token, torch.tensor(sorted(eos), device=token.device))
            if bool(done.all()):
                break
        step = token[:, None]
    return torch.stack(tokens, 1) if tokens else input_ids[:, :0]

"""Steps of compiled code whose ranks hold different numbers of tokens: all are padded to one size, and cut again.

A compiled graph exchanges as many tokens with each rank, and a CUDA graph holds its sizes. So before a step, outside of its
graph, the ranks say how many tokens they hold, and each adds tokens behind its own. Attention is causal, so nobody's own token
sees them; what else they could change, a scale that is computed from a whole tensor, leaves them out (`zeroed`).
"""
from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

REFUSED = ("would keep the padding in a cache; give use_cache=False", "gives a tensor of logits_to_keep; give a number",
           "gives more than token ids, embeddings, positions, use_cache and logits_to_keep; leave it out")


@dataclass
class Step:
    """The arguments of a step, by name, and what is to be kept of the logits that it returns: (start, length) of dimension 1, None
    for all of them."""

    given: dict[str, Any]
    keeps: tuple[int, int] | None = None

    def cut(self, out: Any) -> Any:
        """What the model returned, with logits of this rank's own tokens alone."""
        if self.keeps is None:
            return out
        out = copy.copy(out)  # a CUDA graph returns the same object each time
        out.logits = out.logits.narrow(1, *self.keeps)
        return out


def zeroed(x: Tensor, padding: Tensor | None) -> Tensor:
    """x (tokens, k) with zeros in the rows of padding, see `Layout.padding`."""
    if padding is None:
        return x
    own, length = padding.unbind()
    return x.masked_fill((torch.arange(x.shape[0], device=x.device) % length >= own).unsqueeze(1), 0)


def size_for(n: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the sizes, which ascend, that holds n; above the last one its next multiple. () means powers of two."""
    n = max(n, 1)
    if not sizes:
        return 1 << (n - 1).bit_length()
    return next((s for s in sizes if s >= n), -(-n // sizes[-1]) * sizes[-1])


def why_not(given: dict[str, Any], token_dims: dict[str, int]) -> int:
    """0 if these arguments of a step can be padded, else which of REFUSED says why not, from 1."""
    others = [v for k, v in given.items() if k not in token_dims and k not in ("use_cache", "logits_to_keep")]
    reasons = (given.get("use_cache") is not False, isinstance(given.get("logits_to_keep"), Tensor),
               any(v is not None for v in others))
    return next((i for i, holds in enumerate(reasons, 1) if holds), 0)


def common_size(held: list[list[int]], sizes: tuple[int, ...], always: bool) -> int | None:
    """How many tokens each row of every rank shall have, where the ranks hold [rows, tokens of each, `why_not`].

    always  even if all hold as many; else None is returned for these, unless they hold none
    InputError, the same on every rank, for different numbers of rows and for arguments that cannot be padded.
    """
    rows, lengths, whys = ([h[i] for h in held] for i in range(3))
    if len(set(rows)) > 1:
        raise InputError(f"the ranks hold {rows} rows of tokens and a compiled step needs as many on each; give as many rows "
                         "everywhere, of no tokens where there are none, or run the model without compiling it")
    if len(set(lengths)) == 1 and lengths[0] and not always:
        return None
    size = size_for(max(lengths), sizes)
    if any(whys) and any(n != size for n in lengths):
        rank = next(r for r, why in enumerate(whys) if why)
        raise InputError(f"the ranks hold {lengths} tokens in a row, a compiled step pads them to {size}, and rank {rank} "
                         f"{REFUSED[whys[rank] - 1]}, or run the model without compiling it")
    return size


def padded(given: dict[str, Any], token_dims: dict[str, int], ids: Tensor, size: int) -> Step:
    """The step of a rank whose rows, such as those of `ids` (rows, length, ...), get `size` tokens."""
    new = {k: _longer(v, token_dims[k], size) if k in token_dims and v is not None else v for k, v in given.items()}
    keep, length = given.get("logits_to_keep", 0), ids.shape[1]
    if isinstance(keep, Tensor):  # nothing is padded
        return Step(new)
    if not keep:
        return Step(new, (0, length))
    # the last of a rank's own tokens, not of its row
    new["logits_to_keep"] = torch.arange(length - keep, length, device=ids.device).clamp(min=0)
    return Step(new, (max(keep - length, 0), min(keep, length)))


def _longer(x: Tensor, dim: int, size: int) -> Tensor:
    """x with zeros behind its tokens, in memory of its own: graphs are made for given strides too."""
    shape = list(x.shape)
    shape[dim] = size
    new = x.new_zeros(shape)
    new.narrow(dim, 0, x.shape[dim]).copy_(x)
    return new

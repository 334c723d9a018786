"""Checks of what a model is fed."""
from __future__ import annotations

from torch import Tensor

from ..errors import InputError


def check_token_ids(ids: Tensor, vocab: int) -> None:
    """InputError, naming the first one and where it is, unless every id (any shape, any integer dtype) is in [0, vocab).

    A vocabulary-parallel embedding gives zeros for an unknown id instead of failing, so ask before the first forward.
    """
    if ids.is_floating_point() or ids.is_complex():
        raise InputError(f"token ids are {ids.dtype}; give integers")
    wrong = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise InputError(f"token id {ids[at].item()} at {at} is outside the vocabulary of {vocab}; use this model's own tokenizer")

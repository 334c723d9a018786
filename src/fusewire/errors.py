"""Errors a user can act on: each is one sentence with the thing, the value and the way out."""


class FusewireError(Exception):
    """Anything Fusewire refuses to do; the command prints the sentence alone and exits 1."""

    exit_code = 1


class InputError(FusewireError, ValueError):
    """What the user gave cannot be used (a file, a flag, a shape); the command exits 2."""

    exit_code = 2


class FormatError(InputError):
    """A tensor that a format cannot hold; the sentence names the dimension and its value."""


class MismatchError(FusewireError):
    """Two ranks hold different things that must be the same; raised on every rank, with both values."""


class StrictError(FusewireError):
    """`strict` was asked for and something requested was not fused."""

    exit_code = 3

"""Wire bytes of a graph: what one rank sends, ring-equivalent. Only primitive collectives declare any."""
from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from .. import compat
from ..config import Link
from ..op import OPS, op_of
from .rewrite import val


class WireMeter(TorchDispatchMode):
    """Counts the bytes and the messages of the ops that run under it; a fused op costs what is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Any = 0
        self.messages = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        o = OPS.get(func._opname) if func.namespace == "fusewire" else None
        if o is None:
            return func(*args, **(kwargs or {}))
        if o.wire:
            self.bytes += o.wire(*args)
            self.messages += 1
        if o.fake:
            return o.fake(*args)
        with self:
            return o.reference(*args)


def wire(n: fx.Node, known: dict[Any, tuple[Any, int]]) -> tuple[Any, int]:
    """(bytes, messages) of one node; bytes may be symbolic in the token count.

    known  what was found for equal calls: the layers of a model repeat, and running a fused op's reference takes a while
    """
    if (o := op_of(n)) is None or "group" not in o.params:
        return 0, 0
    key = o.name, compat.shape_key(val(n.args))
    if key not in known:
        with WireMeter() as meter:
            o.target(*val(n.args))
        known[key] = meter.bytes, meter.messages
    return known[key]


def seconds(sent: int, messages: int, link: Link) -> float:
    """How long `messages` messages of `sent` bytes in all keep the wire busy, if nothing hides them."""
    return messages * link.latency_s + sent / link.bytes_per_s


def at(size: Any, symbol: Any, value: int) -> int:
    """A size that is an int, or symbolic in `symbol`, where that symbol is `value`."""
    size = compat.expression(size)
    return int(size.subs(symbol, value)) if hasattr(size, "subs") and symbol is not None else int(size)

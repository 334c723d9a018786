"""Wire bytes of a graph: what one rank sends, ring-equivalent. Only primitive collectives declare any."""
from __future__ import annotations

from typing import Any

from torch import fx

from .. import compat
from ..config import Link
from ..op import Meter, op_of
from .rewrite import val


def wire(n: fx.Node, known: dict[Any, tuple[Any, int]]) -> tuple[Any, int]:
    """(bytes, messages) of one node; bytes may be symbolic in the token count.

    known  what was found for equal calls: the layers of a model repeat, and running a fused op's reference takes a while
    """
    if (o := op_of(n)) is None or "group" not in o.params:
        return 0, 0
    key = o.name, compat.shape_key(val(n.args))
    if key not in known:
        with Meter() as meter:
            o.target(*val(n.args))
        known[key] = meter.bytes, meter.messages
    return known[key]


def seconds(sent: int, messages: int, link: Link) -> float:
    """How long `messages` messages of `sent` bytes in all keep the wire busy, if nothing hides them."""
    return messages * link.latency_s + sent / link.bytes_per_s


def at(size: Any, symbol: Any, value: int) -> int:
    """A size that is an int, or symbolic in `symbol`, where that symbol is `value`, and any other is 1: of several that vary
    the one stands for their product."""
    size = compat.expression(size)
    if symbol is None or not hasattr(size, "subs"):
        return int(size)
    size = size.subs(symbol, value)
    return int(size.subs(dict.fromkeys(size.free_symbols, 1)))

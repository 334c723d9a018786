"""Each call of one of our ops gets the backend that will run it, named in the graph."""
from __future__ import annotations

from torch import fx

from .. import backends  # noqa: F401  (registers them)
from ..op import op_of
from .rewrite import val


def lower(graph: fx.Graph) -> None:
    """Point every call at an overload `fusewire::OP.BACKEND`; meta holds "backend", and "refused" with the reasons."""
    for n in graph.nodes:
        if (o := op_of(n)) is not None:
            choice = o.select(*val(n.args))
            n.target = choice.backend.target
            n.meta["backend"], n.meta["refused"] = choice.backend.name, choice.refused

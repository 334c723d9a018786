"""Each call of one of our ops gets the backend that will run it, named in the graph unless that depends on the token count."""
from __future__ import annotations

import torch
from torch import fx

from .. import backends  # noqa: F401  (registers them)
from ..backends import workspace
from ..op import At, Choice, op_of
from .rewrite import val


def lower(graph: fx.Graph) -> None:
    """Point every call at an overload `fusewire::OP.BACKEND`, meta "choice" says why; or at the op, which chooses when it runs."""
    for n in graph.nodes:
        if (o := op_of(n)) is not None:
            settled = n.meta["choice"] = o.settle(*val(n.args))
            n.target = settled.backend.target if settled else o.target


def choice(n: fx.Node, at: At) -> Choice:
    """What a call runs where symbolic sizes have the values that `at` gives."""
    return n.meta.get("choice") or op_of(n).select(*val(n.args), at=at)


def open_workspace(group: str, nbytes: int, device: torch.device) -> None:
    """The workspace of a group, unless there is one, or it could not be made: then calls that need more run otherwise."""
    if group not in workspace.groups.workspaces:
        workspace.try_open(group, nbytes, device)

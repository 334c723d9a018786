"""Every private PyTorch API that Fusewire touches, for torch 2.11 to 2.13."""
from __future__ import annotations

import torch
from torch.distributed.distributed_c10d import ProcessGroup, _get_process_group_store, _resolve_process_group

OP_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def process_group(name: str) -> ProcessGroup:
    """The process group that torch registered under `name`."""
    return _resolve_process_group(name)


def process_group_store(pg: ProcessGroup) -> torch.distributed.Store:
    """The key-value store through which the ranks of `pg` met; keys are private to `pg` unless it is the default group."""
    return _get_process_group_store(pg)


def group_name(arg: object) -> str:
    """The group argument of a functional collective in a graph: a string, or in 2.13 a process group or a node."""
    if isinstance(arg, str):
        return arg
    if isinstance(arg, torch.fx.Node):  # compile_on_one_rank: _dtensor.mesh_get_process_group(mesh, dim)
        arg = arg.meta["val"]
    return arg.group_name  # type: ignore[attr-defined]


def known_true(condition: object) -> bool:
    """Is a comparison of sizes true whatever the sizes are? Never adds a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Have two (fake) tensors the same shape, whatever their sizes are?"""
    return a.dim() == b.dim() and all(known_true(i == j) for i, j in zip(a.shape, b.shape, strict=True))

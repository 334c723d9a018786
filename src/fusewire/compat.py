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

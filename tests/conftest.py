"""What tests of several files are given."""
from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for devices must not start CUDA here: ranks are forked

import pytest

from fusewire.group import Group, close, simulated_group

gc.set_threshold(100_000, 50, 50)  # compiling makes millions of objects that stay: looking for garbage is a tenth of its time


@pytest.fixture
def ranks() -> Iterator[Callable[[int], Group]]:
    """world_size -> a simulated group, forgotten afterwards."""
    made: list[Group] = []

    def make(world_size: int) -> Group:
        made.append(simulated_group(world_size))
        return made[-1]

    yield make
    for group in made:
        close(group)

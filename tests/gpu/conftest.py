"""Tests that need a CUDA device; they share the helpers beside the other tests."""
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
STARTS_RANKS = {"run_ranks", "run_numbers", "compiled"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that use CUDA in this process come last: from then on ranks cannot be forked, and each imports everything anew."""
    items.sort(key=lambda i: i.path.parent == HERE and STARTS_RANKS.isdisjoint(i.function.__code__.co_names))

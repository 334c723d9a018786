"""Tests that need a CUDA device; they share the helpers beside the other tests."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

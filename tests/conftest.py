"""Fixtures of all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Helpers (tolerances.py, ...) are imported by name from every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)

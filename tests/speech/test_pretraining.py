"""Pretraining's process that makes batches ahead of time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from lora_speech.pretraining.data import Batch, batches

BATCHES = 3


class Maker:
    """Makes batches of more bytes than the pipe between the processes holds."""

    def make(self, index: int, steps: int) -> Batch:
        one = torch.full((1,), index)
        return Batch(torch.full((1, 80, 1000), float(index)), one, one, one, one)


def test_batches_come_in_order() -> None:
    made = list(batches(Maker(), 1, 1 + BATCHES))
    assert [int(batch.tokens) for batch in made] == [1, 2, 3]
    assert all((batch.features == batch.tokens).all() for batch in made)


@pytest.mark.slow
def test_the_process_ends_with_a_killed_trainer() -> None:
    # The process inherits the pipes, and run() waits until nobody holds them.
    killed = subprocess.run([sys.executable, __file__], capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL


if __name__ == "__main__":
    for _ in batches(Maker(), 0, BATCHES):
        os.kill(os.getpid(), signal.SIGKILL)

"""From the environment that a launcher made to an Accelerator; the traps of launching live here and nowhere else.

One process, `accelerate launch`, torchrun and SLURM all announce themselves by environment variables, and several
combinations silently train N independent copies. So the world that torch sees is compared with the one announced.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from trainer.errors import InputError


def make_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process.

    Without CUDA, `cpu=True` is given: otherwise the ranks of torchrun on a CPU box would not know of each other.

    Raises:
        InputError: the world that torch sees is not the one that the launcher announced.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != accelerator.num_processes:
        raise InputError(
            "WORLD_SIZE",
            "the processes do not see each other",
            found=f"a world of {accelerator.num_processes}",
            expected=f"the {announced} that the launcher announced",
            fix="Start with torchrun, or with `accelerate launch --config_file configs/accelerate/cpu.yaml`.",
        )
    return accelerator


class Interrupted(Exception):
    """A signal ended the training at a step boundary, after its checkpoint was written."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} at step {step}; the checkpoint is written")
        self.signum = signum
        self.step = step


class StopRequest:
    """Makes the first SIGINT or SIGTERM a wish that the loop reads at a step boundary; a second one ends at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: object) -> None:
        self._signum = signum
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the training was asked to end."""
        return self._signum is not None

    def leave(self, step: int) -> NoReturn:
        """End the training. Raises Interrupted."""
        assert self._signum is not None
        raise Interrupted(self._signum, step)

"""Several trainings in one start of the processes, since a start costs more than the trainings of a test.

    torchrun --nproc_per_node 2 -m tests.trainings LIST.json

LIST.json: [{"arguments": [of `python -m trainer`], "zero": ZeRO stage or null, "stop_at": step or null}, ...].
Those with ZeRO come last, since DeepSpeed leaves its mark on the process. At `stop_at` the last rank alone gets
SIGUSR1, and all must leave together. Ends with the first status that is not the expected one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate.state import AcceleratorState

from trainer.cli import main
from trainer.data.batches import Batch
from trainer.training.loop import Training

ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
learn = Training._learn


def run(path: Path) -> int:
    """Run the trainings of a list; returns an exit status."""
    for training in json.loads(path.read_text()):
        AcceleratorState._reset_state()
        for name, value in {**ENVIRONMENT, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(training["zero"])}.items():
            if training["zero"] is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

        def learn_and_stop(self: Training, batches: Iterator[Batch], stop_at: int | None = training["stop_at"]) -> None:
            if self.step == stop_at and self.processes.rank == self.processes.world - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            learn(self, batches)

        Training._learn = learn_and_stop  # type: ignore[method-assign]
        expected = 0 if training["stop_at"] is None else 128 + signal.SIGUSR1
        status = main(training["arguments"])
        if status != expected:
            return status or 1
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

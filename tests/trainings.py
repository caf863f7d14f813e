"""Several trainings in one start of the processes, since a start costs more than the trainings of a test.

    torchrun --nproc_per_node 2 -m tests.trainings LIST.json

LIST.json: [[ZeRO stage or null, [arguments of `python -m trainer`]], ...]; those with ZeRO come last, since DeepSpeed
leaves its mark on the process. Ends with the first status that is not 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from trainer.cli import main

ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def run(path: Path) -> int:
    """Run the trainings of a list; returns an exit status."""
    for zero_stage, arguments in json.loads(path.read_text()):
        AcceleratorState._reset_state()
        for name, value in {**ENVIRONMENT, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero_stage)}.items():
            if zero_stage is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        status = main(arguments)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

"""Tasks that train nothing: they write down that they ran, and do what a file of the test says.

A task that is told to join meets the other ranks as a training does, and writes down what would update its weights.

python -m tests.cluster.pretended CONFIG SETTINGS RUN SHARDS      drives the chain of a run with such tasks
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trainer.cluster.local import run_locally
from trainer.cluster.plan import make_plan
from trainer.cluster.records import Diary, Place
from trainer.cluster.submission import Site
from trainer.cluster.task import Task
from trainer.run.files import write_json
from trainer.run.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]
WORLD = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
)


class Pretended(Task):
    """Notes begin and end in RUN/order.jsonl; RUN/wishes.json says {"stage1": "raise" | "wait" | "join"}."""

    def _command(self, place: Place | None, diary: Diary) -> Callable[[], int]:
        return self._pretend

    def _pretend(self) -> int:
        run, rank = Path(self.run), int(os.environ.get("RANK", 0))
        wish = json.loads((run / "wishes.json").read_text()).get(self.name)
        self._note("begin", {name: os.environ[name] for name in WORLD if name in os.environ})
        if wish == "raise" and rank == 1:
            raise RuntimeError("made to raise")
        if wish == "join":
            self._note("joined", joined=_joined())
        if wish == "wait":
            with StopRequest() as stop:
                self._note("waits")
                while not stop.requested:
                    time.sleep(0.05)
                time.sleep(1.5)  # a checkpoint is written
                self._note("saved")
                return 128 + stop.signum
        time.sleep(0.5 if self.name.startswith("stage") else 0)
        if self.name.startswith("stage") and rank == 0 and wish != "raise":
            write_json(run / self.name / "finished.json", {"step": 1})
        self._note("end")
        return 0

    def _note(self, what: str, world: dict[str, str] | None = None, joined: dict[str, str] | None = None) -> None:
        facts = {"what": what, "job": self.name, "argv": self.argv, "pid": os.getpid()}
        line = json.dumps({**facts, "world": world, "joined": joined})
        with (Path(self.run) / "order.jsonl").open("a") as file:
            file.write(line + "\n")


def _joined() -> dict[str, str]:
    """How the weights of a rank are updated, in its own words and in DeepSpeed's."""
    import torch

    from trainer.config import Stage1Config
    from trainer.run.processes import make_processes
    from trainer.training.update import make_update

    processes = make_processes(precision="no", deterministic=False, timeout_s=600)
    model = torch.nn.Linear(3, 2)
    update = make_update(model, model, Stage1Config(), processes, precision="no")
    engine = getattr(update.objective, "zero_optimization_stage", None)
    facts = {"update": type(update).__name__, "type": processes.accelerator.distributed_type.value}
    return facts | {"rank": str(processes.rank), "stage": str(engine() if engine else None)}


if __name__ == "__main__":
    config, settings, run, shards = sys.argv[1:]
    plan = make_plan(Path(config), Path(settings), Path(run), [f"data.shards={shards}"])
    sys.exit(run_locally(plan, Site(ROOT), say=partial(print, flush=True), make_task=Pretended))

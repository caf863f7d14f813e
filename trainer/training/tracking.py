"""The lines of the log where people watch them: TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from typing import Any

from trainer.errors import InputError
from trainer.run.directory import StageDirectory


def check_tracker(kind: str) -> None:
    """Raise InputError where the package of a tracker is not installed."""
    package = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(kind)
    if package and importlib.util.find_spec(package) is None:
        extra = "pip install 'fmri-flow[wandb]'" if kind == "wandb" else "pip install tensorboard"
        raise InputError("tracker", f"{package} is not installed", fix=f"{extra}, or choose tracker=none.")


class Tracker:
    """One curve for each number of a phase, on the main process.

    Args:
        step: after which the training goes on: what an earlier start wrote of later ones is dropped.
    """

    def __init__(self, kind: str, directory: StageDirectory, title: str, config: dict[str, Any], step: int) -> None:
        self._tracker: Any = None
        if kind == "none":
            return
        from accelerate.tracking import TensorBoardTracker, WandBTracker  # their packages are slow to import

        logs = directory.metrics.parent
        if kind == "tensorboard":
            self._tracker = TensorBoardTracker(run_name="", logging_dir=logs, purge_step=step + 1 if step else None)
        else:
            logs.mkdir(parents=True, exist_ok=True)
            project = directory.path.resolve().parent.name
            self._tracker = WandBTracker(run_name=project, name=title, dir=str(logs))
        if hasattr(self._tracker, "start"):  # since accelerate 1.10; before, a tracker starts when it is made
            self._tracker.start()
        if kind == "wandb":
            self._tracker.store_init_configuration(config)

    def log(self, step: int, **values: float | None) -> None:
        """Add the values of a step; those that are no number are left out."""
        if self._tracker is not None:
            self._tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            self._tracker.finish()

"""Score checkpoints of a run now, once: `python -m trainer evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.config import load_config
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.progress import say
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.scoring.score import score_checkpoint
from trainer.scoring.shares import OneProcess


def evaluate(run: RunDirectory, stages: Sequence[int], step: str, sets: Sequence[str] | None) -> None:
    """Score the checkpoints that `step` names (a number, `best`, `last` or `all`) on sets of the configuration.

    `best` is the refitted model where there is one.

    Raises:
        InputError: no such checkpoint or set.
    """
    processes = OneProcess(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for number in stages:
        directory = run.stage(number)
        study = Study(load_config(directory.config))
        refitted = step == "best" and directory.finished() is not None and study.config.train.refit
        chosen = directory.refit if refitted else directory
        named = list(sets) if sets else study.scored_sets(refit=refitted)
        for name in named:
            if name not in study.spans:
                known = ", ".join(study.spans)
                raise InputError("--set", "no such set in the run", found=name, expected=f"one of {known}")
            if refitted and name in ("train", study.config.val_set_name):
                fix = "Score a checkpoint from before the refit with --step N or last."
                raise InputError("--set", f"the refitted model was trained on {name}", fix=fix)
        for each in _steps(chosen, step, study.config.val_set_name):
            score_checkpoint(chosen, number, each, study, named, processes, say, full=True)


def _steps(directory: StageDirectory, wanted: str, val_set_name: str) -> list[int]:
    """The steps that a word or a number names."""
    steps = checkpoint.steps(directory.checkpoints)
    if not steps:
        raise InputError(directory.checkpoints, "holds no checkpoint")
    if wanted == "all":
        return steps
    if wanted == "last":
        return steps[-1:]
    if wanted == "best":
        best = checkpoint.best_step(directory.read_scores(), val_set_name)
        return [steps[-1] if best is None else best]
    if wanted.isdigit() and int(wanted) in steps:
        return [int(wanted)]
    expected = f"best, last, all or one of {', '.join(map(str, steps))}"
    raise InputError("--step", "no such checkpoint", found=wanted, expected=expected)

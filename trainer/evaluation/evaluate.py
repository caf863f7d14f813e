"""Score checkpoints of a run now, once: `python -m trainer evaluate`. Alone, or on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trainer.data.study import Study
from trainer.errors import InputError
from trainer.evaluation.held import score_if_whole
from trainer.evaluation.todo import Part
from trainer.evaluation.worker import sets_of
from trainer.progress import listening, say
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import check_writable
from trainer.run.processes import make_processes
from trainer.run.watchdog import Watchdog
from trainer.scoring.known import open_study, warn
from trainer.scoring.records import stale_steps
from trainer.scoring.shares import Ranks
from trainer.stored import load_stored


def evaluate(run: RunDirectory, stages: Sequence[int], step: str, sets: Sequence[str] | None) -> None:
    """Score the checkpoints that `step` names (a number, `best`, `last` or `all`) on sets of the configuration.

    `best` is the refitted model where there is one. What is asked for is scored, whether or not it was before; of
    `all`, a damaged one is recorded and passed over.

    Raises:
        InputError: no such checkpoint or set, the checkpoint is damaged, or the run cannot be written.
    """
    config = load_stored(run.stage(stages[0]).config)
    processes = make_processes(precision="no", deterministic=config.deterministic, timeout_s=config.timeout_s)
    with Watchdog(processes, config.timeout_s) as watchdog, listening(watchdog.alive):
        for number in stages:
            _evaluate_stage(run, number, step, sets, processes)


def _evaluate_stage(run: RunDirectory, number: int, step: str, sets: Sequence[str] | None, processes: Ranks) -> None:
    stage = run.stage(number)
    study = open_study(stage, load_stored(stage.config))
    if processes.is_main:
        warn(study.warnings)
    refitted = step == "best" and stage.finished() is not None and study.config.train.refit
    part = Part(run, number, refit=refitted)
    named = _named(study, sets, refit=refitted)
    processes.first(partial(check_writable, part.directory.scores, "Who scores a run writes into its directory."))
    for each in processes.first(partial(_steps, part.directory, step, study.config.val_set_name)):
        why = score_if_whole(part.directory, number, each, study, named, processes)
        if why is None:
            processes.first(partial(part.forget_damaged, each))
        elif step == "all":
            processes.first(partial(part.record_damaged, each, why))
            if processes.is_main:
                say(f"{part}: step {each} is damaged, and left out: {why}")
        else:
            raise InputError(why, "")
    if processes.is_main:
        warn(stale for name in named if (stale := _said_of_stale(part.directory, name, study)))


def _said_of_stale(directory: StageDirectory, name: str, study: Study) -> str | None:
    """The sentence about scores of a set that were taken on other data than the shards hold now."""
    steps = stale_steps(directory, name, study.digest(name))
    if not steps:
        return None
    listed = ", ".join(map(str, steps))
    return f"{directory.scores}: {name} held other data when step {listed} was scored (--step all scores all anew)"


def _named(study: Study, names: Sequence[str] | None, *, refit: bool) -> list[str]:
    """The sets to score. Raises InputError for one that the refitted model was trained on."""
    named = sets_of(study, names, refit=refit)
    trained_on = [name for name in names or () if name not in named]
    if trained_on:
        fix = "Score a checkpoint from before the refit with --step N or last."
        raise InputError("--set", f"the refitted model was trained on {trained_on[0]}", fix=fix)
    return named


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

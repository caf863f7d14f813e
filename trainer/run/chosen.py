"""Which checkpoint of a run predicts: one rule for predictions, exports, and whoever else uses a trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import Config, differing_keys
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.stored import load_stored
from trainer.strict import flat

_TRAINED = (
    *("include_features", "bold.", "stage1.model.", "stage1.standardise_features", "stage1.keep_columns"),
    *("stage2.latent_dim", "stage2.projection", "stage2.parametrisation", "stage2.subjects", "stage2.decoder."),
    "stage2.cfm.",
)
"""Keys that say what was trained: with another value they would describe another model than the weights are."""


@dataclass(frozen=True)
class Chosen:
    """A checkpoint: of which stage, in which directory (a stage's own, or its refit's), which step, and the config."""

    stage: int
    directory: StageDirectory
    step: int
    config: Config


def chosen_checkpoint(run: RunDirectory, stage: int | None = None, overrides: Sequence[str] = ()) -> Chosen:
    """The refit of a finished stage where there is one, else the best checkpoint so far, else the newest.

    Args:
        run: the run.
        stage: 1 or 2; without it stage 2 where it is finished, else stage 1.
        overrides: `key=value` for the stage's configuration.

    Raises:
        InputError: the stage has not been trained, or has no checkpoint yet; an override describes another model.
    """
    number = stage or (2 if run.stage(2).finished() is not None else 1)
    directory = run.stage(number)
    if not directory.has_started():
        raise InputError(directory.path, f"holds no training of stage {number}", expected="a run directory")
    config, finished = load_stored(directory.config, overrides), directory.finished()
    _check_overrides(directory, config)
    if finished is not None and config.train.refit:
        return _there(number, directory.refit, int(finished["step"]), config)
    steps = checkpoint.steps(directory.checkpoints)
    best = checkpoint.best_step(directory.read_scores(), config.val_set_name)
    if best is None and steps:
        best = steps[-1]
    return _there(number, directory, best, config)


def _check_overrides(directory: StageDirectory, config: Config) -> None:
    """Raise InputError where the configuration with overrides is that of another model than was trained."""
    trained = load_stored(directory.config)
    if changed := [key for key in differing_keys(trained, config) if key.startswith(_TRAINED)]:
        key = changed[0]
        found, before = (_value(one, key) for one in (config, trained))
        fix = "Leave it out, or train another run with it."
        raise InputError("command line", f"{key}: the model was trained with another value",
                         found=found, expected=before, fix=fix)  # fmt: skip


def _value(config: Config, key: str) -> str:
    """A dotted key's value, as it stands in YAML flow style."""
    return json.dumps(dict(flat(config.model_dump(mode="json"))).get(key), ensure_ascii=False)


def _there(stage: int, directory: StageDirectory, step: int | None, config: Config) -> Chosen:
    if step is None or step not in checkpoint.steps(directory.checkpoints):
        raise InputError(directory.checkpoints, "holds no checkpoint" + ("" if step is None else f" of step {step}"))
    return Chosen(stage, directory, step, config)

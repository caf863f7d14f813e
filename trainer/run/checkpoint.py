"""Checkpoints: one format for every launcher, whole or absent, readable without running any code.

`checkpoints/step_00000500/` holds `model.safetensors` (fp32 weights and buffers by name), `optimizer.safetensors`
(Adam's moments by parameter name) and `meta.json` (step, what the model is made for, SHA-256 of each file). The folder
is written under another name and renamed, so it appears complete or not at all. Which one is the latest or the best is
never stored: both are functions of what lies there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.errors import InputError

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})$")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory.

    `meta` holds the `step` and what else the writer put there. The step is the whole position: the plan does the rest.
    """

    model: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    meta: dict[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step:08d}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of which a complete folder lies here, ascending."""
    if not checkpoints.is_dir():
        return []
    matches = (_NAME.match(path.name) for path in checkpoints.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def save(checkpoints: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; it appears complete or not at all, and replaces one of the same step.

    Raises:
        InputError: it cannot be written (a full disk, say); the older checkpoints are untouched.
    """
    final = folder_of(checkpoints, step)
    aside = checkpoints / f".{final.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(_storable(checkpoint.model), aside / "model.safetensors")
        save_file(_storable(checkpoint.moments), aside / "optimizer.safetensors")
        sums = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        meta = {**checkpoint.meta, "step": step, "format": FORMAT, "sha256": sums}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for path in aside.iterdir():
            _to_disk(path)
        if final.exists():
            final.rename(old := checkpoints / f".{final.name}.old.{os.getpid()}")
            aside.rename(final)
            shutil.rmtree(old)
        else:
            aside.rename(final)
        _to_disk(checkpoints)
    except (OSError, SafetensorError) as error:
        fix = "Older checkpoints are whole: make room and continue with --resume."
        raise InputError(final, f"cannot be written: {error}", fix=fix) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def load(folder: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint and check every file against its SHA-256.

    Raises:
        InputError: a file is missing, altered, or of another format.
    """
    meta = read_meta(folder)
    sums = meta["sha256"]
    names = ["model.safetensors"] if weights_only else ["model.safetensors", "optimizer.safetensors"]
    tensors = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise InputError(path, "missing", fix="The checkpoint is damaged; use an older one.")
        if sha256(path) != sums.get(name):
            raise InputError(path, "altered since it was written", fix="The checkpoint is damaged; use an older one.")
        try:
            tensors.append(load_file(path))
        except SafetensorError as error:
            raise InputError(path, "no safetensors file", found=error) from error
    return Checkpoint(model=tensors[0], moments=tensors[1] if not weights_only else {}, meta=meta)


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint.

    Raises:
        InputError: missing, torn, or of another format.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        found_format = meta["format"] if isinstance(meta["sha256"], dict) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "no whole checkpoint", found=repr(error)) from error
    if found_format != FORMAT:
        raise InputError(path, "format", found=found_format, expected=FORMAT)
    return dict(meta)


def copy_weights(source: Path, target: Path) -> None:
    """Copy a checkpoint's weights and meta.json, so that `load(target, weights_only=True)` reads them.

    Raises:
        InputError: the source is damaged.
    """
    load(source, weights_only=True)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "meta.json"):
        aside = target / f".{name}.{os.getpid()}"
        shutil.copyfile(source / name, aside)
        aside.replace(target / name)


def newest_whole(checkpoints: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named through `say` and passed over."""
    for step in reversed(steps(checkpoints)):
        try:
            return load(folder_of(checkpoints, step))
        except InputError as error:
            say(f"passed over a damaged checkpoint: {error}")
    return None


def quality(score: Mapping[str, Any]) -> float | None:
    """What a score file says of a checkpoint, higher is better; None where it is not a number.

    Stage 1 is chosen by r. Stage 2 is chosen by its loss on unseen runs, which judges the whole distribution: the r of
    its mean hardly moves from the anchor's, and would choose a flow that has learnt next to nothing.
    """
    if "flow_loss" in score:
        return None if score["flow_loss"] is None else -float(score["flow_loss"])
    return None if score["pearson_r"] is None else float(score["pearson_r"])


def qualities(scores: Iterable[Mapping[str, Any]], set_name: str) -> dict[int, float]:
    """Step -> quality on a set, of the steps that the training itself validated there.

    What others score, and when, must not change what a training chooses.
    """
    means = (s for s in scores if (s["set"], s["estimate"]) == (set_name, "mean") and s.get("validation"))
    rated = {score["step"]: quality(score) for score in means}
    return {step: value for step, value in sorted(rated.items()) if value is not None}


def best_step(scores: Iterable[Mapping[str, Any]], set_name: str) -> int | None:
    """The step of the highest quality on a set (the earliest of equals); None where none was validated."""
    rated = qualities(scores, set_name)
    return max(rated, key=lambda step: rated[step]) if rated else None


def prune(checkpoints: Path, *, keep_last: int, keep: Iterable[int | None]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of the steps in `keep`."""
    kept = {*steps(checkpoints)[-keep_last:], *keep}
    for step in steps(checkpoints):
        if step not in kept:
            doomed = checkpoints / f".{folder_of(checkpoints, step).name}.doomed"
            folder_of(checkpoints, step).rename(doomed)
            shutil.rmtree(doomed)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

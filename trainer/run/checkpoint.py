"""Checkpoints: one format for every launcher, whole or absent, readable without running any code.

`checkpoints/step_00000500/` holds `model.safetensors` (fp32 weights and buffers by name), `optimizer.safetensors`
(Adam's moments by parameter name), where there is one `ema.safetensors` (the moving average of the weights, by
parameter name) and `meta.json` (step, what the model is made for, SHA-256 of each file). The folder is written under
another name and renamed, so it appears complete or not at all. Which one is the latest or the best is never stored:
both are functions of what lies there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trainer.errors import InputError
from trainer.run.files import to_disk, whole, write_whole

if TYPE_CHECKING:  # torch takes seconds to import, and `status` only asks what lies here
    import torch

FORMAT = 1
MODEL, MOMENTS, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
_NAME = re.compile(r"step_(\d{8})$")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory.

    `meta` holds the `step` and what else the writer put there. The step is the whole position: the plan does the rest.
    `ema` is empty where no moving average is kept.
    """

    model: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    meta: dict[str, Any]
    ema: dict[str, torch.Tensor] = field(default_factory=dict)


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
        _write_files(aside, step, checkpoint)
        old = checkpoints / f".{final.name}.old.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):  # there is none, or another thread prunes it
            final.rename(old)
        aside.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        to_disk(checkpoints)
    except OSError as error:
        fix = "Older checkpoints are whole: make room and continue with --resume."
        raise InputError(final, f"cannot be written: {error.strerror}", fix=fix) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _write_files(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    parts = {MODEL: checkpoint.model, MOMENTS: checkpoint.moments, EMA: checkpoint.ema}
    sums = {}
    for name, tensors in parts.items():
        if tensors or name != EMA:
            sums[name] = write_tensors(folder / name, _storable(tensors))
    meta = {**checkpoint.meta, "step": step, "format": FORMAT, "sha256": sums}
    write_whole(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    to_disk(folder)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file whole; returns its SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    with whole(path) as aside:
        try:
            save_file(tensors, aside, metadata=metadata)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        return sha256(aside)  # before it is flushed: what was just written is read back from memory


class Writer:
    """Writes checkpoints in a thread, one at a time, so that a step does not wait for the disk.

    What is given must be copies on the CPU that nobody writes to any more. A checkpoint that somebody relies on is
    `needed`: if it cannot be written, the next `write` or `wait` raises. Of any other it is only said.
    """

    def __init__(self, *, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, checkpoints: Path, step: int, checkpoint: Checkpoint, *, needed: bool) -> None:
        """Write a checkpoint as soon as the one before it is written.

        Raises:
            InputError: one that was needed could not be written.
        """
        self.wait()
        # no daemon: a program that ends waits for its checkpoint
        self._thread = threading.Thread(target=self._save, args=(checkpoints, step, checkpoint, needed))
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk. A disk that hangs is the watchdog's business.

        Raises:
            InputError: a checkpoint that was needed could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, checkpoints: Path, step: int, checkpoint: Checkpoint, needed: bool) -> None:
        try:
            save(checkpoints, step, checkpoint)
        except InputError as error:
            if needed:
                self._error = error
            else:
                print(f"warning: the training goes on without a checkpoint: {error}", file=sys.stderr)
        except BaseException as error:  # our mistake: it must not end with the thread
            self._error = error


def sweep(checkpoints: Path) -> None:
    """Remove what killed writers left; nobody may be writing here."""
    for left in checkpoints.glob(".step_*"):
        name, _, rest = left.name[1:].partition(".")
        if rest.startswith("old.") and not (checkpoints / name).exists():
            left.rename(checkpoints / name)  # killed between the two renames that replace a checkpoint
        else:
            shutil.rmtree(left, ignore_errors=True)


def load(folder: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint and check every file against its SHA-256.

    Args:
        folder: the checkpoint.
        weights_only: read what predicts and nothing else: `model` with the moving average of the weights in place of
            those that have one. Otherwise `model` holds the weights as they were trained, for a resume.

    Raises:
        InputError: a file is missing, altered, or of another format.
    """
    meta = read_meta(folder)
    model = _read(folder, MODEL, meta)
    ema = _read(folder, EMA, meta) if EMA in meta["sha256"] else {}
    if weights_only:
        return Checkpoint(model={**model, **ema}, moments={}, meta=meta)
    return Checkpoint(model=model, moments=_read(folder, MOMENTS, meta), meta=meta, ema=ema)


def _read(folder: Path, name: str, meta: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = folder / name
    try:
        if sha256(path) != meta["sha256"].get(name):
            raise InputError(path, "altered since it was written", fix="The checkpoint is damaged; use an older one.")
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(path, "missing", fix="The checkpoint is damaged; use an older one.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(path, "no safetensors file", found=error) from error


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
    meta = load(source, weights_only=True).meta
    target.mkdir(parents=True, exist_ok=True)
    names = [name for name in (MODEL, EMA) if name in meta["sha256"]]
    for name in (*names, "meta.json"):  # meta.json last: where it is, the weights are
        with whole(target / name) as aside:
            shutil.copyfile(source / name, aside)


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

    Subjects of the set that were not trained have no say: the loss is that of the others, and so is r here.
    """
    if "flow_loss" in score:
        return None if score["flow_loss"] is None else -float(score["flow_loss"])
    untrained = score.get("untrained_subjects")
    if not untrained:
        return None if score.get("pearson_r") is None else float(score["pearson_r"])
    trained = [r for label, r in score["per_subject"].items() if label not in untrained]
    return None if not trained or None in trained else sum(trained) / len(trained)


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
    """Delete all but the newest `keep_last` checkpoints and those of the steps in `keep`.

    One that is being written has no name yet and is left alone; one that somebody reads goes on to be readable to who
    has opened it, and is missing, not torn, to who opens it now. One that cannot be deleted is left, with a warning.
    """
    kept = {*steps(checkpoints)[-keep_last:], *keep}
    for step in steps(checkpoints):
        if step not in kept:
            folder = folder_of(checkpoints, step)
            doomed = checkpoints / f".{folder.name}.doomed.{secrets.token_hex(4)}"
            try:
                folder.rename(doomed)
            except FileNotFoundError:  # another thread replaces it
                continue
            except OSError as error:
                _warn(f"{folder} cannot be deleted: {error.strerror}")
                continue
            shutil.rmtree(doomed, ignore_errors=True)  # NFS keeps the folder while a file in it is open


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU; copied only where they are not that, or share memory (safetensors refuses)."""
    storable: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().to("cpu").contiguous()
        memory = stored.untyped_storage().data_ptr()
        storable[name] = stored.clone() if memory in seen else stored
        seen.add(memory)
    return storable


@functools.cache
def _warn(line: str) -> None:
    """Print a warning, once."""
    print(f"warning: {line}", file=sys.stderr)

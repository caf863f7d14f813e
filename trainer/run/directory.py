"""The layout of a run directory: who starts, how far a stage is, and how it ended.

    RUN/stage1/            config.yaml  starts/<n>.json  heartbeat.json  checkpoints/  logs/  scores/  finished.json
    RUN/stage1/data.json   what it is trained and validated on, by content (data/identity.py); stage2/anchor/ has a copy
    RUN/stage1/claims/     what is being scored, and by which worker
    RUN/stage1/refit/      checkpoints/  logs/  scores/  claims/, where `train.refit` trains again on train + validation
    RUN/stage2/            as stage1/, and anchor/ (the chosen stage 1, copied; its folds and what they predict)
    RUN/subject_<label>/   a run of stage 2 for one subject; its stage1 is a symbolic link to ../stage1
    RUN/slurm/             jobs.json, the configurations that were submitted, logs and records of jobs
    RUN/code/              the code that the jobs run, where it was copied
    RUN/ceilings/          what bounds the scores of a set, from the first that is full (scoring/ceilings.py)
    RUN/ensemble/          scores of averages of checkpoints
    RUN/report.html        a report, and figures/ that it shows
    RUN/*.png              what a training draws at its end

Whoever trains, scores, draws or reports reads and writes a run through these two classes, so the layout is said once.
Every file has one writer and appears whole: it is written aside and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.run import heartbeat
from trainer.run.code import code
from trainer.run.files import check_writable, names, read_object, write_json, write_whole

_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "h5py", "webdataset", "safetensors")
_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")


class StageDirectory:
    """One stage of a run on disk (or its refit, or one fold of its anchors)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.checkpoints = path / "checkpoints"
        self.scores = path / "scores"
        self.claims = path / "claims"
        self.metrics = path / "logs" / "metrics.jsonl"

    @property
    def refit(self) -> StageDirectory:
        """Where the stage is trained again on train + validation."""
        return StageDirectory(self.path / "refit")

    @property
    def anchor(self) -> Path:
        """Stage 2 only: the anchor's weights and what it predicts for the training TRs."""
        return self.path / "anchor"

    def has_started(self) -> bool:
        """Whether anything of a training lies here."""
        return any(path.exists() for path in (self.config, self.path / "starts", self.checkpoints))

    def finished(self) -> dict[str, Any] | None:
        """What the stage wrote at its end; None while it has not ended. Raises InputError where it cannot be read."""
        path = self.path / "finished.json"
        return read_object(path, "step") if path.exists() else None

    def write_finished(self, **facts: Any) -> None:
        """Say that the stage has ended, and how."""
        write_json(self.path / "finished.json", {"time": time.time(), **facts})

    def begin(self, config_yaml: str, **facts: Any) -> int:
        """Start a training here: make starts/<n>.json (versions, code, host, job, `facts`), write the configuration.

        Returns:
            n, with which a `Heartbeat` says that the training lives.

        Raises:
            InputError: another training lives here.
        """
        number = heartbeat.begin(self.path, {**environment(), **facts})
        write_whole(self.config, config_yaml)
        return number

    def append_metrics(self, **values: Any) -> None:
        """Add one line to logs/metrics.jsonl; one that the disk does not take is a warning, not an end."""
        try:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("ab+") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                # after a line that a crash cut short, the new one must not drown in its rest
                start = "" if file.read(1) in (b"", b"\n") else "\n"
                file.write(f"{start}{json.dumps(values)}\n".encode())
        except OSError as error:
            print(f"warning: {self.metrics} cannot be written: {error.strerror}", file=sys.stderr)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of logs/metrics.jsonl; of steps that a resume repeated, the later line counts.

        A line that a crash cut short, or that is none of ours, is left out. Raises InputError where the disk fails.
        """
        if not self.metrics.exists():
            return []
        lines: dict[tuple[int, str], dict[str, Any]] = {}
        try:
            texts = self.metrics.read_text(errors="replace").splitlines()
        except OSError as error:
            raise InputError(self.metrics, "cannot be read", found=error) from error
        for text in texts:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"step", "kind"} <= line.keys():
                lines[(line["step"], line["kind"])] = line
        return [lines[key] for key in sorted(lines)]

    def scores_with_paths(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """All score files of the stage, in the order of their names; other files about checkpoints are passed over.

        Raises InputError for one that cannot be read: what is best follows from all of them.
        """
        for path in sorted(self.scores / name for name in names(self.scores) if name.endswith(".json")):
            content = read_object(path)
            if "estimate" in content:
                yield path, content

    def read_scores(self) -> Iterator[dict[str, Any]]:
        """What all score files of the stage hold."""
        return (score for _, score in self.scores_with_paths())


class RunDirectory:
    """A run: two stages and what is drawn from them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, number: int) -> StageDirectory:
        """The directory of stage 1 or 2."""
        return StageDirectory(self.path / f"stage{number}")

    def claim(self, stages: Sequence[int], *, resume: bool, overwrite: bool) -> None:
        """Make room for a training of `stages`, before any time is spent.

        Raises:
            InputError: the folder holds a training already and neither `resume` nor `overwrite` is given, it holds
                something else, or it cannot be written.
        """
        if resume and overwrite:
            raise InputError("--resume", "given together with --overwrite", fix="Choose one of them.")
        strange = [n for n in (1, 2) if self.stage(n).path.exists() and not self.stage(n).has_started()]
        if strange and any(self.stage(strange[0]).path.iterdir()):
            raise InputError(self.stage(strange[0]).path, "is no stage of a run", fix="Choose another --run.")
        foreign = [path.name for path in self.path.glob("*") if not _is_ours(path)]
        if foreign and not any(self.stage(n).has_started() for n in (1, 2)):
            raise InputError(self.path, "is no run directory", found=foreign[0], fix="Choose another --run.")
        started = [n for n in stages if self.stage(n).has_started()]
        if started and not (resume or overwrite):
            holders = {n: heartbeat.holder(self.stage(n).path, patience_s=0) for n in started}
            number, held = next((item for item in holders.items() if item[1]), (started[0], None))
            raise InputError(
                self.stage(number).path,
                "holds another training",
                found=f"{heartbeat.describe(held)}, which has not ended" if held else None,
                fix="Give --resume to continue it, --overwrite to start anew, or another --run.",
            )
        if overwrite and 1 in stages and 2 not in stages and self.stage(2).has_started():
            raise InputError(
                self.stage(2).path,
                "stands around the stage 1 that --overwrite would delete",
                fix="Train both stages (--stage all), or choose another --run.",
            )
        for number in stages if overwrite else ():
            heartbeat.refuse_held(self.stage(number).path)
        check_writable(self.path, "Choose another --run.")
        try:
            for number in stages if overwrite else ():
                self._delete(number)
        except OSError as error:
            raise InputError(self.path, f"cannot be written: {error.strerror}", fix="Choose another --run.") from error

    def _delete(self, number: int) -> None:
        """Delete a stage; renamed first, so that a kill leaves no half of one that nobody would know again."""
        stage = self.stage(number).path
        for left in self.path.glob(f".{stage.name}.deleted.*"):
            shutil.rmtree(left)
        if stage.exists():
            deleted = stage.rename(self.path / f".{stage.name}.deleted.{os.getpid()}")
            shutil.rmtree(deleted)


_OURS = {"stage1", "stage2", "ceilings", "ensemble", "figures", "slurm", "code"}
_OURS_ASIDE = (".probe.", ".code.", ".stage1.deleted.", ".stage2.deleted.")  # of killed processes


def _is_ours(path: Path) -> bool:
    """Whether something in a run directory may be of our making."""
    if path.name.startswith("subject_"):
        return (path / "stage1").is_symlink()
    return path.name in _OURS or path.suffix in (".png", ".html", ".csv") or path.name.startswith(_OURS_ASIDE)


def environment() -> dict[str, Any]:
    """What the start of a training should remember: versions, code, commit and diff, host, job of SLURM, command."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    now = code()
    return {
        "time": time.time(),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
        "versions": versions,
        "git_commit": now.git_commit,
        "git_diff": now.git_diff,
        "code_sha256": now.sha256,
    }

"""The layout of a run directory: who starts, how far a stage is, and how it ended.

    RUN/stage1/            config.yaml  starts/<n>.json  heartbeat.json  checkpoints/  logs/  scores/  finished.json
    RUN/stage1/refit/      the same, where `train.refit` trains again on train + validation
    RUN/stage2/            the same, and anchor/ (the chosen stage 1, copied)
    RUN/*.png              figures

Whoever trains, scores, draws or reports reads and writes a run through these two classes, so the layout is said once.
Every file has one writer and appears whole: it is written aside and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.errors import InputError

_PACKAGES = ("torch", "accelerate", "deepspeed", "numpy", "h5py", "webdataset", "safetensors")
_SECONDS_BETWEEN_BEATS = 5.0


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; NaN is refused, since other readers of JSON do not know it."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(path, "missing") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(path, "cannot be read", found=error) from error


class StageDirectory:
    """One stage of a run on disk (or its refit, or one fold of its anchors)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.scores = path / "scores"
        self.metrics = path / "logs" / "metrics.jsonl"
        self._last_beat = -_SECONDS_BETWEEN_BEATS
        self._beats = 0

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
        return self.config.exists() or self.checkpoints.exists()

    def finished(self) -> dict[str, Any] | None:
        """What the stage wrote at its end; None while it has not ended."""
        path = self.path / "finished.json"
        return read_json(path) if path.exists() else None

    def write_finished(self, **facts: Any) -> None:
        """Say that the stage has ended, and how."""
        write_json(self.path / "finished.json", {"time": time.time(), **facts})

    def record_start(self, config_yaml: str, **facts: Any) -> None:
        """Write the resolved configuration and a new starts/<n>.json: versions, code, host, world."""
        starts = self.path / "starts"
        starts.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, config_yaml)
        numbers = [int(path.stem) for path in starts.glob("*.json") if path.stem.isdigit()]
        write_json(starts / f"{max(numbers, default=0) + 1}.json", {**environment(), **facts})

    def beat(self, step: int) -> None:
        """Show that the training lives, every few seconds at most."""
        now = time.monotonic()
        if now - self._last_beat < _SECONDS_BETWEEN_BEATS:
            return
        self._last_beat = now
        self._beats += 1
        facts = {"step": step, "time": time.time(), "host": platform.node(), "pid": os.getpid(), "count": self._beats}
        write_json(self.path / "heartbeat.json", facts)

    def append_metrics(self, **values: Any) -> None:
        """Add one line to logs/metrics.jsonl."""
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of logs/metrics.jsonl; of steps that a resume repeated, the later line counts.

        A line that a crash cut short is left out.
        """
        if not self.metrics.exists():
            return []
        lines: dict[tuple[int, str], dict[str, Any]] = {}
        for text in self.metrics.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            lines[(line["step"], line["kind"])] = line
        return [lines[key] for key in sorted(lines)]

    def scores_with_paths(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """All score files of the stage, in the order of their names."""
        for path in sorted(self.scores.glob("*.json")):
            yield path, read_json(path)

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
        foreign = [p.name for p in self.path.glob("*") if p.name not in _OURS and p.suffix not in (".png", ".html")]
        if foreign and not any(self.stage(n).has_started() for n in (1, 2)):
            raise InputError(self.path, "is no run directory", found=foreign[0], fix="Choose another --run.")
        started = [n for n in stages if self.stage(n).has_started()]
        if started and not (resume or overwrite):
            raise InputError(
                self.stage(started[0]).path,
                "holds another training",
                fix="Give --resume to continue it, --overwrite to start anew, or another --run.",
            )
        if overwrite and 1 in stages and 2 not in stages and self.stage(2).has_started():
            raise InputError(
                self.stage(2).path,
                "stands around the stage 1 that --overwrite would delete",
                fix="Train both stages (--stage all), or choose another --run.",
            )
        try:
            for number in stages if overwrite else ():
                if self.stage(number).path.exists():
                    shutil.rmtree(self.stage(number).path)
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(self.path, f"cannot be written: {error.strerror}", fix="Choose another --run.") from error


_OURS = {"stage1", "stage2", "figures"}


def environment() -> dict[str, Any]:
    """What the start of a training should remember: versions, commit and diff, host, command."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": time.time(),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "versions": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": _git("diff", "HEAD"),
    }


def _git(*arguments: str) -> str | None:
    """git's answer about the code that runs, or None where it is no checkout."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None

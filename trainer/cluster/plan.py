"""What somebody wants submitted, checked, and what of it is still to be done.

The jobs train with what was submitted: the configuration, overrides and defaults filled in, is written to
RUN/slurm/config_<n>.yaml before the first job is submitted, and the jobs read that file. Whoever edits the original, or
submits again with other overrides, while jobs wait in the queue changes nothing for them. A number is used for one
configuration: the same one, submitted again, is the same file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster.chain import Job, Run, Shards, Stage, pipeline
from trainer.cluster.settings import OVERRIDE, Settings, load_settings
from trainer.config import Config, load_config
from trainer.data.layout import load_layout
from trainer.data.manifest import MANIFEST
from trainer.errors import InputError
from trainer.run import jobs as queue
from trainer.run.directory import RunDirectory
from trainer.run.files import write_new


@dataclass(frozen=True)
class Plan:
    """A chain of jobs that may be submitted.

    Attributes:
        home: the run directory, absolute; logs, scripts and the configuration lie in its folder slurm.
        settings: what the jobs ask for, from the file `source`.
        jobs: the chain.
        notes: what is not done, and why; a line each.
        configs: the configurations that the jobs read, by file.
    """

    home: Path
    settings: Settings
    source: Path
    jobs: list[Job]
    notes: list[str]
    configs: dict[Path, str]

    @property
    def folder(self) -> Path:
        """Of logs and scripts."""
        return self.home / "slurm"

    def keep_configs(self) -> None:
        """Write the configurations that are not there yet."""
        for path, text in self.configs.items():
            if not path.exists() and not write_new(path, text):
                raise InputError(path, "has just been written by another submission", fix="Submit again.")


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the training, and those of the jobs without their leading `slurm.`."""
    of_jobs = [override.removeprefix(OVERRIDE) for override in overrides if override.startswith(OVERRIDE)]
    return [override for override in overrides if not override.startswith(OVERRIDE)], of_jobs


def make_plan(config: Path, slurm: Path, run: Path | None, overrides: Sequence[str]) -> Plan:
    """Check everything, and see what of the pipeline of one run is to be done.

    Args:
        config: of the training.
        slurm: a file of configs/slurm.
        run: the run directory; None for output/<name of the config>.
        overrides: `key=value` of the training and `slurm.key=value` of the jobs.

    Raises:
        InputError: something is wrong with one of these, or the run is being trained outside of the queue.
    """
    own, of_jobs = split_overrides(overrides)
    training, settings = load_config(config, own), load_settings(slurm, of_jobs)
    home = (run or Path("output") / config.stem).absolute()
    standing = {number: _stage(home, number) for number in (1, 2)}
    _check_continues(home, training, standing)
    path, text = _config_file(home, training)
    taking_part = Run(home, path, standing)
    shards, note = _shards(training, settings, home, standing)
    chain = pipeline(home, [taking_part], shards=shards, links=settings.links)
    notes = [line for number, stage in standing.items() for line in _notes(number, stage)]
    return Plan(home, settings, slurm, chain, [*note, *notes], {path: text} if chain else {})


def _stage(home: Path, number: int) -> Stage:
    """How far a stage is, and whether a worker for it is in the queue."""
    found = queue.standing(home, number)
    if found.state == "running" and not found.ids:
        raise InputError(
            home / f"stage{number}",
            "is being trained by a process that is no job of this pipeline",
            fix="Submit when it has ended (`python -m trainer status` tells), or choose another --run.",
        )
    last = found.ids[-1] if found.state == "running" else ""
    return Stage(found.state, last, _in_queue(home, f"evaluate{number}"))


def _in_queue(home: Path, name: str) -> str:
    """The id of a job of this name that is in the queue; empty where there is none."""
    ids = [job.id for job in queue.read(home) if job.name == name]
    states = queue.states(ids) if ids else {}
    return next((job_id for job_id in reversed(ids) if not queue.is_over(states[job_id])), "")


def _check_continues(home: Path, training: Config, standing: dict[int, Stage]) -> None:
    """What a job would refuse after hours in the queue is refused now. Raises InputError."""
    begun = [n for n, stage in standing.items() if stage.needed and RunDirectory(home).stage(n).config.exists()]
    behind = standing[2].needed and standing[1].standing == "finished"
    if begun or behind:
        from trainer.training.stages import check_same_config, stage1_config  # imports torch

        run = RunDirectory(home)
        check_same_config(training, run, begun)
        if behind:
            stage1_config(training, run)


def _config_file(home: Path, training: Config) -> tuple[Path, str]:
    """Where the jobs read the configuration: the file that holds it already, or one with the next number."""
    text, number = training.to_yaml(), 1
    while (path := home / "slurm" / f"config_{number}.yaml").exists() and path.read_text() != text:
        number += 1
    return path, text


def _shards(
    training: Config, settings: Settings, home: Path, standing: dict[int, Stage]
) -> tuple[Shards | None, list[str]]:
    """The job that makes shards, where one is needed and there are none; and what to say of it.

    Raises:
        InputError: there are none, and nothing says how to make them.
    """
    where, asked = training.data.shards, settings.shards
    if not any(stage.needed for stage in standing.values()) or _is_remote(where):
        return None, []
    if (Path(where) / MANIFEST).exists():
        return None, [f"shards: {where} holds some already"] if asked.layout else []
    running = _in_queue(home, "shards")
    if running:
        return Shards(id=running), [f"shards: job {running} of an earlier submission makes them"]
    if asked.layout is None or asked.root is None:
        fix = "Make them with tools/make_shards.py, or set shards.layout and shards.root in the file of --slurm."
        raise InputError("data.shards", f"{where} holds no shards ({MANIFEST} is missing)", fix=fix)
    load_layout(asked.layout)
    if not Path(asked.root).is_dir():
        raise InputError("shards.root", "no such folder", found=asked.root)
    features = asked.features or training.include_features
    return Shards(("--layout", asked.layout, "--root", asked.root, "--out", where, "--features", *features)), []


def _is_remote(shards: str) -> bool:
    if ":" not in shards:
        return False
    from trainer.data.cache import is_remote  # imports torch

    return is_remote(shards)


def _notes(number: int, stage: Stage) -> list[str]:
    """What is said of a stage that is not simply new."""
    name = f"stage {number}"
    if stage.standing == "finished":
        return [f"{name}: finished; nothing to do"]
    if stage.standing == "running":
        return [f"{name}: in the queue as job {stage.id} of an earlier submission; nothing to do"]
    return [f"{name}: goes on from its newest checkpoint"] if stage.standing == "failed" else []


def recorded(job: Job, job_id: str, element: int | None, earlier: Sequence[str], code: str) -> queue.Job:
    """A job, or an element of an array, as it is noted in its run directory; `code` is the hash of what it runs."""
    suffix = "" if element is None else f"_{element}"
    ids = tuple(f"{link}{suffix}" for link in earlier)
    return queue.Job(job.name, f"{job_id}{suffix}", job.kind, job.stage, time.time(), ids, element, code)

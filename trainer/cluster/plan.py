"""What somebody wants submitted, checked, and what of it is still to be done.

The jobs train with what was submitted: the configuration, overrides and defaults filled in, is written to
RUN/slurm/config_<n>.yaml before the first job is submitted, and the jobs read that file. Whoever edits the original, or
submits again with other overrides, while jobs wait in the queue changes nothing for them. A number is used for one
configuration: the same one, submitted again, is the same file.

Several runs are submitted as one where a sweep gives each overrides of its own, and where `stage2.subjects: separate`
asks for one stage 2 a subject around the stage 1 of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster import limits, sweep
from trainer.cluster.chain import Job, Run, Shards, Stage, pipeline
from trainer.cluster.limits import Limits
from trainer.cluster.settings import OVERRIDE, Settings, load_settings
from trainer.config import Config, load_config
from trainer.data.layout import load_layout
from trainer.data.manifest import MANIFEST
from trainer.errors import InputError
from trainer.paths import is_remote
from trainer.run import jobs as queue
from trainer.run.directory import RunDirectory
from trainer.run.files import write_new
from trainer.stored import continued

AskLimits = Callable[[str | None], Limits]


@dataclass(frozen=True)
class Plan:
    """A chain of jobs that may be submitted.

    Attributes:
        home: the run directory, or the folder of a sweep's runs, absolute; logs and scripts lie in its folder slurm.
        settings: what the jobs ask for, from the file `source`.
        jobs: the chain.
        notes: what is not done, and why; a line each.
        configs: the configurations that the jobs read, by file.
        subjects: the runs of single subjects around the stage 1 in `home`.
    """

    home: Path
    settings: Settings
    source: Path
    jobs: list[Job]
    notes: list[str]
    configs: dict[Path, str]
    subjects: Sequence[sweep.Element] = ()

    @property
    def folder(self) -> Path:
        """Of logs and scripts."""
        return self.home / "slurm"

    @property
    def is_one_run(self) -> bool:
        """Whether all is done in `home`, which is a run directory then."""
        return all(element.run == self.home for job in self.jobs for element in job.elements)

    def prepare(self, written: list[Path] | None = None) -> None:
        """Write the configurations that are not there yet, and give each subject's run its stage 1.

        Args:
            written: the configurations that were written are added to it.
        """
        sweep.link_stage1(self.home, self.subjects)
        for path, text in self.configs.items():
            if path.exists():
                continue
            if not write_new(path, text):
                raise InputError(path, "has just been written by another submission", fix="Submit again.")
            if written is not None:
                written.append(path)


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the training, and those of the jobs without their leading `slurm.`."""
    of_jobs = [override.removeprefix(OVERRIDE) for override in overrides if override.startswith(OVERRIDE)]
    return [override for override in overrides if not override.startswith(OVERRIDE)], of_jobs


@dataclass(frozen=True)
class Member:
    """One of the runs that are submitted together: its folder, its configuration, and the stages that it trains."""

    path: Path
    config: Config
    stages: tuple[int, ...] = (1, 2)
    around: Path | None = None

    def standing(self) -> dict[int, Stage]:
        """How far its stages are. Raises InputError where it does not go on as it began."""
        stages = {number: _stage(self.path, number) for number in self.stages}
        self._check_continues([number for number, stage in stages.items() if stage.needed])
        return stages

    def _check_continues(self, needed: Sequence[int]) -> None:
        """What a job would refuse after hours in the queue is refused now. Raises InputError."""
        own, stage1 = RunDirectory(self.path), RunDirectory(self.around or self.path)
        begun = [number for number in needed if own.stage(number).config.exists()]
        behind = 2 in needed and 1 not in needed and stage1.stage(1).finished() is not None
        if begun or behind:
            from trainer.training.stages import check_same_config, stage1_config  # imports torch

            check_same_config(self.config, own, begun)
            if behind:
                stage1_config(self.config, stage1)


def _member(path: Path, config: Config, stages: tuple[int, ...] = (1, 2), around: Path | None = None) -> Member:
    """A run to submit; one that has begun goes on with what its keys meant then."""
    begun = [RunDirectory(home).stage(number).config for home in (path, around or path) for number in (1, 2)]
    return Member(path, continued(config, begun), stages, around)


def make_plan(
    config: Path,
    slurm: Path,
    run: Path | None,
    overrides: Sequence[str],
    *,
    array: Path | None = None,
    ask: AskLimits | None = limits.ask,
) -> Plan:
    """Check everything, and see what of the pipeline is to be done.

    Args:
        config: of the training.
        slurm: a file of configs/slurm.
        run: the run directory, or the folder of a sweep; None for output/<name of the config>.
        overrides: `key=value` of the training and `slurm.key=value` of the jobs.
        array: a sweep file, whose runs are submitted as job arrays.
        ask: tells what SLURM takes from an account; None where the chain runs without SLURM.

    Raises:
        InputError: something is wrong with one of these, a run is being trained outside of the queue, or there are more
            jobs than SLURM takes.
    """
    own, of_jobs = split_overrides(overrides)
    training, settings = load_config(config, own), load_settings(slurm, of_jobs)
    home = (run or Path("output") / config.stem).absolute()
    separate = array is None and training.stage2.subjects == "separate"
    chosen = sweep.elements(array) if array else sweep.subjects(training, home) if separate else []
    configs = sweep.checked(chosen, config, own)
    members = [] if array else [_member(home, training, (1,) if separate else (1, 2))]
    for one, its_config in zip(chosen, configs, strict=True):
        members.append(_member(home / one.name, its_config, *(((2,), home) if separate else ())))
    standing = [member.standing() for member in members]
    files = [_config_file(member.path, member.config) for member in members]
    runs = [
        Run(member.path, path, stages, member.around)
        for member, (path, _), stages in zip(members, files, standing, strict=True)
    ]
    shards, notes = _shards([member.config for member in members], settings, home, standing)
    taken = ask(settings.of("stage1").account) if ask is not None and len(members) > 1 else None
    chain = pipeline(home, runs, shards=shards, links=settings.links, longest=taken.array if taken else None)
    if taken is not None:
        notes += _check_limits(chain, len(members), taken, array or config)
    for member, stages in zip(members, standing, strict=True):
        name = "" if member.path == home else f"{member.path.name}, "
        notes += [f"{name}{line}" for number, stage in stages.items() for line in _notes(number, stage)]
    return Plan(home, settings, slurm, chain, notes, dict(files) if chain else {}, chosen if separate else ())


def _check_limits(chain: Sequence[Job], runs: int, taken: Limits, source: Path) -> list[str]:
    """What to say of runs that are too many for one array. Raises InputError for more jobs than SLURM takes."""
    number = sum(len(job.elements) for job in chain)
    if taken.jobs is not None and number > taken.jobs:
        raise InputError(
            source,
            "gives more jobs than SLURM takes",
            found=f"{number} of training, scoring and the report",
            expected=f"at most {taken.jobs} ({taken.name})",
            fix="Submit a part of the runs, and the others when these have ended.",
        )
    if runs <= taken.array:
        return []
    why = "as MaxArraySize says" if taken.known else "SLURM's default, as scontrol does not tell MaxArraySize"
    return [f"job arrays of at most {taken.array} runs each: {why}"]


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


def _config_file(home: Path, training: Config) -> tuple[Path, str]:
    """Where the jobs read the configuration: the file that holds it already, or one with the next number."""
    text, number = training.to_yaml(), 1
    while (path := home / "slurm" / f"config_{number}.yaml").exists() and path.read_text() != text:
        number += 1
    return path, text


def _shards(
    trainings: Sequence[Config], settings: Settings, home: Path, standing: Sequence[Mapping[int, Stage]]
) -> tuple[Shards | None, list[str]]:
    """The job that makes shards, where one is needed and there are none; and what to say of it.

    Raises:
        InputError: there are none, and nothing says how to make them, or it would have to be several.
    """
    where, asked = trainings[0].data.shards, settings.shards
    if not any(stage.needed for stages in standing for stage in stages.values()) or is_remote(where):
        return None, []
    if len({training.data.shards for training in trainings}) > 1:  # a sweep over data: all must be there
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
    features = asked.features or list(dict.fromkeys(name for one in trainings for name in one.include_features))
    return Shards(("--layout", asked.layout, "--root", asked.root, "--out", where, "--features", *features)), []


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

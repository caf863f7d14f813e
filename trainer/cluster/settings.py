"""What the jobs of a pipeline ask SLURM for: configs/slurm/*.yaml as strict models.

Keys at the top are the defaults of all jobs; the sections `shards`, `stage1`, `stage2`, `evaluate` and `report`
override any of them for one kind of job. On the command line an override is `slurm.KEY=VALUE`, e.g.
`slurm.stage1.nodes=4`. Jobs that are no training have one task on one node unless their own section says otherwise:
what a training needs, written once at the top, must not be asked for by the job that draws the report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from trainer.paths import PathText
from trainer.strict import Few, Size, StrictModel, apply_overrides, read_yaml, validated

OVERRIDE = "slurm."
"""How an override of these settings begins on the command line; all others are the training's."""

_ALONE = {"nodes": 1, "tasks_per_node": 1, "zero_stage": None}
_NO_GPU = {"gpus_per_node": None, "gres": None}
_OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "shards": _ALONE | _NO_GPU,
    "evaluate": _ALONE,
    "report": _ALONE | _NO_GPU | {"cpus_per_task": None, "time": 30},
}
"""What the top level does not say for jobs that are no training."""

_SET_BY_US = {
    **dict.fromkeys(("output", "error", "open-mode", "job-name", "array", "dependency"), "the pipeline sets it"),
    **dict.fromkeys(("kill-on-invalid-dep", "chdir", "wrap"), "the pipeline sets it"),
    "signal": "use signal_delay_s",
    "requeue": "use requeue",
    "no-requeue": "use requeue: false",
    "ntasks-per-node": "use tasks_per_node",
    "mem": "use mem_gb",
}


class JobSettings(StrictModel):
    """What one job asks for; a key left out is not passed on to sbatch."""

    partition: str | None = Field(None, description="`sinfo` lists them")
    account: str | None = Field(None, description="who pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features of the nodes, e.g. a100|h100")
    gres: str | None = Field(None, description="generic resources of a node, e.g. gpu:h100:4")
    gpus_per_node: int | None = Field(None, ge=0, le=1000, description="GPUs of a node; some sites want gres instead")
    nodes: Size = Field(1, description="nodes")
    tasks_per_node: Few = Field(1, description="processes on each node: as many as it has GPUs")
    cpus_per_task: Size | None = Field(None, description="cores of each: data.num_workers + 1 at least")
    mem_gb: float | None = Field(None, gt=0, le=10**6, description="memory of a node in GB")
    time: int = Field(60, gt=0, le=10**7, description="minutes, or HH:MM:SS, D-HH, D-HH:MM:SS")
    exclude: str | None = Field(None, description="nodes not to use")
    mail_user: str | None = Field(None, description="who gets mail")
    mail_type: str | None = Field(None, description="when, e.g. END,FAIL")
    setup: list[str] = Field([], description="lines of bash before anything else: modules, conda, venv")
    python: PathText | None = Field(None, description="the interpreter in the jobs; null: the one that submits")
    interface: str | None = Field(None, description="the network that NCCL and gloo use, e.g. ib0")
    signal_delay_s: int = Field(
        120, ge=0, le=65535, description="seconds before its end at which a job is told to save"
    )
    sbatch: dict[str, str | int | float | bool] = Field({}, description="other options, e.g. {exclusive: true}")
    srun: list[str] = Field([], description="other arguments of srun")
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=2,
        description="what the processes of a training share out: 1 Adam's moments, 2 gradients too, 0 nothing (DDP); "
        "null: as 0, unless the environment of who submits says otherwise",
    )

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, time: object) -> object:
        return minutes(time) if isinstance(time, str) else time

    @field_validator("*", mode="before")
    @classmethod
    def _one_line(cls, value: object) -> object:
        # each text becomes one line `#SBATCH ...`: what follows a line break would run as a command
        for text in value.values() if isinstance(value, dict) else [value]:
            if isinstance(text, str) and "\n" in text:
                raise ValueError(f"found {text!r}, expected text without line breaks")
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key in extra:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", key):
                raise ValueError(f"found {key!r}, expected the name of an option of sbatch without its dashes")
            dashed, ours = key.replace("_", "-"), key.replace("-", "_")
            why = _SET_BY_US.get(dashed) or (f"use {ours}" if ours in JobSettings.model_fields else None)
            if why:
                raise ValueError(f"found {key}, which is not passed on as it is: {why}")
        return extra

    @property
    def tasks(self) -> int:
        """The number of processes."""
        return self.nodes * self.tasks_per_node

    @property
    def gpus(self) -> int:
        """GPUs of a node, whichever way they are asked for."""
        asked = re.search(r"(?:^|,)gpu(?::[^,:]+)?:(\d+)", self.gres or "")
        return self.gpus_per_node or (int(asked[1]) if asked else 0)


class ShardsSettings(JobSettings):
    """The job that makes shards where there are none, one MPI process a task."""

    layout: PathText | None = Field(None, description="YAML that describes the data set; null: there is no such job")
    root: PathText | None = Field(None, description="folder that the layout's patterns start from")
    features: list[str] | None = Field(None, description="streams to store; null: include_features of the training")
    mpi: str | None = Field("pmi2", description="srun --mpi; `srun --mpi=list` lists them")


class Settings(JobSettings):
    """A file of configs/slurm."""

    requeue: bool = Field(True, description="whether the site lets a job be put back into the queue")
    max_requeues: int = Field(
        3,
        ge=0,
        le=1000,
        description="how often a job that was killed goes on; without requeue, the jobs that train a stage",
    )
    shards: ShardsSettings = Field(ShardsSettings(), description="overrides for the job that makes shards")
    stage1: JobSettings = Field(JobSettings(), description="overrides for the training of stage 1")
    stage2: JobSettings = Field(JobSettings(), description="overrides for the training of stage 2")
    evaluate: JobSettings = Field(JobSettings(), description="overrides for the evaluation workers")
    report: JobSettings = Field(JobSettings(), description="overrides for the report")

    @field_validator("shards", "evaluate", "report")
    @classmethod
    def _trains_nothing(cls, section: JobSettings) -> JobSettings:
        if section.zero_stage:
            raise ValueError("zero_stage is for trainings: set it at the top, or for stage1 and stage2")
        return section

    def of(self, job: str) -> JobSettings:
        """What a job of this name asks for: shards, stage1, stage2, evaluate1, evaluate2 or report."""
        section = job.rstrip("12") if job.startswith("evaluate") else job
        own: JobSettings = getattr(self, section)
        values = {name: getattr(self, name) for name in JobSettings.model_fields}
        values |= _OF_THEIR_OWN.get(section, {})
        values |= {name: getattr(own, name) for name in own.model_fields_set}
        values["sbatch"] = self.sbatch | own.sbatch
        return own.model_copy(update=values)

    @property
    def links(self) -> int:
        """How many jobs train a stage, one after another: one that is put back, or as many as may be needed."""
        return 1 if self.requeue else max(1, self.max_requeues)


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a file of configs/slurm and apply overrides, which are given without the leading `slurm.`.

    Raises:
        InputError: unreadable file, unknown key (the nearest is suggested), wrong type.
    """
    data = read_yaml(path)
    apply_overrides(Settings, data, overrides)
    for section in ("shards", "stage1", "stage2", "evaluate", "report"):
        if data.get(section, {}) is None:  # a section of which every line is a comment
            del data[section]
    return validated(Settings, data, f"{path} with overrides" if overrides else path)


def minutes(text: str) -> int:
    """A time as SLURM writes it, in whole minutes, rounded up. Raises ValueError.

    SLURM reads 4:00 as four minutes and most people as four hours: it is refused.
    """
    days = re.fullmatch(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", text.strip())
    clock = re.fullmatch(r"()(\d+):(\d{1,2}):(\d{1,2})", text.strip())
    found = days or clock
    if re.fullmatch(r"\d+", text.strip()):
        return int(text)
    if found is None:
        raise ValueError(f"found {text!r}, expected minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
    day, hour, minute, second = (int(number or 0) for number in found.groups())
    return (day * 24 + hour) * 60 + minute + math.ceil(second / 60)

"""The order of a training: stage 1, stage 2 around the best anchor, each with its scores and, where asked, its refit.

Stage 1 trains the anchor. Stage 2 copies the best one, never chooses again, and trains the flow around it. With
`train.refit` each stage is trained once more, on train + validation, for the number of steps that the validation
chose; the refit has no validation of its own, and a refitted flow stands around the refitted anchor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from trainer.config import Config, differing_keys
from trainer.data.identity import Known
from trainer.data.overlap import shared_stimuli
from trainer.data.plan import micro_batches
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.models.build import build_anchor, build_flow
from trainer.progress import listening, say
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.heartbeat import Heartbeat
from trainer.run.jobs import other_code
from trainer.run.launch import sharing
from trainer.run.processes import StopRequest, make_processes
from trainer.run.watchdog import Watchdog
from trainer.scoring.known import known_data, warn, write_record
from trainer.scoring.predictor import shapes_of
from trainer.scoring.score import score_checkpoint
from trainer.stored import continued, load_stored
from trainer.training.checks import check, check_parcels
from trainer.training.loop import Phase, Training, Watch
from trainer.training.phases import Job, anchor_phase, flow_phase, planned_steps
from trainer.training.tracking import check_tracker


def train(config: Config, path: Path, stages: Sequence[int], *, resume: bool, overwrite: bool) -> RunDirectory | None:
    """Train stages of a run; returns its directory on the main process, None on the others.

    Raises:
        InputError: configuration and shards do not fit, or the run directory is taken.
        Interrupted: a signal ended the training after a checkpoint.
    """
    check_tracker(config.tracker)
    run = RunDirectory(path)
    if resume or 1 not in stages:
        config = continued(config, [run.stage(number).config for number in (1, 2)])
    study = Study(config, _known(run, stages, resume=resume), trains=True)
    with torch.device("meta"):  # models that cannot be built are refused before anything is written
        build_anchor(config.stage1.model, shapes_of(study))
        if 2 in stages or study.manifest.parcels > 1:
            check_parcels(study)
            build_flow(config, shapes_of(study))
    if 1 not in stages:
        study.stand_on(stage1_config(config, run))
    processes = make_processes(
        precision=config.precision, deterministic=config.deterministic, timeout_s=config.timeout_s, tf32=config.tf32
    )
    micro_batches(range(config.batch_size), processes.rank, processes.world, config.gradient_accumulation_steps)
    new = [number for number in stages if not checkpoint.steps(run.stage(number).checkpoints) or overwrite]
    for warning in processes.first(lambda: check(study, new)):
        if processes.is_main:
            print(f"warning: {warning}", file=sys.stderr)
    processes.first(lambda: _claim(config, run, stages, resume=resume, overwrite=overwrite))
    where = study.reside(processes.device)
    if processes.is_main:
        if how := sharing(processes.world, processes.zero_stage):
            say(f"{processes.world} process{'es' if processes.world > 1 else ''} of {processes.launcher}: {how}")
        warn([*study.warnings, *shared_stimuli(study)])
        say(where)
        for name in study.without_bold():
            say(f"datasets.{name}: no run has BOLD, so it is not scored; `predict --set {name}` predicts it")
    with StopRequest() as stop, Watchdog(processes, config.timeout_s) as watchdog, listening(watchdog.alive):
        job = Job(config, study, run, processes, stop, watchdog, resume)
        for number in stages:
            _train_stage(job, number)
    return run if processes.is_main else None


def _known(run: RunDirectory, stages: Sequence[int], *, resume: bool) -> list[Known]:
    """The data of the stages that a training goes on with, or stands on; those that it starts anew do not count."""
    kept = [number for number in range(1, max(stages) + 1) if resume or number not in stages]
    return [known for number in kept for known in known_data(run.stage(number))]


def _claim(config: Config, run: RunDirectory, stages: Sequence[int], *, resume: bool, overwrite: bool) -> None:
    run.claim(stages, resume=resume, overwrite=overwrite)
    if resume:
        check_same_config(config, run, stages)


def _train_stage(job: Job, number: int) -> None:
    """Start a stage, unless it is finished: say so in the run directory, train, and say how it ended."""
    directory, processes = job.run.stage(number), job.processes
    if processes.first(lambda: job.resume and directory.finished() is not None):
        if processes.is_main:
            say(_said_of_finished(job, number))
        return
    hosts = processes.gather_objects(processes.host)
    start = processes.first(lambda: _begin(job, directory, hosts))
    with Heartbeat(directory.path, start) if processes.is_main else nullcontext() as heartbeat:
        watch = Watch(job.stop, heartbeat, job.watchdog)
        (train_stage1 if number == 1 else train_stage2)(job, directory, watch)


def _begin(job: Job, directory: StageDirectory, hosts: Sequence[str]) -> int:
    """Write down who starts, with which code and configuration; returns the number of the start."""
    processes = job.processes
    facts = {"world": processes.world, "launcher": processes.launcher, "zero_stage": processes.zero_stage}
    start = directory.begin(job.config.to_yaml(), **facts, hosts=hosts)
    write_record(directory, job.study.record())
    warning = other_code(job.run.path)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return start


def _said_of_finished(job: Job, number: int) -> str:
    """The line about a finished stage that is resumed: what to do where the configuration now asks for more steps."""
    directory = job.run.stage(number)

    def planned(config: Config) -> int:
        return planned_steps(config.num_samples // config.batch_size, config.stage1 if number == 1 else config.stage2)

    before, now = planned(load_stored(directory.config)), planned(job.config)
    if now <= before:
        return f"Stage {number} is finished: {directory.path}"
    last = max(checkpoint.steps(directory.checkpoints), default=before)
    return (
        f"Stage {number} is finished at step {last}, and the configuration now asks for {now}: {directory.path} stays "
        "as it is. Give --overwrite to train it anew, or another --run."
    )


# What may change between a start and its resume: how long, how fast and how often, never what is learnt.
_HOW_DATA_ARE_READ = tuple(f"data.{key}" for key in ("num_workers", "prefetch", "residence", "verify", "cache_"))
_HOW_PROCESSES_SHARE = ("precision", "tf32", "gradient_accumulation_steps", "deterministic", "timeout_s")
_HOW_LONG = ("checkpoint.", "evaluate.", "log_every", "tracker", "stage1.max_steps", "stage2.max_steps")
_MAY_CHANGE = (*_HOW_DATA_ARE_READ, *_HOW_PROCESSES_SHARE, *_HOW_LONG)


def check_same_config(config: Config, run: RunDirectory, stages: Sequence[int]) -> None:
    """Raise InputError that names the keys in which a resume differs from its start."""
    for number in stages:
        path = run.stage(number).config
        if path.exists():
            differing = [key for key in differing_keys(load_stored(path), config) if not key.startswith(_MAY_CHANGE)]
            other_stage = f"stage{3 - number}."
            differing = [key for key in differing if not key.startswith(other_stage)]
            if differing:
                raise InputError(
                    path,
                    "the training to resume has another configuration",
                    found=f"other values of {', '.join(differing)}",
                    fix="Resume with the configuration it started with, or choose another --run.",
                )


def stage1_config(config: Config, run: RunDirectory) -> Config:
    """The configuration of the finished stage 1 that stage 2 alone stands on.

    It must be of the same data and anchor. Stage 2 may learn from some of its subjects only (`stage2.subjects:
    separate` as several runs), but not from others, whom the anchor does not know.

    Raises:
        InputError: stage 1 is not finished, or was trained with another configuration.
    """
    stage1 = run.stage(1)
    if stage1.finished() is None:
        raise InputError(stage1.path / "finished.json", "missing", fix="Train stage 1 of this run first (--stage 1).")
    trained = load_stored(stage1.config)
    own = ("stage2.", *_MAY_CHANGE, *_fewer_subjects(trained, config))
    differing = [
        key
        for key in differing_keys(trained, config)
        if not key.startswith(own)
        and (not key.startswith("datasets.") or key.split(".")[1] in ("train", config.val_set_name))
    ]
    if differing:
        raise InputError(
            stage1.config,
            "stage 1 was trained with another configuration",
            found=f"other values of {', '.join(differing)}",
            fix="Train stage 2 with stage 1's configuration, or both in another --run.",
        )
    return trained


def _fewer_subjects(all_: Config, some: Config) -> Iterator[str]:
    """The keys by which sets of one configuration take the BOLD of fewer subjects than another's."""
    for name in all_.datasets.keys() & some.datasets.keys():
        taken, left = (c.datasets[name].filter.subjects for c in (all_, some))
        if left is not None and (taken is None or set(left) <= set(taken)):
            yield f"datasets.{name}.filter.subjects"


def train_stage1(job: Job, directory: StageDirectory, watch: Watch) -> None:
    """Train, score and, where asked, refit the anchor."""
    spans = job.study.training_spans(refit=False)
    chosen = _fit_and_choose(job, anchor_phase(job, directory, spans, "Stage 1", validates=True), watch)
    _score_chosen(job, directory, 1, chosen, refit=False)
    if job.config.train.refit:
        spans = job.study.training_spans(refit=True)
        phase = anchor_phase(job, directory.refit, spans, "Stage 1 refit", steps=chosen)
        _fit(job, phase, watch)
        _score_chosen(job, directory.refit, 1, chosen, refit=True)
    if job.processes.is_main:
        directory.write_finished(step=chosen)


def train_stage2(job: Job, directory: StageDirectory, watch: Watch) -> None:
    """Train, score and, where asked, refit the flow around the anchor that stage 1 chose."""
    finished = job.run.stage(1).finished()
    assert finished is not None, "stage 1 is trained or checked before"
    step = int(finished["step"])
    phase = flow_phase(job, directory, job.run.stage(1), step, watch, refit=False)
    chosen = _fit_and_choose(job, phase, watch)
    _score_chosen(job, directory, 2, chosen, refit=False)
    if job.config.train.refit:
        phase = flow_phase(job, directory.refit, job.run.stage(1).refit, step, watch, refit=True, steps=chosen)
        _fit(job, phase, watch)
        _score_chosen(job, directory.refit, 2, chosen, refit=True)
    if job.processes.is_main:
        directory.write_finished(step=chosen)


def _fit(job: Job, phase: Phase, watch: Watch) -> None:
    Training(phase, job.processes, job.config, watch, resume=job.resume).run()


def _fit_and_choose(job: Job, phase: Phase, watch: Watch) -> int:
    """Train a phase and return the step that the validation set chooses."""
    _fit(job, phase, watch)
    scored = phase.directory.read_scores
    chosen: int | None = job.processes.first(lambda: checkpoint.best_step(scored(), phase.val_set_name))
    if chosen is None:
        raise FloatingPointError(f"{phase.title}: r on {phase.val_set_name} is not a number at any step")
    return chosen


def _score_chosen(job: Job, directory: StageDirectory, stage: int, step: int, *, refit: bool) -> None:
    """Score one checkpoint on every set that it was not trained on."""
    sets = job.study.scored_sets(refit=refit)
    score_checkpoint(directory, stage, step, job.study, sets, job.processes, job.say, full=False)

"""What differs between the stages: model, loss, what is validated, and what each leaves for the next.

Stage 1 trains the anchor. Stage 2 copies the best one, never chooses again, and trains the flow around it. With
`train.refit` each stage is trained once more, on train + validation, for the number of steps that the validation
chose; the refit has no validation of its own, and a refitted flow stands around the refitted anchor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import Config, OptimisationConfig, differing_keys, load_config
from trainer.data.batches import Batch
from trainer.data.loader import Reading, training_batches
from trainer.data.plan import Part, Plan, Span
from trainer.data.statistics import feature_statistics
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.models.anchor import Anchor, anchor_loss
from trainer.models.build import build_anchor, build_flow
from trainer.models.flow import FlowMatching
from trainer.models.randomness import keyed, make_keys
from trainer.progress import say
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.processes import make_accelerator
from trainer.scoring.predictor import (
    AnchorPredictor,
    FlowPredictor,
    Items,
    Predictor,
    load_anchor,
    shapes_of,
)
from trainer.scoring.score import lines, printed, score_checkpoint, score_set, write_scores
from trainer.scoring.shares import OneProcess
from trainer.training import crossfit
from trainer.training.loop import Phase, Training


@dataclass(frozen=True)
class Job:
    """What every part of a training needs to know."""

    config: Config
    study: Study
    run: RunDirectory
    accelerator: Accelerator
    resume: bool

    def say(self, line: str) -> None:
        """Print on the main process."""
        if self.accelerator.is_main_process:
            say(line)


def train(config: Config, path: Path, stages: Sequence[int], *, resume: bool, overwrite: bool) -> RunDirectory | None:
    """Train stages of a run; returns its directory on the main process, None on the others.

    Raises:
        InputError: configuration and shards do not fit, or the run directory is taken.
        Interrupted: a signal ended the training after a checkpoint.
    """
    study = Study(config)
    with torch.device("meta"):  # models that cannot be built are refused before anything is written
        build_anchor(config.stage1.model, shapes_of(study))
        build_flow(config.stage2, shapes_of(study))
    run = RunDirectory(path)
    if 1 not in stages:
        _check_stage1(config, run)
    accelerator = make_accelerator(config.precision)
    if accelerator.is_main_process:
        run.claim(stages, resume=resume, overwrite=overwrite)
        if resume:
            _check_same_config(config, run, stages)
    accelerator.wait_for_everyone()
    job = Job(config, study, run, accelerator, resume)
    job.say(study.reside(accelerator.device))
    for number in stages:
        (train_stage1 if number == 1 else train_stage2)(job)
    return run if accelerator.is_main_process else None


# What may change between a start and its resume: how long, how fast and how often, never what is learnt.
_HOW_DATA_ARE_READ = tuple(f"data.{key}" for key in ("num_workers", "prefetch", "residence", "verify", "cache_"))
_MAY_CHANGE = ("precision", *_HOW_DATA_ARE_READ, "checkpoint.", "log_every", "stage1.max_steps", "stage2.max_steps")


def _check_same_config(config: Config, run: RunDirectory, stages: Sequence[int]) -> None:
    """Raise InputError that names the keys in which a resume differs from its start."""
    for number in stages:
        path = run.stage(number).config
        if path.exists():
            differing = [key for key in differing_keys(load_config(path), config) if not key.startswith(_MAY_CHANGE)]
            other_stage = f"stage{3 - number}."
            differing = [key for key in differing if not key.startswith(other_stage)]
            if differing:
                raise InputError(
                    path,
                    "the training to resume has another configuration",
                    found=f"other values of {', '.join(differing)}",
                    fix="Resume with the configuration it started with, or choose another --run.",
                )


def _check_stage1(config: Config, run: RunDirectory) -> None:
    """Stage 2 alone stands on a finished stage 1 of the same data and anchor. Raises InputError."""
    stage1 = run.stage(1)
    if stage1.finished() is None:
        raise InputError(stage1.path / "finished.json", "missing", fix="Train stage 1 of this run first (--stage 1).")
    own = ("stage2.", *_MAY_CHANGE)
    differing = [
        key
        for key in differing_keys(load_config(stage1.config), config)
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


class AnchorObjective(nn.Module):
    """Stage 1's loss: squared error over what is there."""

    def __init__(self, anchor: Anchor, seed: int) -> None:
        super().__init__()
        self.anchor, self.seed = anchor, seed

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """(sum over valid TRs of the mean squared error over parcels, number of valid (subject, TR) pairs)."""
        with keyed(make_keys(self.seed, epoch, batch.windows)):
            prediction = self.anchor(batch.features, batch.mask)
        valid = batch.loss_mask[:, None, :] & batch.subject_mask[:, :, None]
        return anchor_loss(prediction, batch.bold, batch.loss_mask, batch.subject_mask, count=1), valid.sum()


class FlowObjective(nn.Module):
    """Stage 2's loss: flow matching on the (window, subject) pairs that have BOLD."""

    def __init__(self, flow: FlowMatching, seed: int) -> None:
        super().__init__()
        self.flow, self.seed = flow, seed

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """(sum over valid TRs of the mean loss over latent dimensions, number of valid (subject, TR) pairs)."""
        assert batch.anchor is not None
        items = Items(batch, self.seed, epoch)
        bold, anchor = items.take(batch.bold), items.take(batch.anchor)
        loss = self.flow.loss(bold, anchor, items.mask, items.subject, items.keys, count=1)
        return loss, items.mask.sum()


def train_stage1(job: Job) -> None:
    """Train, score and, where asked, refit the anchor."""
    directory = job.run.stage(1)
    if directory.finished() and job.resume:
        job.say(f"Stage 1 is finished: {directory.path}")
        return
    if job.accelerator.is_main_process:
        directory.record_start(job.config.to_yaml(), world=job.accelerator.num_processes)
    spans = job.study.training_spans(refit=False)
    chosen = _fit_and_choose(job, anchor_phase(job, directory, spans, "Stage 1", validates=True))
    _score_chosen(job, directory, 1, chosen, refit=False)
    if job.config.train.refit:
        spans = job.study.training_spans(refit=True)
        phase = anchor_phase(job, directory.refit, spans, "Stage 1 refit", steps=chosen)
        Training(phase, job.accelerator, job.config, resume=job.resume).run()
        _score_chosen(job, directory.refit, 1, chosen, refit=True)
    if job.accelerator.is_main_process:
        directory.write_finished(step=chosen)


def train_stage2(job: Job) -> None:
    """Train, score and, where asked, refit the flow around the anchor that stage 1 chose.

    Raises:
        InputError: stage 1 of the run is not finished.
    """
    directory = job.run.stage(2)
    if directory.finished() and job.resume:
        job.say(f"Stage 2 is finished: {directory.path}")
        return
    finished = job.run.stage(1).finished()
    assert finished is not None, "stage 1 is trained or checked before"
    if job.accelerator.is_main_process:
        directory.record_start(job.config.to_yaml(), world=job.accelerator.num_processes)
    step = int(finished["step"])
    phase = flow_phase(job, directory, job.run.stage(1), step, refit=False)
    chosen = _fit_and_choose(job, phase)
    _score_chosen(job, directory, 2, chosen, refit=False)
    if job.config.train.refit:
        phase = flow_phase(job, directory.refit, job.run.stage(1).refit, step, refit=True, steps=chosen)
        Training(phase, job.accelerator, job.config, resume=job.resume).run()
        _score_chosen(job, directory.refit, 2, chosen, refit=True)
    if job.accelerator.is_main_process:
        directory.write_finished(step=chosen)


def anchor_phase(
    job: Job,
    directory: StageDirectory,
    spans: Sequence[Span],
    title: str,
    *,
    validates: bool = False,
    steps: int | None = None,
    seed: int | None = None,
) -> Phase:
    """The phase that trains an anchor on `spans`, for `steps` or as long as the configuration says."""
    seed = job.config.seed if seed is None else seed
    torch.manual_seed(seed)
    anchor = build_anchor(job.config.stage1.model, shapes_of(job.study))
    if job.config.stage1.standardise_features:
        anchor.set_standardising(*feature_statistics(job.study.shards, spans, job.study.streams))
    phase = _phase(job, directory, anchor, AnchorObjective(anchor, seed), spans, job.config.stage1, title, seed, steps)
    if validates:
        phase.validate_every = phase.steps_per_epoch
        _validate_with(job, phase, 1, AnchorPredictor(anchor))
    return phase


def flow_phase(
    job: Job, directory: StageDirectory, stage1: StageDirectory, step: int, *, refit: bool, steps: int | None = None
) -> Phase:
    """The phase that trains the flow around the anchor of `stage1` at `step`."""
    config, device = job.config, job.accelerator.device
    spans = job.study.training_spans(refit=refit)
    if not (directory.anchor / "meta.json").exists() and job.accelerator.is_main_process:
        checkpoint.copy_weights(checkpoint.folder_of(stage1.checkpoints, step), directory.anchor)
    job.accelerator.wait_for_everyone()
    anchor = load_anchor(directory.anchor, job.study, device)
    predictions = _unseen_predictions(job, directory, anchor, spans, step)

    torch.manual_seed(config.seed)
    flow = build_flow(config.stage2, shapes_of(job.study)).to(device)
    if checkpoint.newest_whole(directory.checkpoints, lambda _: None) is None:
        crossfit.fit_latent(flow, job.study, spans, predictions, OneProcess(device))
    title = "Stage 2 refit" if refit else "Stage 2"
    objective = FlowObjective(flow, config.seed)
    phase = _phase(job, directory, flow, objective, spans, config.stage2, title, config.seed, steps, anchor=predictions)
    if not refit:
        phase.validate_every = phase.steps_per_epoch * config.stage2.snapshot_every_epochs
        phase.keeps_validated = True
        _validate_with(job, phase, 2, FlowPredictor(anchor, flow, config, ("mean",)), flow)
    return phase


def _unseen_predictions(
    job: Job, directory: StageDirectory, anchor: Anchor, spans: Sequence[Span], steps: int
) -> crossfit.Predictions:
    """What anchors that have not seen them predict for the training TRs; with cross_fit 0, what the anchor does."""
    k = job.config.stage2.cross_fit
    predictions = crossfit.Predictions(directory.anchor / "predictions", job.study)
    if not k:
        predictions.write([(anchor, spans)], OneProcess(job.accelerator.device))
        return predictions
    held_out = crossfit.folds(spans, job.study.manifest, k)
    parts = []
    for fold, hidden in enumerate(held_out, start=1):
        fold_directory = StageDirectory(directory.anchor / f"fold_{fold}")
        seen = crossfit.without(spans, hidden)
        phase = anchor_phase(job, fold_directory, seen, f"Fold {fold} of {k}", steps=steps, seed=job.config.seed + fold)
        Training(phase, job.accelerator, job.config, resume=True).run()
        assert isinstance(phase.model, Anchor)
        parts.append((phase.model, hidden))
    predictions.write(parts, OneProcess(job.accelerator.device))
    return predictions


def _phase(
    job: Job,
    directory: StageDirectory,
    model: nn.Module,
    objective: nn.Module,
    spans: Sequence[Span],
    optimisation: OptimisationConfig,
    title: str,
    seed: int,
    steps: int | None,
    *,
    anchor: crossfit.Predictions | None = None,
) -> Phase:
    study, accelerator, data = job.study, job.accelerator, job.config.data
    plan: Plan = study.plan(spans, seed)
    planned = plan.steps_per_epoch * optimisation.epochs
    planned = min(planned, optimisation.max_steps or planned)
    reading = Reading(
        study.streams if anchor is None else [],
        study.scaling,
        context=data.context_trs if anchor is None else 0,
        anchor=anchor,
        part=Part(accelerator.process_index, accelerator.num_processes),
    )

    def batches(step: int) -> Iterator[Batch]:
        pin = accelerator.device.type == "cuda"
        return training_batches(
            study.source, plan, reading, start=step, num_workers=data.num_workers, prefetch=data.prefetch, pin=pin
        )

    return Phase(
        title=title,
        directory=directory,
        model=model,
        objective=objective,
        batches=batches,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=planned if steps is None else steps,
        schedule_steps=planned,
        optimisation=optimisation,
        facts={
            "shapes": shapes_of(study).as_json(),
            "shards": checkpoint.sha256(study.manifest.folder / "manifest.json"),
            "steps_per_epoch": plan.steps_per_epoch,
        },
        val_set_name=job.config.val_set_name,
    )


def _validate_with(job: Job, phase: Phase, stage: int, predictor: Predictor, flow: FlowMatching | None = None) -> None:
    """Let the phase score its validation set, in its own loop, with the weights as they are."""

    def validate(step: int) -> float:
        scores = score_set(predictor, job.study, phase.val_set_name, OneProcess(job.accelerator.device))
        epoch = step // phase.steps_per_epoch
        facts = {"stage": stage, "step": step, "set": phase.val_set_name, "epoch": epoch, "validation": True}
        written = write_scores(phase.directory, scores, job.study.manifest.subjects, facts)["mean"]
        logged = {"set": phase.val_set_name, "pearson_r": written["pearson_r"], "flow_loss": written.get("flow_loss")}
        if flow is not None:
            logged["latent_std"] = _latent_range(job, flow, phase)
        phase.directory.append_metrics(kind="val", step=step, **logged)
        if stage == 2:
            job.say("\n".join(lines(written)))
        else:
            job.say(
                f"{phase.title} step {step} epoch {epoch} r on {phase.val_set_name} {printed(written['pearson_r'])}"
            )
        value = checkpoint.quality(written)
        return -math.inf if value is None else value

    phase.validate = validate


def _latent_range(job: Job, flow: FlowMatching, phase: Phase) -> list[float]:
    """Least and largest standard deviation of the latents of the training BOLD; warns where they leave [0.5, 2]."""
    low, high = crossfit.latent_range(flow, job.study, job.study.spans["train"], OneProcess(job.accelerator.device))
    if low < 0.5 or high > 2.0:
        print(
            f"warning: {phase.title}: standard deviations of the latents lie between {low:.2f} and {high:.2f}, "
            "expected within 0.5 and 2: the projection collapses (stage2.projection: pca does not)",
            file=sys.stderr,
        )
    return [low, high]


def _fit_and_choose(job: Job, phase: Phase) -> int:
    """Train a phase and return the step that the validation set chooses."""
    Training(phase, job.accelerator, job.config, resume=job.resume).run()
    chosen = checkpoint.best_step(phase.directory.read_scores(), phase.val_set_name)
    if chosen is None:
        raise FloatingPointError(f"{phase.title}: r on {phase.val_set_name} is not a number at any step")
    return chosen


def _score_chosen(job: Job, directory: StageDirectory, stage: int, step: int, *, refit: bool) -> None:
    """Score one checkpoint on every set that it was not trained on."""
    if job.accelerator.is_main_process:
        sets = job.study.scored_sets(refit=refit)
        score_checkpoint(directory, stage, step, job.study, sets, OneProcess(job.accelerator.device), job.say)

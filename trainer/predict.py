"""What a trained model says of whole runs, with or without BOLD: `python -m trainer predict`.

The model, its noise and the cut of the runs are those of scoring, so for a set with BOLD the r of what is written here
is the r of the score file. Every subject of the set's filter is predicted, whether or not they have BOLD of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch

from trainer.config import Config
from trainer.data.batches import whole_runs
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.progress import say, watched
from trainer.run.chosen import Chosen, chosen_checkpoint
from trainer.run.directory import RunDirectory
from trainer.run.files import new_whole
from trainer.run.processes import use_tf32
from trainer.scoring.known import open_study, warn
from trainer.scoring.predictor import Predictor, estimated, load_predictor
from trainer.submission import wanted_predictions, write_submission


@dataclass(frozen=True)
class Request:
    """What is to be predicted.

    Attributes:
        set_name: a set of the configuration.
        estimate: `mean` or `sample`.
        samples: how many draws, for `sample`; None for the mean.
    """

    set_name: str
    estimate: str
    samples: int | None

    @classmethod
    def of(cls, set_name: str, estimate: str, samples: int | None) -> Request:
        """A request as it is given on the command line. Raises InputError where the parts do not fit."""
        if estimate == "mean" and samples is not None:
            raise InputError("--samples", "the mean is one", found=samples, fix="Give --estimate sample too.")
        if samples is not None and samples < 1:
            raise InputError("--samples", "", found=samples, expected="1 or more")
        return cls(set_name, estimate, None if estimate == "mean" else samples or 1)


@dataclass(frozen=True)
class RunPrediction:
    """One run: the span of TRs, and by subject label (T, V) float32, or (K, T, V) of K samples."""

    span: Span
    values: dict[str, np.ndarray]


def predict(
    run: RunDirectory, request: Request, out: Path, *, stage: int | None, form: str, overrides: Sequence[str]
) -> None:
    """Predict a set with the run's chosen checkpoint and write the file `out`, which appears whole or not at all.

    Args:
        stage: 1 or 2; without it stage 2 where it is finished.
        form: `h5`, or `algonauts` for the challenge's submission.
        overrides: `key=value` for the run's configuration, to define a set that it lacks, say.

    Raises:
        InputError: no such run, checkpoint or set; what is asked for does not fit the model or the challenge; `out`
            exists.
    """
    chosen = chosen_checkpoint(run, stage, overrides)
    study = open_study(run.stage(chosen.stage), chosen.config)
    warn(study.warnings)
    spans = spans_to_predict(study, request.set_name)
    if request.samples and chosen.stage == 1:
        raise InputError("--estimate", "stage 1 has a mean and no samples", found="sample", expected="mean")
    if form == "algonauts" and (request.samples or 1) > 1:
        raise InputError("--samples", "a submission holds one prediction a run", found=request.samples, expected=1)
    wanted = wanted_predictions(study, request.set_name) if form == "algonauts" else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_tf32(study.config.tf32)
    predictor = load_predictor(chosen.directory, chosen.stage, chosen.step, study, device, (request.estimate,))
    _check_predicted(predictor, study, request.set_name)
    with new_whole(out, "--out") as aside:
        runs = watched(predicted(predictor, study, request, device), f"predicting {request.set_name}", len(spans))
        if wanted is None:
            _write_h5(aside, runs, study, request, run, chosen)
        else:
            values = {study.manifest.samples[done.span.sample].run: done.values for done in runs}
            write_submission(aside, values, wanted, study.manifest.parcels)
    say(f"{out}: {len(spans)} run(s) by stage {chosen.stage}, step {chosen.step}, {request.estimate}")


def spans_to_predict(study: Study, set_name: str) -> list[Span]:
    """The spans of a set: those that are scored, numbered as there, then those without BOLD.

    Raises:
        InputError: no such set.
    """
    if set_name not in study.unseen:
        raise InputError(
            "--set",
            "no such set in the run",
            found=set_name,
            expected=f"one of {', '.join(study.unseen)}",
            fix=f"Define it behind the command, e.g. 'datasets.{set_name}.filter.seasons=[7]'.",
        )
    return [*study.spans.get(set_name, []), *study.unseen[set_name]]


def predicted(predictor: Predictor, study: Study, request: Request, device: torch.device) -> Iterator[RunPrediction]:
    """Predict the runs of a set, one at a time. Raises InputError where features are so large that it overflows."""
    subjects = subjects_to_predict(study.config, request.set_name, study.manifest.subjects)
    spans = spans_to_predict(study, request.set_name)
    context = study.config.data.context_trs
    batches = whole_runs(study.shards, spans, study.streams, study.scaling, context=context)
    mask = torch.tensor([[label in subjects for label in study.manifest.subjects]])
    for span, batch in zip(spans, batches, strict=True):
        # the BOLD that is there goes unread; whose it is must not decide who is predicted
        seen = replace(batch, subject_mask=mask).to(device)
        values = estimated(predictor, seen, request.estimate, request.samples)
        if not np.isfinite(values[..., mask[0].numpy(), :, :]).all():
            where, run = f"datasets.{request.set_name}", study.manifest.samples[span.sample].key
            expected = "features in the units of those that it was trained on"
            raise InputError(where, f"the model's arithmetic overflows in run {run}", expected=expected)
        by_label = {label: values[..., i, :, :] for i, label in enumerate(study.manifest.subjects) if label in subjects}
        yield RunPrediction(span, by_label)


def _check_predicted(predictor: Predictor, study: Study, set_name: str) -> None:
    """Raise InputError where nothing could predict a subject of the set: not trained, and no decoder is shared."""
    wanted = subjects_to_predict(study.config, set_name, study.manifest.subjects)
    silent = predictor.anchor.decoder.silent().tolist()
    unknown = [label for label, nothing in zip(study.manifest.subjects, silent, strict=True) if nothing]
    found = [label for label in wanted if label in unknown]
    if found:
        raise InputError(
            f"datasets.{set_name}",
            "subjects that were not trained, and no decoder is shared that could predict them",
            found=", ".join(found),
            fix=f"Say behind the command whom to predict: datasets.{set_name}.filter.subjects=[...].",
        )


def subjects_to_predict(config: Config, set_name: str, subjects: Sequence[str]) -> list[str]:
    """The labels that a set's filter leaves, in the order of the subject axis."""
    chosen = config.datasets[set_name].filter.subjects
    return [label for label in subjects if chosen is None or label in chosen]


def _write_h5(
    path: Path, runs: Iterator[RunPrediction], study: Study, request: Request, run: RunDirectory, chosen: Chosen
) -> None:
    """One group a subject, one data set a run, named like the sample in the shards."""
    with h5py.File(path, "w") as file:
        file.attrs.update(
            run=str(run.path), stage=chosen.stage, step=chosen.step, set=request.set_name, estimate=request.estimate,
            tr=study.manifest.tr, bold_standardise=study.config.bold.standardise,
        )  # fmt: skip
        if study.manifest.dropped_parcels:
            file.attrs["dropped_parcels"] = study.manifest.dropped_parcels
        for done in runs:
            sample = study.manifest.samples[done.span.sample]
            for label, values in done.values.items():
                written = file.create_dataset(f"{label}/{sample.key}", data=values)
                written.attrs.update(series=sample.series, run=sample.run, first_tr=done.span.start)

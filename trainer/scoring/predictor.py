"""From the checkpoints of a run to something that predicts whole runs.

A predictor takes a batch of one span and gives named pairs (prediction, target), each (B, S, T, V) without the
context around the span; the pairs named like an estimate (`mean`, `sample`) become score files, the others stand
beside them in the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.data.batches import Batch
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.models.anchor import Anchor
from trainer.models.build import Shapes, build_anchor, build_flow
from trainer.models.flow import FlowMatching
from trainer.models.randomness import fold_in, make_keys
from trainer.progress import alive
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory

Pairs = dict[str, tuple[Tensor, Tensor]]

# Scores draw their noise from an epoch that no training reaches.
SCORING_EPOCH = 2**31 - 1
FIRST_SAMPLE = 1000
"""Samples after the first draw from keys folded with numbers from here on, which nothing else uses."""
TRAINED = "trained_subjects"
"""The key under which a checkpoint and an export hold the labels of the subjects that were trained."""
LOSS_DRAWS = 8
"""Times and noises that the flow's validation loss is averaged over, the same for every checkpoint."""


def shapes_of(study: Study) -> Shapes:
    """What the shards and the configuration ask of the models."""
    streams = [(stream.name, stream.layers, stream.width) for stream in study.streams]
    return Shapes(streams, study.manifest.subjects, study.manifest.parcels)


class AnchorPredictor:
    """Stage 1: the anchor itself is the mean."""

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor

    @torch.no_grad()
    def predict(self, batch: Batch) -> Pairs:
        """`mean`."""
        self.anchor.eval()
        mu, batch = anchored(self.anchor, batch)
        return {"mean": (mu, batch.bold)}


def anchored(anchor: Anchor, batch: Batch) -> tuple[Tensor, Batch]:
    """What the anchor predicts with the context in sight, and the batch, both cut to the TRs that are scored."""
    scored = batch.scored()
    return anchor(batch.features, batch.mask)[:, :, scored], batch.cut(scored)


class FlowPredictor:
    """Stage 2: the posterior mean or one sample around the anchor, and what both are inside the latent's subspace."""

    def __init__(self, anchor: Anchor, flow: FlowMatching, config: Config, estimates: Sequence[str]) -> None:
        self.anchor, self.flow, self.estimates = anchor, flow, estimates
        self.seed, self.options = config.seed, config.stage2
        # the loss in a latent that is trained falls as the latent collapses: it judges nothing
        self.has_fixed_latent = config.stage2.projection == "pca"

    @torch.no_grad()
    def predict(self, batch: Batch) -> Pairs:
        """The estimates asked for and `anchor`, each with `<name>_subspace`: prediction and BOLD projected."""
        items, around, batch = self._around(batch)
        arguments = (around, items.mask, items.subject, items.keys)
        predictions = {"anchor": around}
        if "mean" in self.estimates:
            predictions["mean"] = self.flow.posterior_mean(*arguments, n_draws=self.options.posterior_draws, tick=alive)
        if "sample" in self.estimates:
            predictions["sample"] = self.flow.sample(*arguments, temperature=self.options.temperature, tick=alive)
        inside = items.put(self.flow.subspace(items.take(batch.bold), items.subject), batch.bold)
        pairs: Pairs = {}
        for name, prediction in predictions.items():
            pairs[name] = (items.put(prediction, batch.bold), batch.bold)
            pairs[f"{name}_subspace"] = (items.put(self.flow.subspace(prediction, items.subject), batch.bold), inside)
        return pairs

    @torch.no_grad()
    def loss(self, batch: Batch) -> tuple[float, int]:
        """(sum of the flow matching loss over valid (subject, TR) pairs, their number), mean of `LOSS_DRAWS` draws.

        Of trained subjects only: the loss chooses the step, in which the others have no say.
        """
        batch = replace(batch, subject_mask=batch.subject_mask & self.flow.trained)
        if not batch.subject_mask.any():
            return 0.0, 0
        items, around, batch = self._around(batch)
        bold = items.take(batch.bold)
        losses = [
            self.flow.loss(bold, around, items.mask, items.subject, fold_in(items.keys, draw), 1, alive).item()
            for draw in range(LOSS_DRAWS)
        ]
        return sum(losses) / LOSS_DRAWS, int(items.mask.sum())

    @torch.no_grad()
    def samples(self, batch: Batch, count: int) -> Iterator[Tensor]:
        """`count` draws around the anchor, each (B, S, T, V), one at a time; the first is what `predict` gives."""
        items, around, batch = self._around(batch)
        for draw in range(count):
            keys = fold_in(items.keys, FIRST_SAMPLE + draw) if draw else items.keys
            arguments = (around, items.mask, items.subject, keys)
            sample = self.flow.sample(*arguments, temperature=self.options.temperature, tick=alive)
            yield items.put(sample, batch.bold)

    @torch.no_grad()
    def draws(self, batch: Batch, count: int) -> Iterator[Draws]:
        """Samples of one subject of a run after the other; the first one is the estimate `sample`."""
        items, around, batch = self._around(batch)
        bold = items.take(batch.bold)
        for i, subject in enumerate(items.subject.tolist()):
            same = torch.full((count,), i, device=around.device)
            samples = self.flow.sample(
                around[same],
                items.mask[same],
                items.subject[same],
                sample_keys(items.keys[i : i + 1], count),
                temperature=self.options.temperature,
                tick=alive,
            )
            yield Draws(subject, *map(_as_float64, (bold[i], around[i], samples)))

    def _around(self, batch: Batch) -> tuple[Items, Tensor, Batch]:
        """The items of the scored TRs, what the anchor predicts for them, (N, T, V), and the batch of these TRs."""
        self.anchor.eval()
        self.flow.eval()
        mu, batch = anchored(self.anchor, batch)
        items = Items(batch, self.seed, SCORING_EPOCH)
        return items, items.take(mu), batch


@dataclass(frozen=True)
class Draws:
    """BOLD and anchor (T, V) of one subject in one run, and samples around the anchor (K, T, V): float64."""

    subject: int
    bold: np.ndarray
    anchor: np.ndarray
    samples: np.ndarray


def sample_keys(keys: Tensor, count: int) -> Tensor:
    """Keys of several samples of one item: (1,) -> (K,). The first is the item's own."""
    return torch.cat([keys, *(fold_in(keys, FIRST_SAMPLE + number) for number in range(1, count))])


def _as_float64(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


class Items:
    """The (window, subject) pairs of a batch that have BOLD: what stage 2 learns from and predicts one by one.

    Attributes:
        window, subject: (N,) indices into the batch and the subject axis.
        mask: (N, T) bool.
        keys: (N,) int64 keys of each pair's randomness.
    """

    def __init__(self, batch: Batch, seed: int, epoch: int) -> None:
        self.window, self.subject = batch.subject_mask.nonzero(as_tuple=True)
        self.mask = batch.mask[self.window]
        self.keys = make_keys(seed, epoch, batch.windows[self.window], self.subject)

    def take(self, values: Tensor) -> Tensor:
        """(B, S, T, V) -> (N, T, V)."""
        return values[self.window, self.subject]

    def put(self, values: Tensor, like: Tensor) -> Tensor:
        """(N, T, V) -> (B, S, T, V), zeros where a subject has no BOLD."""
        whole = torch.zeros_like(like, dtype=values.dtype)
        whole[self.window, self.subject] = values
        return whole


Predictor = AnchorPredictor | FlowPredictor


def estimated(predictor: Predictor, batch: Batch, estimate: str, samples: int | None = None) -> np.ndarray:
    """What a predictor says of one span, for every subject of `batch.subject_mask`: float32, zeros for the others.

    Returns: (S, T, V); for the estimate `sample` the draws, (`samples`, S, T, V).
    """
    if estimate == "sample":
        assert isinstance(predictor, FlowPredictor) and samples, "stage 1 draws no samples"
        draws = []
        for draw in predictor.samples(batch, samples):
            draws.append(draw[0].float().cpu().numpy())
            alive()
        return np.stack(draws)
    prediction, _ = predictor.predict(batch)[estimate]
    whole: np.ndarray = prediction[0].float().cpu().numpy()
    return whole


def load_predictor(
    directory: StageDirectory,
    number: int,
    step: int,
    study: Study,
    device: torch.device,
    estimates: Sequence[str] = ("mean",),
) -> Predictor:
    """The predictor of one checkpoint of a stage.

    Raises:
        InputError: the checkpoint is damaged, or does not fit the shards.
    """
    folder = checkpoint.folder_of(directory.checkpoints, step)
    if number == 1:
        return AnchorPredictor(load_anchor(folder, study, device))
    anchor = load_anchor(directory.anchor, study, device)
    flow = build_flow(study.config, shapes_of(study))
    flow.load_state_dict(_weights(folder, study))
    flow.set_trained(trained_of(checkpoint.read_meta(folder), study.manifest.subjects))
    return FlowPredictor(anchor, flow.to(device), study.config, estimates)


def trained_of(facts: Mapping[str, Any], subjects: Sequence[str]) -> list[bool]:
    """Whether each subject was trained, by what a checkpoint or an export says; all, where it does not say it."""
    trained = facts.get(TRAINED, subjects)
    return [label in trained for label in subjects]


def load_anchor(folder: Path, study: Study, device: torch.device) -> Anchor:
    """An anchor with the weights of a checkpoint folder."""
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    anchor.load_state_dict(_weights(folder, study))
    return anchor.to(device)


def _weights(folder: Path, study: Study) -> dict[str, Tensor]:
    found = checkpoint.load(folder, weights_only=True)
    expected = shapes_of(study).as_json()
    for key, value in expected.items():
        if found.meta["shapes"].get(key) != value:
            raise InputError(
                folder,
                f"{key} do not fit the shards {study.config.data.shards}",
                found=f"{found.meta['shapes'].get(key)} in the checkpoint",
                expected=f"{value} as in the shards",
            )
    return found.model

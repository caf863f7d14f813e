"""Stage 2's latent, fitted to the training BOLD: its principal components, and what samples add outside of them.

Up to 5,000 parcels the main process takes the components from the covariance of parcel with parcel. Above, that matrix
and its eigenvectors cost too much memory and time (3 x 8 x V^2 bytes; 10 GB at the 20,484 vertices of fsaverage5). The
components are then searched for (`models.components`) in several passes over the BOLD, which the ranks share: each
reads its own runs, in blocks of TRs, and sums of (V, d) are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainer.data.batches import Batch, whole_runs
from trainer.data.plan import Span, used_subjects
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.models.components import ComponentSearch, sketch_width
from trainer.models.flow import FlowMatching
from trainer.models.latent import CovarianceAccumulator, Latent, principal_latent
from trainer.models.randomness import fold_in, make_keys, normal
from trainer.progress import LEAST_RATE, say, unbroken, watched
from trainer.run.signals import Interrupted, StopRequest
from trainer.scoring.shares import Ranks, in_order, shown
from trainer.training.crossfit import Predictions

EXACT_PARCELS = 5000
"""The most parcels whose covariance is decomposed as a whole."""
BLOCK_BYTES = 2**26
"""Of a block in float64, where many parcels are read in blocks: a second of work."""
SITE_SKETCH = 4
"""What the keys of the search are for: its random vectors (the sites before belong to `models.flow`)."""


@torch.no_grad()
def fit_latent(
    flow: FlowMatching,
    study: Study,
    spans: Sequence[Span],
    predictions: Predictions | None,
    processes: Ranks,
    stop: StopRequest | None = None,
) -> None:
    """Fit the latent to the BOLD of `spans`, and what a sample adds outside it to what the anchors left there.

    A sample adds white noise e that is then projected on the complement Q = I - P^T P, where parcel v keeps a share
    Q_vv of its variance: so the variance of e is that of Q (x - mu), over Q_vv. Without predictions e stays 0. A
    trainable projection has nothing to fit.

    The latent is the same to the bit on all ranks. Up to `EXACT_PARCELS` parcels the main process fits it while the
    others wait, and it is the same for any number of ranks: 15 s for 144,000 (subject, TR) pairs of 1000 parcels and
    128 dimensions on one core of a Cascade Lake. Above, the number of ranks changes its rounding.

    Raises:
        InputError: on every rank, where BOLD does not vary, or a shard cannot be read.
        Interrupted: on every rank, where there is a wish to end.
    """
    latent, stop = flow.latent, stop or StopRequest()
    if not isinstance(latent, Latent):
        return
    if study.manifest.parcels <= EXACT_PARCELS:
        series = Series(study, spans, stop)
        latent.load_state_dict(processes.first(lambda: _fitted(flow, latent, series, predictions)))
    else:
        rows = max(1, BLOCK_BYTES // (8 * study.manifest.parcels))
        series = Series(study, spans, stop, rows=rows, rank=processes.rank, world=processes.world)
        latent.load_state_dict(_found_by_all(latent, series, predictions, processes))
    latent.stand_in(torch.tensor(used_subjects(spans), device=latent.mean.device))


@dataclass(frozen=True)
class Block:
    """TRs of one subject in one span: BOLD (T, V), predictions (T, V) or None, and the keys (1,) of its randomness."""

    subject: int
    bold: Tensor
    mu: Tensor | None
    keys: Tensor

    def to(self, device: torch.device) -> Block:
        """The block on a device."""
        mu = None if self.mu is None else self.mu.to(device)
        return Block(self.subject, self.bold.to(device), mu, self.keys.to(device))


class Series:
    """The BOLD of every span and subject that has BOLD, in blocks of at most `rows` TRs, or whole.

    Rank r of `world` gets spans r, r + world, ...
    """

    def __init__(
        self,
        study: Study,
        spans: Sequence[Span],
        stop: StopRequest,
        *,
        rows: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.study, self.spans, self.stop, self.rank, self.world = study, spans, stop, rank, world
        self.rows = rows or max(map(len, spans))

    def blocks(self, title: str, predictions: Predictions | None = None) -> Iterator[Block]:
        """The blocks, shown on the first rank. Raises Interrupted where there is a wish to end."""
        total = sum(sum(span.subjects) * -(-len(span) // self.rows) for span in self.spans[self.rank :: self.world])
        for block in watched(self._read(predictions), title, total, visible=self.rank == 0):
            if self.stop.requested:
                self.stop.leave(0)
            yield block

    def _read(self, predictions: Predictions | None) -> Iterator[Block]:
        study, seed = self.study, self.study.config.seed
        for batch in whole_runs(
            study.shards, self.spans, [], study.scaling, anchor=predictions, rank=self.rank, world=self.world
        ):
            for subject in batch.subject_mask[0].nonzero()[:, 0]:
                keys = make_keys(seed, 0, batch.windows, subject[None])
                bold = batch.bold[0, subject].split(self.rows)
                mu = [None] * len(bold) if batch.anchor is None else batch.anchor[0, subject].split(self.rows)
                for number, (rows, predicted) in enumerate(zip(bold, mu, strict=True)):
                    yield Block(int(subject), rows, predicted, fold_in(keys, number))


class Outside:
    """The variance of residuals x - mu outside the subspace of `basis`, (d, V) float64 with orthonormal rows."""

    def __init__(self, basis: Tensor, n_subjects: int) -> None:
        self.basis = basis
        self.squares = basis.new_zeros(n_subjects, basis.shape[1])
        self.count = basis.new_zeros(n_subjects, 1)

    def add(self, block: Block) -> None:
        """Take in a block that has predictions."""
        assert block.mu is not None
        left = (block.bold - block.mu).to(self.basis)
        outside = left - (left @ self.basis.T) @ self.basis
        self.squares[block.subject] += outside.square().sum(0)
        self.count[block.subject] += len(outside)

    def std(self) -> Tensor:
        """(S, V) standard deviation of e."""
        share = 1.0 - self.basis.square().sum(0)
        variance = self.squares / self.count.clamp(min=1) / share.clamp(min=1e-6)
        return torch.where(share > 1e-6, variance, 0.0).sqrt()


def _fitted(flow: FlowMatching, latent: Latent, series: Series, predictions: Predictions | None) -> dict[str, Tensor]:
    """Fit the latent of `flow` by its covariance, here; its buffers, on the CPU."""
    covariance = CovarianceAccumulator(*latent.mean.shape)
    for block in series.blocks("covariance of the training BOLD"):
        covariance.update(block.bold, block.subject)
    with unbroken(most_s=60 + 10 * latent.mean.shape[1] ** 3 / LEAST_RATE):
        flow.fit_latent(covariance)
    if predictions is not None:
        outside = Outside(latent.basis.double().cpu(), len(latent.mean))
        for block in series.blocks("residuals outside the latent", predictions):
            outside.add(block)
        latent.residual_std.copy_(outside.std())
    return {name: buffer.cpu() for name, buffer in latent.state_dict().items()}


def _found_by_all(
    latent: Latent, series: Series, predictions: Predictions | None, processes: Ranks
) -> dict[str, Tensor]:
    """Search for the components of a latent on all ranks; its buffers, on the CPU.

    Only the main process holds the search. In directions in which BOLD does not vary its vectors are rounding noise,
    which ranks of several kinds of CPU would not agree on.
    """
    sums = Sums(series, processes)
    mean, n_trs, sketch = _sketched(latent, sums)
    search = ComponentSearch(sketch, len(latent.basis)) if processes.is_main else None
    block = processes.first(lambda: None if search is None else search.block)
    variance = 0.0
    while block is not None:
        product, variance = _multiplied(block, mean, n_trs, sums)
        if variance <= _rounding(mean):
            raise InputError("training BOLD", "it does not vary", found=f"{n_trs} TRs")
        block = processes.first(partial(_next_block, search, product))
    found = processes.first(lambda: _components(search, mean, n_trs, variance))
    found["residual_std"] = latent.residual_std.cpu()
    if predictions is not None:
        outside = Outside(found["basis"].to(processes.device, torch.float64), len(latent.mean))
        outside.squares, outside.count = sums.over(
            "residuals outside the latent", outside.add, outside.squares, outside.count, predictions=predictions
        )
        found["residual_std"] = outside.std().cpu()
    return found


@dataclass(frozen=True)
class Sums:
    """Sums over the blocks of a series, of which each rank has its share."""

    series: Series
    processes: Ranks

    def zeros(self, *shape: int) -> Tensor:
        """Where a rank forms a sum: float64 on its device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.processes.device)

    def over(
        self, title: str, add: Callable[[Block], None], *sums: Tensor, predictions: Predictions | None = None
    ) -> list[Tensor]:
        """The totals, on every rank, of the sums into which `add` takes blocks (that are on this rank's device).

        Raises:
            InputError, OSError, Interrupted: on every rank, where one cannot read a shard, or there is a wish to end.
        """

        def add_share() -> list[int]:
            try:
                for block in self.series.blocks(title, predictions):
                    add(block.to(self.processes.device))
            except Interrupted as wish:
                return [wish.signum]
            return [0]

        signum = max(in_order(self.processes, add_share))
        if signum:
            self.series.stop.leave(0, signum)
        return [self.processes.sum(part) for part in sums]


def _sketched(latent: Latent, sums: Sums) -> tuple[Tensor, int, Tensor]:
    """One pass: each subject's mean (S, V), the number of TRs, and random combinations (V, k) of all centred TRs."""
    subjects, parcels = latent.mean.shape
    width = sketch_width(len(latent.basis), parcels)
    count, total, weights = sums.zeros(subjects, 1), sums.zeros(subjects, parcels), sums.zeros(subjects, width)
    sketch = sums.zeros(parcels, width)

    def add(block: Block) -> None:
        x = block.bold.double()
        g = normal(block.keys, SITE_SKETCH, (len(x), width))[0].double()
        count[block.subject] += len(x)
        total[block.subject] += x.sum(0)
        weights[block.subject] += g.sum(0)
        sketch.addmm_(x.T, g)

    count, total, weights, sketch = sums.over("means of the training BOLD", add, count, total, weights, sketch)
    mean = total / count.clamp(min=1)
    return mean, int(count.sum()), (sketch - mean.T @ weights).cpu()


def _multiplied(block: Tensor, mean: Tensor, n_trs: int, sums: Sums) -> tuple[Tensor, float]:
    """One pass: the covariance within subjects times vectors (V, k), and its trace."""
    block = block.to(mean.device)
    product, squares = sums.zeros(*block.shape), sums.zeros(1)

    def add(trs: Block) -> None:
        x = trs.bold - mean[trs.subject]
        product.addmm_(x.T, x @ block)
        squares.add_(x.square().sum())

    product, squares = sums.over("components of the training BOLD", add, product, squares)
    return (product / n_trs).cpu(), float(squares) / n_trs


def _rounding(mean: Tensor) -> float:
    """The most variance, over all parcels, that float32 leaves to constant values of these means (S, V)."""
    return float((torch.finfo(torch.float32).eps * mean / 2).square().sum(1).max())


def _next_block(search: ComponentSearch | None, product: Tensor) -> Tensor | None:
    """On the main process: the next vectors to multiply with the covariance, None when all is found."""
    assert search is not None
    with unbroken(most_s=60 + 10 * search.operations / LEAST_RATE):
        return search.take(product)


def _components(search: ComponentSearch | None, mean: Tensor, n_trs: int, variance: float) -> dict[str, Tensor]:
    """On the main process: the latent of the components, on the CPU."""
    assert search is not None
    with unbroken(most_s=60 + 10 * search.operations / LEAST_RATE):
        values, basis = search.components()
    part, passes = float(values.sum()) / variance, len(search.held)
    say(f"Latent: {len(values)} components hold {part:.1%} of the training BOLD's variance, found in {passes} passes")
    return principal_latent(mean.cpu(), values.cpu(), basis.cpu(), n_trs).state_dict()


@torch.no_grad()
def latent_range(flow: FlowMatching, study: Study, spans: Sequence[Span], processes: Ranks) -> tuple[float, float]:
    """Least and largest standard deviation, over dimensions, of the latents of the BOLD of `spans`, on every rank.

    Taken around each run's and subject's own mean, and pooled: 1 for a fresh principal component. The ranks share the
    runs.
    """

    def square_share() -> list[tuple[Tensor, int]]:
        batches = whole_runs(study.shards, spans, [], study.scaling, rank=processes.rank, world=processes.world)
        runs = shown(processes, batches, "standard deviations of the latents", len(spans))
        return [_latent_squares(flow, batch.to(processes.device)) for batch in runs]

    runs = in_order(processes, square_share)
    squares = torch.stack([squares for squares, _ in runs]).sum(0)
    std = (squares / sum(count for _, count in runs)).sqrt()
    return float(std.min()), float(std.max())


def _latent_squares(flow: FlowMatching, batch: Batch) -> tuple[Tensor, int]:
    """The latents of one run: sum of their squares around each subject's mean, (d,) float64, and their number."""
    subject = batch.subject_mask[0].nonzero()[:, 0]
    z = flow.latent.encode(batch.bold[0, subject], subject).double().cpu()
    return (z - z.mean(1, keepdim=True)).square().sum((0, 1)), z.shape[0] * z.shape[1]

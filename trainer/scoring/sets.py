"""From a predictor and a set of runs to what each run adds to the scores of the set.

Runs are scored whole and one at a time, on the rank that is dealt them, so memory does not grow with the set but for
the sums that each run leaves (5 x (S, V) float64 for each pair of prediction and BOLD) and, in a full scoring, the
series of a set of fewer than ten runs, whose blocks are resampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trainer.data.batches import Batch, whole_runs
from trainer.data.study import Study
from trainer.progress import alive
from trainer.scoring.intervals import RunSeries
from trainer.scoring.kept import NOTHING_KEPT, Arrays, Kept, filled, named
from trainer.scoring.metrics import Correlation, PearsonR, merged
from trainer.scoring.predictor import FlowPredictor, Pairs, Predictor
from trainer.scoring.rsa import Groups, similarities, trs_of_a_run
from trainer.scoring.shares import Ranks, in_order, shown

ESTIMATES = ("mean", "sample")
KIND = "run"
"""What the names of kept scores of runs begin with."""


@dataclass(frozen=True)
class Details:
    """What a full scoring keeps of each run beside its sums.

    series: numbers of the runs whose predictions and BOLD are kept.
    groups: parcels whose TRs are compared within runs; None where they are not.
    """

    series: frozenset[int] = frozenset()
    groups: Groups | None = None


NO_DETAILS = Details()


@dataclass(frozen=True)
class RunScores:
    """What one run adds to the scores of its set.

    pairs: what was seen of every pair that the predictor gives.
    loss, count: stage 2's loss, summed over `count` valid (subject, TR) pairs; 0, 0 where there is none.
    series: estimate -> prediction and BOLD, where they are kept.
    similarity: estimate -> (S, groups) representational similarity within the run, where TRs are compared.
    """

    pairs: dict[str, PearsonR]
    loss: float = 0.0
    count: int = 0
    series: dict[str, RunSeries] = field(default_factory=dict)
    similarity: dict[str, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, to be kept; the BOLD of the series, which the estimates share, once."""
        found = {"loss": np.array(self.loss), "count": np.array(self.count)}
        for name, sums in self.pairs.items():
            found |= named(f"pairs/{name}", sums)
        for name, run in self.series.items():
            found |= {f"series/{name}": run.prediction, "bold": run.bold, "present": run.present}
        return found | {f"similarity/{name}": values for name, values in self.similarity.items()}

    @classmethod
    def of(cls, arrays: Arrays) -> RunScores:
        """What `arrays` gave."""

        def under(folder: str) -> dict[str, np.ndarray]:
            return {name.split("/", 1)[1]: array for name, array in arrays.items() if name.startswith(f"{folder}/")}

        pairs = dict.fromkeys(name.split("/")[0] for name in under("pairs"))
        return cls(
            pairs={name: filled(PearsonR(0, 0), f"pairs/{name}", arrays) for name in pairs},
            loss=float(arrays["loss"]),
            count=int(arrays["count"]),
            series={
                name: RunSeries(prediction, arrays["bold"], arrays["present"])
                for name, prediction in under("series").items()
            },
            similarity=under("similarity"),
        )


@dataclass(frozen=True)
class SetScores:
    """What one predictor reached on one set: r of every pair it gives, stage 2's loss, and the runs one by one."""

    correlations: dict[str, Correlation]
    flow_loss: float | None
    runs: Sequence[RunScores] = ()

    @property
    def estimates(self) -> list[str]:
        """Those of the pairs that become score files."""
        return [name for name in ESTIMATES if name in self.correlations]


def dealt_runs(study: Study, set_name: str, processes: Ranks, title: str, numbers: Sequence[int]) -> Iterator[Batch]:
    """Those of the whole runs of these numbers that this rank is dealt, on its device, with its progress shown."""
    spans, context = study.spans[set_name], study.config.data.context_trs
    rank, world = processes.rank, processes.world
    batches = whole_runs(
        study.shards, spans, study.streams, study.scaling, context=context, rank=rank, world=world, numbers=numbers
    )
    for batch in shown(processes, batches, f"{title} {set_name}", len(numbers)):
        yield batch.to(processes.device)


def score_set(
    predictor: Predictor,
    study: Study,
    set_name: str,
    processes: Ranks,
    details: Details = NO_DETAILS,
    kept: Kept = NOTHING_KEPT,
) -> SetScores:
    """Score a predictor over all TRs of a set, on all ranks; every rank gets the scores.

    The ranks share the runs, but for those that are `kept`. Each run has sums of its own, in one process too, and they
    are merged in the order of the runs: the scores are the same to the bit for any number of ranks.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """
    n_runs = len(study.spans[set_name])
    done = processes.first(lambda: _kept_scores(kept))
    missing = [number for number in range(n_runs) if number not in done]

    def score_share() -> list[RunScores]:
        scored = []
        for batch in dealt_runs(study, set_name, processes, "scoring", missing):
            scored.append(_score_run(predictor, batch, details, n_runs))
            kept.write(f"{KIND}-{int(batch.windows[0]):05d}", scored[-1].arrays())
        return scored

    done |= dict(zip(missing, in_order(processes, score_share), strict=True))
    return _merge([done[number] for number in range(n_runs)])


def _kept_scores(kept: Kept) -> dict[int, RunScores]:
    """What is kept of runs, by their numbers."""
    found = {}
    for name in kept.names(KIND):
        arrays = kept.read(name)
        if arrays is not None:
            found[int(name.removeprefix(f"{KIND}-"))] = RunScores.of(arrays)
    return found


def _score_run(predictor: Predictor, batch: Batch, details: Details, n_runs: int) -> RunScores:
    """The sums of one run of so many, and its details."""
    scored = batch.cut(batch.scored())
    valid = scored.mask[:, None, :] & scored.subject_mask[:, :, None]
    predicted = predictor.predict(batch)
    alive()
    pairs = {}
    for name, (prediction, target) in predicted.items():
        pairs[name] = PearsonR(*target.shape[1::2])
        pairs[name].update(prediction, target, valid)
        alive()
    loss, count = 0.0, 0
    if isinstance(predictor, FlowPredictor) and predictor.has_fixed_latent:
        loss, count = predictor.loss(batch)
    found = RunScores(pairs, loss, count)
    if details is NO_DETAILS:
        return found
    series = _series(predicted, scored)
    kept = series if int(batch.windows[0]) in details.series else {}
    return replace(found, series=kept, similarity=_similarity(series, details.groups, n_runs))


def _series(predicted: Pairs, scored: Batch) -> dict[str, RunSeries]:
    """The estimates and the BOLD of a batch of one run."""
    bold, present = scored.bold[0].cpu().numpy(), scored.subject_mask[0].cpu().numpy()
    estimates = (name for name in ESTIMATES if name in predicted)
    return {name: RunSeries(predicted[name][0][0].float().cpu().numpy(), bold, present) for name in estimates}


def _similarity(series: dict[str, RunSeries], groups: Groups | None, n_runs: int) -> dict[str, np.ndarray]:
    """Estimate -> (S, groups), from some TRs of the run."""
    if groups is None:
        return {}
    found = {}
    for estimate, run in series.items():
        trs = trs_of_a_run(run.bold.shape[1], n_runs)
        found[estimate] = similarities(run.prediction[:, trs], run.bold[:, trs], run.present, groups)
    return found


def _merge(runs: Sequence[RunScores]) -> SetScores:
    """The scores of the runs of a set."""
    correlations = {name: merged([run.pairs[name] for run in runs]).compute() for name in runs[0].pairs}
    count = sum(run.count for run in runs)
    return SetScores(correlations, sum(run.loss for run in runs) / count if count else None, runs)

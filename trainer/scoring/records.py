"""The files that scores are written to, and how they are printed.

    scores/step_00000500-val-mean.json           {"stage": 1, "step": 500, "set": "val", "estimate": "mean", ...}
    scores/step_00000500-val-mean.npy            (S, V) float64, r
    scores/step_00000500-val-mean-bootstrap.npy  (B, S) float64, r of each subject in each resampling

The arrays are there before the .json that speaks of them. Training writes r alone, and whoever scores fully adds to
it: neither takes away what the other has written.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.identity import TAR
from trainer.errors import InputError
from trainer.run.directory import StageDirectory
from trainer.run.files import read_object, whole, write_json
from trainer.scoring.metrics import Correlation
from trainer.scoring.sets import SetScores

PAIRS = "pairs_of_parcels"
"""The key that says how many of how many parcels were taken where pairs are judged; absent where all were."""
SAME_R = 1e-4
"""Scores of one checkpoint on two devices differ by less."""


def stem(directory: StageDirectory, step: int, set_name: str) -> Path:
    """What the names of all files about a checkpoint and a set begin with."""
    return directory.scores / f"step_{step:08d}-{set_name}"


def write_scores(
    directory: StageDirectory,
    scores: SetScores,
    subjects: Sequence[str],
    facts: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write one score file for each estimate; returns estimate -> what the file holds.

    Args:
        facts: stage, step, set, epoch, `data`, the digest of what the set holds (`identity.set_digest`), and
            `validation`: whether this is the training's own validation, by which it chooses. One that was stays one
            when it is scored again.
        more: estimate -> keys that a full scoring adds.
    """
    written = {}
    for estimate in reversed(scores.estimates):  # where the mean is, the others are
        path = directory.scores / f"{stem(directory, facts['step'], facts['set']).name}-{estimate}.json"
        content = {**facts, "estimate": estimate, **_content(scores, estimate, subjects)}
        write_array(path.with_suffix(".npy"), scores.correlations[estimate].r)
        content = _beside(path, {**content, **(more or {}).get(estimate, {})})
        write_json(path, content)
        written[estimate] = content
    return {estimate: written[estimate] for estimate in scores.estimates}


def _content(scores: SetScores, estimate: str, subjects: Sequence[str]) -> dict[str, Any]:
    """What every score file of an estimate holds."""
    correlations = scores.correlations
    content = {"subjects": list(subjects), **summary(correlations[estimate], subjects)}
    beside = {"subspace": f"{estimate}_subspace", "anchor": "anchor", "anchor_subspace": "anchor_subspace"}
    for key, name in beside.items():
        if name in correlations:
            content[f"pearson_r_{key}"] = finite(correlations[name].overall)
    if scores.flow_loss is not None:
        content["flow_loss"] = finite(scores.flow_loss)
    return content


def _beside(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """A new score, with what the file that it takes the place of must go on to say.

    A score that validated the training still does so when a worker scores it in full, and a training that scores a
    checkpoint after a worker keeps what the worker found, as long as the checkpoint is the same (r is, but for the
    rounding of another device).
    """
    try:
        before = read_object(path, "pearson_r") if path.exists() else {}
    except InputError:
        return content
    if on_other_data(before, content.get("data")):
        return content
    if before.get("validation"):
        content = {**content, "validation": True}
    if "full" in content or "full" not in before:
        return content
    old, new = before["pearson_r"], content["pearson_r"]
    same = old == new if old is None or new is None else abs(old - new) < SAME_R
    return {**before, **content} if same else content


def on_other_data(score: Mapping[str, Any], data: Mapping[str, str] | None) -> bool:
    """Whether a score was taken on another set than the one of that digest (`identity.set_digest`).

    Scores from before there were digests count as taken on the same, and so do those of which nothing can be said, as
    contents have hashes now and had none then.
    """
    before = score.get("data")
    if not data or not before:
        return False
    return any(before.get(n) != word and before[n].startswith(TAR) == word.startswith(TAR) for n, word in data.items())


def stale_steps(directory: StageDirectory, set_name: str, data: Mapping[str, str]) -> list[int]:
    """Steps of a stage whose scores on a set were taken on other data, ascending."""
    scores = (score for score in directory.read_scores() if score.get("set") == set_name)
    return sorted({int(score["step"]) for score in scores if on_other_data(score, data)})


def summary(correlation: Correlation, subjects: Sequence[str]) -> dict[str, Any]:
    """The part of a score file that follows from r: overall, per subject, TRs, constant parcels."""
    return {
        "pearson_r": finite(correlation.overall),
        "per_subject": {
            label: finite(r)
            for label, r, present in zip(subjects, correlation.per_subject, correlation.present, strict=True)
            if present
        },
        "n_trs": int(correlation.n_trs.max(initial=0)),
        "n_constant_parcels": correlation.n_constant,
    }


def lines(score: Mapping[str, Any]) -> list[str]:
    """The score as it is printed."""
    title = f"Stage {score['stage']}" + (f" Epoch {score['epoch']}" if score["stage"] == 2 else "")
    if score["estimate"] != "mean":
        title += f" (one {score['estimate']})"
    overall = [f"{title} Overall Pearson's r: {printed(score['pearson_r'])}"]
    subjects = [f"{title} - Sub {label} Mean Pearson's r: {printed(r)}" for label, r in score["per_subject"].items()]
    inside = []
    if score.get("pearson_r_subspace") is not None:
        inside = [
            f"{title} r inside the subspace: {printed(score['pearson_r_subspace'])} (the anchor's: "
            f"{printed(score['pearson_r_anchor_subspace'])}; outside and in, the anchor's r is "
            f"{printed(score['pearson_r_anchor'])})"
        ]
    if score.get("flow_loss") is not None:
        inside.append(f"{title} flow matching loss: {score['flow_loss']:.4f}")
    return overall + subjects + inside + _full_lines(score, title)


def _full_lines(score: Mapping[str, Any], title: str) -> list[str]:
    """What a full scoring adds to what is printed."""
    found = []
    if "ci" in score:
        low, high = score["ci"]
        found.append(f"{title} 95 % interval of r: {low:.4f} to {high:.4f} (bootstrap over {score['ci_by']})")
    if "r_over_ceiling" in score:
        found.append(
            f"{title} r over the noise ceiling of {printed(score['ceiling'])}: {printed(score['r_over_ceiling'])}"
        )
    if "rsa" in score:
        found.append(f"{title} representational similarity: {printed(score['rsa']['all'])}")
    if PAIRS in score:
        taken, whole = score[PAIRS]["taken"], score[PAIRS]["of"]
        found.append(f"{title} functional connectivity and full covariance are of {taken} of {whole} parcels")
    return found


def printed(r: float | None) -> str:
    """r with four decimals."""
    return "not a number" if r is None else f"{r:.4f}"


def finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return float(value) if math.isfinite(value) else None


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy whole."""
    buffer = io.BytesIO()  # numpy hides what a disk says of its own writing
    np.save(buffer, array)
    with whole(path) as aside:
        aside.write_bytes(buffer.getvalue())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a .npz whole."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # a name could be `allow_pickle`, says numpy
    with whole(path) as aside:
        aside.write_bytes(buffer.getvalue())

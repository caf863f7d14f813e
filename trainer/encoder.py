"""A trained model out of an exported folder: features in, BOLD out, without shards or a configuration.

    import trainer
    model = trainer.load("folder")
    bold = model.predict({"whisper/layers.12": features, ...})      # (subjects, TRs, parcels)

The folder holds `config.json` (what the model is made for, and how it was trained) and `model.safetensors` (the
weights of the anchor, and of the flow where there is one, with all standardising folded in).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import Config
from trainer.data.batches import Batch
from trainer.errors import InputError
from trainer.models.build import Shapes, build_anchor, build_flow
from trainer.models.upstream import with_prefix
from trainer.run.files import read_json
from trainer.scoring.predictor import AnchorPredictor, FlowPredictor, Predictor, estimated, trained_of
from trainer.stored import stored_config

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Encoder:
    """A model that predicts BOLD.

    Attributes:
        shapes: its streams (name, layers, width), in order, its subjects' labels and the number of parcels.
        config: the configuration that it was trained with.
        facts: all of config.json: stage, step, TR in seconds, ...
    """

    def __init__(self, predictor: Predictor, shapes: Shapes, config: Config, facts: Mapping[str, Any]) -> None:
        self._predictor, self.shapes, self.config, self.facts = predictor, shapes, config, facts

    @property
    def subjects(self) -> tuple[str, ...]:
        """Labels, in the order of the subject axis."""
        return tuple(self.shapes.subjects)

    def predict(
        self,
        features: Mapping[str, np.ndarray | Tensor],
        *,
        estimate: str = "mean",
        samples: int = 1,
        number: int = 0,
    ) -> np.ndarray:
        """Predict one run.

        Args:
            features: stream -> (TRs, D), or (TRs, L, D) for a stream of L layers: one row a TR, row 0 at the start of
                the run, finite numbers of any float type, byte order and strides; (TRs, 1, D) is as good as (TRs, D).
                Further streams are not read.
            estimate: `mean`, the expected BOLD, or `sample`, draws that look like real scans (stage 2 only).
            samples: how many draws, K.
            number: what the noise depends on: another number, other noise. A run predicted from a set of shards has its
                place in the set.

        Returns: float32 (subjects, TRs, parcels), for samples (K, subjects, TRs, parcels); in the units of the BOLD it
            was trained on, z-scored where `config.bold.standardise` says so. NaN for a subject who was not trained
            (`facts["trained_subjects"]`), where no decoder is shared that could predict them.

        Raises:
            InputError: a stream is missing, of another shape or type or not finite (the place is named), streams differ
                in TRs; they are so large that the prediction is not finite; or there is no such estimate.
        """
        possible = ("mean", "sample") if isinstance(self._predictor, FlowPredictor) else ("mean",)
        if estimate not in possible:
            raise InputError("estimate", "not one of this model's", found=estimate, expected=" or ".join(possible))
        if samples < 1:
            raise InputError("samples", "", found=samples, expected="1 or more")
        batch = self._batch(features, number)
        found = estimated(self._predictor, batch, estimate, samples if estimate == "sample" else None)
        silent = self._predictor.anchor.decoder.silent().cpu().numpy()
        if not np.isfinite(found[..., ~silent, :, :]).all():
            expected = "features in the units of those that it was trained on"
            raise InputError("features", "the model's arithmetic overflows", expected=expected)
        found[..., silent, :, :] = np.nan
        return found

    def _batch(self, features: Mapping[str, np.ndarray | Tensor], number: int) -> Batch:
        rows = [self._checked(features, *stream) for stream in self.shapes.streams]
        lengths = {name: len(row) for (name, _, _), row in zip(self.shapes.streams, rows, strict=True)}
        n_trs = len(rows[0])
        if set(lengths.values()) != {n_trs} or not n_trs:
            raise InputError("features", "TRs", found=lengths, expected="the same number, 1 or more, in each stream")
        n_subjects = len(self.shapes.subjects)
        there = torch.ones(1, n_trs, dtype=torch.bool)
        batch = Batch(
            features=[row[None] for row in rows],
            bold=torch.zeros(1, n_subjects, n_trs, self.shapes.n_parcels),
            mask=there,
            loss_mask=there,
            subject_mask=torch.ones(1, n_subjects, dtype=torch.bool),
            windows=torch.tensor([number]),
        )
        return batch.to(next(self._predictor.anchor.parameters()).device)

    def _checked(
        self, features: Mapping[str, np.ndarray | Tensor], name: str, layers: int, width: int
    ) -> Tensor:  # fmt: skip
        if name not in features:
            raise InputError("features", f"stream {name} is missing", found=", ".join(features) or "nothing")
        where = f"features: {name}"
        rows = as_floats(features[name], where)
        row = (width,) if layers == 1 else (layers, width)
        if layers == 1 and tuple(rows.shape[1:]) == (1, width):
            rows = rows[:, 0]
        if tuple(rows.shape[1:]) != row:
            expected = f"floats ({', '.join(['TRs', *map(str, row)])})"
            raise InputError(where, "array", found=f"{rows.dtype} {tuple(rows.shape)}", expected=expected)
        if not rows.isfinite().all():
            place = (~rows.isfinite()).nonzero()[0].tolist()
            axes = ("TR", "column") if layers == 1 else ("TR", "layer", "column")
            found = f"{rows[tuple(place)].item()} at {', '.join(f'{a} {i}' for a, i in zip(axes, place, strict=True))}"
            raise InputError(where, "not a finite number", found=found, expected="finite numbers in float32's range")
        return rows


def as_floats(values: np.ndarray | Tensor, where: str) -> Tensor:
    """An array of floats as a tensor: float16 and bfloat16 as they are, wider ones as float32.

    Args:
        values: an array or tensor of any float type, byte order and strides; masked values become NaN.
        where: what it is, for errors.

    Raises:
        InputError: it holds no floats.
    """
    if isinstance(values, Tensor):
        rows = values.detach()
    else:
        try:
            array = np.ma.filled(values, np.nan) if _is_masked_floats(values) else np.asarray(values)
        except ValueError as error:  # lists of several lengths
            raise InputError(where, "no array", found=error, expected="floats") from error
        if array.dtype.kind != "f":
            fix = "Convert it with .astype('float32')." if array.dtype.kind in "iub" else None
            raise InputError(where, "array", found=f"{array.dtype} {array.shape}", expected="floats", fix=fix)
        native = np.float16 if array.dtype.itemsize == 2 else np.float32
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused by its place
            rows = torch.from_numpy(np.array(array, native, order="C"))
    if not rows.is_floating_point():
        fix = "Convert it with .float()."
        raise InputError(where, "array", found=f"{rows.dtype} {tuple(rows.shape)}", expected="floats", fix=fix)
    return (
        rows if rows.itemsize == 2 else rows.float()
    ).contiguous()  # strides decide about the last bits of a product


def _is_masked_floats(values: object) -> bool:
    return isinstance(values, np.ma.MaskedArray) and values.dtype.kind == "f"


def load_encoder(folder: str | Path, device: str = "cpu") -> Encoder:
    """The model of a folder that `python -m trainer export` wrote.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    path = Path(folder) / CONFIG
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise InputError(path, "format", found=found, expected=FORMAT, fix="Export the run again.")
    config = stored_config(facts.get("config", {}), path)
    try:
        streams = [(str(name), int(layers), int(width)) for name, layers, width in facts["shapes"]["streams"]]
        shapes = Shapes(streams, facts["shapes"]["subjects"], int(facts["shapes"]["n_parcels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(path, "shapes", found=repr(error), expected="streams, subjects and n_parcels") from error
    weights = _weights(Path(folder) / WEIGHTS)
    anchor = build_anchor(config.stage1.model, shapes)
    _fill(anchor, weights, "anchor.", Path(folder) / WEIGHTS)
    anchor.to(device).eval()
    predictor: Predictor = AnchorPredictor(anchor)
    if facts.get("stage") == 2:
        flow = build_flow(config, shapes)
        _fill(flow, weights, "flow.", Path(folder) / WEIGHTS)
        flow.set_trained(trained_of(facts, shapes.subjects))
        predictor = FlowPredictor(anchor, flow.to(device).eval(), config, ("mean",))
    return Encoder(predictor, shapes, config, facts)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(path, "cannot be read", found=error, expected="the weights of an export") from error


def _fill(model: nn.Module, weights: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    try:
        model.load_state_dict(with_prefix(weights, prefix))
    except RuntimeError as error:
        raise InputError(path, f"does not fit {CONFIG}: {error}", fix="Export the run again.") from error

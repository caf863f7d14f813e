"""Turn a published encoder's ckpt.pt into a run that can be scored, predicted with and exported.

    python tools/import_upstream.py ckpt.pt --run output/published --config configs/full.yaml [key=value ...]
    python -m trainer evaluate output/published

The file holds weights by their published names, and mostly the configuration of its training (`cfg`). What it does not
hold comes from --config: the shards, the streams in the order in which the encoder reads them, the options of
`stage1.model`. Whatever both say must agree. Such a run has a stage 1 alone, the published mean anchor: at one step,
finished, never trained by us. Its features are not standardised, since the published encoder's are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.config import Config, load_config
from trainer.data.identity import record_of
from trainer.data.study import Study
from trainer.errors import InputError, exit_on_input_error
from trainer.models.anchor import Anchor
from trainer.models.upstream import anchor_from_upstream, read_published
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory
from trainer.scoring.known import write_record
from trainer.scoring.predictor import shapes_of

# options of stage1.model that are called the same on both sides
_OPTIONS = (
    "embed_dim", "encoder_kernel_size", "decoder_kernel_size", "encoder_causal", "encoder_positive",
    "encoder_blockwise", "global_pool", "with_shared_decoder", "with_subject_decoders",
)  # fmt: skip
STEP = 1
"""The one step of such a run: how many its training had is not known."""


def import_checkpoint(path: Path, config: Config, run: RunDirectory) -> None:
    """Write the run.

    Raises:
        InputError: no checkpoint of a published encoder, one that does not fit the configuration or the shards, or the
            run directory is taken.
    """
    study = Study(config)
    weights, said = _parts(path)
    _check_said(path, said, config)
    if config.stage1.model.hidden_model is not None:
        found = config.stage1.model.hidden_model
        raise InputError("stage1.model.hidden_model", "cannot be imported", found=found, expected="null")
    anchor = _anchor(path, weights, config, study)
    run.claim([1], resume=False, overwrite=False)
    stage1 = config.stage1.model_copy(update={"standardise_features": False})
    directory = run.stage(1)
    directory.begin(config.model_copy(update={"stage1": stage1}).to_yaml(), imported=checkpoint.sha256(path))
    write_record(directory, record_of(study.manifest, study.streams, {}))  # nobody knows which runs it has learnt from
    facts = {"shapes": shapes_of(study).as_json(), "steps_per_epoch": 1}
    checkpoint.save(directory.checkpoints, STEP, checkpoint.Checkpoint(anchor.state_dict(), {}, facts))
    directory.write_finished(step=STEP)


def _parts(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The weights by their published names, and what the file says of its configuration."""
    content = read_published(path)
    if not isinstance(content, Mapping):
        raise InputError(path, "the content", found=type(content).__name__, expected="a dict of tensors")
    weights = content.get("model", content)
    if not isinstance(weights, Mapping) or not any(isinstance(tensor, Tensor) for tensor in weights.values()):
        found = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise InputError(path, "holds no weights", found=found, expected="tensors by name, or `model`, a dict of them")
    said = content.get("cfg") if weights is not content else None
    return weights, said if isinstance(said, Mapping) else {}


def _check_said(path: Path, said: Mapping[str, Any], config: Config) -> None:
    """Compare the checkpoint's own configuration with ours. Raises InputError."""
    streams = said.get("include_features")
    if streams is not None and list(streams) != config.include_features:
        expected = f"{', '.join(map(str, streams))} as in {path}, in this order"
        raise InputError("include_features", "", found=", ".join(config.include_features), expected=expected)
    model = said.get("model") or {}
    for key in _OPTIONS:
        ours = getattr(config.stage1.model, key)
        if key in model and model[key] != ours:
            raise InputError(f"stage1.model.{key}", "", found=ours, expected=f"{model[key]} as in {path}")


def _anchor(path: Path, weights: Mapping[str, Tensor], config: Config, study: Study) -> Anchor:
    """The published anchor, of the shapes that the shards and the configuration ask for."""
    options = {key: getattr(config.stage1.model, key) for key in _OPTIONS}
    options["feat_dims"] = [s.width if s.layers == 1 else (s.layers, s.width) for s in study.streams]
    options |= {"num_subjects": len(study.manifest.subjects), "target_dim": study.manifest.parcels}
    return anchor_from_upstream(options, weights, str(path))


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="published ckpt.pt")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory to write")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. data.shards=DIR")
    options = parser.parse_intermixed_args(argv)
    import_checkpoint(options.checkpoint, load_config(options.config, options.overrides), RunDirectory(options.run))
    print(f"{options.run}: stage 1 at step {STEP}; score it with `python -m trainer evaluate {options.run}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A trained model as a folder that can be shared, in the form of the Hugging Face Hub: `python -m trainer export`.

    config.json          what the model is made for, and the configuration without the paths of this machine
    model.safetensors    anchor.* and, with stage 2, flow.*; averaged weights where the training kept an average
    README.md            model card: data, scores, how to load

`trainer.load` (trainer/encoder.py) reads it back and predicts the same bits.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from trainer import __version__
from trainer.config import Config, DataConfig
from trainer.data.identity import is_certain
from trainer.data.manifest import Manifest
from trainer.encoder import CONFIG, FORMAT, WEIGHTS
from trainer.errors import InputError
from trainer.progress import say
from trainer.run import checkpoint
from trainer.run.chosen import Chosen, chosen_checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import new_whole, write_json, write_whole
from trainer.scoring.known import known_data
from trainer.scoring.predictor import TRAINED

TAGS = ("fmri", "brain-encoding", "neuroscience", "flow-matching")


def export(run: RunDirectory, out: Path, stage: int | None = None) -> None:
    """Write the run's chosen model into the new folder `out`, which appears whole or not at all.

    Raises:
        InputError: no such run or checkpoint, a damaged one, or `out` exists.
    """
    chosen = chosen_checkpoint(run, stage)
    with new_whole(out, "--out") as folder:
        weights, shapes, trained = _weights(chosen)
        facts = {
            "model_type": "fmri-flow",
            "format": FORMAT,
            "version": __version__,
            "stage": chosen.stage,
            "step": chosen.step,
            **_data_facts(run.stage(chosen.stage), chosen.config),
            "shapes": shapes,
            **trained,
            "config": _without_paths(chosen.config).model_dump(mode="json"),
        }
        folder.mkdir()
        checkpoint.write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
        write_json(folder / CONFIG, facts)
        write_whole(folder / "README.md", model_card(run.path.resolve().name, facts, _scores(chosen)))
    say(f"{out}: stage {chosen.stage}, step {chosen.step}, {sum(t.numel() for t in weights.values())} numbers")


def _weights(chosen: Chosen) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[str]]]:
    """What predicts, by name, the shapes that it is made for, and who was trained, where the checkpoint says it."""
    found = checkpoint.load(checkpoint.folder_of(chosen.directory.checkpoints, chosen.step), weights_only=True)
    shapes, trained = found.meta["shapes"], {key: found.meta[key] for key in (TRAINED,) if key in found.meta}
    if chosen.stage == 1:
        return {f"anchor.{name}": tensor for name, tensor in found.model.items()}, shapes, trained
    anchor = checkpoint.load(chosen.directory.anchor, weights_only=True)
    if anchor.meta["shapes"] != found.meta["shapes"]:
        fix = "Train stage 2 anew around the anchor that belongs to it."
        raise InputError(chosen.directory.anchor, "is the anchor of other streams, subjects or parcels", fix=fix)
    weights = {f"anchor.{name}": tensor for name, tensor in anchor.model.items()}
    return {**weights, **{f"flow.{name}": tensor for name, tensor in found.model.items()}}, shapes, trained


def _data_facts(stage: StageDirectory, config: Config) -> dict[str, Any]:
    """Name and TR of the data that the stage was trained on; without a record, where its shards still lie."""
    for known in known_data(stage)[:1]:
        if known.record.name:
            return {"data": known.record.name, "tr": known.record.tr}
        with contextlib.suppress(InputError):
            manifest = Manifest.read(config.data.shards)
            if is_certain(known.record, manifest):
                return {"data": manifest.name, "tr": manifest.tr}
    return {}


def _without_paths(config: Config) -> Config:
    """The configuration, without what says where things lie on this machine."""
    evaluate = config.evaluate.model_copy(update={"labels": None, "atlas": None})
    context = config.data.context_trs
    return config.model_copy(
        update={"data": DataConfig(shards="not included", context_trs=context), "evaluate": evaluate}
    )


def _scores(chosen: Chosen) -> list[dict[str, Any]]:
    """The scores of the exported checkpoint, of which r is a number."""
    scores = (score for score in chosen.directory.read_scores() if "pearson_r" in score and "estimate" in score)
    return [score for score in scores if score.get("step") == chosen.step and score["pearson_r"] is not None]


def model_card(name: str, facts: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """The README.md of the folder: YAML front matter as the Hub reads it, then what a reader asks first."""
    shapes, config = facts["shapes"], facts["config"]
    streams = [f"| `{stream}` | {_shape(layers, width)} |" for stream, layers, width in shapes["streams"]]
    sets = [f"| `{name}` | `{_filter(dataset)}` |" for name, dataset in config["datasets"].items()]
    rows = [
        f"| `{s['set']}` | {s['estimate']} | {s['pearson_r']:.4f}{_interval(s)} | {s.get('n_trs', '')} |"
        for s in scores
    ]
    return _CARD.format(
        matter=yaml.safe_dump({"license": "mit", "library_name": "fmri-flow", "tags": list(TAGS)}, sort_keys=False),
        name=name,
        n_subjects=len(shapes["subjects"]),
        subjects=", ".join(shapes["subjects"]) + _untrained(shapes["subjects"], facts.get(TRAINED)),
        n_parcels=shapes["n_parcels"],
        kind=_KINDS[facts["stage"]],
        data=facts.get("data", "fMRI data"),
        version=facts["version"],
        every=f" of {facts['tr']} s" if "tr" in facts else "",
        units=_UNITS[config["bold"]["standardise"]],
        streams="\n".join(streams),
        val=config["val_set_name"],
        refitted=" and is learnt from too" if config["train"]["refit"] else "",
        sets="\n".join(sets),
        step=facts["step"],
        scores="\n".join(rows) or "| none | | | |",
    )


_KINDS = {1: "a mean anchor", 2: "a mean anchor and conditional flow matching around it"}
_UNITS = {
    "none": "in the units of the data",
    "run": "z-scored over each run",
    "subject": "z-scored over the subject's training TRs",
}
_CARD = """---
{matter}---

# {name}

An fMRI encoder: features of a film in, BOLD of {n_subjects} people in {n_parcels} parcels out. It is {kind},
trained on {data} with fmri-flow {version}.

## How to load

```python
import trainer  # the package fmri-flow

model = trainer.load("this folder")  # for one on the Hub, what huggingface_hub.snapshot_download returns
bold = model.predict(features)  # {{stream: (TRs, D)}} -> (subjects, TRs, parcels)
```

One row of the features is one TR{every}, row 0 the first of the run. BOLD is {units}. With a stage 2,
`model.predict(features, estimate="sample", samples=16)` draws samples. Subjects, in order: {subjects}.

| stream | shape |
|---|---|
{streams}

## Data

The model learnt from `train`; `{val}` chose its number of steps{refitted}.

| set | filter |
|---|---|
{sets}

## Scores

Pearson's r over all TRs of a set, averaged over parcels, then over subjects, at step {step}.

| set | estimate | r | TRs |
|---|---|---|---|
{scores}

## Licence

MIT. Where the data that it was trained on ask for something else, change `license` above.
"""


def _untrained(subjects: list[str], trained: list[str] | None) -> str:
    """What the card says behind the subjects of those who were not trained."""
    unknown = [label for label in subjects if trained is not None and label not in trained]
    return f" (not trained, and predicted by what the others share: {', '.join(unknown)})" if unknown else ""


def _shape(layers: int, width: int) -> str:
    return f"(TRs, {width})" if layers == 1 else f"(TRs, {layers}, {width})"


def _filter(dataset: dict[str, Any]) -> str:
    given = {key: value for key, value in dataset["filter"].items() if value is not None}
    return yaml.safe_dump(given, default_flow_style=True, width=1000).strip()


def _interval(score: dict[str, Any]) -> str:
    """The confidence interval, where there is one."""
    ends = score.get("ci") or [None]
    return "" if None in ends else " ({:.4f} to {:.4f})".format(*ends)

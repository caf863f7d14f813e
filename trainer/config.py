"""The whole configuration of a run as strict models: YAML in, dotted overrides applied, written back resolved.

Keys keep the names that users of the published encoder know. Each key's meaning stands beside it here; the README's
table is made from these descriptions, and a test keeps the two equal. A key whose default is not what the program did
before the key existed says so (`before`), since stored configurations keep their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from trainer.paths import PathText
from trainer.strict import Few, NotNegative, Positive, Size, StrictModel, apply_overrides, flat, read_yaml, validated
from trainer.written import yaml_text


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError(f"found {size}, expected an odd number")
    return size


Odd = Annotated[Size, AfterValidator(_odd)]
Tr = Annotated[int, Field(ge=-(10**9), le=10**9)]
Column = Annotated[str, Field(pattern=r"^.+:\d+$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
BlockType = Literal["conformer", "transformer"]

HIGHEST_SEED = 2**64 - 1 - 2**16
"""torch takes 64 bits; the rest is room for what is added to a seed: the number of a fold."""


class Filter(StrictModel):
    """Which runs, repeats, subjects and TRs of the shards a data set takes; a key left out takes all."""

    series: list[str] | None = Field(None, description="series to take, e.g. [friends]")
    seasons: list[NotNegative] | None = Field(None, description="seasons to take; united with `films`")
    films: list[str] | None = Field(None, description="films to take; united with `seasons`")
    runs: list[str] | None = Field(None, description="run names or patterns, e.g. ['s01e0*']")
    repeats: list[NotNegative] | None = Field(None, description="which showings of a repeated run, counted from 1")
    subjects: list[str] | None = Field(None, description="subjects whose BOLD is used; others count as missing")
    trs: list[Tr | None] | None = Field(None, description="[start, stop] inside each run, like a Python slice")

    @field_validator("trs")
    @classmethod
    def _two_ends(cls, trs: list[int | None] | None) -> list[int | None] | None:
        if trs is not None and len(trs) != 2:
            raise ValueError(f"found {trs}, expected two numbers or nulls: [start, stop]")
        return trs


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class DatasetConfig(StrictModel):
    """One named set of runs: to train on, or to score."""

    filter: Filter = Field(Filter(), description="what the set takes (table below)")


class DataConfig(StrictModel):
    """Where the shards lie and how they are read."""

    shards: PathText = Field(
        description="folder that tools/make_shards.py wrote, or its URL (`https:`, `s3:`, `pipe:`); in all paths `~`, "
        "`$VAR` and `${VAR}` are expanded as the file is read, and the run directory keeps the result"
    )
    num_workers: int = Field(0, ge=0, le=1000, description="reading processes beside the training; 0 reads in it")
    prefetch: Few = Field(2, description="batches that each of them reads ahead")
    residence: Literal["device", "host", "disk", "auto"] = Field(
        "auto",
        description="where the data stand: on the GPU, in memory once per node, read per window, or the first that "
        "fits into half of what is free",
    )
    context_trs: int = Field(
        0,
        ge=0,
        le=10**6,
        description="TRs on both sides of a window whose features stage 1 sees too, but does not learn from; half the "
        "kernel's TRs give every TR of a window what it has in the whole run",
    )
    verify: Literal["size", "full"] = Field(
        "size", description="what is compared with the manifest at the start: sizes, or every SHA-256"
    )
    cache_dir: PathText | None = Field(
        None,
        description="local folder for copies of remote shards; null: `fmri-flow-UID` in the folder for temporary files",
    )
    cache_gb: float = Field(
        100, gt=0, le=10**9, description="size in GB that the copies may grow to; the oldest make room"
    )


class BoldConfig(StrictModel):
    """How BOLD is scaled before it is learnt or scored."""

    standardise: Literal["none", "run", "subject"] = Field(
        "none", description="z-score each parcel over a `run`, over a `subject`'s training TRs, or not at all"
    )
    keep_parcels: list[NotNegative] | None = Field(
        [],
        description="parcels, counted from 0, that are z-scored by their own std although it is below 1e-4 of the "
        "median parcel's; null: every one",
        json_schema_extra={"before": None},
    )


class TransformerConfig(StrictModel):
    """The transformer hidden model of stage 1."""

    num_heads: Few = Field(3, description="attention heads")
    depth: Few = Field(6, description="blocks")
    mlp_ratio: float = Field(4.0, gt=0, le=1000, description="width of the feed-forward layer over the embedding's")


class Conv1dNextConfig(StrictModel):
    """The conv1dnext hidden model of stage 1."""

    depth: Few = Field(6, description="blocks")
    kernel_size: Odd = Field(11, description="TRs a block sees")


class AnchorConfig(StrictModel):
    """The mean anchor's architecture."""

    embed_dim: Size = Field(192, description="width d that every stream is projected to")
    encoder_kernel_size: Odd = Field(45, description="TRs of the temporal kernel of each stream; 1 for none")
    encoder_causal: bool = Field(False, description="the kernel sees no future TR")
    encoder_positive: bool = Field(False, description="kernel weights are made positive")
    encoder_blockwise: bool = Field(False, description="one kernel for all channels of a stream")
    global_pool: Literal["avg", "linear", "attn"] = Field("avg", description="how streams and layers are joined")
    hidden_model: Literal["transformer", "conv1dnext"] | None = Field(
        None, description="a model between pooling and decoders"
    )
    transformer: TransformerConfig = Field(TransformerConfig(), description="its options")
    conv1dnext: Conv1dNextConfig = Field(Conv1dNextConfig(), description="its options")
    dropout: Fraction = Field(0.0, description="dropout in the hidden model")
    with_shared_decoder: bool = Field(True, description="a decoder that all subjects share")
    with_subject_decoders: bool = Field(True, description="a decoder of each subject's own, added")
    decoder_kernel_size: int = Field(
        0, ge=0, le=10**6, description="TRs of a kernel before the own decoders; 0 for none"
    )

    @model_validator(mode="after")
    def _has_a_decoder(self) -> AnchorConfig:
        if not (self.with_shared_decoder or self.with_subject_decoders):
            raise ValueError("with_shared_decoder and with_subject_decoders are both false, expected one of them")
        if self.decoder_kernel_size and self.decoder_kernel_size % 2 == 0:
            raise ValueError(f"decoder_kernel_size: found {self.decoder_kernel_size}, expected an odd number or 0")
        if self.hidden_model == "transformer" and self.embed_dim % self.transformer.num_heads:
            raise ValueError(
                f"embed_dim: found {self.embed_dim}, expected a multiple of the transformer's "
                f"num_heads {self.transformer.num_heads}"
            )
        return self


class OptimisationConfig(StrictModel):
    """How long and how fast one stage learns (AdamW)."""

    lr: float = Field(3e-4, gt=0, le=100, description="learning rate of AdamW")
    weight_decay: float = Field(
        0.1, ge=0, le=1000, description="decoupled weight decay of the weights (biases have none)"
    )
    epochs: Positive = Field(10, description="epochs of `num_samples` windows")
    max_steps: Positive | None = Field(None, description="stop after so many steps, whatever `epochs` says")
    warmup_steps: NotNegative = Field(0, description="steps in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    clip_grad_norm: float | None = Field(
        None, gt=0, le=10**9, description="largest gradient norm; null for no clipping"
    )
    patience: Positive | None = Field(
        None, description="stop after so many validations that bring nothing better; null never stops early"
    )


class Stage1Config(OptimisationConfig):
    """Stage 1, the mean anchor."""

    model: AnchorConfig = Field(AnchorConfig(), description="architecture (table below)")
    standardise_features: bool = Field(True, description="z-score every feature with the training set's statistics")
    keep_columns: list[Column] | None = Field(
        [],
        description="columns `KEY/LAYER:COLUMN`, counted from 0, that are z-scored although their std in training is "
        "below 1e-4 of the median of their stream, where a column is otherwise left out; null: every one",
        json_schema_extra={"before": None},
    )


class DecoderConfig(StrictModel):
    """The U-Net that estimates the velocity in stage 2."""

    channels: list[Size] = Field([256, 256], description="channels of each level")
    dropout: Fraction = Field(0.05, description="dropout in its blocks")
    attention_head_dim: Size = Field(64, description="width of one attention head")
    n_blocks: Few = Field(1, description="attention blocks a level")
    num_mid_blocks: Few = Field(2, description="blocks at the bottom of the U")
    num_heads: Few = Field(2, description="attention heads")
    act_fn: Literal["snakebeta"] = Field("snakebeta", description="activation of the transformer block")
    down_block_type: BlockType = Field("conformer", description="block on the way down")
    mid_block_type: BlockType = Field("conformer", description="block at the bottom")
    up_block_type: BlockType = Field("conformer", description="block on the way up")

    @field_validator("channels")
    @classmethod
    def _groups(cls, channels: list[int]) -> list[int]:
        if not channels or any(c % 8 for c in channels):
            raise ValueError(f"found {channels}, expected at least one number, each a multiple of 8 (GroupNorm)")
        return channels


class FlowConfig(StrictModel):
    """The path of the flow."""

    sigma_min: float = Field(1e-4, ge=0, lt=1, description="noise left at t = 1")


class Stage2Config(OptimisationConfig):
    """Stage 2, conditional flow matching around the anchor."""

    latent_dim: Size = Field(128, description="dimensions of the latent; at most the number of parcels")
    projection: Literal["pca", "linear"] = Field(
        "pca", description="fixed principal components, or the published trainable projection (it collapses)"
    )
    parametrisation: Literal["skip", "velocity"] = Field(
        "skip", description="the known part of the velocity is given, or the network learns all (published)"
    )
    subjects: Literal["embedding", "separate"] = Field(
        "embedding", description="one field told who the subject is, or one field per subject"
    )
    decoder: DecoderConfig = Field(DecoderConfig(), description="the U-Net (table below)")
    cfm: FlowConfig = Field(FlowConfig(), description="the path of the flow (table below)")
    n_timesteps: Size = Field(25, description="Euler steps of a sample")
    temperature: float = Field(1.0, ge=0, le=100, description="scale of the noise that a sample starts from")
    posterior_draws: Size = Field(4, description="noise draws averaged in the posterior mean")
    cross_fit: int = Field(
        5,
        ge=0,
        le=1000,
        description="folds of anchors that predict runs they have not seen, to learn from; 0: the anchor",
    )
    snapshot_every_epochs: Positive = Field(5, description="epochs between checkpoints that are scored")
    ema: Fraction | None = Field(
        None, description="decay of a moving average of the weights, e.g. 0.999, which then is what predicts; null: off"
    )
    window_trs: Size | None = Field(
        256,
        json_schema_extra={"before": None},
        description="TRs that the network sees at once of a longer run, in overlapping windows that are cross-faded; "
        "at least `sample_length`; null: the whole run, as published weights want it",
    )

    @field_validator("cross_fit")
    @classmethod
    def _folds(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("found 1, expected 0 (off) or at least 2 folds")
        return folds


class TrainConfig(StrictModel):
    """What happens around the stages."""

    refit: bool = Field(False, description="train again on train + validation for the chosen number of steps")


class CheckpointConfig(StrictModel):
    """When a checkpoint is written, and which are kept."""

    every_steps: Positive | None = Field(500, description="steps between checkpoints; null: only where one is scored")
    every_minutes: float | None = Field(
        None, gt=0, le=10**6, description="minutes between checkpoints, by the clock of rank 0"
    )
    keep_last: Positive = Field(2, description="newest checkpoints to keep; the best is always kept")
    background: bool = Field(True, description="the training goes on while a checkpoint is written")


class EvaluateConfig(StrictModel):
    """How checkpoints are judged, beside Pearson's r."""

    samples: int = Field(
        16, ge=0, le=10**6, description="samples that stage 2's distribution is judged by; 0: it is not"
    )
    bootstrap: int = Field(1000, ge=0, le=10**6, description="resamplings for confidence intervals; 0: none")
    labels: PathText | None = Field(
        None, description="the atlas's label file, a line a parcel: networks are read from the names"
    )
    atlas: PathText | None = Field(
        None, description="volumes of parcel ids (.nii.gz) for brain maps, with {subject} where the label stands"
    )
    parcels: Positive = Field(
        5000,
        json_schema_extra={"before": 10**9},
        description="most parcels, spread evenly, whose pairs are judged (functional connectivity, full covariance)",
    )

    @field_validator("samples")
    @classmethod
    def _two_or_none(cls, samples: int) -> int:
        if samples == 1:
            raise ValueError("found 1, expected 0 (off) or at least 2 samples, whose differences are judged")
        return samples


class Config(StrictModel):
    """A run: data, both stages, and what is written down about them."""

    seed: int = Field(3315, ge=0, le=HIGHEST_SEED, description="everything random follows from it")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision; weights stay float32")
    deterministic: bool = Field(
        False, description="a resume repeats every bit on the same number of processes (CPU; on GPUs as far as it can)"
    )
    data: DataConfig = Field(description="where the data lie (table below)")
    bold: BoldConfig = Field(BoldConfig(), description="scaling of BOLD (table below)")
    include_features: list[str] = Field(min_length=1, description="streams KEY/LAYER that the anchor reads")
    datasets: dict[SetName, DatasetConfig] = Field(
        description="named sets; `train` is trained on, the others are scored"
    )
    val_set_name: str = Field(description="the set that chooses the number of steps")
    sample_length: Size = Field(64, description="TRs of a training window")
    num_samples: Positive = Field(2000, description="windows of an epoch")
    batch_size: Size = Field(16, description="windows of a global batch, whatever the number of processes")
    gradient_accumulation_steps: Size = Field(
        1, description="micro-batches that each process cuts its share of a global batch into, to save memory"
    )
    stage1: Stage1Config = Field(Stage1Config(), description="the mean anchor")
    stage2: Stage2Config = Field(Stage2Config(), description="the flow")
    train: TrainConfig = Field(TrainConfig(), description="around the stages")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="scores (table below)")
    log_every: Positive = Field(25, description="steps between lines of the log")
    tracker: Literal["tensorboard", "wandb", "none"] = Field(
        "tensorboard", description="where the lines of the log go too; wandb needs its own package"
    )
    timeout_s: float = Field(
        600, gt=0, le=10**7, description="seconds without progress after which a process ends the job"
    )
    tf32: bool = Field(
        False,
        description="float32 products and convolutions on NVIDIA GPUs are formed of 10 bits (TF32), which is faster; "
        "CPUs know no difference",
    )

    @model_validator(mode="after")
    def _sets_exist(self) -> Config:
        for key, name in (("datasets", "train"), ("val_set_name", self.val_set_name)):
            if name not in self.datasets:
                raise ValueError(f"{key}: found no set {name!r}, expected it among {', '.join(self.datasets)}")
        if self.val_set_name == "train":
            raise ValueError("val_set_name: found 'train', expected a set that is not trained on")
        twice = sorted({s for s in self.include_features if self.include_features.count(s) > 1})
        if twice:
            raise ValueError(f"include_features: stream {twice[0]} is named twice, expected each once")
        if self.num_samples < self.batch_size:
            raise ValueError(f"num_samples: found {self.num_samples}, expected at least batch_size {self.batch_size}")
        return self

    @property
    def window_trs(self) -> int | None:
        """TRs that stage 2's network sees at once; None for all of a run."""
        window = self.stage2.window_trs
        return None if window is None else max(window, self.sample_length)

    def stage(self, number: int) -> Stage1Config | Stage2Config:
        """The section of stage 1 or 2."""
        return self.stage1 if number == 1 else self.stage2

    def to_yaml(self) -> str:
        """The configuration with every default filled in, as it is kept in a run directory."""
        return yaml_text(self.model_dump(mode="json"))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        InputError: unreadable file, unknown key (the nearest is suggested), wrong type, inconsistent values.
    """
    data = read_yaml(path)
    apply_overrides(Config, data, overrides)
    return validated(Config, data, f"{path} with overrides" if overrides else path)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys, in the order of the configuration, whose values differ."""
    a, b = dict(flat(one.model_dump(mode="json"))), dict(flat(other.model_dump(mode="json")))
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def documentation() -> dict[str, list[tuple[str, str, str]]]:
    """Section -> (key, default, meaning) of every key, for the README's tables."""
    tables: dict[str, list[tuple[str, str, str]]] = {}

    def visit(model: type[BaseModel], title: str) -> None:
        rows = tables.setdefault(title, [])
        for name, field in model.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None:
                free_names = ".<name>" if get_origin(field.annotation) is dict else ""
                visit(inner, f"{title}.{name}{free_names}".lstrip("."))
                continue
            default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
            rows.append((name, default, field.description or ""))

    visit(Config, "")
    return tables


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a key's annotation holds, where the key is a section or a mapping of sections."""
    candidates = (annotation, *get_args(annotation))
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return models[0] if models else None


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").strip()

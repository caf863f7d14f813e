"""What a configuration takes from a folder of shards: the spans of every set, the streams, the scaling of BOLD.

Opened once at the start of a command, so that every mismatch between configuration and shards is found before any time
is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from trainer.config import Config
from trainer.data.cache import local_folder
from trainer.data.manifest import Manifest, Stream
from trainer.data.plan import Plan, Span, select
from trainer.data.residence import DeviceCopy, HostCopy, extents, reside
from trainer.data.shards import Shards
from trainer.data.statistics import BoldScaling
from trainer.errors import InputError


class Study:
    """The data side of a configuration.

    Attributes:
        shards: the opened folder, or its local copy where data.shards is remote.
        source: what training batches are read from: the shards, until `reside` has been called.
        spans: set name -> the spans of TRs that its filter leaves.
        streams: the streams of `include_features`, in that order.

    Raises:
        InputError: no such folder, a stream or subject that the shards lack, an empty set, more latent dimensions than
            parcels.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        data = config.data
        self.shards = Shards(local_folder(data.shards, data.cache_dir, data.cache_gb), verify=data.verify)
        self.source: Shards | HostCopy | DeviceCopy = self.shards
        self.streams: list[Stream] = [self.manifest.stream(name) for name in config.include_features]
        self.spans: dict[str, list[Span]] = {}
        for name, dataset in config.datasets.items():
            try:
                self.spans[name] = select(self.manifest, dataset.filter)
            except InputError as error:
                raise InputError(f"datasets.{name}", str(error)) from error
        _check_apart(self.spans["train"], self.spans[config.val_set_name], self.manifest, config.val_set_name)
        parcels = self.manifest.parcels
        if config.stage2.latent_dim > parcels:
            raise InputError(
                "stage2.latent_dim",
                "more dimensions than the shards have parcels",
                found=config.stage2.latent_dim,
                expected=f"at most {parcels}",
            )

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self.shards.manifest

    @cached_property
    def scaling(self) -> BoldScaling:
        """The scaling of BOLD, with statistics of the training set where it needs them."""
        return BoldScaling.fit(self.config.bold.standardise, self.shards, self.spans["train"])

    def reside(self, device: torch.device) -> str:
        """Copy what training reads again and again (train and validation) to where data.residence says.

        Returns: a line that says where that is, and why.

        Raises:
            InputError: there is not enough memory for what is asked for, or a shard cannot be read.
        """
        data = self.config.data
        spans = [*self.spans["train"], *self.spans[self.config.val_set_name]]
        needed = extents(spans, self.manifest, data.context_trs)
        self.source, line = reside(data.residence, self.shards, needed, self.streams, self.scaling, device)
        return line

    def training_spans(self, *, refit: bool) -> list[Span]:
        """The training set, together with the validation set where the model is refitted on both."""
        validation = self.spans[self.config.val_set_name] if refit else []
        return [*self.spans["train"], *validation]

    def scored_sets(self, *, refit: bool) -> list[str]:
        """The sets that the model has not been trained on, validation first."""
        first = [] if refit else [self.config.val_set_name]
        return first + [name for name in self.spans if name not in ("train", self.config.val_set_name)]

    def plan(self, spans: Sequence[Span], seed: int) -> Plan:
        """The plan of windows over some spans."""
        config = self.config
        return Plan(
            spans,
            seed=seed,
            sample_length=config.sample_length,
            num_samples=config.num_samples,
            batch_size=config.batch_size,
        )


def _check_apart(train: Sequence[Span], validation: Sequence[Span], manifest: Manifest, name: str) -> None:
    """Raise InputError where the validation set holds TRs that are trained on: it would choose by what it has seen."""
    for span in validation:
        for other in train:
            if span.sample == other.sample and span.start < other.stop and other.start < span.stop:
                run = manifest.samples[span.sample].key
                raise InputError(f"datasets.{name}", f"shares TRs of {run} with train", expected="other runs or TRs")

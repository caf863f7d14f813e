"""What a configuration takes from a folder of shards: the spans of every set, the streams, the scaling of BOLD.

Opened once at the start of a command, so that every mismatch between configuration and shards is found before any time
is spent. For a stage that has started, the shards are compared with what it has used (see `identity`), its subjects are
found by label, and its training and validation sets stay the runs that they were, whatever has been added since.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import torch

from trainer.config import Config, Filter
from trainer.data.cache import local_folder
from trainer.data.identity import LISTED, DataRecord, Known, check, record_of, set_digest
from trainer.data.manifest import Manifest, Stream
from trainer.data.plan import Plan, Span, select, select_without_bold, used_subjects
from trainer.data.residence import DeviceCopy, HostCopy, extents, reside
from trainer.data.shards import Shards
from trainer.data.statistics import BoldScaling
from trainer.errors import InputError


class Study:
    """The data side of a configuration.

    Attributes:
        shards: the opened folder, or its local copy where data.shards is remote.
        source: what training batches are read from: the shards, until `reside` has been called.
        spans: set name -> the spans of TRs that its filter leaves, of runs with BOLD; sets without any are not in it.
        unseen: set name -> the spans of runs without BOLD, which can be predicted only.
        streams: the streams of `include_features`, in that order.
        warnings: what the user should know of the data, a sentence each.
        is_certain: the data of the stages that are `known` are known to be in the shards.

    Args:
        known: what the stages that the study is opened for have used, those that they stand on included. The first
            gives the subject axis and the training and validation sets.
        trains: a training is to stand on the data (see `identity.check`).

    Raises:
        InputError: no such folder, a stream or subject that the shards lack, an empty set, more latent dimensions than
            parcels, other data than those that are known.
    """

    def __init__(self, config: Config, known: Sequence[Known] = (), *, trains: bool = False) -> None:
        self.config = config
        data = config.data
        self._known = known[0] if known else None
        subjects = self._known.record.subjects if self._known else None
        folder = local_folder(data.shards, data.cache_dir, data.cache_gb)
        self.shards = Shards(folder, verify=data.verify, subjects=subjects)
        compared = [check(each, self.manifest, data.shards, trains=trains) for each in known]
        self.warnings = [warning for warning in compared if warning is not None]
        self.is_certain = not self.warnings
        self.source: Shards | HostCopy | DeviceCopy = self.shards
        self.streams: list[Stream] = [self.manifest.stream(name) for name in config.include_features]
        self.spans: dict[str, list[Span]] = {}
        self.unseen: dict[str, list[Span]] = {}
        for name, dataset in config.datasets.items():
            try:
                spans, self.unseen[name] = self._chosen(name, dataset.filter)
            except InputError as error:
                raise InputError(f"datasets.{name}", str(error)) from error
            if spans:
                self.spans[name] = spans
        self._anchors = self.spans
        for name in ("train", config.val_set_name):
            self.check_scorable(name, f"datasets.{name}")
        self.check_apart(config.val_set_name, "train", self.spans["train"])
        parcels = self.manifest.parcels
        if config.stage2.latent_dim > parcels > 1:  # of one parcel there is no stage 2, whatever it says
            raise InputError(
                "stage2.latent_dim",
                "more dimensions than the shards have parcels",
                found=config.stage2.latent_dim,
                expected=f"at most {parcels}",
                fix=f"Set stage2.latent_dim={parcels} or less.",
            )

    def _used(self, name: str, chosen: Filter) -> list[Span] | None:
        """The spans of a set that the stage has used already; None where it has not."""
        return None if self._known is None else self._known.record.spans(name, chosen, self.manifest)

    def _chosen(self, name: str, chosen: Filter) -> tuple[list[Span], list[Span]]:
        """The spans of a set with BOLD, and without: what its filter leaves, or with BOLD what the stage has used."""
        used = self._used(name, chosen)
        try:
            now, unseen = select(self.manifest, chosen), select_without_bold(self.manifest, chosen)
        except InputError:
            if used is None:
                raise
            return used, []  # the layout gives films or seasons other names, which changes no data
        if used is None:
            return now, unseen
        self._warn_of_further(name, now, used)
        return used, unseen

    def _warn_of_further(self, name: str, now: Sequence[Span], used: Sequence[Span]) -> None:
        """Note the runs, or BOLD, that the shards hold more of than the stage has used of a set."""
        where = self._known.where if self._known else ""
        further = [self.manifest.samples[span.sample].key for span in now if span not in used]
        if further:
            more = f" and {len(further) - LISTED} more" if len(further) > LISTED else ""
            self.warnings.append(
                f"datasets.{name}: its filter fits {', '.join(further[:LISTED])}{more} too, which {where} "
                "has not used: the set stays as it was (a new training takes them)"
            )

    def record(self) -> DataRecord:
        """What a stage that starts now is trained and validated on."""
        names = ("train", self.config.val_set_name)
        sets = {name: (self.config.datasets[name].filter, self.spans[name]) for name in names}
        return record_of(self.manifest, self.streams, sets)

    def digest(self, name: str) -> dict[str, str]:
        """What a set holds now, as `identity.set_digest`."""
        return set_digest(self.manifest, self.spans[name], self.streams)

    def check_scorable(self, name: str, where: str = "--set") -> None:
        """Raise InputError where there is no such set, or no run of it has BOLD to learn from or to score against."""
        if name not in self.unseen:
            raise InputError(where, "no such set in the run", found=name, expected=f"one of {', '.join(self.unseen)}")
        if name not in self.spans:
            known = f"one of {', '.join(self.spans)}"
            what = f"no run of this set has BOLD: only `predict --set {name}` has a use for it"
            raise InputError(where, what, found=name, expected=known)

    def check_apart(self, name: str, other: str, seen: Sequence[Span]) -> None:
        """Raise InputError where a set holds TRs of `seen`, the spans of `other`: it would judge by what was seen."""
        for span in self.spans[name]:
            for before in seen:
                if span.sample == before.sample and span.start < before.stop and before.start < span.stop:
                    run = self.manifest.samples[span.sample].key
                    expected = "other runs or TRs"
                    raise InputError(f"datasets.{name}", f"shares TRs of {run} with {other}", expected=expected)

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self.shards.manifest

    @cached_property
    def scaling(self) -> BoldScaling:
        """The scaling of BOLD, with statistics of the training set where it needs them."""
        bold = self.config.bold
        return BoldScaling.fit(bold.standardise, self.shards, self._anchors["train"], bold.keep_parcels)

    def stand_on(self, stage1: Config) -> None:
        """Note what stage 1 was trained on, where stage 2 learns from fewer subjects: anchors are trained on all."""
        names = ("train", self.config.val_set_name)
        self._anchors = {
            name: self._used(name, (chosen := stage1.datasets[name].filter)) or select(self.manifest, chosen)
            for name in names
        }

    def reside(self, device: torch.device) -> str:
        """Copy what training reads again and again (train and validation) to where data.residence says.

        Returns: a line that says where that is, and why.

        Raises:
            InputError: there is not enough memory for what is asked for, or a shard cannot be read.
        """
        data = self.config.data
        spans = self.anchor_spans(refit=True)
        needed = extents(spans, self.manifest, data.context_trs)
        self.source, line = reside(data.residence, self.shards, needed, self.streams, self.scaling, device)
        return line

    def training_spans(self, *, refit: bool) -> list[Span]:
        """The training set, together with the validation set where the model is refitted on both."""
        validation = self.spans[self.config.val_set_name] if refit else []
        return [*self.spans["train"], *validation]

    def anchor_spans(self, *, refit: bool) -> list[Span]:
        """As `training_spans`, with the BOLD of every subject that stage 1 learnt from."""
        validation = self._anchors[self.config.val_set_name] if refit else []
        return [*self._anchors["train"], *validation]

    def labels_of(self, spans: Sequence[Span]) -> list[str]:
        """The subjects whose BOLD some spans use, in the order of the subject axis."""
        used = used_subjects(spans)
        return [label for label, is_used in zip(self.manifest.subjects, used, strict=True) if is_used]

    def untrained(self, set_name: str, trained: Collection[str]) -> list[str]:
        """The subjects of a set with BOLD that are not among those who were trained."""
        return [label for label in self.labels_of(self.spans[set_name]) if label not in trained]

    def scored_sets(self, *, refit: bool) -> list[str]:
        """The sets that the model has not been trained on, validation first."""
        first = [] if refit else [self.config.val_set_name]
        return first + [name for name in self.spans if name not in ("train", self.config.val_set_name)]

    def without_bold(self) -> list[str]:
        """The sets that can be predicted only."""
        return [name for name in self.unseen if name not in self.spans]

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

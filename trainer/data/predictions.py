"""Predictions of whole runs in a folder, one .npy a run, and of what they were made: read as they were meant, or not.

KEY.npy         (S, T, V) float32; NaN where none was asked
made_from.json  key -> the features that the run was predicted from, as one word (`identity.features_digest`)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.data.identity import features_digest
from trainer.data.manifest import Manifest, Stream
from trainer.errors import InputError

MADE_FROM = "made_from.json"


class StoredPredictions(Mapping[int, np.ndarray]):
    """Sample index -> predictions (S, T, V), memory-mapped, of the runs whose file is there.

    A run without a file, with one that is cut short or of another shape, or that was predicted from other features
    raises InputError when it is asked for.
    """

    def __init__(self, folder: Path, manifest: Manifest, streams: Sequence[Stream]) -> None:
        self.folder, self.manifest, self.streams = folder, manifest, streams
        self._known_right: set[int] = set()

    def path(self, sample: int) -> Path:
        """Where the predictions of a sample lie."""
        return self.folder / f"{self.manifest.file_stems[sample]}.npy"

    def __getitem__(self, sample: int) -> np.ndarray:
        path = self.path(sample)
        expected = (len(self.manifest.subjects), self.manifest.samples[sample].n_trs, self.manifest.parcels)
        try:
            found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise InputError(path, "missing", fix=_ANEW) from error
        except (OSError, ValueError, EOFError) as error:
            raise InputError(path, "cannot be read", found=error, expected=f"float32 {expected}", fix=_ANEW) from error
        if (found.shape, found.dtype) != (expected, np.float32):
            shape = f"{found.dtype} {found.shape}"
            raise InputError(path, "array", found=shape, expected=f"float32 {expected}", fix=_ANEW)
        if sample not in self._known_right:
            self.check_features(sample)
            self._known_right.add(sample)
        return found

    def __iter__(self) -> Iterator[int]:
        return (sample for sample in range(len(self.manifest.samples)) if self.path(sample).exists())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check_features(self, sample: int) -> None:
        """Raise InputError where a run was predicted from other features than the shards hold, as far as is known."""
        before, now = self.made_from.get(self.manifest.samples[sample].key), self.features(sample)
        if before and now and before != now:
            raise InputError(self.path(sample), "was predicted from other features than the shards hold", fix=_ANEW)

    def features(self, sample: int) -> str:
        """What the shards hold of a run's features."""
        return features_digest(self.manifest.samples[sample], self.streams)

    @cached_property
    def made_from(self) -> dict[str, str]:
        """What is written of the features that the runs were predicted from; empty where nothing is."""
        path = self.folder / MADE_FROM
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(path, "cannot be read", found=error, fix=_ANEW) from error


_ANEW = "Train stage 2 anew (--stage 2 --overwrite)."

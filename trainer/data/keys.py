"""Names of samples: the key in the shards, and the stem of a file about a sample.

A key is `SERIES_RUN[_run-REPEAT]` with `_` for each character that tars, webdataset and file systems may stumble over.
Runs for which that would lose something that tells them apart have a key from which series, run and repeat can be read
back: `SERIES~RUN[~REPEAT]`, in which everything but letters, digits, `_` and `-` of ASCII is percent-encoded (UTF-8).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

MOST_CHARACTERS = 200
"""Of a file's stem: file systems take 255 bytes, and files that are written aside have longer names."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def sample_keys(runs: Sequence[tuple[str, str, int | None]]) -> list[str]:
    """A key for each (series, run, repeat), no two the same; `repeat` is None for a run that was shown once only.

    The keys of names in plain ASCII are the short ones, unless two of them have the same: then it belongs to the name
    that is spelt like it, if there is exactly one.
    """
    names = [f"{series}_{run}" + ("" if repeat is None else f"_run-{repeat}") for series, run, repeat in runs]
    short = [_UNSAFE.sub("_", name) if name.isascii() else None for name in names]
    count = Counter(short)
    spelt = Counter(name for name, key in zip(names, short, strict=True) if name == key)
    keys = []
    for name, key, run in zip(names, short, runs, strict=True):
        own = key is not None and (count[key] == 1 or (name == key and spelt[name] == 1))
        keys.append(key if own and key is not None else reversible_key(*run))
    return keys


def reversible_key(series: str, run: str, repeat: int | None) -> str:
    """The long form of a key."""
    return "~".join(_encoded(part) for part in (series, run, *([] if repeat is None else [str(repeat)])))


def is_of_series(key: str, series: str) -> bool:
    """Whether a key is one of a run of the series, or the series itself; `a_b` may be of the series a or a_b."""
    return key == series or key.startswith((f"{_UNSAFE.sub('_', series)}_", f"{_encoded(series)}~"))


def _encoded(text: str) -> str:
    return _UNSAFE.sub(lambda m: "".join(f"%{byte:02X}" for byte in m[0].encode("utf-8", "surrogateescape")), text)


def file_stems(keys: Sequence[str]) -> list[str]:
    """What the names of files about samples begin with: their keys, where these can be file names of their own.

    A key that is too long, or that differs from another one in case only, which some file systems do not tell apart,
    is cut and followed by its digest.
    """
    count = Counter(key.lower() for key in keys)
    return [key if len(key) <= MOST_CHARACTERS and count[key.lower()] == 1 else _digested(key) for key in keys]


def _digested(key: str) -> str:
    return f"{key[: MOST_CHARACTERS - 17]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}"

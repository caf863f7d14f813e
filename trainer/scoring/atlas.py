"""The network of each parcel, from the label file of an atlas."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.errors import InputError
from trainer.text import read_text

_SCHAEFER = re.compile(r"\d+Networks_[LR]H_([^_]+)(_.*)?")


def networks(path: str | Path, n_parcels: int) -> list[str]:
    """The network of each parcel, in the order of the parcels.

    A line stands for a parcel, as in Schaefer's files (`1 7Networks_LH_Vis_1 120 18 131 0`: its number, name and
    colour), or with nothing but a name. The network is what a name like 7Networks_LH_Vis_1 says it is, else the whole
    name. Empty lines are passed over.

    Raises:
        InputError: the file cannot be read, or has another number of lines than there are parcels.
    """
    lines = [line.split() for line in read_text(path, "Correct evaluate.labels.").split("\n") if line.strip()]
    if len(lines) != n_parcels:
        raise InputError(
            path, "does not fit the parcels", found=f"{len(lines)} lines", expected=f"{n_parcels}, one for each parcel"
        )
    return [_network(fields[1] if fields[0].isdigit() and len(fields) > 1 else " ".join(fields)) for fields in lines]


def _network(name: str) -> str:
    found = _SCHAEFER.fullmatch(name)
    return found[1] if found else name

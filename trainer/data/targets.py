"""How many TRs of each run a challenge wants: `target_sample_number`, pickled dicts that are read without running them.

A pickle can name any function and call it. The dicts of run -> number of TRs that come with Algonauts 2025 need six
names of numpy and nothing else, so nothing else is looked up: a file that asks for more is refused before it can act.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.data.layout import Layout, find_files
from trainer.errors import InputError

_reconstruct = np.ndarray.__reduce__(np.zeros(1))[0]
_scalar = np.float64(0).__reduce__()[0]
_HARMLESS: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy's name for it before 2.0, and since
    _HARMLESS |= {(_module, "_reconstruct"): _reconstruct, (_module, "scalar"): _scalar}


class Forbidden(Exception):
    """A pickle has asked for something that it does not need."""


class NotPickled(Exception):
    """An .npy of plain numbers."""


class _Restricted(pickle.Unpickler):
    """Builds dicts, lists, texts, numbers and numpy's arrays and scalars."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise Forbidden(f"{module}.{name}") from None


def unpickled_npy(file: BinaryIO) -> Any:
    """The content of an .npy of pickled objects.

    Raises:
        NotPickled, Forbidden: it holds plain numbers, or more than the harmless kinds; whatever numpy and pickle raise
            where the bytes are damaged.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read(file)
    if not dtype.hasobject:
        raise NotPickled(dtype)
    content = _Restricted(file).load()
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content


def read_pickled_npy(path: Path) -> Any:
    """What an .npy of pickled objects holds, where that is dicts, lists, texts, numbers and arrays of them.

    Raises:
        InputError: no such file, no .npy of objects, or one that asks for anything else (nothing of it has run).
    """
    expected = "an .npy with a pickled dict run -> TRs, as np.save writes it"
    try:
        with path.open("rb") as file:
            return unpickled_npy(file)
    except NotPickled as error:
        raise InputError(path, "holds no pickled objects", found=error, expected=expected) from error
    except Forbidden as error:
        raise InputError(
            path, "asks for more than numbers, which could run code, and is not opened", found=error
        ) from error
    except OSError as error:
        raise InputError(path, "cannot be read", found=error.strerror) from error
    except Exception as error:  # damaged bytes make numpy and pickle raise whatever they come upon
        raise InputError(path, "cannot be read", found=repr(error), expected=expected) from error


def read_sample_numbers(path: Path) -> dict[str, int]:
    """Run -> number of TRs.

    Raises:
        InputError: as `read_pickled_npy`, or another content than run names and positive whole numbers.
    """
    content = read_pickled_npy(path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(path, "the content", found=type(content).__name__, expected="a dict run -> TRs")
    for run, n_trs in content.items():
        if not isinstance(run, str) or isinstance(n_trs, bool) or not isinstance(n_trs, int | np.integer) or n_trs < 1:
            raise InputError(path, f"{run!r}", found=repr(n_trs), expected="a run name and a positive whole number")
    return {run: int(n_trs) for run, n_trs in content.items()}


def find_targets(layout: Layout, root: Path, series: str, notes: list[str]) -> dict[str, dict[str, int]]:
    """Run -> subject label -> TRs to predict; empty where the layout names no files of that, or none are there.

    Raises:
        InputError: two files of one subject, or as `read_sample_numbers`.
    """
    pattern = layout.series[series].target_sample_number
    targets: dict[str, dict[str, int]] = {}
    for label, folder in layout.subjects.items() if pattern else ():
        files = [path for path, _ in find_files(root, str(pattern), {"subject": folder})]
        if len(files) > 1:
            raise InputError(files[1], f"a second file of subject {label}", found=files[0], expected="one")
        if not files:
            notes.append(f"{series}: no target_sample_number of subject {label}")
        for path in files:
            for run, n_trs in read_sample_numbers(path).items():
                targets.setdefault(run, {})[label] = n_trs
    return targets

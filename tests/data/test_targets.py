"""Pickled dicts are read without running what they name."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.targets import Forbidden, read_sample_numbers, unpickled_npy
from trainer.errors import InputError

HEADER = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"


def saved(path: Path, content: object) -> Path:
    np.save(path, content)  # type: ignore[arg-type]
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_sample_numbers(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_numbers_are_read_as_the_challenge_stores_them(tmp_path: Path) -> None:
    content = {"s07e01a": 460, "s07e01b": np.int64(459), "chaplin1": np.int32(432)}
    found = read_sample_numbers(saved(tmp_path / "a.npy", content))
    assert found == {"s07e01a": 460, "s07e01b": 459, "chaplin1": 432}
    assert all(type(n_trs) is int for n_trs in found.values())


def test_files_of_an_older_numpy_are_read(tmp_path: Path) -> None:
    array = np.array({"a": np.int64(3)}, dtype=object)
    content = pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert b"numpy.core.multiarray" in content
    (tmp_path / "old.npy").write_bytes(HEADER + content)
    assert read_sample_numbers(tmp_path / "old.npy") == {"a": 3}


contents = st.recursive(
    st.none() | st.integers() | st.text() | st.floats(allow_nan=False) | st.integers(0, 9).map(np.int64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), contents), st.integers(2, 5))
def test_whatever_is_harmless_comes_back(content: dict[str, Any], size: int) -> None:
    buffer = io.BytesIO()
    np.save(buffer, {**content, "array": np.arange(size, dtype=np.float32)})  # type: ignore[arg-type]
    buffer.seek(0)
    found = unpickled_npy(buffer)
    np.testing.assert_array_equal(found.pop("array"), np.arange(size))
    content.pop("array", None)
    assert found == content


class Runs:
    """Runs code where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


@pytest.mark.parametrize("name", ["system", "eval", "numpy", "getattr"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    target = tmp_path / "it ran"
    attacks = {
        "system": Runs(os.system, f"touch '{target}'"),
        "eval": Runs(eval, f"open({str(target)!r}, 'w')"),
        "numpy": Runs(np.save, str(target), 3),
        "getattr": Runs(getattr, "text", "upper"),
    }
    for content in (attacks[name], {"s07e01a": attacks[name]}):
        message = refusal(saved(tmp_path / "a.npy", content))
        assert "could run code, and is not opened: found" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npy"]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_of_numpy_nothing_is_reached_but_what_is_needed(module: str) -> None:
    for name in ("fromfile", "frombuffer", "ndarray.tofile", "_reconstruct.__globals__"):
        content = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
        content += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
        with pytest.raises(Forbidden, match=name):
            unpickled_npy(io.BytesIO(HEADER + content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.array(["s07e01a"], object), "found ndarray, expected a dict"),
        ({}, "found dict, expected a dict"),
        ({"s07e01a": 0}, "'s07e01a': found 0"),
        ({"s07e01a": 4.5}, "'s07e01a': found 4.5"),
        ({"s07e01a": True}, "'s07e01a': found True"),
        ({7: 460}, "7: found 460, expected a run name"),
        (np.arange(3), "holds no pickled objects: found int64"),
    ],
)
def test_another_content_is_named(tmp_path: Path, content: Any, words: str) -> None:
    assert words in refusal(saved(tmp_path / "a.npy", content))


@pytest.mark.parametrize("content", [b"", b"text", HEADER, HEADER + b"\x80\x04K\x05", HEADER + b"\xff"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    assert "cannot be read" in refusal(tmp_path / "a.npy")
    assert "cannot be read" in refusal(tmp_path / "nowhere.npy")

"""Whatever HDF5 can hold reads as it was written, or is refused in one line that names file and data set."""

from __future__ import annotations

import fcntl
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from trainer.data import hdf5
from trainer.errors import InputError

VALUES = np.arange(60, dtype=np.float32).reshape(20, 3) + 1


def described_and_read(path: Path, name: str = "x") -> np.ndarray:
    return hdf5.read(hdf5.describe(path, name, (2, 3), "(TRs, D)"), 20)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", "<f2", ">i2", "u1", "i8", "g"])
def test_numbers_of_every_type_and_byte_order_are_read(tmp_path: Path, dtype: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = VALUES.astype(dtype)
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5"), VALUES)


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (7, 2)},
        {"chunks": (20, 3), "maxshape": (None, 3)},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf"},
        {"track_times": True},
    ],
)
def test_every_way_to_store_is_read(tmp_path: Path, options: dict[str, object]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=VALUES, **options)
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5"), VALUES)


def test_links_are_followed_and_each_name_is_listed_once(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["deep/x"] = VALUES
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["here"] = VALUES
        file["hard"] = file["here"]
        file["soft"] = h5py.SoftLink("/here")
        file["outside"] = h5py.ExternalLink("other.h5", "deep/x")
        file["folder"] = h5py.ExternalLink("other.h5", "deep")
        file["circle/up"] = h5py.SoftLink("/")
        file["type"] = np.dtype("f4")
        file["gone"] = h5py.SoftLink("/nowhere")
    names = ["folder/x", "gone", "hard", "here", "outside", "soft"]
    assert hdf5.dataset_names(tmp_path / "a.h5") == names
    for name in set(names) - {"gone"}:
        np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5", name), VALUES)
    assert hdf5.is_same(tmp_path / "a.h5", "here", "soft") and not hdf5.is_same(tmp_path / "a.h5", "here", "outside")


def test_whole_virtual_data_sets_are_read(tmp_path: Path) -> None:
    _sources(tmp_path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plain = h5py.VirtualLayout((20, 3), "f4")
        plain[:10], plain[10:] = h5py.VirtualSource("one.h5", "x", (10, 3)), h5py.VirtualSource("two.h5", "x", (10, 3))
        file.create_virtual_dataset("x", plain)
        nested = h5py.VirtualLayout((20, 3), "f4")
        nested[::2] = h5py.VirtualSource(".", "x", (20, 3))[::2]
        nested[1::2] = h5py.VirtualSource(".", "x", (20, 3))[1::2]
        file.create_virtual_dataset("nested", nested)
        growing = h5py.VirtualLayout((10, 3), "f4", maxshape=(None, 3))
        source = h5py.VirtualSource("one.h5", "x", (10, 3), maxshape=(None, 3))
        growing[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
        file.create_virtual_dataset("growing", growing)
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5"), VALUES)
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5", "nested"), VALUES)
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5", "growing"), VALUES[:10])


def _sources(folder: Path) -> None:
    for name, part in (("one", VALUES[:10]), ("two", VALUES[10:])):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("x", data=part, maxshape=(None, 3))


def _virtual(
    file: h5py.File, second: h5py.VirtualSource | None, rows: slice = slice(10, None), name: str = "x"
) -> None:
    _sources(Path(file.filename).parent)
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:10] = h5py.VirtualSource("one.h5", "x", (10, 3))
    if second is not None:
        layout[rows] = second
    file.create_virtual_dataset(name, layout)


def _virtual_file_gone(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("gone.h5", "x", (10, 3)))
    return ["a source of this virtual data set is not there", "no file gone.h5"]


def _virtual_data_set_gone(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("two.h5", "y", (10, 3)))
    return ["a source of this virtual data set is not there", "two.h5: y"]


def _virtual_source_too_small(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("two.h5", "x", (12, 3))[2:12])
    return ["two.h5: x", "too small", "found (10, 3)"]


def _virtual_whole_source_too_small(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("small.h5", "x", (10, 3)))
    with h5py.File(Path(file.filename).with_name("small.h5"), "w") as small:
        small["x"] = VALUES[:4]
    return ["small.h5: x", "too small", "found (4, 3)"]


def _virtual_part_without_source(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("two.h5", "x", (10, 3))[:8], slice(10, 18))
    return ["a part has no source", "found 6 of 60 numbers"]


def _virtual_source_unwritten(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("empty.h5", "x", (10, 3)))
    with h5py.File(Path(file.filename).with_name("empty.h5"), "w") as empty:
        empty.create_dataset("x", (10, 3), "f4")
    return ["empty.h5: x: was never written"]


def _virtual_of_virtual_gone(file: h5py.File) -> list[str]:
    _virtual(file, h5py.VirtualSource("gone.h5", "x", (10, 3)), name="inner")
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:] = h5py.VirtualSource(".", "inner", (20, 3))
    file.create_virtual_dataset("x", layout)
    return ["inner: a source of this virtual data set is not there"]


def _virtual_circle(file: h5py.File) -> list[str]:
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:] = h5py.VirtualSource(".", "x", (20, 3))
    file.create_virtual_dataset("x", layout)
    return ["made of each other"]


def _virtual_numbered(file: h5py.File) -> list[str]:
    for i, part in enumerate((VALUES[:10], VALUES[10:])):
        with h5py.File(Path(file.filename).with_name(f"part-{i}.h5"), "w") as source:
            source["x"] = part
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    target = h5py.h5s.create_simple((20, 3), (h5py.h5s.UNLIMITED, 3))
    target.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (10, 3), (10, 3))
    created.set_virtual(target, b"part-%b.h5", b"x", h5py.h5s.create_simple((10, 3)))
    space = h5py.h5s.create_simple((20, 3), (h5py.h5s.UNLIMITED, 3))
    h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, created)
    return ["numbered sources", "part-%b.h5"]


def _virtual_integers_of_floats(file: h5py.File) -> list[str]:
    _sources(Path(file.filename).parent)
    layout = h5py.VirtualLayout((10, 3), "i2")
    layout[:] = h5py.VirtualSource("one.h5", "x", (10, 3))
    file.create_virtual_dataset("x", layout)
    return ["cuts the numbers of one.h5: x", "found int16, expected float32"]


def _soft_link_gone(file: h5py.File) -> list[str]:
    file["x"] = h5py.SoftLink("/moved/x")
    return ["a link to /moved/x that leads nowhere"]


def _external_link_gone(file: h5py.File) -> list[str]:
    file["x"] = h5py.ExternalLink("elsewhere.h5", "/x")
    return ["a link to /x in elsewhere.h5 that leads nowhere"]


def _raw_file_gone(file: h5py.File) -> list[str]:
    raw = Path(file.filename).with_name("raw.bin")
    file.create_dataset("x", data=VALUES, external=[(str(raw), 0, VALUES.nbytes)])
    file.flush()
    raw.unlink()
    return ["raw.bin", "found no such file"]


def _raw_file_short(file: h5py.File) -> list[str]:
    raw = Path(file.filename).with_name("raw.bin")
    file.create_dataset("x", (20, 3), "f4", external=[(str(raw), 8, h5py.h5f.UNLIMITED)])
    raw.write_bytes(VALUES.tobytes()[:100])
    return ["raw.bin", "found 100 bytes, expected 248 bytes"]


def _never_written(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), "f4", fillvalue=3)
    return ["was never written", "the fill value 3.0"]


def _half_written(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), "f4", chunks=(5, 3))[:10] = 1
    return ["some chunks of the data set were never written", "found 2 of 4"]


def _extended_and_not_written(file: h5py.File) -> list[str]:
    file.create_dataset("x", data=VALUES[:10], maxshape=(None, 3), chunks=(5, 3)).resize(20, axis=0)
    return ["found 2 of 4"]


def _null(file: h5py.File) -> list[str]:
    file["x"] = h5py.Empty("f4")
    return ["x: shape: found an empty data set (null)"]


def _scalar(file: h5py.File) -> list[str]:
    file["x"] = np.float32(3)
    return ["x: shape: found ()"]


def _flat(file: h5py.File) -> list[str]:
    file["x"] = VALUES[:, 0]
    return ["x: shape: found (20,)", "(TRs, D)"]


def _no_rows(file: h5py.File) -> list[str]:
    file["x"] = VALUES[:0]
    return ["x: shape: found (0, 3)"]


def _compound(file: h5py.File) -> list[str]:
    file["x"] = np.zeros((20, 3), [("a", "f4"), ("b", "i4")])
    return ["x: type", "expected numbers"]


def _complex(file: h5py.File) -> list[str]:
    file["x"] = VALUES.astype(np.complex64)
    return ["x: type: found complex64"]


def _boolean(file: h5py.File) -> list[str]:
    file["x"] = VALUES > 3
    return ["x: type: found bool"]


def _text(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), h5py.string_dtype())[:] = "1.0"
    return ["x: type: found object"]


def _enumeration(file: h5py.File) -> list[str]:
    file.create_dataset("x", data=np.zeros((20, 3), "i1"), dtype=h5py.enum_dtype({"REST": 0, "FILM": 1}, "i1"))
    return ["x: type: found an enumeration"]


def _references(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), h5py.ref_dtype)
    return ["x: type: found object"]


def _region_references(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), h5py.regionref_dtype)
    return ["x: type: found object"]


def _lists(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), h5py.vlen_dtype("f4"))
    return ["x: type: found object"]


def _opaque(file: h5py.File) -> list[str]:
    file.create_dataset("x", data=np.zeros((20, 3), "V4"))
    return ["x: type"]


def _arrays_of_arrays(file: h5py.File) -> list[str]:
    file.create_dataset("x", (20, 3), np.dtype(("f4", (2,))))[:] = np.ones((20, 3, 2), "f4")
    return ["x: type"]


def _a_group(file: h5py.File) -> list[str]:
    file.create_group("x")
    return ["x: found a group, expected a data set"]


def _unknown_filter(file: h5py.File) -> list[str]:
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((20, 3))
    created.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (4,))
    space = h5py.h5s.create_simple((20, 3))
    data = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, created)
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, VALUES)
    return ["compressed by a filter that is not installed", "HDF5 filter 32004"]


def _packed(file: h5py.File) -> list[str]:
    file["x"] = VALUES.astype("i2")
    file["x"].attrs["scale_factor"] = np.array([0.01])
    return ["packed numbers", "scale_factor: found 0.01"]


def _marked_as_missing(file: h5py.File) -> list[str]:
    file["x"] = VALUES
    file["x"].attrs["_FillValue"] = np.float64(7)
    return ["missing values: found 1 values of 7"]


ODD = [
    _virtual_file_gone, _virtual_data_set_gone, _virtual_source_too_small, _virtual_whole_source_too_small,
    _virtual_part_without_source, _virtual_source_unwritten, _virtual_of_virtual_gone, _virtual_circle,
    _virtual_numbered, _virtual_integers_of_floats, _soft_link_gone, _external_link_gone, _raw_file_gone,
    _raw_file_short, _never_written, _half_written, _extended_and_not_written, _null, _scalar, _flat, _no_rows,
    _compound, _complex, _boolean, _text, _enumeration, _references, _region_references, _lists, _opaque,
    _arrays_of_arrays, _a_group, _unknown_filter, _packed, _marked_as_missing,
]  # fmt: skip


@pytest.mark.parametrize("make", ODD, ids=lambda f: f.__name__.lstrip("_"))
def test_what_would_read_as_other_numbers_is_refused_by_name(
    make: Callable[[h5py.File], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        words = make(file)
    if make is _unknown_filter:
        content = path.read_bytes()
        head = b"\x01\x00\x08\x00\x01\x00\x01\x00deflate\x00"
        assert content.count(head) == 1
        path.write_bytes(content.replace(head, (32004).to_bytes(2, "little") + head[2:]))
    with pytest.raises(InputError) as caught:
        described_and_read(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), "x", *words]:
        assert word in message, message


def test_attributes_that_change_nothing_change_nothing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = VALUES
        marks = {"_FillValue": np.nan, "missing_value": "NaN", "scale_factor": 1.0, "add_offset": np.zeros(1)}
        file["x"].attrs.update(marks, unit="z")
    np.testing.assert_array_equal(described_and_read(tmp_path / "a.h5"), VALUES)


def test_damage_in_the_numbers_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        place = file.create_dataset("x", data=VALUES, chunks=(20, 3), fletcher32=True).id
        file.flush()
        offset = place.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 9] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.h5: x: cannot be read"):
        described_and_read(path)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones((500, 3))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=r"a\.h5: not a whole HDF5 file: found \d+ bytes"):
        hdf5.dataset_names(path)


def test_a_file_that_is_open_for_writing_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = VALUES
    with path.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"a\.h5: is open for writing in another program"):
            hdf5.dataset_names(path)
        fcntl.flock(writer, fcntl.LOCK_SH)
        assert hdf5.dataset_names(path) == ["x"]


def _write_and_die(path: Path) -> None:
    import os

    file = h5py.File(path, "w", libver="latest")
    file["x"] = VALUES
    file.swmr_mode = True
    os._exit(0)


def test_a_file_whose_writer_has_died_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(path,))
    writer.start()
    writer.join()
    with pytest.raises(InputError, match=r"a\.h5: is marked as open for writing.*h5clear"):
        hdf5.dataset_names(path)

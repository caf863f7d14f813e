"""Plain webdataset reads the shards, and the windowed reader gives exactly the slices of what went in."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import Invented
from tools.make_shards import main
from trainer.data.manifest import Sample
from trainer.data.shards import SampleContent, Shards, extension, write_shard
from trainer.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs/datasets"


def _samples(folder: Path) -> dict[str, dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False).decode()}


def test_plain_webdataset_reads_the_source_back(invented_folder: Path, invented_source: Invented) -> None:
    samples = _samples(invented_folder)
    assert list(samples) == ["cinema_alpha_1", "cinema_alpha_2", "cinema_beta_1_run-1", "cinema_beta_1_run-2"]
    for sample in samples.values():
        meta = sample["meta.json"]
        run, repeat, n_trs = meta["run"], meta["repeat"], meta["n_trs"]
        expected = [invented_source.bold[run, repeat, label][:n_trs] for label in meta["subjects"]]
        np.testing.assert_array_equal(sample["bold.npy"], np.stack(expected))
        assert sample["bold.npy"].dtype == np.float32
        text = sample["text_v2__emb.npy"]
        source = invented_source.features[run, "Text"][:n_trs].astype(np.float16)
        assert text.dtype == np.float16 and len(text) == n_trs
        np.testing.assert_array_equal(text[: len(source)], source)
        assert set(sample) > set(meta["streams"])


def test_extensions_are_what_webdataset_keeps() -> None:
    assert extension("llama_3.2_3b/layers.11") == "llama_3_2_3b__layers_11.npy"
    assert extension("My-Model/a/B.c") == "my-model__a__b_c.npy"


def test_long_stream_names_fit(tmp_path: Path) -> None:
    name = "internvl3_14b/" + "language_model.model." * 8 + "norm"
    places = write_shard(tmp_path / "x.tar", [SampleContent("k" * 60, {}, {name: np.arange(3.0)})])
    assert places["k" * 60][name].shape == (3,)
    (sample,) = _samples(tmp_path).values()
    np.testing.assert_array_equal(sample[extension(name)], np.arange(3.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_window_is_a_slice_of_the_sample(
    invented_shards: Shards, invented_folder: Path, data: st.DataObject
) -> None:
    i = data.draw(st.integers(0, len(invented_shards.manifest.samples) - 1))
    sample = invented_shards.manifest.samples[i]
    start = data.draw(st.integers(0, sample.n_trs))
    stop = data.draw(st.integers(start, sample.n_trs))
    plain = _plain(invented_folder)[sample.key]
    for stream in invented_shards.manifest.streams:
        window = invented_shards.read(i, stream.name, start, stop)
        assert window.dtype == stream.dtype
        np.testing.assert_array_equal(window, plain[extension(stream.name)][start:stop])
    bold = plain["bold.npy"][:, start:stop]
    np.testing.assert_array_equal(invented_shards.read(i, "bold", start, stop), bold)
    for row in range(len(sample.subjects)):
        np.testing.assert_array_equal(invented_shards.read(i, "bold", start, stop, row=row), bold[row])


_CACHE: dict[Path, dict[str, dict]] = {}


def _plain(folder: Path) -> dict[str, dict]:
    if folder not in _CACHE:
        _CACHE[folder] = _samples(folder)
    return _CACHE[folder]


def test_read_fills_the_given_buffer(invented_shards: Shards) -> None:
    batch = np.full((2, 8, 2, 3), 9, np.float16)
    invented_shards.read(0, "video/deep", 5, 10, batch[1, :5])
    np.testing.assert_array_equal(batch[1, :5], invented_shards.read(0, "video/deep", 0, 30)[5:10])
    assert (batch[0] == 9).all() and (batch[1, 5:] == 9).all()


@pytest.mark.parametrize(
    "out", [np.empty((5, 3), np.float16), np.empty((5, 4), np.float32), np.empty((4, 5), np.float16).T]
)
def test_unfit_buffer_is_refused(invented_shards: Shards, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected contiguous float16"):
        invented_shards.read(0, "text.v2/emb", 0, 5, out)


@pytest.mark.parametrize(("name", "row"), [("bold", 2), ("bold", -1), ("audio/mono", 0)])
def test_row_of_no_present_subject_is_refused(invented_shards: Shards, name: str, row: int) -> None:
    with pytest.raises(ValueError, match="has no row"):
        invented_shards.read(1, name, 0, 5, row=row)


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (3, 2), (0, 31)])
def test_window_outside_its_run_is_refused(invented_shards: Shards, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="outside its 30 TRs"):
        invented_shards.read(0, "bold", start, stop)


def test_reader_is_pickled_without_open_files(invented_folder: Path) -> None:
    shards = Shards(invented_folder)
    before = shards.read(0, "bold", 3, 9)
    copy = pickle.loads(pickle.dumps(shards))
    shards.close()
    np.testing.assert_array_equal(copy.read(0, "bold", 3, 9), before)
    np.testing.assert_array_equal(shards.read(0, "bold", 3, 9), before)


def test_closing_gives_the_file_descriptors_back(invented_folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Shards(invented_folder) as shards:
        shards.read(0, "bold", 0, 1)
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_window_is_one_read_of_its_own_bytes(invented_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(invented_folder)
    reads: list[tuple[int, int]] = []
    original = Shards._fill

    def counted(self: Shards, place: object, offset: int, target: np.ndarray) -> None:
        reads.append((offset, target.nbytes))
        original(self, place, offset, target)  # type: ignore[arg-type]

    monkeypatch.setattr(Shards, "_fill", counted)
    shards.read(0, "audio/mono", 4, 9)
    place = shards.manifest.samples[0].arrays["audio/mono"]
    assert reads == [(place.offset + 4 * 5 * 4, 5 * 5 * 4)]


def test_truncated_or_missing_tar_is_noticed_when_opened(invented_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(invented_folder, folder)
    tar = next(folder.glob("*.tar"))
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    with pytest.raises(InputError, match=f"{tar.name}: size: found {size - 512} bytes, expected {size} bytes"):
        Shards(folder)
    tar.unlink()
    with pytest.raises(InputError, match=f"{tar.name}: missing"):
        Shards(folder)


def test_tar_cut_short_or_removed_while_open_is_an_error(invented_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(invented_folder, folder)
    shards, late = Shards(folder), Shards(folder)
    tar = next(folder.glob("*.tar"))
    shards.read(0, "bold", 0, 3)
    os.truncate(tar, 1024)
    with pytest.raises(InputError, match="ends inside cinema_beta_1_run-2: found 1024 bytes"):
        shards.read(3, "bold", 0, 20)
    tar.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        late.read(0, "bold", 0, 3)


def test_a_tar_that_is_replaced_by_another_build_is_never_read_at_the_addresses_of_the_old(
    invented: Invented, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    assert main(invented.arguments(out)) == 0
    shards = Shards(out)
    assert not shards.are_replaced()
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    assert not shards.are_replaced()
    with h5py.File(invented.bold_file("a"), "a") as file:
        for day in file.values():
            for values in day.values():
                values[...] = values[...] + 1
    assert main(invented.arguments(out, "--overwrite")) == 0
    assert shards.are_replaced()
    with pytest.raises(InputError, match="was replaced while it was in use"):
        shards.read(0, "bold", 0, 3)


def test_song8_is_stored_as_it_was(shared: Path, tmp_path: Path) -> None:
    root = shared / "data/song8"
    layout = str(CONFIGS / "song8.yaml")
    assert main(["--layout", layout, "--root", str(root), "--out", str(tmp_path / "s")]) == 0
    shards = Shards(tmp_path / "s")
    assert [(s.run, s.n_trs, len(s.subjects)) for s in shards.manifest.samples] == [
        ("sitcomep1", 1486, 8), ("sitcomep2", 1465, 8),
    ]  # fmt: skip
    with h5py.File(root / "features/pc100/sitcom/sitcomep2.h5") as file:
        np.testing.assert_array_equal(shards.read(1, "pc100/pc", 100, 300), file["pc"][100:300])
    sample: Sample = shards.manifest.samples[1]
    for row, label in enumerate(sample.subjects):
        name = f"sub-00{label}_task-sitcom_atlas-Schaefer18_parcel-200Par7Net_bold.h5"
        with h5py.File(root / f"fmri/sub-00{label}/func" / name) as file:
            source = file["ses-002_task-sitcomep2"][1000:1400].astype(np.float32)
        np.testing.assert_array_equal(shards.read(1, "bold", 1000, 1400, row=row), source)

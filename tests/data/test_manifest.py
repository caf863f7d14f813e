"""The manifest tells the truth about the shards, and notices when it, or what it describes, was changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.manifest import BOLD, MANIFEST, STATISTICS, Manifest, Moments, content_hashes
from trainer.data.shards import Shards
from trainer.errors import InputError


def test_statistics_of_each_run_equal_numpy_in_float64(invented_shards: Shards) -> None:
    manifest = invented_shards.manifest
    for stream in manifest.streams:
        moments = manifest.moments(stream.name)
        for i, sample in enumerate(manifest.samples):
            rows = invented_shards.read(i, stream.name, 0, sample.n_trs).astype(np.float64).reshape(-1, stream.width)
            assert moments.count[i] == sample.n_trs * stream.layers == len(rows)
            np.testing.assert_allclose(moments.mean[i], rows.mean(0), rtol=1e-13)
            np.testing.assert_allclose(moments.m2[i], rows.var(0) * len(rows), rtol=1e-12)


def test_bold_statistics_leave_absent_subjects_at_zero(invented_shards: Shards) -> None:
    manifest = invented_shards.manifest
    moments = manifest.moments("bold")
    assert moments.count.tolist() == [[30, 30, 30], [24, 24, 0], [20, 20, 20], [20, 20, 20]]
    assert not moments.mean[1, 2].any() and not moments.m2[1, 2].any()
    bold = invented_shards.read(1, "bold", 0, 24).astype(np.float64)
    np.testing.assert_allclose(moments.mean[1, :2], bold.mean(1), rtol=1e-13)
    np.testing.assert_allclose(moments.std()[1, :2], bold.std(1), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 1000),
)
def test_combined_moments_equal_those_of_the_union(lengths: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 1 + i, (n, 3)) for i, n in enumerate(lengths)]
    empty = Moments(np.asarray(0), np.full(3, 77.0), np.full(3, 5.0))
    total = Moments.stack([Moments.of(p) if len(p) else empty for p in parts]).combine()
    union = np.concatenate(parts)
    assert total.count == len(union)
    np.testing.assert_allclose(total.mean, union.mean(0), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(total.std(), union.std(0), rtol=1e-7, atol=1e-9)


def test_loading_gives_what_was_saved(invented_folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(invented_folder)
    shutil.copytree(invented_folder, tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).unlink()
    manifest.save(tmp_path / "copy")
    assert Manifest.load(tmp_path / "copy") == manifest
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (invented_folder / MANIFEST).read_bytes()


def _edit(folder: Path) -> str:
    content = json.loads((folder / MANIFEST).read_text())
    content["samples"][0]["arrays"]["bold"]["offset"] += 4
    (folder / MANIFEST).write_text(json.dumps(content))
    return "edited since it was written"


def _truncate(folder: Path) -> str:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])
    return "not valid JSON"


def _remove(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "cannot be read"


def _other_format(folder: Path) -> str:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    return "format: found 99, expected 1"


def _list(folder: Path) -> str:
    (folder / MANIFEST).write_text("[]")
    return "found list"


def _other_statistics(folder: Path) -> str:
    content = bytearray((folder / STATISTICS).read_bytes())
    content[-1] ^= 1
    (folder / STATISTICS).write_bytes(content)
    return "SHA-256"


def _no_statistics(folder: Path) -> str:
    (folder / STATISTICS).unlink()
    return "missing"


SPOILT = [_edit, _truncate, _remove, _other_format, _list, _other_statistics, _no_statistics]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__.lstrip("_"))
def test_spoilt_manifest_is_noticed_at_load(
    spoil: Callable[[Path], str], invented_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(invented_folder, folder)
    words = spoil(folder)
    with pytest.raises(InputError) as error:
        Manifest.load(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


def test_unknown_stream_lists_those_that_exist(invented_shards: Shards) -> None:
    with pytest.raises(InputError, match=r"no stream whisper/norm: found text\.v2/emb, video/deep, audio/mono"):
        invented_shards.manifest.stream("whisper/norm")


def test_hashes_are_of_the_stored_bytes_of_each_stream_and_each_subjects_bold(invented_shards: Shards) -> None:
    manifest = invented_shards.manifest
    for i, sample in enumerate(manifest.samples):
        for name, place in sample.arrays.items():
            stored = invented_shards.read(i, name, 0, sample.n_trs)
            parts = list(stored) if name == BOLD else [stored]
            assert place.hashes == tuple(hashlib.sha256(part.tobytes()).hexdigest()[:32] for part in parts)
            assert place.hashes == content_hashes(name, stored)
    twice = [sample for sample in manifest.samples if sample.run == "beta_1"]
    assert twice[0].arrays["audio/mono"].hashes == twice[1].arrays["audio/mono"].hashes
    assert not set(twice[0].arrays[BOLD].hashes) & set(twice[1].arrays[BOLD].hashes)


def test_shards_from_before_there_were_hashes_load_and_are_known_as_the_same(
    invented_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(invented_folder, tmp_path / "old")
    manifest = Manifest.load(invented_folder)
    content = json.loads((invented_folder / MANIFEST).read_text())
    for sample in content["samples"]:
        for place in sample["arrays"].values():
            del place["hashes"]
    del content["sha256"], content["format"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"format": 1, "sha256": digest, **content}, indent=1) + "\n"
    (tmp_path / "old" / MANIFEST).write_text(text)
    old = Manifest.load(tmp_path / "old")
    assert not any(place.hashes for sample in old.samples for place in sample.arrays.values())
    assert old.digest == hashlib.sha256(text.encode()).hexdigest()
    assert old.digests == {old.digest} and manifest.digests == {manifest.digest, old.digest}
    assert manifest.with_subjects(["b"]).digests == manifest.digests
    old.save(tmp_path / "old")
    assert (tmp_path / "old" / MANIFEST).read_text() == text


@pytest.mark.parametrize("axis", [["a", "b", "3"], ["3", "a"], ["b"], ["x", "3", "y", "b"]])
def test_statistics_of_bold_follow_the_subject_axis(invented_shards: Shards, axis: list[str]) -> None:
    manifest = invented_shards.manifest
    stored, found = manifest.moments(BOLD), manifest.with_subjects(axis).moments(BOLD)
    for column, label in enumerate(axis):
        for field in ("count", "mean", "m2"):
            ours = getattr(found, field)[:, column]
            if label in manifest.subjects:
                np.testing.assert_array_equal(ours, getattr(stored, field)[:, manifest.subjects.index(label)])
            else:
                assert not ours.any()
    assert (
        manifest.with_subjects(axis).with_subjects(manifest.subjects).moments(BOLD).mean.tolist()
        == stored.mean.tolist()
    )

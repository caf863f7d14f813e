"""HDF5 -> shards: what is aligned how, and every mistake in the data ends in one line and leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data.conftest import FOLDERS, LAYOUT, LENGTHS, PARCELS, Invented, write_invented
from tools.check_shards import main as check
from tools.make_shards import main
from trainer.data import build as building
from trainer.data.arrays import fit_length
from trainer.data.build import deal
from trainer.data.casts import Stored
from trainer.data.layout import load_layout
from trainer.data.shards import Shards
from trainer.data.survey import request_streams, survey
from trainer.data.unfinished import new_folder
from trainer.errors import InputError


def test_one_sample_a_run_and_repeat_with_what_its_name_says(invented_shards: Shards) -> None:
    samples = {s.key: s for s in invented_shards.manifest.samples}
    keys = ["cinema_alpha_1", "cinema_alpha_2", "cinema_beta_1_run-1", "cinema_beta_1_run-2"]
    assert list(samples) == keys
    second = samples["cinema_beta_1_run-2"]
    assert (second.series, second.run, second.repeat, second.film, second.part) == ("cinema", "beta_1", 2, "beta", "1")
    assert samples["cinema_alpha_1"].repeat == 1
    assert samples["cinema_alpha_2"].subjects == ("a", "b")
    assert invented_shards.manifest.subjects == ("a", "b", "3")
    assert (invented_shards.manifest.parcels, invented_shards.manifest.tr) == (PARCELS, 2.0)


def test_labels_reach_the_shards_as_they_are_written(tmp_path: Path) -> None:
    made = write_invented(tmp_path / "source")
    written = LAYOUT.replace("{a: person_A, b: person_B, 3: person_C}", "{010: person_A, NO: person_B, 12e4: person_C}")
    made.layout.write_text(written)
    assert main(made.arguments(tmp_path / "shards")) == 0
    shards = Shards(tmp_path / "shards")
    assert shards.manifest.subjects == ("010", "NO", "12e4")
    i, sample = next((i, s) for i, s in enumerate(shards.manifest.samples) if s.run == "alpha_1")
    expected = np.stack([made.bold["alpha_1", 1, label][: sample.n_trs] for label in FOLDERS])
    np.testing.assert_array_equal(shards.read(i, "bold", 0, sample.n_trs), expected)


def test_bold_is_cut_to_the_shortest_subject(invented_shards: Shards, invented_source: Invented) -> None:
    for i, sample in enumerate(invented_shards.manifest.samples):
        scans = [invented_source.bold[sample.run, sample.repeat, label] for label in sample.subjects]
        assert len({len(scan) for scan in scans}) == 2
        assert sample.n_trs == min(map(len, scans)) == LENGTHS[sample.run]
        stored = invented_shards.read(i, "bold", 0, sample.n_trs)
        np.testing.assert_array_equal(stored, np.stack([scan[: sample.n_trs] for scan in scans]))


def test_features_are_squeezed_kept_cut_and_repeated(invented_shards: Shards, invented_source: Invented) -> None:
    streams = {s.name: s for s in invented_shards.manifest.streams}
    assert [(s.layers, s.width, s.dtype) for s in streams.values()] == [
        (1, 4, "float16"), (2, 3, "float16"), (1, 5, "float32"),
    ]  # fmt: skip
    for i, sample in enumerate(invented_shards.manifest.samples):
        for name, model in (("text.v2/emb", "Text"), ("video/deep", "Video"), ("audio/mono", "Audio")):
            source = invented_source.features[sample.run, model]
            rows = source[np.minimum(np.arange(sample.n_trs), len(source) - 1)]
            expected = rows.reshape(sample.n_trs, *streams[name].row).astype(streams[name].dtype)
            np.testing.assert_array_equal(invented_shards.read(i, name, 0, sample.n_trs), expected)


def test_fit_length_repeats_the_last_row_only() -> None:
    values = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(fit_length(values, 5), [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    np.testing.assert_array_equal(fit_length(values, 2), [[0, 1], [2, 3]])


def test_pool_and_float32_options(invented: Invented, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    more = ["--features", "video/deep", "--pool", "video/deep", "--float32", "video/deep"]
    assert main(invented.arguments(out, *more)) == 0
    shards = Shards(out)
    (stream,) = shards.manifest.streams
    assert (stream.layers, stream.width, stream.dtype) == (1, 3, "float32")
    expected = invented.features["alpha_2", "Video"].mean(1)
    np.testing.assert_allclose(shards.read(1, "video/deep", 0, 24), expected, rtol=1e-6)


def test_equal_input_gives_equal_bytes(invented: Invented, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(invented.arguments(tmp_path / name)) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert len(first) == 3


def test_runs_are_dealt_in_order_to_tars_of_limited_size(invented_source: Invented) -> None:
    layout = load_layout(invented_source.layout)
    found = survey(layout, invented_source.root, request_streams(layout, []))
    size = 30 * (3 * PARCELS * 4 + 4 * 2 + 6 * 2 + 5 * 4)
    dealt = deal(found.runs, found.streams, size)
    assert [run.key for runs in dealt for run in runs] == [run.key for run in found.runs]
    assert [len(runs) for runs in dealt] == [1, 1, 1, 1]
    assert [len(runs) for runs in deal(found.runs, found.streams, 2 * size)] == [2, 2]
    assert len(deal(found.runs, found.streams, 1)) == 4


def test_several_tars_hold_the_same_as_one(invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.make_shards.build", lambda *a, **k: building.build(*a, **{**k, "shard_bytes": 4000}))
    assert main(invented.arguments(tmp_path / "many")) == 0
    shards = Shards(tmp_path / "many")
    assert len(shards.manifest.shards) == 4
    assert [s.shard for s in shards.manifest.samples] == [0, 1, 2, 3]
    np.testing.assert_array_equal(shards.read(3, "bold", 0, 20)[2], invented.bold["beta_1", 2, "3"][:20])
    monkeypatch.undo()
    assert main(invented.arguments(tmp_path / "one")) == 0
    for many, one in zip(shards.manifest.samples, Shards(tmp_path / "one").manifest.samples, strict=True):
        assert {n: place.hashes for n, place in many.arrays.items()} == {n: p.hashes for n, p in one.arrays.items()}


def test_overwrite_replaces_shards_once_the_new_ones_are_whole(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert main(invented.arguments(out)) == 0
    before = (out / "manifest.json").read_text()
    assert main(invented.arguments(out, "--features", "audio/mono")) == 2
    assert "already holds shards" in capsys.readouterr().err
    invented.put_bold("a", "day1/alpha_9", np.full((20, PARCELS), np.nan))
    for model, width in (("Text", 4), ("Video", 3), ("Audio", 5)):
        name = {"Text": "embedding", "Video": "deep", "Audio": "wave"}[model]
        invented.put_features(model, "alpha_9", name, np.zeros((20, 2, width) if model == "Video" else (20, width)))
    assert main(invented.arguments(out, "--overwrite")) == 2
    assert (out / "manifest.json").read_text() == before
    with h5py.File(invented.bold_file("a"), "a") as file:
        del file["day1/alpha_9"]
    assert main(invented.arguments(out, "--overwrite", "--features", "audio/mono")) == 0
    assert [s.name for s in Shards(out).manifest.streams] == ["audio/mono"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "source"]


def _interrupt_at(run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = building.read_bold

    def interrupted(run: building.RunPlan, subjects: list[str]) -> dict[str, Stored]:
        if run.run == run_name:
            raise KeyboardInterrupt
        return original(run, subjects)

    monkeypatch.setattr(building, "read_bold", interrupted)


def test_ctrl_c_before_any_tar_is_finished_leaves_nothing(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _interrupt_at("beta_1", monkeypatch)
    assert main(invented.arguments(tmp_path / "new/shards")) == 130
    assert "interrupted by SIGINT" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def _one_run_a_tar(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes one tar of each run, and returns the list of those that are written from now on."""
    written: list[str] = []
    original = building.write_shard
    monkeypatch.setattr(building, "deal", lambda runs, streams, size: [[run] for run in runs])
    monkeypatch.setattr(building, "write_shard", lambda path, s: (written.append(path.stem), original(path, s))[1])
    return written


def _content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_finished_tars_of_the_very_same_request_are_kept_over_a_restart(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, home = tmp_path / "shards", tmp_path / ".shards.building"
    written = _one_run_a_tar(monkeypatch)
    assert main(invented.arguments(tmp_path / "undisturbed")) == 0
    whole = [f"shard-{i:05d}" for i in range(4)]
    assert written == whole
    with monkeypatch.context() as patch:
        _interrupt_at("beta_1", patch)
        written.clear()
        assert main(invented.arguments(out)) == 130
        assert written == whole[:3] and not out.exists()
        written.clear()
        assert main(invented.arguments(out)) == 130  # interrupted again: what was finished at first is still there
        assert written == whole[2:3]
    shutil.copytree(home, tmp_path / "copy")
    written.clear()
    assert main(invented.arguments(out)) == 0
    assert written == whole[2:]
    assert _content(out) == _content(tmp_path / "undisturbed")
    assert not home.exists()

    def again(*more: str) -> list[str]:
        shutil.copytree(tmp_path / "copy", home)
        written.clear()
        assert main(invented.arguments(out, "--overwrite", *more)) == 0
        return list(written)

    assert again() == whole[2:]
    assert again("--float32", "video/deep") == whole
    assert again("--skip-bad") == whole
    tar = next((tmp_path / "copy").glob("start-*/shards/shard-00001.tar"))
    tar.chmod(0o644)
    tar.write_bytes(tar.read_bytes()[:-600] + bytes([1] * 600))
    assert again() == whole[1:]
    os.utime(invented.feature_file("Text", "alpha_1"), (1, 1))
    assert again() == whole


def test_output_that_was_away_for_the_exchange_when_a_build_was_killed_comes_back(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert main(invented.arguments(out)) == 0
    before = _content(out)
    (tmp_path / ".shards.building").mkdir()
    out.rename(tmp_path / ".shards.building/old")
    assert main(invented.arguments(out, "--features", "audio/mono")) == 2
    assert "already holds shards" in capsys.readouterr().err
    assert _content(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "source"]


def test_second_build_to_the_same_output_is_told_who_is_at_it(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    with pytest.raises(InputError), new_folder(out, False, "first"):
        assert main(invented.arguments(out)) == 2
        raise InputError("the first", "ends badly")
    found = f"is being built already: found process {os.getpid()} on host {platform.node()}"
    assert found in capsys.readouterr().err
    assert not list(tmp_path.glob(".shards*")) and not out.exists()


@pytest.mark.parametrize(
    ("owner", "refused"),
    [
        ({"host": platform.node(), "pid": 2**22 + 1}, False),  # above the kernel's largest pid: dead for certain
        ({"host": platform.node(), "pid": 1}, True),
        ({"host": "another", "pid": 1}, True),
        ({}, False),
    ],
)
def test_host_and_process_decide_where_files_cannot_be_locked(
    owner: dict[str, object], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    home = tmp_path / ".shards.building"
    home.mkdir()
    (home / "owner.json").write_text(json.dumps(owner) if owner else "")
    if not refused:
        with new_folder(tmp_path / "shards", False, "r") as folder:
            assert json.loads((home / "owner.json").read_text())["pid"] == os.getpid()
            (folder.shards / "x.tar").touch()
        assert [p.name for p in tmp_path.iterdir()] == ["shards"]
        return
    words = f"found process 1 on host {owner['host']}.*if it is dead, remove {home}"
    with pytest.raises(InputError, match=words), new_folder(tmp_path / "shards", False, "r"):
        pass
    assert home.exists()


def test_bad_runs_and_scans_are_left_out_and_listed_on_request(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _one_run_a_tar(monkeypatch)
    _nan_in_bold(invented)
    _missing_dataset(invented)
    assert main(invented.arguments(tmp_path / "shards", "--skip-bad")) == 0
    shards = Shards(tmp_path / "shards", verify="full")
    assert [(s.key, s.subjects) for s in shards.manifest.samples] == [
        ("cinema_alpha_1", ("a", "3")), ("cinema_alpha_2", ("a", "b")),
    ]  # fmt: skip
    assert [r.name for r in shards.manifest.shards] == ["shard-00000.tar", "shard-00001.tar"]
    reasons = {(s.run, s.subject): s.reason for s in shards.manifest.skipped}
    assert list(reasons) == [("cinema_beta_1_run-1", ""), ("cinema_beta_1_run-2", ""), ("cinema_alpha_1", "b")]
    assert "no data set embedding" in reasons["cinema_beta_1_run-1", ""]
    assert "found nan at TR 7, column 3" in reasons["cinema_alpha_1", "b"]
    printed = capsys.readouterr().out
    for (run, subject), reason in reasons.items():
        assert f"skipped: {run}: {f'subject {subject}: ' if subject else ''}{reason}" in printed
    assert shards.manifest.moments("bold").count.tolist() == [[30, 0, 30], [24, 24, 0]]
    for row, label in enumerate(("a", "3")):
        stored = shards.read(0, "bold", 0, 30)[row]
        np.testing.assert_array_equal(stored, invented.bold["alpha_1", 1, label][:30])
    assert check([str(tmp_path / "shards")]) == 0


@pytest.mark.parametrize(
    ("spoil", "skipped"),
    [
        ("_widths", [("cinema_beta_1_run-1", ""), ("cinema_beta_1_run-2", "")]),
        ("_parcels", [("cinema_alpha_9", "")]),
        ("_length_of_one", [("cinema_alpha_2", "b")]),
        ("_feature_lengths", [("cinema_beta_1_run-1", ""), ("cinema_beta_1_run-2", "")]),
        ("_empty", [("cinema_beta_1_run-1", ""), ("cinema_beta_1_run-2", "")]),
        ("_overflow", [("cinema_alpha_1", "")]),
        ("_nan_in_bold", [("cinema_alpha_1", "b")]),
        ("_sentinel", [("cinema_alpha_1", "b")]),
        ("_odd_parcels_of_one", [("cinema_alpha_2", "b")]),
    ],
)
def test_every_mistake_leaves_out_what_is_bad_and_no_more(
    spoil: str, skipped: list[tuple[str, str]], invented: Invented, tmp_path: Path
) -> None:
    globals()[spoil](invented)
    assert main(invented.arguments(tmp_path / "shards", "--skip-bad")) == 0
    manifest = Shards(tmp_path / "shards").manifest
    assert sorted((s.run, s.subject) for s in manifest.skipped) == skipped
    runs = {run for run, subject in skipped if not subject} - {"cinema_alpha_9"}
    assert len(manifest.samples) == 4 - len(runs)
    scans = 11 - sum(3 for run in runs) - sum(1 for _, subject in skipped if subject)
    assert sum(len(sample.subjects) for sample in manifest.samples) == scans
    assert check([str(tmp_path / "shards")]) == 0


def test_a_file_that_cannot_be_read_leaves_out_the_scans_of_its_subject(invented: Invented, tmp_path: Path) -> None:
    invented.bold_file("b").unlink()
    invented.bold_file("b").write_bytes(b"no HDF5")
    other = invented.bold_file("b").parent.with_name("y") / invented.bold_file("b").name
    other.parent.mkdir()
    with h5py.File(other, "w") as file:
        file["day1/alpha_1"] = invented.bold["alpha_1", 1, "b"]
    assert main(invented.arguments(tmp_path / "shards", "--skip-bad")) == 0
    manifest = Shards(tmp_path / "shards").manifest
    assert [(s.run, s.subject) for s in manifest.skipped] == [("cinema", "b")]
    assert "person_B.hdf5: not a whole HDF5 file" in manifest.skipped[0].reason
    assert [len(sample.subjects) for sample in manifest.samples] == [3, 1, 2, 2]


def test_a_run_of_which_no_scan_is_good_is_left_out_and_a_subject_without_any_is_an_error(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject in "ab3":
        invented.put_bold(subject, _name(invented, subject, "alpha_1"), np.full((30, PARCELS), np.nan))
    assert main(invented.arguments(tmp_path / "shards", "--skip-bad")) == 0
    manifest = Shards(tmp_path / "shards").manifest
    assert [(s.run, s.subject) for s in manifest.skipped] == [("cinema_alpha_1", "")]
    for run in ("beta_1_rep1", "beta_1_rep2"):
        invented.put_bold("3", _name(invented, "3", run), np.full((20, PARCELS), np.inf))
    assert main(invented.arguments(tmp_path / "other", "--skip-bad")) == 2
    assert "no good scan is left of subject 3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_nothing_but_bad_runs_is_an_error(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in LENGTHS:
        invented.put_features("Audio", run, "wave", np.full((LENGTHS[run], 1, 5), np.nan))
    assert main(invented.arguments(tmp_path / "shards", "--skip-bad")) == 2
    assert re.search(
        r"--skip-bad: no run is left\. The first: .*alpha_1.hdf5: wave: not a finite", capsys.readouterr().err
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_disk_that_is_full_while_a_tar_is_written_leaves_nothing(invented: Invented, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write that would exceed it fails."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        "from tools.make_shards import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *invented.arguments(tmp_path / "shards")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"error: .*/shards: cannot be written: File too large\n", ended.stderr)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_failing_disk_is_named(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "describe_file", full)
    assert main(invented.arguments(tmp_path / "shards")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def _missing_feature_file(d: Invented) -> list[str]:
    d.feature_file("Text", "beta_1").unlink()
    return ["stimuli/Text", "beta_1.hdf5", "no feature file", "text.v2/emb"]


def _missing_dataset(d: Invented) -> list[str]:
    with h5py.File(d.feature_file("Text", "beta_1"), "a") as file:
        file.move("embedding", "embeding")
    return [str(d.feature_file("Text", "beta_1")), "no data set embedding", "found embeding"]


def _widths(d: Invented) -> list[str]:
    d.put_features("Text", "beta_1", "embedding", np.zeros((20, 7)))
    return [str(d.feature_file("Text", "beta_1")), "embedding", "width", "found 7", "expected 4"]


def _layers(d: Invented) -> list[str]:
    d.put_features("Video", "alpha_2", "deep", np.zeros((24, 1, 3)))
    return [str(d.feature_file("Video", "alpha_2")), "deep", "found 3", "expected 2 x 3"]


def _dimensions(d: Invented) -> list[str]:
    d.put_features("Text", "beta_1", "embedding", np.zeros(20))
    return [str(d.feature_file("Text", "beta_1")), "embedding: shape", "found (20,)", "(TRs, D)"]


def _parcels(d: Invented) -> list[str]:
    d.put_bold("b", "day5/alpha_9", np.zeros((30, 5)))
    for model, name in (("Text", "embedding"), ("Video", "deep"), ("Audio", "wave")):
        d.put_features(model, "alpha_9", name, np.zeros((30, 2, 3) if model == "Video" else (30, 1, 4)))
    return [str(d.bold_file("b")), "day5/alpha_9", "parcels", "found 5", "expected 6"]


def _bold_lengths(d: Invented) -> list[str]:
    d.put_bold("b", _name(d, "b", "alpha_1"), np.zeros((26, PARCELS)))
    return [str(d.bold_file("b")), "alpha_1: length", "found 26 TRs", "within 2 TRs of the 31 TRs"]


def _feature_lengths(d: Invented) -> list[str]:
    d.put_features("Text", "beta_1", "embedding", np.zeros((17, 4)))
    return [str(d.feature_file("Text", "beta_1")), "embedding: length", "found 17 TRs", "of the 20 TRs of the BOLD"]


def _feature_too_long(d: Invented) -> list[str]:
    d.put_features("Text", "beta_1", "embedding", np.zeros((24, 4)))
    return [str(d.feature_file("Text", "beta_1")), "found 24 TRs"]


def _nan_in_bold(d: Invented) -> list[str]:
    name = _name(d, "b", "alpha_1")
    values = d.bold["alpha_1", 1, "b"].copy()
    values[7, 3] = np.nan
    d.put_bold("b", name, values)
    return [str(d.bold_file("b")), name, "found nan at TR 7, column 3"]


def _inf_in_features(d: Invented) -> list[str]:
    values = d.features["alpha_1", "Audio"].copy()
    values[4, 0, 2] = -np.inf
    d.put_features("Audio", "alpha_1", "wave", values)
    return [str(d.feature_file("Audio", "alpha_1")), "wave", "found -inf at TR 4, column 2"]


def _overflow(d: Invented) -> list[str]:
    values = d.features["alpha_1", "Text"].copy()
    values[4, 2] = -70000
    d.put_features("Text", "alpha_1", "embedding", values)
    return ["embedding", "overflows float16", "found 70000", "65504", "--float32 text.v2/emb"]


def _sentinel(d: Invented) -> list[str]:
    values = d.bold["alpha_1", 1, "b"].astype(np.float64)
    values[7, 3] = -np.finfo(np.float64).max
    d.put_bold("b", _name(d, "b", "alpha_1"), values)
    return [str(d.bold_file("b")), "too large to compute with", "found -1.79769e+308 at TR 7, column 3", "1 such value"]


def _length_of_one(d: Invented) -> list[str]:
    d.put_bold("b", _name(d, "b", "alpha_2"), np.zeros((15, PARCELS)))
    return [str(d.bold_file("b")), "alpha_2: length", "found 15 TRs"]


def _odd_parcels_of_one(d: Invented) -> list[str]:
    d.put_bold("b", _name(d, "b", "alpha_2"), np.zeros((24, 5)))
    return [str(d.bold_file("b")), "parcels", "found 5", "expected 6"]


def _empty(d: Invented) -> list[str]:
    d.feature_file("Text", "beta_1").write_bytes(b"")
    return [str(d.feature_file("Text", "beta_1")), "not a whole HDF5 file", "0 bytes"]


def _empty_bold(d: Invented) -> list[str]:
    d.bold_file("b").unlink()
    h5py.File(d.bold_file("b"), "w").close()
    return [str(d.bold_file("b")), "no data set of this series", "an empty file", "{run}"]


def _truncated(d: Invented) -> list[str]:
    with d.bold_file("3").open("r+b") as file:
        file.truncate(d.bold_file("3").stat().st_size // 2)
    return [str(d.bold_file("3")), "not a whole HDF5 file"]


def _broken_link(d: Invented) -> list[str]:
    d.feature_file("Text", "beta_1").unlink()
    d.feature_file("Text", "beta_1").symlink_to(d.root / "not-downloaded")
    return [str(d.feature_file("Text", "beta_1")), "broken link"]


def _no_bold(d: Invented) -> list[str]:
    shutil.rmtree(d.root / "scans")
    return ["no BOLD file found", "scans/{subject}"]


def _subject_without_bold(d: Invented) -> list[str]:
    d.bold_file("3").unlink()
    return ["no BOLD file found for subject 3"]


def _second_scan(d: Invented) -> list[str]:
    d.put_bold("a", "day1/alpha_1", np.zeros((30, PARCELS)))
    return [str(d.bold_file("a")), "second scan of run alpha_1, repeat 1"]


def _second_feature_file(d: Invented) -> list[str]:
    target = d.root / "stimuli/Text/copy/beta_1.hdf5"
    target.parent.mkdir()
    shutil.copy(d.feature_file("Text", "beta_1"), target)
    return ["a second feature file of run beta_1", str(target)]


def _no_numbers(d: Invented) -> list[str]:
    with h5py.File(d.feature_file("Text", "beta_1"), "a") as file:
        del file["embedding"]
        file["embedding"] = np.full((20, 4), b"x")
    return [str(d.feature_file("Text", "beta_1")), "embedding: type", "expected numbers"]


def _no_root(d: Invented) -> list[str]:
    layout = d.layout.read_text()
    shutil.rmtree(d.root)
    d.layout.parent.mkdir()
    d.layout.write_text(layout)
    return ["no BOLD file found"]


def _layout(d: Invented) -> list[str]:
    d.layout.write_text(LAYOUT.replace("tr:", "trs:"))
    return [str(d.layout), "trs: unknown key"]


def _name(d: Invented, subject: str, run: str) -> str:
    with h5py.File(d.bold_file(subject)) as file:
        return next(f"{day}/{run}" for day in file if run in file[day])


SPOILT = [
    _missing_feature_file, _missing_dataset, _widths, _layers, _dimensions, _parcels, _bold_lengths, _feature_lengths,
    _feature_too_long, _nan_in_bold, _inf_in_features, _overflow, _sentinel, _odd_parcels_of_one, _length_of_one,
    _empty, _empty_bold, _truncated, _broken_link,
    _no_bold, _subject_without_bold, _second_scan, _second_feature_file, _no_numbers, _no_root, _layout,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__.lstrip("_"))
def test_bad_data_is_one_line_and_leaves_nothing(
    spoil: Callable[[Invented], list[str]], invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = spoil(invented)
    before = sorted(tmp_path.rglob("*"))
    assert main(invented.arguments(tmp_path / "new/shards")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stream_of_a_small_scale_is_refused_with_what_to_do_and_stored_as_float32(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for (run, model), values in invented.features.items():
        if model != "Audio":
            invented.put_features(model, run, {"Text": "embedding", "Video": "deep"}[model], values * 1e-9)
    assert main(invented.arguments(tmp_path / "shards")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "text.v2/emb (e.g. " in error and "alpha_1.hdf5: embedding)" in error
    assert "found 4 of 4 columns that vary" in error and error.endswith(
        "Store as float32: --float32 text.v2/emb video/deep\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert main(invented.arguments(tmp_path / "shards", "--float32", "text.v2/emb", "video/deep")) == 0


def test_a_restart_judges_the_casts_of_the_tars_that_it_keeps(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = _one_run_a_tar(monkeypatch)
    invented.put_features("Text", "alpha_1", "embedding", 3000 + 0.01 * invented.features["alpha_1", "Text"])
    for run in ("alpha_2", "beta_1"):
        invented.put_features("Text", run, "embedding", np.full((LENGTHS[run], 4), 3000.0))
    with monkeypatch.context() as patch:
        _interrupt_at("beta_1", patch)
        assert main(invented.arguments(tmp_path / "shards")) == 130
    written.clear()
    capsys.readouterr()
    assert main(invented.arguments(tmp_path / "shards")) == 2
    assert written == ["shard-00002", "shard-00003"]  # the run that is rounded was written by the first start
    assert "float16 rounds more than 1% of the variation away: found 4 of 4" in capsys.readouterr().err


def test_runs_of_zeros_are_named_once_and_kept(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    invented.put_features("Video", "beta_1", "deep", np.zeros((20, 2, 3)))
    invented.put_bold("a", _name(invented, "a", "alpha_1"), np.zeros((30, PARCELS)))
    assert main(invented.arguments(tmp_path / "shards")) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: BOLD of subject a: all values are 0 in 1 run(s): cinema_alpha_1",
        "warning: video/deep: all values are 0 in 2 run(s): cinema_beta_1_run-1, cinema_beta_1_run-2",
    ]


def _nan_parcels(invented: Invented) -> None:
    for (run, repeat, subject), values in invented.bold.items():
        if subject == "b":
            spoilt = values.copy()
            spoilt[:, [1, 4]] = np.nan
            invented.put_bold("b", _name(invented, "b", run + (f"_rep{repeat}" if run == "beta_1" else "")), spoilt)


def test_parcels_that_are_nan_in_one_subject_are_named_and_can_be_dropped(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _nan_parcels(invented)
    out = tmp_path / "shards"
    assert main(invented.arguments(out)) == 2
    error = capsys.readouterr().err
    assert "found nan at TR 0, column 1" in error and "60 such value(s) in all. Columns 1,4 are not finite in" in error
    assert "of subject b: leave them out of all subjects with --drop-parcels 1,4, or the scan with --skip-bad" in error
    assert main(invented.arguments(out, "--drop-parcels", "4,1")) == 0
    shards = Shards(out)
    assert (shards.manifest.parcels, shards.manifest.dropped_parcels) == (PARCELS - 2, (1, 4))
    stored = shards.read(0, "bold", 0, 30)
    for row, label in enumerate("ab3"):
        np.testing.assert_array_equal(stored[row], invented.bold["alpha_1", 1, label][:30, [0, 2, 3, 5]])
    assert check([str(out)]) == 0


@pytest.mark.parametrize("columns", ["6", "-1", "0,1,2,3,4,5"])
def test_dropped_parcels_that_are_not_there_are_named(
    columns: str, invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(invented.arguments(tmp_path / "shards", f"--drop-parcels={columns}")) == 2
    assert "expected some of the columns 0 to 5" in capsys.readouterr().err


def test_an_error_counts_the_columns_of_the_file(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _nan_in_bold(invented)
    assert main(invented.arguments(tmp_path / "shards", "--drop-parcels", "0,2")) == 2
    assert "found nan at TR 7, column 3" in capsys.readouterr().err
    _sentinel(invented)
    assert main(invented.arguments(tmp_path / "shards", "--drop-parcels", "0,2")) == 2
    assert "at TR 7, column 3" in capsys.readouterr().err


def test_names_with_brackets_and_outside_of_ascii_are_found_and_told_apart(invented: Invented, tmp_path: Path) -> None:
    old = invented.bold_file("a")
    new = invented.root / "scans/sub [01]*/x/sub [01]*.hdf5"
    new.parent.mkdir(parents=True)
    old.rename(new)
    invented.layout.write_text(
        LAYOUT.replace("person_A", "'sub [01]*'").replace(r"(?P<film>[a-z]+)_(?P<part>\d+)", ".+")
    )
    runs = ["a映", "a画", "A[1]", "a[1]", "a.1", "x" * 120 + "映"]
    for run in runs:
        with h5py.File(new, "a") as file:
            file[f"day1/{run}"] = invented.bold["alpha_2", 1, "a"]
        for model, name in (("Text", "embedding"), ("Video", "deep"), ("Audio", "wave")):
            invented.put_features(model, run, name, invented.features["alpha_2", model])
    assert main(invented.arguments(tmp_path / "shards")) == 0
    samples = {s.run: s for s in Shards(tmp_path / "shards").manifest.samples}
    assert set(runs) < set(samples)
    assert len({sample.key for sample in samples.values()}) == len(samples)
    assert check([str(tmp_path / "shards")]) == 0


def test_a_scan_that_a_link_names_again_is_one_scan(invented: Invented, tmp_path: Path) -> None:
    with h5py.File(invented.bold_file("a"), "a") as file:
        file["day0/alpha_1"] = h5py.SoftLink("/" + _name(invented, "a", "alpha_1"))
        file["notes"] = h5py.SoftLink("/nowhere")
    assert main(invented.arguments(tmp_path / "shards")) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--features", "text.v2/emb", "text.v2/emb"], ["text.v2/emb", "named twice"]),
        (["--features", "txt.v2/emb"], ["unknown feature model", "txt.v2", "Did you mean text.v2/emb?"]),
        (["--features", "video"], ["video", "not a stream", "KEY/LAYER"]),
        (["--features", "video/deeep"], ["no data set deeep", "found deep"]),
        (["--float32", "video/other"], ["--float32", "video/other", "video/deep"]),
        (["--pool", "video/other"], ["--pool", "video/other"]),
        (["--root", "nowhere"], ["nowhere", "no such folder"]),
        (["--series", "theatre"], ["--series", "theatre", "cinema"]),
        (["--drop-parcels", "17;18"], ["--drop-parcels", "found 17;18", "numbers of columns"]),
        (["--shard-size-mb", "0"], ["--shard-size-mb", "found 0"]),
    ],
)
def test_bad_option_is_one_line(
    more: list[str], words: list[str], invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(invented.arguments(tmp_path / "shards", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "shards").exists()


def test_unwritable_output_is_refused_before_anything_is_read(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    shutil.rmtree(invented.root / "scans")
    assert main(invented.arguments(tmp_path / "file/shards")) == 2
    assert re.search(r"file/shards: cannot be written", capsys.readouterr().err)


def test_folder_with_other_files_is_never_replaced(
    invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert main(invented.arguments(tmp_path / "mine", "--overwrite")) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.tex").exists()


def test_meta_json_lists_the_present_subjects(invented_folder: Path) -> None:
    import tarfile

    with tarfile.open(next(invented_folder.glob("*.tar"))) as tar:
        member = tar.extractfile("cinema_alpha_2.meta.json")
        assert member is not None
        meta = json.load(member)
    assert meta["subjects"] == ["a", "b"]
    assert meta["streams"]["text_v2__emb.npy"] == "text.v2/emb"
    assert (meta["film"], meta["part"], meta["season"], meta["n_trs"]) == ("alpha", "2", None, 24)

"""Every kind of damage is a line that names the file and the sample, and none makes the check itself fail."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.data.conftest import Invented
from tools.check_shards import main
from tools.make_shards import main as make
from trainer.data import build as building
from trainer.data.check import find_problems
from trainer.data.manifest import MANIFEST, STATISTICS, Manifest, describe_file
from trainer.data.shards import Shards
from trainer.errors import InputError


@pytest.fixture(scope="session")
def sound(invented_source: Invented, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in four tars of one run each, not to be changed."""
    folder = tmp_path_factory.mktemp("check") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "deal", lambda runs, streams, size: [[run] for run in runs])
        assert make(invented_source.arguments(folder)) == 0
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return _copied(sound, tmp_path / "shards")


def _copied(sound: Path, folder: Path) -> Path:
    shutil.copytree(sound, folder)
    return folder


def _tar(folder: Path, number: int = 1) -> Path:
    return folder / f"shard-{number:05d}.tar"


def test_sound_shards_are_one_line_and_status_0(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sound)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"ok: {sound}: 4 runs in 4 tar(s)")
    assert not any(line.startswith("problem") for line in lines)


def test_a_run_of_zeros_is_a_warning(invented: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invented.put_features("Audio", "beta_1", "wave", np.zeros((20, 1, 5)))
    assert make(invented.arguments(tmp_path / "shards")) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "shards")]) == 0
    warning = "warning: audio/mono: all values are 0 in 2 of 4 runs: cinema_beta_1_run-1, cinema_beta_1_run-2\n"
    assert capsys.readouterr().err == warning


def _edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    """Change the manifest and make its checksum right again: a lie that only the bytes give away."""
    content = json.loads((folder / MANIFEST).read_text())
    edit(content)
    rest = {k: v for k, v in content.items() if k not in ("format", "sha256")}
    content["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))


def _acknowledge(folder: Path) -> None:
    """Let the manifest describe the files as they are now, whatever is in them."""

    def edit(content: dict) -> None:
        for record in [*content["shards"], content["statistics"]]:
            now = describe_file(folder / record["name"])
            record.update(size=now.size, sha256=now.sha256)

    _edit_manifest(folder, edit)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _offset(folder: Path, sample: int, name: str) -> int:
    return Manifest.read(folder).samples[sample].arrays[name].offset


def _retar(path: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _a_flipped_bit(folder: Path) -> list[str]:
    offset = _offset(folder, 1, "video/deep") + 6
    byte = _tar(folder).read_bytes()[offset]
    _write_at(_tar(folder), offset, bytes([byte ^ 0x10]))
    return ["shard-00001.tar: SHA-256: found", "shard-00001.tar: cinema_alpha_2: video/deep: mean in the statistics"]


def _a_truncated_tar(folder: Path) -> list[str]:
    os.truncate(_tar(folder), 3000)
    return ["shard-00001.tar: size: found 3000 bytes", "shard-00001.tar: cinema_alpha_2"]


def _an_empty_tar(folder: Path) -> list[str]:
    _tar(folder).write_bytes(b"")
    return ["shard-00001.tar: size: found 0 bytes", "not a whole, uncompressed tar"]


def _a_tar_of_zeros(folder: Path) -> list[str]:
    _tar(folder).write_bytes(bytes(_tar(folder).stat().st_size))
    return ["shard-00001.tar: SHA-256", "shard-00001.tar: cinema_alpha_2.bold.npy: missing in the tar"]


def _another_tar(folder: Path) -> list[str]:
    assert _tar(folder, 1).stat().st_size == _tar(folder, 2).stat().st_size
    shutil.copy(_tar(folder, 2), _tar(folder, 1))
    return ["shard-00001.tar: SHA-256", "shard-00001.tar: cinema_beta_1_run-1.bold.npy: not in the manifest"]


def _a_compressed_tar(folder: Path) -> list[str]:
    _tar(folder).write_bytes(gzip.compress(_tar(folder).read_bytes()))
    _acknowledge(folder)
    return ["shard-00001.tar: not a whole, uncompressed tar"]


def _a_missing_tar(folder: Path) -> list[str]:
    _tar(folder).unlink()
    return ["shard-00001.tar: missing"]


def _a_file_too_many(folder: Path) -> list[str]:
    (folder / "shard-00009.tar").write_bytes(b"")
    return ["shard-00009.tar: not in the manifest"]


def _a_folder_in_place_of_a_tar(folder: Path) -> list[str]:
    _tar(folder).unlink()
    _tar(folder).mkdir()
    return ["shard-00001.tar: missing"]


def _not_finite(folder: Path) -> list[str]:
    _write_at(_tar(folder), _offset(folder, 1, "bold") + 4 * 9, np.float32(np.nan).tobytes())
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: bold: not finite: found nan at (0, 1, 3)"]


def _too_large(folder: Path) -> list[str]:
    _write_at(_tar(folder), _offset(folder, 1, "bold") + 4 * 9, np.float32(-9.97e36).tobytes())
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: bold: too large to compute with: found -9.97", "at (0, 1, 3)"]


def _zeros_everywhere(folder: Path) -> list[str]:
    for i, sample in enumerate(Manifest.read(folder).samples):
        place = sample.arrays["text.v2/emb"]
        _write_at(_tar(folder, i), place.offset, bytes(2 * np.prod(place.shape)))
    tensors = load_file(folder / STATISTICS)
    save_file(
        {n: t * (not n.endswith(("mean:text.v2/emb", "m2:text.v2/emb"))) for n, t in tensors.items()},
        folder / STATISTICS,
    )
    _acknowledge(folder)
    return ["manifest.json: text.v2/emb: all values are 0 in all runs"]


def _a_value_changed_and_acknowledged(folder: Path) -> list[str]:
    _write_at(_tar(folder), _offset(folder, 1, "bold") + 4 * 9, np.float32(7.5).tobytes())
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: bold: mean in the statistics at (0, 3)"]


def _another_order(folder: Path) -> list[str]:
    _retar(_tar(folder), lambda members: members[::-1])
    _acknowledge(folder)
    return ["order of the members: found cinema_alpha_2.video__deep.npy", "cinema_alpha_2: bold: offset: found"]


def _a_missing_member(folder: Path) -> list[str]:
    _retar(_tar(folder), lambda members: members[:-1])
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2.video__deep.npy: missing in the tar"]


def _a_member_twice(folder: Path) -> list[str]:
    _retar(_tar(folder), lambda members: [*members, members[0]])
    _acknowledge(folder)
    return ["cinema_alpha_2.audio__mono.npy: a second member of that name"]


def _another_dtype(folder: Path) -> list[str]:
    start = _offset(folder, 1, "text.v2/emb") - 128
    header = _tar(folder).read_bytes()[start : start + 128]
    assert b"<f2" in header
    _write_at(_tar(folder), start, header.replace(b"<f2", b"<i2"))
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: text.v2/emb: dtype: found int16, expected float16"]


def _another_shape(folder: Path) -> list[str]:
    start = _offset(folder, 1, "text.v2/emb") - 128
    header = _tar(folder).read_bytes()[start : start + 128]
    _write_at(_tar(folder), start, header.replace(b"(24, 4)", b"(4, 24)"))
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: text.v2/emb: shape: found (4, 24), expected (24, 4)"]


def _no_npy(folder: Path) -> list[str]:
    _write_at(_tar(folder), _offset(folder, 1, "text.v2/emb") - 128, b"NOTNUMPY")
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: text.v2/emb: no .npy header"]


def _meta_of_others(folder: Path) -> list[str]:
    content = _tar(folder).read_bytes()
    _tar(folder).write_bytes(content.replace(b'"film": "alpha"', b'"film": "omega"'))
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: meta.json: film: found omega, expected alpha"]


def _other_subjects(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"][1].update(subjects=["a", "3"]))
    return ["cinema_alpha_2: meta.json: subjects", "cinema_alpha_2: bold: count in the statistics"]


def _unknown_subject(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"][1].update(subjects=["a", "x"]))
    return ["manifest.json: cinema_alpha_2: subjects: found"]


def _other_offset(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"][1]["arrays"]["bold"].update(offset=640))
    return ["shard-00001.tar: cinema_alpha_2: bold: offset: found", "expected 640"]


def _fewer_trs(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"][1].update(n_trs=23))
    return ["manifest.json: cinema_alpha_2: bold: found ((2, 24, 6), 'float32'), expected ((2, 23, 6), 'float32')"]


def _a_sample_less(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"].pop(1))
    return ["manifest.json: tars of samples: found [0, 2, 3], expected 0 to 3, all"]


def _a_sample_twice(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content["samples"].append(content["samples"][1]))
    return ["manifest.json: cinema_alpha_2: a sample listed twice"]


def _other_statistics(folder: Path) -> list[str]:
    tensors = load_file(folder / STATISTICS)
    tensors["m2:audio/mono"][1, 2] *= 1 + 1e-7
    save_file(tensors, folder / STATISTICS)
    _acknowledge(folder)
    return ["shard-00001.tar: cinema_alpha_2: audio/mono: m2 in the statistics at (2,)"]


def _statistics_of_fewer_runs(folder: Path) -> list[str]:
    tensors = load_file(folder / STATISTICS)
    tensors["count:audio/mono"] = tensors["count:audio/mono"][:-1]
    save_file(tensors, folder / STATISTICS)
    _acknowledge(folder)
    return ["statistics.safetensors: audio/mono: shapes"]


def _flipped_statistics(folder: Path) -> list[str]:
    _write_at(folder / STATISTICS, 0, b"\xff" * 8)
    return ["statistics.safetensors: SHA-256", "statistics of bold cannot be read"]


def _edited_manifest(folder: Path) -> list[str]:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"tr": 2.0', '"tr": 2.1'))
    return ["manifest.json: edited since it was written"]


def _manifest_of_another_kind(folder: Path) -> list[str]:
    _edit_manifest(folder, lambda content: content.pop("samples"))
    return ["manifest.json: not a manifest: found KeyError('samples')"]


def _no_manifest(folder: Path) -> list[str]:
    (folder / MANIFEST).unlink()
    return ["manifest.json: cannot be read: No such file"]


SPOILT = [
    _a_flipped_bit, _a_truncated_tar, _an_empty_tar, _a_tar_of_zeros, _another_tar, _a_compressed_tar, _a_missing_tar,
    _a_file_too_many, _a_folder_in_place_of_a_tar, _not_finite, _too_large, _zeros_everywhere,
    _a_value_changed_and_acknowledged, _another_order,
    _a_missing_member, _a_member_twice, _another_dtype, _another_shape, _no_npy, _meta_of_others, _other_subjects,
    _unknown_subject, _other_offset, _fewer_trs, _a_sample_less, _a_sample_twice, _other_statistics,
    _statistics_of_fewer_runs, _flipped_statistics, _edited_manifest, _manifest_of_another_kind, _no_manifest,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__.lstrip("_"))
def test_damage_is_a_line_for_each_problem_and_status_2(
    spoil: Callable[[Path], list[str]], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = spoil(copy)
    assert main([str(copy)]) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    for word in words:
        assert any(word in line for line in problems), problems
    named = {"shard-00001", "shard-00009", "manifest.json", STATISTICS}
    if spoil is _zeros_everywhere:
        named |= {"text.v2/emb"}
    assert all(any(name in line for name in named) for line in problems), problems


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_and_no_change_makes_the_check_fail(
    data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = _copied(sound, tmp_path_factory.mktemp("fuzz") / "shards")
    name = data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir() if p.name != MANIFEST)))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (folder / name).write_bytes(content[:cut])
    if bytes(content[:cut]) == (sound / name).read_bytes():
        return
    assert any(name in str(problem) for problem in find_problems(Manifest.read(folder)))
    _acknowledge(folder)  # then the checksum is right, and what is found depends on what was hit; it ends either way
    list(find_problems(Manifest.read(folder)))
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_a_truncated_tar, "shard-00001.tar: size: found 3000 bytes, expected 10240 bytes"),
        (_another_tar, "shard-00001.tar: begins with: found cinema_beta_1_run-1.audio__mono.npy"),
        (_a_tar_of_zeros, "shard-00001.tar: begins with: found nothing, expected cinema_alpha_2.audio__mono.npy"),
        (_a_missing_tar, "shard-00001.tar: missing"),
        (_edited_manifest, "edited since it was written"),
        (_manifest_of_another_kind, "not a manifest"),
    ],
)
def test_opening_compares_sizes_and_first_headers(spoil: Callable[[Path], list[str]], words: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(InputError) as error:
        Shards(copy)
    assert words in str(error.value) and str(copy) in str(error.value)


def test_opening_names_a_first_array_of_another_shape(copy: Path) -> None:
    start = _offset(copy, 1, "audio/mono") - 128
    header = _tar(copy).read_bytes()[start : start + 128]
    _write_at(_tar(copy), start, header.replace(b"(24, 5)", b"(5, 24)"))
    with pytest.raises(InputError, match=r"begins with: found .*mono.npy float32 \(5, 24\) .*expected .* \(24, 5\)"):
        Shards(copy)
    _write_at(_tar(copy), start, b"\x00" * 128)
    with pytest.raises(InputError, match=r"shard-00001.tar: begins with no array"):
        Shards(copy)


def test_only_a_full_look_at_the_start_finds_changed_values(copy: Path) -> None:
    Shards(copy, verify="full")
    _a_flipped_bit(copy)
    Shards(copy)
    with pytest.raises(InputError, match=r"shard-00001.tar: SHA-256: found"):
        Shards(copy, verify="full")

"""Parcels find their place in the brain, or a sentence says why they do not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.conftest import N_PARCELS, write_atlas
from tests.evaluation.test_figures import is_whole
from trainer.errors import InputError
from trainer.evaluation.brain import INSTALL, NO_ATLAS, brain_drawings, painted, read_atlas
from trainer.evaluation.results import Scored


def scored(*subjects: str) -> Scored:
    r = np.linspace(-0.1, 0.4, len(subjects) * N_PARCELS).reshape(len(subjects), N_PARCELS)
    return Scored(1, False, {"set": "test", "estimate": "mean", "step": 3, "subjects": subjects, "pearson_r": 0.1}, r)


def test_every_voxel_has_the_r_of_its_parcel_and_nothing_lies_outside() -> None:
    volume = painted(np.array([[[0, 2], [1, 2]]]), np.array([0.3, np.nan]))
    np.testing.assert_array_equal(volume, [[[0, 0], [0.3, 0]]])


def test_without_atlas_or_nilearn_a_sentence_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert brain_drawings(scored("1"), None) == ({}, [NO_ATLAS])
    monkeypatch.setitem(sys.modules, "nilearn", None)
    assert brain_drawings(scored("1"), "atlas.nii.gz") == ({}, [INSTALL])


def test_parcels_that_are_left_out_keep_their_ids(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel is missing (the extra [brain])")
    for name, held in (("all", [0, 1, 2, 3, 4]), ("lacking", [0, 1, 3, 4, 0])):
        volume = np.array(held, np.int16).reshape(1, 1, 5)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
        ids, _ = read_atlas(tmp_path / f"{name}.nii.gz", 3, dropped=(1,))
        r_of = {0: 0.0, 1: 0.1, 2: 0.0, 3: 0.3, 4: 0.4}
        np.testing.assert_array_equal(painted(ids, np.array([0.1, 0.3, 0.4]), (1,)).ravel(), [r_of[i] for i in held])
    with pytest.raises(InputError, match="found 3 from 1 to 4, expected all of 1 to 4"):
        read_atlas(tmp_path / "lacking.nii.gz", 3, dropped=(0,))


@pytest.mark.slow
def test_a_subject_has_a_glass_brain_and_slices(tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="nilearn is missing (the extra [brain])")
    write_atlas(tmp_path / "sub-1.nii.gz")
    score = scored("1", "2", "3")
    assert score.r is not None
    score.r[2] = np.nan
    drawings, missing = brain_drawings(score, str(tmp_path / "sub-{subject}.nii.gz"), "run2-")
    expected = ["run2-glass_brain-stage1-test-subject1", "run2-slices-stage1-test-subject1"]
    assert [drawing.name for drawing in drawings["1"]] == expected
    assert all(drawing.card and drawing.alt and is_whole(drawing) for drawing in drawings["1"])
    np.testing.assert_array_equal(np.unique(drawings["1"][0].arrays[""]), np.unique([0, *score.r[0]]))
    assert list(drawings) == ["1"]
    assert missing == [
        f"Subject 2: {tmp_path}/sub-2.nii.gz: missing. See evaluate.atlas in the configuration.",
        "Subject 3 has no BOLD in test.",
    ]


def test_an_atlas_of_other_parcels_is_named_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "atlas.nii.gz"
    write_atlas(path, n_parcels=18)
    with pytest.raises(InputError, match="found 18 from 1 to 18, expected all of 1 to 20, as in the scores"):
        read_atlas(path, N_PARCELS)
    drawings, missing = brain_drawings(scored("1"), str(path))
    assert drawings == {} and len(missing) == 1 and str(path) in missing[0]
    assert read_atlas(path, 18)[0].max() == 18


@pytest.mark.parametrize("content", [b"", b"no volume at all"])
def test_a_file_that_is_no_volume_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("nibabel", reason="nibabel is missing (the extra [brain])")
    for name in ("atlas.nii.gz", "atlas.txt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as an atlas volume"):
            read_atlas(tmp_path / name, N_PARCELS)


def test_an_empty_volume_has_no_parcels(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="nibabel is missing (the extra [brain])")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="found none, expected all of 1 to 20"):
        read_atlas(tmp_path / "a.nii.gz", N_PARCELS)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 2), np.int16), np.eye(4)), tmp_path / "b.nii.gz")
    with pytest.raises(InputError, match="found 4, expected 3"):
        read_atlas(tmp_path / "b.nii.gz", N_PARCELS)

"""Brain maps: r of every parcel at its place in the brain, from the subjects' atlas volumes.

The volumes hold parcel ids 1..V in MNI space. Nilearn (the extra `[brain]`) draws them on a glass brain and on slices
of the template that it brings along: nothing is downloaded. Without the extra or the volumes, sentences say what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from trainer.errors import InputError
from trainer.evaluation.drawing import INK, PAGE, SEQUENTIAL, Drawing, style
from trainer.evaluation.figures import model_name
from trainer.evaluation.maps import extend, map_limit
from trainer.evaluation.results import Scored
from trainer.progress import watched

INSTALL = 'Brain maps are drawn by nilearn: `pip install "fmri-flow[brain]"`, then report again.'
NO_ATLAS = (
    "Brain maps need the subjects' atlas volumes (.nii.gz in MNI space: parcel ids from 1 on as in the BOLD, else 0): "
    "name them in the configuration as `evaluate.atlas`, with `{subject}` where a subject's label stands."
)
SLICES = (-20, -6, 8, 22, 36, 50, 62)
"""z of the slices, in mm."""


def brain_drawings(
    scored: Scored, atlas: str | None, prefix: str = "", dropped: Sequence[int] = ()
) -> tuple[dict[str, list[Drawing]], list[str]]:
    """Glass brain and slices of every subject by label, and sentences about what is missing.

    Args:
        scored: its r (S, V) must be there.
        atlas: config.evaluate.atlas.
        dropped: the columns of the BOLD files, counted from 0, that the scores lack.
    """
    if atlas is None:
        return {}, [NO_ATLAS]
    try:
        import nilearn  # noqa: F401
    except ImportError:
        return {}, [INSTALL]
    assert scored.r is not None
    drawings: dict[str, list[Drawing]] = {}
    missing = []
    limit = map_limit([scored.r])
    brains = list(zip(scored.subjects, scored.r, strict=True))
    for label, r in watched(brains, "brain maps", len(brains)):
        if np.isnan(r).all():
            missing.append(f"Subject {label} has no BOLD in {scored.set_name}.")
            continue
        try:
            ids, affine = read_atlas(atlas_path(atlas, label), len(r), dropped)
        except InputError as error:
            missing.append(f"Subject {label}: {error}")
            continue
        drawings[label] = _draw(_Brain(painted(ids, r, dropped), affine, label, scored, limit), prefix)
    return drawings, list(dict.fromkeys(missing))


def atlas_path(atlas: str, label: str) -> Path:
    """The atlas volume of a subject."""
    return Path(atlas.replace("{subject}", label))


def read_atlas(path: Path, n_parcels: int, dropped: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Parcel ids (X, Y, Z) of an atlas volume and its affine (4, 4).

    A parcel that the scores lack, column c of `dropped`, has the id c + 1; a volume may hold it or not.

    Raises:
        InputError: no such volume, not three axes, or other ids than 0 and those of all columns.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        values = np.asarray(image.dataobj)
    except (OSError, EOFError, nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        what = "missing" if not path.exists() else "cannot be read as an atlas volume"
        fix = "See evaluate.atlas in the configuration."
        raise InputError(path, what, found=None if not path.exists() else error, fix=fix) from error
    if values.ndim != 3:
        raise InputError(path, "axes of the atlas volume", found=values.ndim, expected=3)
    found = np.unique(values)
    parcels = found[found != 0]
    all_ids, lacking = np.arange(1, n_parcels + len(dropped) + 1), np.asarray(dropped, int) + 1
    if not np.array_equal(np.union1d(parcels, lacking), all_ids):
        seen = f"{len(parcels)} from {parcels[0]:g} to {parcels[-1]:g}" if len(parcels) else "none"
        raise InputError(
            path, "parcel ids of the atlas", found=seen, expected=f"all of 1 to {len(all_ids)}, as in the scores"
        )
    return values.astype(np.int64), image.affine


def painted(ids: np.ndarray, r: np.ndarray, dropped: Sequence[int] = ()) -> np.ndarray:
    """The volume (X, Y, Z) in which every voxel has the r (V,) of its parcel; 0 outside and in parcels without r."""
    of_ids = np.zeros(1 + len(r) + len(dropped))
    of_ids[np.delete(np.arange(len(of_ids)), [0, *(column + 1 for column in dropped)])] = np.nan_to_num(r)
    return of_ids[ids]


@dataclass(frozen=True)
class _Brain:
    """A painted volume (X, Y, Z), its affine, the subject it is of, and the upper end of its colours."""

    volume: np.ndarray
    affine: np.ndarray
    label: str
    scored: Scored
    limit: float


def _draw(brain: _Brain, prefix: str) -> list[Drawing]:
    """The glass brain and the slices of one subject."""
    what = f"subject {brain.label}, {brain.scored.set_name}"
    name = f"stage{brain.scored.stage}-{brain.scored.set_name}-subject{brain.label}"
    kinds = {"glass_brain": (_glass_brain, "a glass brain"), "slices": (_slices, "axial slices (z in mm)")}
    below = " Parcels with r below 0 are left empty." if (brain.volume < 0).any() else ""
    drawings = []
    for kind, (draw, where) in kinds.items():
        with style():
            figure = draw(brain)
            figure.suptitle(f"{what[0].upper()}{what[1:]}", x=0.01, y=0.985, ha="left", fontsize=8.5, color=INK)
        drawings.append(
            Drawing(
                name=f"{prefix}{kind}-{name}",
                figure=figure,
                alt=f"Pearson's r of every parcel on {where}, {what}",
                caption=f"{model_name(brain.scored)}: Pearson's r of every parcel on {where}, {what}.{below}",
                arrays={"": brain.volume} if kind == "glass_brain" else {},
                wide=True,
                card=True,
            )
        )
    return drawings


def _glass_brain(brain: _Brain) -> Figure:
    from nilearn import plotting

    figure, look = _prepared(brain, height=1.95)
    display = plotting.plot_glass_brain(_image(brain), display_mode="lyrz", plot_abs=False, **look)
    display.annotate(size=7, positions=False)
    return figure


def _slices(brain: _Brain) -> Figure:
    from nilearn import plotting

    figure, look = _prepared(brain, height=1.5)
    options = {"display_mode": "z", "cut_coords": SLICES, "black_bg": False, "draw_cross": False}
    display = plotting.plot_stat_map(_image(brain), **options, **look)
    display.annotate(size=7)
    return figure


def _prepared(brain: _Brain, height: float) -> tuple[Figure, dict[str, Any]]:
    """A figure with a colour bar as beside the other maps, and how nilearn draws into it."""
    figure = Figure(figsize=(PAGE, height), facecolor="white")
    colours = matplotlib.colormaps[SEQUENTIAL]
    scale = ScalarMappable(Normalize(0, brain.limit), colours)
    bar = figure.add_axes((0.93, 0.16, 0.011, 0.68))
    figure.colorbar(scale, cax=bar, label="Pearson's r", extend=extend(brain.volume.clip(0), brain.limit))
    look = {"figure": figure, "axes": (0.0, 0.0, 0.91, 0.9), "annotate": False, "colorbar": False}
    return figure, {**look, "cmap": colours, "vmin": 0, "vmax": brain.limit, "threshold": 1e-6}


def _image(brain: _Brain) -> Any:
    from nibabel import Nifti1Image

    return Nifti1Image(brain.volume.astype(np.float32), brain.affine)

"""How every figure looks, and what becomes of one: inline SVG for a page; PNG, PDF and its numbers for a paper.

The colours are Okabe and Ito's, told apart by colour-blind readers; maps are viridis, which stays ordered in grey. In
an inline SVG colours of the style become variables of the page's style sheet, so the same drawing is read on light and
on dark paper, in the page's own typeface.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from trainer.run.files import whole
from trainer.scoring.records import write_array

INK, MUTED, RULE = "#1d2126", "#666d77", "#d6d9de"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""A line is known by its dashes too, and lines beyond the fourth by both together."""
VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule",
    BLUE: "--blue", VERMILLION: "--vermillion", GREEN: "--green", PURPLE: "--purple",
}  # fmt: skip
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
BELOW = "#a8a8a8"  # what lies below a sequential map's zero

COLUMN, PAGE = 3.5, 7.2
"""Widths in inches of a figure in one column of a journal, and across the page."""

STYLE: Any = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib: figures are the same on every machine
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in the name of a run is a $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.2,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text that a journal can edit
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A figure and what belongs to it.

    Attributes:
        name: stem of its files.
        figure: drawn inside `style()`.
        alt: what it shows, for those who do not see it.
        caption: what to know for reading it.
        columns: its numbers by name of the column, for a .csv; columns may differ in length.
        arrays: its numbers by suffix of the name, each for a .npy.
        wide: it runs across the page.
        card: it is an image on light paper, not lines that take the page's colours.
    """

    name: str
    figure: Figure
    alt: str
    caption: str = ""
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    wide: bool = False
    card: bool = False


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn and saved in the one style."""
    with matplotlib.rc_context(STYLE):
        yield


def panel(width: float = COLUMN, height: float = 2.3) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches; without pyplot, so that nothing has to be closed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of line `index`; 16 differ."""
    return {"color": CYCLE[index % 4], "linestyle": DASHES[(index + index // 4) % 4]}


def save(drawing: Drawing, folder: Path) -> list[Path]:
    """Write NAME.png (300 dpi), NAME.pdf and the numbers as NAME.csv and NAME[-suffix].npy; returns their paths."""
    settle(drawing.figure)
    stem = folder / drawing.name
    paths = [save_figure(drawing.figure, stem.with_name(f"{stem.name}.{kind}")) for kind in ("png", "pdf")]
    if drawing.columns:
        paths.append(_write_csv(stem.with_name(f"{stem.name}.csv"), drawing.columns))
    for suffix, array in drawing.arrays.items():
        name = f"{stem.name}-{suffix}.npy" if suffix else f"{stem.name}.npy"
        paths.append(stem.with_name(name))
        write_array(paths[-1], array)
    return paths


def settle(figure: Figure) -> None:
    """Lay a figure out once and for all: each saving would do it again, which takes longer than drawing."""
    with style():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format that the path ends with; the same drawing gives the same bytes."""
    metadata = {".pdf": {"CreationDate": None}, ".png": {"Software": None}}[path.suffix]
    form = path.suffix[1:]
    with style(), whole(path) as aside:
        figure.savefig(aside, format=form, metadata=metadata)
    return path


def as_svg(drawing: Drawing) -> str:
    """The drawing as an <svg> element for a page: its colours and typeface are the page's, its ids its own."""
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with style(), matplotlib.rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(text, format="svg", transparent=True, metadata=metadata, dpi=144)
    return themed(text.getvalue(), drawing.name)


def themed(svg: str, prefix: str) -> str:
    """Matplotlib's SVG file as an element of a page that holds several, with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(data:image/png;base64,)([^\"]*)", lambda png: png[1] + _with_palette(base64.b64decode(png[2])), svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def as_png_uri(drawing: Drawing) -> str:
    """The drawing as the data: URI of a PNG, sharp on screens of two pixels a point."""
    image = io.BytesIO()
    with style():
        drawing.figure.savefig(image, format="png", dpi=180, metadata={"Software": None})
    return "data:image/png;base64," + _with_palette(image.getvalue())


def _with_palette(png: bytes) -> str:
    """The base64 of a PNG whose pixels are numbers in a palette, about a third of the bytes.

    Maps have no more than 256 colours, and keep them exactly; the smooth edges of a picture of more are rounded.
    """
    with Image.open(io.BytesIO(png)) as opened:
        image = opened.convert("RGBA")
    colours, numbers = np.unique(np.asarray(image).reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256:
        image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    else:
        height, width = image.height, image.width
        image = Image.fromarray(numbers.reshape(height, width).astype(np.uint8), "P")
        image.putpalette(colours.tobytes(), "RGBA")
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return base64.b64encode(min(small.getvalue(), png, key=len)).decode()


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> Path:
    with whole(path) as aside, aside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip_longest(*columns.values(), fillvalue=""))
    return path

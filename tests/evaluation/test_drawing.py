"""A drawing becomes a file for each reader: a page in any colours, a journal, a program."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from trainer.evaluation.drawing import VARIABLES, Drawing, as_png_uri, as_svg, line_style, panel, save, style

MAP = np.random.default_rng(0).random((4, 100))
ODD = 'a <b> & "c" $d$'


@pytest.fixture
def drawing() -> Drawing:
    with style():
        figure, axis = panel()
        axis.plot([0, 1, 2], [2.0, -1.0, 3.0], label=ODD, **line_style(1))
        axis.imshow(MAP, extent=(0, 2, -1, 3), aspect="auto", interpolation="none")
        axis.set(title=ODD, xlabel="Step", ylabel="r")
        axis.legend()
    columns = {"step": [0, 1, 2], "r": np.array([2.0, -1.0])}
    return Drawing("odd", figure, "what it shows", columns=columns, arrays={"": np.eye(2), "fc": np.ones((2, 2))})


def test_a_drawing_leaves_png_pdf_and_its_numbers(drawing: Drawing, tmp_path: Path) -> None:
    names = [path.name for path in save(drawing, tmp_path / "figures")]
    assert names == ["odd.png", "odd.pdf", "odd.csv", "odd.npy", "odd-fc.npy"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)
    assert Image.open(tmp_path / "figures" / "odd.png").size == (1050, 690)
    with (tmp_path / "figures" / "odd.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "r"], ["0", "2.0"], ["1", "-1.0"], ["2", ""]]
    assert np.array_equal(np.load(tmp_path / "figures" / "odd-fc.npy"), np.ones((2, 2)))


def test_text_of_a_pdf_is_text(drawing: Drawing, tmp_path: Path) -> None:
    save(drawing, tmp_path)
    pdf = (tmp_path / "odd.pdf").read_bytes()
    assert b"CIDFontType2" in pdf or b"/TrueType" in pdf
    assert b"/Type3" not in pdf


def test_the_same_drawing_gives_the_same_bytes(drawing: Drawing, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in save(drawing, tmp_path / "a")}
    assert {path.name: path.read_bytes() for path in save(drawing, tmp_path / "b")} == before
    assert as_svg(drawing) == as_svg(drawing)


def test_an_inline_svg_takes_the_colours_of_the_page_and_keeps_names_as_they_are(drawing: Drawing) -> None:
    svg = as_svg(drawing)
    root = ElementTree.fromstring(svg)  # well-formed, so nothing of a name got out of its place
    assert "".join(root.itertext()).count(ODD) == 2
    assert not [colour for colour in VARIABLES if colour in svg]
    assert "var(--ink)" in svg and "var(--vermillion)" in svg
    assert "font-family" not in svg and "<style" not in svg and "width=" not in svg.split(">")[0]


def test_two_svgs_of_one_page_share_no_id(drawing: Drawing) -> None:
    other = Drawing("other", drawing.figure, "")
    ids = [re.findall(r'\bid="([^"]+)"', as_svg(each)) for each in (drawing, other)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    svg = as_svg(drawing)
    used = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', svg))
    assert {first or second for first, second in used} <= set(ids[0])


def test_maps_keep_their_exact_colours_in_a_palette(drawing: Drawing) -> None:
    import base64
    import io

    import matplotlib

    found = re.search(r"data:image/png;base64,([^\"]*)", as_svg(drawing))
    assert found
    image = Image.open(io.BytesIO(base64.b64decode(found[1])))
    assert (image.size, image.mode) == ((100, 4), "P")
    expected = matplotlib.colormaps["viridis"]((MAP - MAP.min()) / (MAP.max() - MAP.min()), bytes=True)
    assert np.array_equal(np.asarray(image.convert("RGBA")), expected)


def test_a_picture_of_many_colours_is_still_a_picture() -> None:
    figure = Figure(figsize=(1, 1), facecolor="white")
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).random((40, 40, 3)))
    assert as_png_uri(Drawing("noise", figure, "")).startswith("data:image/png;base64,iVBOR")


def test_sixteen_lines_differ() -> None:
    assert len({str(line_style(i)) for i in range(16)}) == 16

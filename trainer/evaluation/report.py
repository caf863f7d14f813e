"""One page about one or several runs: `python -m trainer report RUN [RUN ...]`.

RUN/report.html holds all it shows (no network, no other file), RUN/figures/ every figure again as PNG and PDF with its
numbers. Both are made from the files of the runs, at any time, whatever part of a run is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trainer import __version__
from trainer.errors import InputError
from trainer.evaluation import tables
from trainer.evaluation.drawing import Drawing, as_png_uri, as_svg, save
from trainer.evaluation.results import RunResults, read_results
from trainer.evaluation.sections import Section, lead, sections
from trainer.progress import progress
from trainer.run.files import check_writable, write_whole
from trainer.scoring.atlas import networks


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write report.html and figures/ into a folder, which is the first run if not given; returns the page's path.

    Raises:
        InputError: a path is no run, or is given twice; the folder cannot be written.
    """
    for path in paths:
        if not path.is_dir():
            raise InputError(path, "no such run directory")
    labels = run_labels(paths)
    runs = {label: read_results(path) for label, path in zip(labels, paths, strict=True)}
    for run in runs.values():
        if not run.stages:
            raise InputError(run.path, "holds no training", expected="a run directory with stage1/")
    folder = out or paths[0]
    check_writable(folder, "Give another --out." if out else "Give --out FOLDER to write the report elsewhere.")
    content = sections(runs, networks_of(runs[labels[0]]))
    pictures = _save(content, folder / "figures")
    page = folder / "report.html"
    write_whole(page, render(runs, content, pictures, time.time()))
    return page


def run_labels(paths: Sequence[Path]) -> list[str]:
    """What runs are called: their folder's name, with as many folders above as it takes to tell them apart.

    Raises:
        InputError: a run is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    twice = next((path for path, found in zip(paths, parts, strict=True) if parts.count(found) > 1), None)
    if twice is not None:
        raise InputError(twice, "given twice", expected="different runs")
    depth = 1
    while len({found[-depth:] for found in parts}) < len(parts):
        depth += 1
    return [str(Path(*found[-depth:])) for found in parts]


def networks_of(run: RunResults) -> list[str] | str:
    """The network of every parcel by the atlas's label file, or the sentence that says why it is not known."""
    score = next((s for stage in run.stages.values() for s in stage.scored if s.r is not None), None)
    if score is None or score.r is None or run.config is None:
        return "No scores of parcels yet."
    if run.config.evaluate.labels is None:
        return "Networks need the atlas's label file: name it in the configuration as `evaluate.labels`."
    try:
        return networks(run.config.evaluate.labels, score.r.shape[1], run.dropped_parcels)
    except InputError as error:
        return str(error)


def _save(content: Iterable[Section], folder: Path) -> dict[str, Markup]:
    """Write the files of all figures; returns name -> what stands for it in the page."""
    drawings = [drawing for section in content for drawing in section.drawings]
    pictures = {}
    with progress(len(drawings), "figure") as tick:
        for drawing in drawings:
            save(drawing, folder)
            pictures[drawing.name] = picture(drawing)
            tick(drawing.name)
    return pictures


def picture(drawing: Drawing) -> Markup:
    """A figure inside the page."""
    if drawing.card:
        return Markup('<img src="{}" alt="{}">').format(as_png_uri(drawing), drawing.alt)
    label = Markup('<svg role="img" aria-label="{}"').format(drawing.alt)
    return Markup(as_svg(drawing).replace("<svg", label, 1))


def render(
    runs: Mapping[str, RunResults], content: Sequence[Section], pictures: Mapping[str, Markup], now: float
) -> str:
    """The page. `now` is the time of writing in seconds since 1970."""
    environment = Environment(
        loader=PackageLoader("trainer.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = with_code
    template = environment.get_template("report.html.j2")
    return template.render(
        title=", ".join(runs),
        lead=lead(runs),
        sections=content,
        pictures=pictures,
        written=tables.when_utc(now),
        version=__version__,
    )


def with_code(text: str) -> Markup:
    """Text whose `backticks` become code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))

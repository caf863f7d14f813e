"""The report: one page that opens anywhere, says what a run lacks, and lets no name out of its place."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.browser import open_page
from tests.evaluation.conftest import copy_run, write_atlas
from trainer.cli import main
from trainer.errors import InputError
from trainer.evaluation.report import run_labels, with_code, write_report

ODD = 'a <img src=x onerror=alert(1)> & "c" $d$ `e`'


class Page(HTMLParser):
    """A page as its reader sees it: tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def reported(full_run: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run scored in full, with atlas and labels, and its report."""
    folder = tmp_path_factory.mktemp("reported")
    atlas = folder / "sub-1.nii.gz"
    with contextlib.suppress(pytest.skip.Exception):  # a sentence about nilearn then takes the place of the maps
        write_atlas(atlas)
    run = copy_run(full_run, folder / "run", labels=str(labels), atlas=str(folder / "sub-{subject}.nii.gz"))
    assert main(["report", str(run)]) == 0
    return run


def test_the_page_shows_all_there_is_to_show(reported: Path) -> None:
    page = Page(reported / "report.html")
    labels = " ".join(str(svg.get("aria-label")) for svg in page.all("svg"))
    for figure in ("over training steps", "Heat map", "r over the noise ceiling", "by network", "over time in two"):
        assert figure in labels
    for figure in ("Power spectra", "nominal coverage", "Functional connectivity"):
        assert figure in labels
    assert "95 % interval" in page.text and "r / ceiling" in page.text and "RSA" in page.text
    assert "No " not in page.text.split("Training")[0], "nothing is said to be missing"
    assert "embed_dim: 8" in page.text and '"torch"' in page.text and "a TR of 1.49 s" in page.text


def test_the_page_needs_no_network_and_no_other_file(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', text)
    assert {link or url for link, url in links if not (link or url).startswith(("#", "data:"))} == set()
    assert "<script" not in text and "@import" not in text
    assert len(text) < 2_000_000


def test_the_page_reads_aloud(reported: Path) -> None:
    page = Page(reported / "report.html")
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert {header["scope"] for header in page.all("th")} <= {"col", "row", "rowgroup", "colgroup"}
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {str(link["href"])[1:] for link in page.all("a")} <= targets


def test_every_figure_lies_beside_the_page_as_png_and_pdf_with_its_numbers(reported: Path) -> None:
    names = {path.name for path in (reported / "figures").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    stems = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    assert len(stems) == len(Page(reported / "report.html").all("figure"))
    for stem in stems - {stem for stem in stems if stem.startswith("slices-")}:
        assert f"{stem}.pdf" in names
        assert any(name.startswith(stem) and name.endswith((".csv", ".npy")) for name in names), stem


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_browser_shows_the_page(reported: Path, tmp_path: Path, width: int, scheme: str) -> None:
    seen = open_page(reported / "report.html", tmp_path, width, scheme)
    assert seen.console == []
    assert seen.probe["width"] == width
    assert seen.probe["overflow"] <= 0, "the page is wider than the window"
    page = Page(reported / "report.html")
    assert len(seen.probe["images"]) == len(page.all("img")) and all(seen.probe["images"])
    assert seen.probe["drawings"] == len(page.all("svg")) - seen.probe["folded_drawings"]
    assert len(seen.probe["ids"]) == len(set(seen.probe["ids"]))
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    assert seen.probe["background"] == (dark if scheme == "dark" else light)
    assert seen.probe["ink"] == ("rgb(230, 232, 235)" if scheme == "dark" else "rgb(29, 33, 38)")


def test_a_run_that_failed_half_way_says_so_in_place_of_what_it_lacks(debug_run: Path, tmp_path: Path) -> None:
    run = copy_run(debug_run, tmp_path / "run", atlas=str(tmp_path / "none.nii.gz"), labels=str(tmp_path / "none.txt"))
    shutil.rmtree(run / "stage2" / "scores")
    shutil.rmtree(run / "stage2" / "logs")
    (run / "stage2" / "finished.json").unlink()
    beat = run / "stage2" / "heartbeat.json"
    ended = {"ended": {"state": "failed", "why": "the <GPU> melted"}}
    beat.write_text(json.dumps(json.loads(beat.read_text()) | ended))
    next((run / "stage1" / "scores").glob("*-test-mean.npy")).write_bytes(b"torn")
    text = Page(write_report([run])).text
    for sentence in (
        "Stage 2 has not finished: it is failed",
        "(the <GPU> melted)",
        "What follows is of the best checkpoint so far.",
        "-test-mean.npy: cannot be read: found",
        "No intervals or ceilings yet. python -m trainer evaluate",
        "Stage 2 has logged no step yet.",
        f"{tmp_path}/none.txt: cannot be read",
        f"{tmp_path}/none.nii.gz: missing",
        "No predicted series are kept yet.",
        "The distribution of samples is not judged yet.",
    ):
        assert sentence in text, sentence


def test_a_run_that_has_only_started_has_a_report(debug_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stage1" / "starts").mkdir(parents=True)
    shutil.copy(debug_run / "stage1" / "starts" / "1.json", run / "stage1" / "starts" / "1.json")
    text = Page(write_report([run])).text
    assert "No checkpoint was scored yet." in text and "Stage 1 has logged no step yet." in text
    assert "stage 2 has not begun" in text


@pytest.mark.slow
def test_no_name_gets_out_of_its_place(debug_run: Path, tmp_path: Path) -> None:
    run, other = copy_run(debug_run, tmp_path / ODD), copy_run(debug_run, tmp_path / "other")
    for path in (run, other):
        shutil.rmtree(path / "stage2")
    page = Page(write_report([run, other]))
    assert page.all("img") == [] and page.all("script") == []
    assert page.text.count(ODD) > 5
    assert not [path.name for path in (run / "figures").iterdir() if "<" in path.name]


@pytest.mark.slow
def test_several_runs_stand_side_by_side(full_run: Path, debug_run: Path, tmp_path: Path) -> None:
    runs = [copy_run(full_run, tmp_path / "full"), copy_run(debug_run, tmp_path / "bare", bootstrap=7)]
    for run in runs:
        shutil.rmtree(run / "stage2")
    assert main(["report", *map(str, runs)]) == 0
    page = Page(runs[0] / "report.html")
    assert "Stage 1: bare − full" in page.text and "not known" in page.text
    assert "bare differs from full in" in page.text and "evaluate.bootstrap" in page.text
    assert "bare: No intervals or ceilings yet." in page.text
    assert "Parcels: bare" in page.text and "Parcels: full" in page.text
    assert {"runs-loss-stage1.csv", "run1-r-stage1-test.npy", "run2-r-stage1-test.npy"} <= {
        path.name for path in (runs[0] / "figures").iterdir()
    }
    assert not (runs[1] / "report.html").exists()


def test_what_is_no_run_is_refused(debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run directory" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no training" in capsys.readouterr().err
    assert main(["report", str(debug_run), str(debug_run / ".." / debug_run.name)]) == 2
    assert "given twice" in capsys.readouterr().err
    assert not (debug_run / "report.html").exists()


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(lambda p: Path("/", *p)), unique=True))
def test_runs_are_told_apart_by_as_few_folders_as_it_takes(paths: list[Path]) -> None:
    labels = run_labels(paths)
    assert len(set(labels)) == len(paths)
    assert all(str(path).endswith(label) for path, label in zip(paths, labels, strict=True))
    if len({path.name for path in paths}) == len(paths):
        assert labels == [path.name for path in paths]


def test_a_run_given_twice_is_named() -> None:
    with pytest.raises(InputError, match="b: given twice"):
        run_labels([Path("a"), Path("b"), Path("./b")])


def test_only_backticks_become_code() -> None:
    assert with_code("<b> `a & b` c") == "&lt;b&gt; <code>a &amp; b</code> c"

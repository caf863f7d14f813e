"""Commands where the file system says no: another's run, closed and full folders, no hard links, any umask."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.links import refuse
from tests.permissions import bound_by_modes
from tests.test_cli import ENVIRONMENT, ROOT, refused
from tools import bench, check_shards, import_upstream, make_shards, make_synthetic
from trainer.cli import main

Main = Callable[[list[str]], int]


@pytest.fixture
def anothers_run(debug_run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the debug run that may be read and not written."""
    run = tmp_path / "run"
    shutil.copytree(debug_run, run)
    set_modes(run, 0o555, 0o444)
    yield run
    set_modes(run, 0o755, 0o644)


def set_modes(top: Path, folders: int, files: int) -> None:
    for path in [*top.rglob("*"), top]:
        path.chmod(folders if path.is_dir() else files)


def wrong_modes(top: Path, umask: int) -> list[str]:
    """What below a folder others may not use as the umask lets them."""
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in top.rglob("*") if not path.is_symlink()}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in expected}
    return [f"{path.relative_to(top)} {modes[path]:o}" for path in expected if modes[path] != expected[path]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report"], "run: cannot be written: Permission denied. Give --out FOLDER to write the report elsewhere."),
        (["evaluate", "--stage", "1"], "run/stage1/scores: cannot be written: Permission denied. Who scores"),
        (["watch", "--until-finished"], "run/stage1/claims: cannot be written: Permission denied. Who scores"),
        (
            ["ensemble", "--set", "test", "--choose-on", "val"],
            "run/ensemble: cannot be written: Permission denied. Name",
        ),
        (["export", "--out", "{run}/model"], "--out: {run}/model cannot be written: Permission denied"),
        (["predict", "--set", "val", "--out", "{run}/p.h5"], "--out: {run}/p.h5 cannot be written: Permission denied"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_write_into_anothers_run_is_refused_in_one_line(
    anothers_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command, *options = (word.format(run=anothers_run) for word in arguments)
    before = sorted(anothers_run.rglob("*"))
    capsys.readouterr()
    with bound_by_modes():
        assert said.format(run=anothers_run) in refused(capsys, command, str(anothers_run), *options)
    assert sorted(anothers_run.rglob("*")) == before


def test_a_run_that_may_only_be_read_is_looked_at_reported_exported_and_predicted_with(
    anothers_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    with bound_by_modes():
        assert main(["status", str(anothers_run)]) == 0
        assert main(["report", str(anothers_run), "--out", str(out / "report")]) == 0
        assert main(["export", str(anothers_run), "--out", str(out / "model")]) == 0
        assert main(["predict", str(anothers_run), "--set", "val", "--out", str(out / "p.h5")]) == 0
    assert (out / "report" / "report.html").exists() and list((out / "report" / "figures").glob("*.pdf"))


@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_a_training_in_anothers_run_is_refused_and_deletes_nothing(
    anothers_run: Path, debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    before = sorted(anothers_run.rglob("*"))
    train = ["train", "--config", str(debug_config), "--run", str(anothers_run), f"data.shards={tiny_shards}"]
    capsys.readouterr()
    with bound_by_modes():
        assert refused(capsys, *train, *options)
    assert sorted(anothers_run.rglob("*")) == before


def make(kind: str, path: Path) -> Path:
    """A path at which something is wrong."""
    if kind == "missing above":
        return path / "missing" / "x"
    if kind == "a file":
        path.write_text("hello\n")
    if kind == "an empty file":
        path.touch()
    if kind == "below a file":
        path.touch()
        return path / "x"
    if kind in ("a closed folder", "in a closed folder"):
        path.mkdir(mode=0)
    if kind == "a closed file":
        path.touch(mode=0)
    if kind == "a link to nothing":
        path.symlink_to("gone")
    if kind == "a loop of links":
        path.symlink_to(path.name)
    if kind == "a long name":
        return path.with_name("n" * 300)
    return path / "x" if kind == "in a closed folder" else path


KINDS = (
    "missing above", "a file", "an empty file", "below a file", "a closed folder", "in a closed folder",
    "a closed file", "a link to nothing", "a loop of links", "a long name",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_cannot_be_used_is_one_line_that_names_it(
    tmp_path: Path,
    debug_run: Path,
    debug_config: Path,
    tiny_shards: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    path = make(kind, tmp_path / "path")
    word, config, new = str(path), str(debug_config), str(tmp_path / "new")
    layout = str(ROOT / "configs" / "datasets" / "algonauts2025.yaml")
    read: list[tuple[Main, list[str]]] = [
        (main, ["train", "--config", word, "--run", new]),
        (main, ["train", "--config", config, "--run", new, f"data.shards={word}"]),
        (main, ["status", word]),
        (main, ["evaluate", word]),
        (main, ["report", word]),
        (main, ["export", word, "--out", new]),
        (main, ["predict", word, "--set", "val", "--out", new]),
        (main, ["ensemble", word, "--set", "test", "--choose-on", "val"]),
        (check_shards.main, [word]),
        (make_shards.main, ["--layout", word, "--root", new, "--out", new]),
        (make_shards.main, ["--layout", layout, "--root", word, "--out", new]),
        (import_upstream.main, [word, "--run", new, "--config", config, f"data.shards={tiny_shards}"]),
    ]
    write: list[tuple[Main, list[str]]] = [
        (main, ["train", "--config", config, "--run", word, f"data.shards={tiny_shards}"]),
        (main, ["report", str(debug_run), "--out", word]),
        (main, ["export", str(debug_run), "--out", word]),
        (main, ["predict", str(debug_run), "--set", "val", "--out", word]),
        (make_synthetic.main, ["--tiny", "--out", word]),
    ]
    if kind == "a link to nothing":  # make_synthetic follows it
        write = write[:-1]
    refusals = [*read, *(write if kind != "missing above" else [])]
    if kind in ("below a file", "a closed folder", "in a closed folder", "a long name"):
        refusals.append((bench.main, ["data", "--json", word]))
    capsys.readouterr()
    for command, arguments in refusals:
        with bound_by_modes():
            assert command(arguments) == 2, arguments
        said = capsys.readouterr()
        text = said.err or said.out  # check_shards prints its problems
        assert text.count("\n") == 1 and (word in text or str(tmp_path / "path") in text), (arguments, text)
    assert not (tmp_path / "new").exists()


def test_another_users_run_is_refused_to_a_real_other_user(debug_run: Path) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        shutil.copytree(debug_run, run)
        set_modes(Path(folder), 0o755, 0o644)
        other = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        Path(folder, "matplotlib").mkdir()
        Path(folder, "matplotlib").chmod(0o777)
        environment = {**ENVIRONMENT, "MPLCONFIGDIR": str(Path(folder, "matplotlib"))}
        done = subprocess.run(
            [*other, sys.executable, "-m", "trainer", "report", str(run)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if "Permission denied: '" in done.stderr or "cannot execute" in done.stderr:
        pytest.skip("another user cannot read the interpreter or the checkout here")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {run}: cannot be written: Permission denied. Give --out FOLDER to write the report elsewhere."
    )


def test_a_run_lives_where_there_are_no_hard_links(
    debug_config: Path, tiny_shards: Path, debug_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, resumed, scored by workers; the scores are those of a run on any other file system."""
    monkeypatch.setattr(os, "link", refuse)
    run, config = str(tmp_path / "run"), str(debug_config)
    train = ["train", "--config", config, "--run", run, f"data.shards={tiny_shards}", "--stage", "1"]
    assert main(train) == 0
    assert main([*train, "--resume"]) == 0
    assert main(["watch", run, "--until-finished", "--stage", "1"]) == 0
    scored = sorted((tmp_path / "run" / "stage1" / "scores").glob("*-test-mean.npy"))
    assert scored and all(
        path.read_bytes() == (debug_run / "stage1" / "scores" / path.name).read_bytes() for path in scored[-1:]
    )
    left = [path.name for path in (tmp_path / "run").rglob(".*")]
    assert left == [] and list((tmp_path / "run" / "stage1" / "claims").iterdir()) == []


def test_what_a_run_writes_has_the_modes_of_the_umask(
    debug_config: Path, tiny_source: Path, tmp_path: Path, debug_run: Path
) -> None:
    home, config = tmp_path / "home", str(debug_config)
    before = os.umask(0o002)
    try:
        assert wrong_modes(debug_run, before) == []
        layout = str(ROOT / "configs" / "datasets" / "algonauts2025.yaml")
        streams = ["llama_3.2_3b/layers.11", "whisper/layers.12"]
        arguments = ["--layout", layout, "--root", str(tiny_source), "--out", str(home / "shards")]
        assert make_shards.main([*arguments, "--features", *streams]) == 0
        run, few = str(home / "run"), ["stage1.max_steps=1", "stage2.max_steps=1", "evaluate.samples=2"]
        assert main(["train", "--config", config, "--run", run, f"data.shards={home / 'shards'}", *few]) == 0
        assert main(["evaluate", run, "--set", "val"]) == 0
        assert main(["ensemble", run, "--set", "test", "--choose-on", "val"]) == 0
        assert main(["export", run, "--out", str(home / "model")]) == 0
        assert main(["predict", run, "--set", "val", "--out", str(home / "p.h5")]) == 0
    finally:
        os.umask(before)
    kinds = {path.suffix for path in home.rglob("*") if path.is_file()}
    assert {".safetensors", ".json", ".jsonl", ".npy", ".npz", ".tar", ".png", ".yaml", ".md", ".h5"} <= kinds
    assert wrong_modes(home, 0o002) == []

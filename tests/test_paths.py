"""`~`, `$VAR` and `${VAR}` in paths of configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_config import MINIMAL
from trainer.cluster.settings import load_settings
from trainer.config import load_config
from trainer.errors import InputError
from trainer.paths import _escaped, expanded
from trainer.strict import StrictModel


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$x")
    monkeypatch.setenv("REMOTE", "s3://bucket/$x")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "/home/me"), ("~/data", "/home/me/data"), ("$HOME/a", "/home/me/a"), ("${HOME}s", "/home/mes"),
        ("/a/$SCRATCH/b", "/a//scratch/$x/b"), ("a/~/b", "a/~/b"), ("./~", "./~"), ("data", "data"), ("", ""),
        ("/a$$b", "/a$b"), ("$$HOME", "$HOME"), ("/a$", "/a$"), ("/a$/b", "/a$/b"), ("/$5", "/$5"),
        ("$REMOTE/y", "s3://bucket/$x/y"), ("$HOME/{subject}.nii", "/home/me/{subject}.nii"),
        ("pipe:cat $HOME/{name}", "pipe:cat $HOME/{name}"), ("https://h/a?$x=~", "https://h/a?$x=~"),
    ],
)  # fmt: skip
def test_home_and_variables_are_put_in_and_urls_are_left_alone(path: str, expected: str) -> None:
    assert expanded(path) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NOWHERE/x", r"found \$NOWHERE in \$NOWHERE/x, expected a variable that is set"),
        ("/a/${NOWHERE}", r"found \$\{NOWHERE\}"),
        ("$EMPTY/x", r"found \$EMPTY"),
        ("${HOME", r"found \$\{HOME in \$\{HOME, expected a variable as \$NAME or \$\{NAME\}"),
        ("${HOME:-x}", r"found \$\{HOME:-x\}"),
        ("${}", r"found \$\{\}"),
        ("~no-such-user-here/x", "found ~no-such-user-here/x, expected ~ or ~NAME of a user"),
    ],
)
def test_variables_and_users_that_are_not_there_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expanded(path)


@given(st.text("ab/$~{}:", max_size=8))
def test_escaped_path_expands_to_itself(path: str) -> None:
    if not path.startswith("~"):  # nothing expanded does
        assert expanded(_escaped(path)) == path


KEYS = ("data.shards", "data.cache_dir", "evaluate.labels", "evaluate.atlas")


def config_file(folder: Path) -> Path:
    path = folder / "c.yaml"
    path.write_text(MINIMAL)
    return path


def value(model: StrictModel, key: str) -> object:
    found: object = model
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("key", KEYS)
def test_every_path_of_the_configuration_is_expanded_and_written_back(key: str, tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path), [f"{key}=$SCRATCH/a"])
    assert value(config, key) == "/scratch/$x/a"
    (tmp_path / "stored.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "stored.yaml") == config
    with pytest.raises(InputError, match=rf"{key}: found \$NOWHERE in \$NOWHERE/a") as caught:
        load_config(config_file(tmp_path), [f"{key}=$NOWHERE/a"])
    assert "\n" not in str(caught.value)


def test_stored_configuration_does_not_need_the_variable_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "stored.yaml").write_text(load_config(config_file(tmp_path), ["data.shards=$DATA/s"]).to_yaml())
    monkeypatch.delenv("DATA")
    assert load_config(tmp_path / "stored.yaml").data.shards == "/data/s"


@pytest.mark.parametrize("key", ["python", "shards.layout", "shards.root"])
def test_every_path_of_the_slurm_settings_is_expanded_once(key: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("{}")
    settings = load_settings(tmp_path / "s.yaml", [f"{key}=$SCRATCH/a"])
    assert value(settings, key) == "/scratch/$x/a"
    assert value(settings.of("shards"), key.removeprefix("shards.")) == "/scratch/$x/a"
    with pytest.raises(InputError, match=rf"{key}: found \$NOWHERE"):
        load_settings(tmp_path / "s.yaml", [f"{key}=$NOWHERE/a"])


@pytest.mark.parametrize("override", ["data.shards=''", "data.cache_dir=' '", "evaluate.labels=''"])
def test_an_empty_path_is_refused(override: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(InputError, match=r"(shards|cache_dir|labels): found ' ?', expected a path"):
        load_config(file, [override])


def test_only_paths_are_expanded(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path), ["datasets.val.filter.runs=[$NOWHERE, '~']"])
    assert config.datasets["val"].filter.runs == ["$NOWHERE", "~"]

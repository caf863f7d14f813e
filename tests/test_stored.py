"""What a stored configuration means: its own keys, and those that were added to the program after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_config import MINIMAL
from trainer.config import load_config
from trainer.errors import InputError
from trainer.stored import continued, load_stored


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_key_that_a_stored_configuration_lacks_means_what_was_done_before_it_existed(config_file: Path) -> None:
    assert load_config(config_file).window_trs == 256
    assert load_stored(config_file).window_trs is None
    config_file.write_text(MINIMAL + "stage2: {window_trs: 300}")
    assert load_stored(config_file).window_trs == 300


@pytest.mark.parametrize("text", ["stage2: 3", "stage2:", "bold: [1]", "datasets: {train: , val: }", "datasets: 4"])
def test_a_stored_configuration_of_wrong_types_is_refused_in_one_line(config_file: Path, text: str) -> None:
    key = text.partition(":")[0]
    config_file.write_text("\n".join(line for line in MINIMAL.splitlines() if not line.startswith(key)) + f"\n{text}\n")
    with pytest.raises(InputError, match=key):
        load_stored(config_file)


@pytest.mark.parametrize(
    ("stored", "given", "window"),
    [("", "", None), ("stage2: {window_trs: 300}", "", 256), ("", "stage2: {window_trs: 99}", 99)],
)
def test_a_resume_keeps_the_meaning_of_keys_that_the_stored_configuration_lacks(
    tmp_path: Path, stored: str, given: str, window: int | None
) -> None:
    kept, own = tmp_path / "kept.yaml", tmp_path / "own.yaml"
    kept.write_text(MINIMAL + stored)
    own.write_text(MINIMAL + given)
    config = continued(load_config(own), [tmp_path / "missing.yaml", kept])
    assert config.window_trs == window
    assert (config.seed, config.datasets) == (load_config(own).seed, load_config(own).datasets)
    assert continued(load_config(own), [tmp_path / "missing.yaml"]) == load_config(own)

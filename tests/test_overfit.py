"""tools/overfit.py says whether stage 2 can memorise one batch, and its exit status agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.overfit import main


def test_it_passes_or_fails_by_the_threshold_and_says_so(
    debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["stage2.decoder.channels=[64, 64]", "stage2.lr=2e-3", "batch_size=1", "stage2.decoder.dropout=0.0"]
    arguments = ["--config", str(debug_config), "--subject-idx", "1", f"data.shards={tiny_shards}", *options]
    assert main([*arguments, "--steps", "250", "--threshold", "0.6"]) == 0
    printed = capsys.readouterr().out
    assert "Stage 2 memorises one batch." in printed
    r = float(printed.split("its target: ")[1].split()[0])
    assert r > 0.5
    assert main([*arguments, "--steps", "3"]) == 1
    assert "expected below 15%" in capsys.readouterr().out


def test_a_subject_that_is_not_there_is_refused(
    debug_config: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(debug_config), "--subject-idx", "4", f"data.shards={tiny_shards}"]) == 2
    assert "found 4, expected 0 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-2"])
def test_it_takes_one_step_at_least(debug_config: Path, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert main(["--config", str(debug_config), "--steps", steps]) == 2
    assert f"--steps: too few: found {steps}, expected 1 or more" in capsys.readouterr().err

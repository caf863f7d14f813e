"""Any number of processes builds the same bytes, and they end together. Each start costs seconds, so there are few."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import Invented
from tools.make_shards import main

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 120
"""A bound for what takes seconds, on a machine that may be busy."""

DRIVER = '''
"""The tool with one run a tar, a log of who writes which tar, and tars that take the time a test asks for."""
import os, sys, time
from pathlib import Path
import tools.make_shards as tool
import trainer.data.build as building

seconds = dict(word.split("=") for word in os.environ.get("SECONDS_OF", "").split())

def write(path, samples, original=building.write_shard):
    with Path(os.environ["WRITTEN"]).open("a") as log:
        log.write(f"{path.stem} {os.getpid()}\\n")
    time.sleep(float(seconds.get(path.stem, seconds.get("each", 0))))
    return original(path, samples)

building.write_shard = write
building.deal = lambda runs, streams, size: [[run] for run in runs]
status = tool.main()
if len(sys.argv) > 1 and os.environ.get("WITHOUT_MPI"):
    assert not any(name.startswith("mpi4py") for name in sys.modules)
sys.exit(status)
'''


def _mpiexec() -> str:
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("no mpiexec beside the Python or on the PATH (pip install mpich)")
    return found


class Building:
    """A build in other processes."""

    def __init__(self, tmp_path: Path, invented: Invented, out: str, ranks: int = 0, *more: str, **settings: str):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER)
        self.log = tmp_path / f"written-{out}-{time.monotonic_ns()}"
        start = [_mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py"] if ranks else [sys.executable]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI", "OMPI_", "MV2_"))}
        environment |= {"PYTHONPATH": str(ROOT), "WRITTEN": str(self.log), "OMP_NUM_THREADS": "1", **settings}
        self.out, self.home = tmp_path / out, tmp_path / f".{out}.building"
        self.process = subprocess.Popen(
            [*start, str(driver), *invented.arguments(self.out, *more)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> int:
        """Wait for the end; leaves no process behind even where the test fails."""
        try:
            self.printed, self.errors = self.process.communicate(timeout=WAIT_SECONDS)
        finally:
            self.process.kill()
            left = self.left()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert not left, f"{len(left)} of the ranks outlived the build"
        return self.process.returncode

    def written(self) -> dict[str, int]:
        """Which tar which process began."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return {tar: int(pid) for tar, pid in (line.split() for line in lines)}

    def left(self) -> list[int]:
        """Ranks that are still at work a moment after the end."""
        for _ in range(100):
            left = [pid for pid in set(self.written().values()) if _works(pid)]
            if not left:
                return []
            time.sleep(0.1)
        return left

    def content(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.out.iterdir()}


def _works(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(WAIT_SECONDS * 50):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.fixture(scope="module")
def reference(invented_source: Invented, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one undisturbed process makes; where the source lies does not enter."""
    alone = Building(tmp_path_factory.mktemp("reference"), invented_source, "alone", WITHOUT_MPI="1")
    assert alone.end() == 0, alone.errors
    assert len(set(alone.written().values())) == 1 and len(alone.written()) == 4
    return alone.content()


@pytest.mark.slow
def test_every_byte_is_the_same_for_any_number_of_ranks(
    invented: Invented, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    for ranks in (1, 2, 3):
        # tars that take a moment, so that each rank comes to write one
        built = Building(tmp_path, invented, f"ranks{ranks}", ranks, SECONDS_OF="each=0.3")
        assert built.end() == 0, built.errors
        assert built.content() == reference
        assert len(set(built.written().values())) == ranks
        assert not built.home.exists()
        assert f"ranks{ranks}: 4 runs" in built.printed and "4/4 runs: " in built.printed


@pytest.mark.slow
def test_bad_run_ends_all_ranks_whatever_they_are_at(invented: Invented, tmp_path: Path) -> None:
    values = invented.features["alpha_2", "Audio"].copy()
    values[3] = np.nan
    invented.put_features("Audio", "alpha_2", "wave", values)
    # rank 0 and another one are busy for far longer than this test waits while the third comes to the bad run
    built = Building(tmp_path, invented, "bad", 3, SECONDS_OF="shard-00000=3600 shard-00003=3600")
    assert built.end() == 2
    assert "alpha_2.hdf5: wave: not a finite number" in built.errors and "Traceback" not in built.errors
    assert not built.out.exists() and not list(tmp_path.glob(".bad*"))

    skipping = Building(tmp_path, invented, "skipping", 2, "--skip-bad")
    assert skipping.end() == 0, skipping.errors
    assert "skipped: cinema_alpha_2: " in skipping.printed
    assert b'"run": "cinema_alpha_2"' in skipping.content()["manifest.json"]
    assert len(skipping.content()) == 3 + 2


def _finished(building: Building) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of the tars that have a record."""
    (start,) = building.home.glob("start-*")
    tars = [start / "shards" / f"{record.name}.tar" for record in start.glob("records/shard-*")]
    return {tar.name: (tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars}


def _goes_on(killed: Building, tmp_path: Path, invented: Invented, reference: dict[str, bytes]) -> None:
    """The next start keeps the finished tars as they are and comes to the same bytes."""
    kept = _finished(killed)
    assert kept and not killed.out.exists()
    again = Building(tmp_path, invented, killed.out.name)
    assert again.end() == 0, again.errors
    assert {f"{name}.tar" for name in again.written()} == {n for n in reference if n.endswith("tar")} - set(kept)
    assert again.content() == reference
    for name, was in kept.items():
        assert ((again.out / name).stat().st_ino, (again.out / name).stat().st_mtime_ns) == was
    assert not again.home.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_of_a_killed_build_writes_only_what_is_missing(
    number: int, invented: Invented, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    killed = Building(tmp_path, invented, "killed", SECONDS_OF="shard-00002=3600")
    _until(lambda: "shard-00002" in killed.written())
    killed.process.send_signal(number)
    assert killed.end() == (-number if number == signal.SIGKILL else 128 + number)
    assert set(_finished(killed)) == {"shard-00000.tar", "shard-00001.tar"}
    _goes_on(killed, tmp_path, invented, reference)


@pytest.mark.slow
@pytest.mark.parametrize("leader", [True, False])
def test_killed_rank_ends_the_others_and_the_finished_tars_are_kept(
    leader: bool, invented: Invented, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    # rank 0 begins at the end of the list, the other at its beginning
    killed = Building(tmp_path, invented, "killed", 2, SECONDS_OF="shard-00001=3600 shard-00002=3600")
    _until(lambda: len(killed.written()) == 4)
    os.kill(killed.written()["shard-00002" if leader else "shard-00001"], signal.SIGKILL)
    assert killed.end() != 0
    _goes_on(killed, tmp_path, invented, reference)


@pytest.mark.slow
def test_terminated_mpiexec_ends_all_ranks_and_the_finished_tars_are_kept(
    invented: Invented, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    killed = Building(tmp_path, invented, "killed", 2, SECONDS_OF="shard-00001=3600 shard-00002=3600")
    _until(lambda: len(killed.written()) == 4)
    killed.process.terminate()
    assert killed.end() != 0
    assert "interrupted by SIGTERM" in killed.errors
    _goes_on(killed, tmp_path, invented, reference)


def test_rank_that_fails_by_our_mistake_ends_all_ranks(invented: Invented, tmp_path: Path) -> None:
    built = Building(tmp_path, invented, "broken", 2, SECONDS_OF="shard-00000=soon shard-00003=3600")
    assert built.end() not in (0, 2)
    assert "could not convert string to float: 'soon'" in built.errors
    assert not built.out.exists() and not list(tmp_path.glob(".broken*"))


def test_tasks_of_slurm_that_mpi_does_not_connect_are_refused(
    invented: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert main(invented.arguments(tmp_path / "shards")) == 2
    error = capsys.readouterr().err
    assert "SLURM_NTASKS" in error and "found an MPI world of 1, expected the 4 tasks" in error
    assert "--mpi=pmi2" in error and "--mpi=pmix" in error
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main(invented.arguments(tmp_path / "shards")) == 0


def test_wrong_command_line_ends_with_status_2_on_all_ranks(invented: Invented, tmp_path: Path) -> None:
    invented.layout.write_text(invented.layout.read_text().replace("tr:", "trs:"))
    built = Building(tmp_path, invented, "wrong", 2)
    assert built.end() == 2
    assert built.errors.count("trs: unknown key") == 1

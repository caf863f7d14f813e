"""Over the nodes of a real cluster: MPI builds the same bytes, and every launcher trains to the losses of one process.

Starts cost far more than the few steps: all launches share one job, and two of the three train stage 1 only.
"""

from __future__ import annotations

import json
import math
import shlex
import socket
import sys
from pathlib import Path

import pytest

from tests.slurm.lab import ROOT, Cluster
from trainer.run.directory import RunDirectory, StageDirectory

pytestmark = pytest.mark.slow

STREAMS = ["llama_3.2_3b/layers.11", "whisper/layers.12"]
STEPS = 6
OPTIONS = [
    "log_every=1", "batch_size=8", "num_samples=24", "checkpoint.every_steps=null", "tracker=none",
    f"stage1.max_steps={STEPS}", "stage1.model.hidden_model=transformer", "stage1.model.dropout=0.2",
    "stage1.model.transformer={num_heads: 2, depth: 1}",
    f"stage2.max_steps={STEPS}", "stage2.cross_fit=0", "stage2.decoder.dropout=0.2",
]  # fmt: skip
ACCELERATE = {"ddp": ("multi_node.yaml", "4"), "zero2": ("deepspeed_zero2_cpu.yaml", "2")}
"""Files of configs/accelerate, and processes on all nodes."""


BUILD = """
# tools/make_shards.py with one run a tar, in which no node goes on before each of them has begun a tar
import os, socket, sys, time
from pathlib import Path
import tools.make_shards as tool
import trainer.data.build as building

begun, nodes = Path(os.environ["BEGUN"]), int(os.environ["SLURM_JOB_NUM_NODES"])

def write(path, samples, original=building.write_shard):
    (begun / socket.gethostname()).touch()
    end = time.monotonic() + 120
    while len(list(begun.iterdir())) < nodes and time.monotonic() < end:
        time.sleep(0.05)
    return original(path, samples)

building.write_shard = write
building.deal = lambda runs, streams, size: [[run] for run in runs]
sys.exit(tool.main())
"""


def building(source: Path, out: Path) -> list[str]:
    """Arguments of tools/make_shards.py."""
    layout = str(ROOT / "configs" / "datasets" / "algonauts2025.yaml")
    return ["--layout", layout, "--root", str(source), "--out", str(out), "--features", *STREAMS]


def test_mpi_over_two_nodes_writes_the_bytes_of_one_process(
    cluster: Cluster, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.data.build
    from tools.make_shards import main

    (tmp_path / "build.py").write_text(BUILD)
    (tmp_path / "begun").mkdir()
    tool = [sys.executable, "-m", "mpi4py", tmp_path / "build.py", *building(tiny_source, tmp_path / "four")]
    resources = ["--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--mpi=pmi2"]
    cluster.srun(*resources, *tool, BEGUN=str(tmp_path / "begun"))
    assert {path.name for path in (tmp_path / "begun").iterdir()} == {"n1", "n2"}

    monkeypatch.setattr(trainer.data.build, "deal", lambda runs, streams, size: [[run] for run in runs])
    assert main(building(tiny_source, tmp_path / "one")) == 0
    one, four = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "four"))
    assert one == four and len(one) > 5


def test_tasks_that_mpi_does_not_connect_build_nothing(cluster: Cluster, tiny_source: Path, tmp_path: Path) -> None:
    tool = [sys.executable, "-m", "mpi4py", "tools/make_shards.py", *building(tiny_source, tmp_path / "shards")]
    alone = cluster.srun("--nodes=2", "--ntasks-per-node=1", "--mpi=none", *tool, check=False)
    assert alone.returncode == 2
    said = [line for line in alone.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2, alone.stderr
    assert all("SLURM_NTASKS" in line and "found an MPI world of 1" in line and "--mpi=pmi2" in line for line in said)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same training by one process here, and on two nodes under each launcher."""
    from trainer.cli import main

    folder = tmp_path_factory.mktemp("nodes")

    def training(name: str) -> list[str]:
        config = str(ROOT / "configs" / "debug.yaml")
        return ["train", "--config", config, "--run", str(folder / name), f"data.shards={tiny_shards}", *OPTIONS]

    lines = [
        "set -e",
        f"srun --kill-on-bad-exit=1 {shlex.join([sys.executable, '-m', 'trainer', *training('srun')])}",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    ]
    for name, (file, processes) in ACCELERATE.items():
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}"]
        launch += ["--num_machines", "2", "--num_processes", processes, "--main_process_port", str(port)]
        each = f"{shlex.join(launch)} --main_process_ip $0 --machine_rank $SLURM_NODEID"
        each += f" -m {shlex.join(['trainer', *training(name), '--stage', '1'])}"
        lines.append(f'srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c {shlex.quote(each)} "$first"')
    job = cluster.submit("launches", lines, "--nodes=2", "--ntasks-per-node=2")
    assert main(training("one")) == 0
    cluster.wait_for_state(job, "COMPLETED", seconds=900)
    return folder


def losses(stage: StageDirectory) -> list[float]:
    lines = [line for line in stage.read_metrics() if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def assert_same_losses(runs: Path, name: str, stage: int, launcher: str, hosts: list[str]) -> None:
    """A stage of a run over nodes was the one training that was asked for, and its losses are those of one process."""
    one, several = (RunDirectory(runs / run).stage(stage) for run in ("one", name))
    start = json.loads((several.path / "starts" / "1.json").read_text())
    assert (start["world"], start["launcher"], start["hosts"]) == (len(hosts), launcher, hosts)
    assert start["host"] == hosts[0] and start["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    pairs = list(zip(losses(one), losses(several), strict=True))
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs), pairs
    assert several.finished() is not None


@pytest.mark.parametrize("stage", [1, 2])
def test_four_tasks_of_srun_on_two_nodes_have_the_losses_of_one_process(runs: Path, stage: int) -> None:
    assert_same_losses(runs, "srun", stage, "srun", ["n1", "n1", "n2", "n2"])


@pytest.mark.parametrize(("name", "hosts"), [("ddp", ["n1", "n1", "n2", "n2"]), ("zero2", ["n1", "n2"])])
def test_a_launcher_of_accelerate_on_each_of_two_nodes_has_the_losses_of_one_process(
    runs: Path, name: str, hosts: list[str]
) -> None:
    assert_same_losses(runs, name, 1, "accelerate launch", hosts)

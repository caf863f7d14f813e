"""Over the nodes of a real cluster: MPI builds the same bytes, and every launcher trains to the losses of one process.

Starts cost far more than the few steps of training, so all launches share one job, and what each left is looked at.
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
ACCELERATE = {"ddp": "multi_node.yaml", "zero2": "deepspeed_zero2_cpu.yaml"}


def building(source: Path, out: Path) -> list[str]:
    """Arguments of tools/make_shards.py."""
    layout = str(ROOT / "configs" / "datasets" / "algonauts2025.yaml")
    return ["--layout", layout, "--root", str(source), "--out", str(out), "--features", *STREAMS]


def test_mpi_over_two_nodes_writes_the_bytes_of_one_process(
    cluster: Cluster, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    tool = [sys.executable, "-m", "mpi4py", "tools/make_shards.py", *building(tiny_source, tmp_path / "shards")]
    cluster.srun("--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--mpi=pmi2", *tool)
    one, four = ({path.name: path.read_bytes() for path in out.iterdir()} for out in (tiny_shards, tmp_path / "shards"))
    assert one == four


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
    """A folder with the same training by one process here, and by four on two nodes under each launcher."""
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
    for name, file in ACCELERATE.items():
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}"]
        launch += ["--num_machines", "2", "--num_processes", "4", "--main_process_port", str(port)]
        each = f"{shlex.join(launch)} --main_process_ip $0 --machine_rank $SLURM_NODEID"
        each += f" -m {shlex.join(['trainer', *training(name)])}"
        lines.append(f'srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c {shlex.quote(each)} "$first"')
    job = cluster.submit("launches", lines, "--nodes=2", "--ntasks-per-node=2")
    assert main(training("one")) == 0
    cluster.wait_for_state(job, "COMPLETED", seconds=900)
    return folder


def losses(stage: StageDirectory) -> list[float]:
    lines = [line for line in stage.read_metrics() if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(
    ("name", "launcher"), [("srun", "srun"), ("ddp", "accelerate launch"), ("zero2", "accelerate launch")]
)
def test_four_processes_on_two_nodes_have_the_losses_of_one(
    cluster: Cluster, runs: Path, name: str, launcher: str
) -> None:
    n1, n2 = cluster.hosts
    for number in (1, 2):
        one, four = (RunDirectory(runs / run).stage(number) for run in ("one", name))
        start = json.loads((four.path / "starts" / "1.json").read_text())
        assert (start["world"], start["launcher"], start["hosts"]) == (4, launcher, [n1, n1, n2, n2])
        assert start["host"] == n1 and start["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
        pairs = list(zip(losses(one), losses(four), strict=True))
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in pairs), (number, pairs)
        assert four.finished() is not None

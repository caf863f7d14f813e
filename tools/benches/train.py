"""Many processes: what kills cost (nothing), how two processes scale, what checkpoints cost, what ZeRO-2 saves.

The kills run the tiny data, since they are about order; the speeds are those of stage 1 at the published widths.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.benches import ROOT, Row, below, in_turns
from tools.benches.data import BATCH, WIDTHS, make_data
from tools.make_shards import main as make_shards
from tools.make_synthetic import main as make_synthetic
from trainer.config import load_config
from trainer.data.batches import Batch
from trainer.models.build import Shapes, build_anchor
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.run.files import write_json
from trainer.run.processes import make_processes
from trainer.training.phases import AnchorObjective
from trainer.training.update import make_update, state_bytes

STEPS = 200
KILLS = {1: 20, 2: 5}
PATIENCE_S = 300.0
LARGE = ["stage1.model.embed_dim=768", "stage1.model.transformer={depth: 8, num_heads: 12}"]
"""configs/large.yaml cut down to 71 M parameters, so that two ranks fit on a workstation."""
ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
}
"""What `accelerate launch` with a DeepSpeed file tells its processes."""


def measure(scratch: Path) -> list[Row]:
    """All rows; about 4 GB of scratch and 10 minutes on two cores."""
    return [*kill_rows(scratch), *speed_rows(scratch), *state_rows(scratch)]


def kill_rows(scratch: Path) -> list[Row]:
    """SIGKILL at random moments of a run of 200 steps: resumes must end at the weights of an uninterrupted run."""
    source, shards = scratch / "tiny", scratch / "tiny_shards"
    assert make_synthetic(["--tiny", "--out", str(source)]) == 0
    layout = str(ROOT / "configs/datasets/algonauts2025.yaml")
    streams = ["llama_3.2_3b/layers.11", "whisper/layers.12"]
    arguments = ["--layout", layout, "--root", str(source), "--out", str(shards), "--features", *streams]
    assert make_shards(arguments) == 0
    rows = []
    for world, kills in KILLS.items():
        options = [
            f"data.shards={shards}", "deterministic=true", "log_every=1", f"stage1.max_steps={STEPS}",
            "stage1.epochs=100", "checkpoint.every_steps=3", "stage1.model.hidden_model=transformer",
            "stage1.model.transformer={num_heads: 2, depth: 1}", "stage1.model.dropout=0.1",
        ]  # fmt: skip
        whole, killed = scratch / f"whole{world}", scratch / f"killed{world}"
        end(start("debug", whole, world, options))
        while_writing = kill_often(killed, world, options, kills)
        differing = differing_tensors(StageDirectory(whole / "stage1"), StageDirectory(killed / "stage1"))
        name = f"tensors that differ after {kills} SIGKILLs of {world} process{'es' * (world > 1)}"
        rows.append(Row(name, differing, "", goal="0", met=differing == 0))
        rows.append(Row("  of these kills, while a checkpoint was being written", while_writing, ""))
    return rows


def kill_often(run: Path, world: int, options: Sequence[str], kills: int) -> int:
    """Kill a run again and again, and let it come to its end; returns how often a checkpoint was being written."""
    draw = random.Random(world)
    while_writing = 0
    stage = StageDirectory(run / "stage1")
    for target in sorted(draw.sample(range(1, STEPS), kills)):
        process = start("debug", run, world, [*options, "--resume"])
        deadline = time.monotonic() + PATIENCE_S
        while last_step(stage) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        while_writing += bool(list(stage.checkpoints.glob(".step_*")))
    end(start("debug", run, world, [*options, "--resume"]))
    return while_writing


def last_step(stage: StageDirectory) -> int:
    """The last step that the log of a training names."""
    lines = stage.metrics.read_bytes().splitlines() if stage.metrics.exists() else []
    steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith(b"}")]
    return max(steps, default=0)


def differing_tensors(one: StageDirectory, other: StageDirectory) -> int:
    """How many weights and moments of the last checkpoints differ in a bit."""
    contents = []
    for stage in (one, other):
        last = checkpoint.steps(stage.checkpoints)[-1]
        assert last == STEPS
        found = checkpoint.load(checkpoint.folder_of(stage.checkpoints, last))
        contents.append({**found.model, **found.moments})
    assert contents[0].keys() == contents[1].keys()
    return sum(not torch.equal(tensor, contents[1][name]) for name, tensor in contents[0].items())


def speed_rows(scratch: Path) -> list[Row]:
    """Windows per second of one and two processes, and what a checkpoint costs, from the trainings' own log lines."""
    config = write_config(scratch, make_data(scratch))
    count = itertools.count()

    def begin(world: int, *options: str) -> tuple[StageDirectory, subprocess.Popen[bytes]]:
        run = scratch / f"speed{next(count)}"
        return StageDirectory(run / "stage1"), start(config, run, world, [*options, f"batch_size={BATCH * world}"])

    def speed(*worlds: int) -> float:
        trainings = [begin(world) for world in worlds]
        for _, process in trainings:
            end(process)
        rates = [[line["windows_per_s"] for line in train_lines(stage)[1:]] for stage, _ in trainings]
        return sum(statistics.median(each) for each in rates)

    rates = in_turns({"one": lambda: speed(1), "two": lambda: speed(2), "apart": lambda: speed(1, 1)}, 5)
    every = 50
    stage, process = begin(1, f"checkpoint.every_steps={every}", "log_every=1", f"stage1.max_steps={10 * every}")
    end(process)
    seconds = [BATCH / line["windows_per_s"] for line in train_lines(stage)]
    cost = 100 * checkpoint_cost(seconds, every)
    ratio = rates["two"] / (2 * rates["one"])
    return [
        Row("windows/s of 2 processes, against 2 x 1 process", rates["two"], "1/s", 2 * rates["one"], ratio,
            rates["two"] / rates["apart"], "ratio >= 0.9", ratio >= 0.9),
        Row("windows/s of 2 processes that know nothing of each other", rates["apart"], "1/s", 2 * rates["one"],
            rates["apart"] / (2 * rates["one"])),
        below(f"time that a checkpoint every {every} steps costs", cost, "%", 3),
    ]  # fmt: skip


def train_lines(stage: StageDirectory) -> list[dict[str, Any]]:
    """The log lines of the training itself."""
    return [line for line in stage.read_metrics() if line["kind"] == "train"]


def checkpoint_cost(seconds: Sequence[float], every: int) -> float:
    """The share of the time that checkpoints take: each one's next steps against the steps just before it, the median.

    Args:
        seconds: of each step, from the first one on; a checkpoint follows every `every`-th.
    """
    near = every // 2
    excess = [
        sum(seconds[k : k + near]) - sum(seconds[k - near : k]) for k in range(every, len(seconds) - near + 1, every)
    ]
    return statistics.median(excess) / (every * statistics.median(seconds))


def state_rows(scratch: Path) -> list[Row]:
    """Bytes of gradients and of Adam's state that a rank of two holds between backward and step, DDP and ZeRO-2."""
    held = {}
    for name, extra in {"ddp": {}, "zero2": ZERO_2}.items():
        out = scratch / f"{name}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        environment = {**os.environ, **extra, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "tools.benches.train", str(out)], env=environment, timeout=PATIENCE_S, check=True)
        held[name] = json.loads(out.read_text())
    total = {name: sum(sizes.values()) / 1e6 for name, sizes in held.items()}
    ratio = total["zero2"] / total["ddp"]
    return [
        Row("optimizer state and gradients of a rank, ZeRO-2 against DDP", total["zero2"], "MB", total["ddp"], ratio,
            goal="ratio <= 0.6", met=ratio <= 0.6),
    ]  # fmt: skip


def hold_state(out: Path) -> None:
    """One backward of configs/large.yaml, cut down, on this rank of two; the main one writes what it holds."""
    processes = make_processes(precision="no", deterministic=False, timeout_s=PATIENCE_S)
    assert processes.world == 2
    config = load_config(ROOT / "configs" / "large.yaml", LARGE)
    streams = [(name, 1, width) for name, width in zip(config.include_features, WIDTHS, strict=True)]
    anchor = build_anchor(config.stage1.model, Shapes(streams, ["1", "2", "3", "5"], 1000))
    objective = AnchorObjective(anchor, seed=0)
    update = make_update(anchor, objective, config.stage1, processes, precision="no")
    features = [torch.randn(1, 8, width) for width in WIDTHS]
    mask = torch.ones(1, 8, dtype=torch.bool)
    present = torch.ones(1, 4, dtype=torch.bool)
    batch = Batch(features, torch.randn(1, 4, 8, 1000), mask, mask, present, torch.tensor([processes.rank]))
    for _ in range(2):  # from the second step on, nothing is made for the first time
        with update.micro_batch(last=True):
            update.backward(update.objective(batch.to(processes.device), 0, 64))
        held = state_bytes(update)
        update.step(1e-4)
    if processes.is_main:
        write_json(out, held)


def write_config(scratch: Path, shards: Path) -> str:
    """Stage 1 at the published widths, 100 steps, on the bench's random data."""
    runs = "[run0*]"
    text = f"""
data: {{shards: {shards}}}
include_features: [s0/x, s1/x, s2/x, s3/x, s4/x]
datasets:
  train: {{filter: {{runs: {runs}}}}}
  val: {{filter: {{runs: [run10], trs: [0, 64]}}}}
val_set_name: val
num_samples: 8000
log_every: 25
tracker: none
stage1: {{epochs: 1, max_steps: 101}}
checkpoint: {{every_steps: null}}
"""
    path = scratch / "speed.yaml"
    path.write_text(text)
    return str(path)


def start(config: str, run: Path, world: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a training of stage 1 with one thread a process, in a group of its own."""
    file = config if config.endswith(".yaml") else str(ROOT / "configs" / f"{config}.yaml")
    # the two dashes keep torchrun from taking --run for an abbreviation of an option of its own
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m", "trainer", "--"]
    command = [sys.executable, "-m", *(launcher if world > 1 else ["trainer"])]
    arguments = ["train", "--config", file, "--run", str(run), "--stage", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload]


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a training that must come to its end."""
    _, error = process.communicate(timeout=2 * PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"a training ended with status {process.returncode}: {error.decode()[-2000:]}")


if __name__ == "__main__":
    hold_state(Path(sys.argv[1]))

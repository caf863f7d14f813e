"""What happens to jobs of a real cluster: time limits, preemption, kills, lost nodes, mistakes, sites without requeue.

Starts cost far more than steps, so several things happen to one job, and what can run side by side does. Whatever
happened to a training, its weights are those of one that was left alone, to the bit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.packages import need_command
from tests.slurm.lab import ROOT, Cluster
from trainer.run.directory import RunDirectory

pytestmark = pytest.mark.slow

STEPS, EVERY = 160, 40
SETTINGS = {"FMRI_FLOW_CODE": str(ROOT), "FMRI_FLOW_PYTHON": sys.executable}
OPTIONS = [
    "deterministic=true", f"num_samples={4 * STEPS}", "stage1.epochs=1", "log_every=4", "tracker=none",
    f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=1000", "timeout_s=120",
]  # fmt: skip
HOOK = """
import os, sys, time
if "trainer.cluster.task" in sys.orig_argv and "train" in sys.orig_argv:
    from trainer.training.loop import Training
    def learn(self, batches, learn=Training._learn):
        slow = time.time() < float(os.environ.get("SLOW_UNTIL", 0))
        time.sleep(1 if slow else 0.04)
        if self.step == int(os.environ.get("RAISE_AT", -1)) and self.processes.rank == 1:
            raise ValueError("a mistake of ours")
        learn(self, batches)
    Training._learn = learn
"""
"""Lets no machine train faster than things can happen to it, and makes a rank raise; as sitecustomize.py."""


class Plain:
    """A run whose jobs are the plain scripts, and what happens to it."""

    def __init__(self, cluster: Cluster, run: Path, shards: Path) -> None:
        self.cluster, self.run, self.shards = cluster, run, shards
        self.hook = run.with_name(f"{run.name}.hook")
        self.hook.mkdir()
        (self.hook / "sitecustomize.py").write_text(HOOK)
        self.settings = {**SETTINGS, "PYTHONPATH": str(self.hook)}
        self.stage = RunDirectory(run).stage(1)

    def train(self, *options: str, limit: int = 3, **settings: str) -> str:
        """Submit stage 1; returns the job's number."""
        rules = f"--max-requeues {limit} --requeue yes"
        return self._submit("stage1", options, self.configured(), FMRI_FLOW_RULES=rules, **settings)

    def configured(self) -> list[str]:
        """What every training here is told."""
        return ["--config", str(ROOT / "configs" / "debug.yaml"), f"data.shards={self.shards}", *OPTIONS]

    def evaluate(self) -> str:
        """Submit a worker for stage 1; returns the job's number."""
        return self._submit("evaluate", ["--nodes=1"], ["--stage", "1"])

    def build(self, source: Path, stream: str) -> str:
        """Submit the building of shards on two nodes; returns the job's number."""
        layout = ROOT / "configs" / "datasets" / "algonauts2025.yaml"
        shards = ["--layout", str(layout), "--root", str(source), "--out", f"{self.run}.shards", "--features", stream]
        return self._submit("shards", WORLDS[2], shards)

    def _submit(self, name: str, options: Sequence[str], arguments: list[str], **settings: str) -> str:
        logs = self.run / "slurm"
        logs.mkdir(parents=True, exist_ok=True)
        files = [f"--output={logs}/%j_0_log.out", f"--error={logs}/%j_0_log.err", "--cpus-per-task=1", "--time=60"]
        script = ROOT / "slurm" / f"{name}.sbatch"
        command = [*files, *options, script, "--run", self.run, *arguments]
        job = self.cluster.sbatch(*command, **self.settings, **settings)
        self.cluster.run(sys.executable, "-m", "trainer.run.jobs", "record", self.run, f"{NAMES[name]}={job}")
        return job

    def reaches(self, step: int, job: str) -> None:
        """Wait until the training has done a step."""

        def reached() -> bool:
            lines = self.stage.read_metrics()
            return bool(lines) and lines[-1]["step"] >= step

        self.cluster.wait_for(reached, f"step {step}", 240, job)

    def restarts(self, job: str, number: int) -> None:
        """Wait until SLURM has taken the job back into its queue for the `number`-th time."""
        count = str(number)
        self.cluster.wait_for(lambda: self.cluster.facts(job)["Restarts"] == count, f"restart {count}", 120, job)

    def kill(self, job: str, restart: int, rank: int) -> None:
        """SIGKILL for one task."""
        os.kill(self.record(job, restart, rank)["pid"], signal.SIGKILL)

    def record(self, job: str, restart: int, rank: int) -> Mapping[str, int]:
        """What a task said of itself."""
        return dict(json.loads((self.run / "slurm" / job / "tasks" / f"{restart}.{rank}.json").read_text()))

    def ends(self, job: str) -> list[str]:
        """How the starts of a job ended, as far as its batch script came to say it."""
        paths = sorted((self.run / "slurm" / job / "ends").glob("*.json"))
        return [json.loads(path.read_text())["verdict"] for path in paths]

    def log(self, job: str) -> str:
        """What the batch script and task 0 wrote to stderr."""
        return (self.run / "slurm" / f"{job}_0_log.err").read_text()

    def steps(self) -> set[int]:
        """The steps of all checkpoints."""
        return {int(path.name.removeprefix("step_")) for path in self.stage.checkpoints.glob("step_*")}

    def weights(self) -> bytes:
        """Of the last step."""
        return (self.stage.checkpoints / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()


NAMES = {"stage1": "stage1", "evaluate": "evaluate1", "shards": "shards"}
WORLDS = {2: ("--nodes=2", "--ntasks-per-node=1"), 4: ("--nodes=2", "--ntasks-per-node=2")}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Plain]:
    """Trainings on 2 and on 4 ranks that nothing happens to."""
    runs = {n: Plain(cluster, tmp_path_factory.mktemp("alone") / str(n), tiny_shards) for n in WORLDS}
    jobs = [run.train(*WORLDS[n]) for n, run in runs.items()]
    for job in jobs:
        cluster.wait_for_state(job, "COMPLETED")
    return runs


@pytest.fixture
def plain(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> Plain:
    """A run of its own."""
    return Plain(cluster, tmp_path / "run", tiny_shards)


def saved_at(plain: Plain, job: str) -> int:
    """The step at which the training last ended on SIGUSR2."""
    return int(re.findall(r"SIGUSR2 at step (\d+); the checkpoint is written", plain.log(job))[-1])


def test_a_signal_and_a_kill_are_survived_by_the_training_and_its_worker(
    cluster: Cluster, plain: Plain, alone: Mapping[int, Plain]
) -> None:
    job, worker = plain.train(*WORLDS[2], limit=1), plain.evaluate()
    plain.reaches(20, job)
    cluster.run("scancel", "--signal=USR2", job)
    plain.restarts(job, 1)
    step = saved_at(plain, job)
    assert plain.steps() == {saved for saved in alone[2].steps() if saved <= step} | {step}, "exactly one more"
    plain.reaches(2 * EVERY + 8, job)
    plain.kill(job, restart=1, rank=1)
    plain.restarts(job, 2)
    cluster.wait_for_state(worker, "RUNNING")
    plain.kill(worker, restart=0, rank=0)
    cluster.wait_for_state(job, "COMPLETED")
    assert plain.weights() == alone[2].weights()
    assert plain.steps() == alone[2].steps() | {step}
    starts = [json.loads((plain.stage.path / "starts" / f"{n}.json").read_text()) for n in (1, 2, 3)]
    assert [start["slurm"].get("SLURM_RESTART_COUNT", "0") for start in starts] == ["0", "1", "2"]
    assert plain.ends(job) == ["interrupted", "killed", "done"]
    assert "killed (1 of at most 1 times); requeued" in plain.log(job)
    assert plain.record(job, 0, 0)["status"] == plain.record(job, 0, 1)["status"] == 128 + signal.SIGUSR2
    assert plain.record(job, 1, 1)["status"] is None, "it had no time to say anything"

    cluster.wait_for_state(worker, "COMPLETED")
    assert plain.ends(worker) == ["killed", "done"]
    scored = {score["step"] for score in plain.stage.read_scores() if score["set"] == "test"}
    assert scored == plain.steps()


def test_preemption_is_survived(cluster: Cluster, plain: Plain, alone: Mapping[int, Plain]) -> None:
    job = plain.train(*WORLDS[4])
    plain.reaches(20, job)
    urgent = cluster.submit("urgent", ["sleep 1"], "--partition=urgent", "--nodes=2", "--exclusive")
    cluster.wait_for_state(urgent, "RUNNING", "COMPLETED")
    assert cluster.facts(job)["Restarts"] == "1"
    step = saved_at(plain, job)
    assert plain.steps() == {saved for saved in alone[4].steps() if saved <= step} | {step}, "exactly one more"
    cluster.wait_for_state(job, "COMPLETED")
    assert plain.weights() == alone[4].weights()
    assert plain.steps() == alone[4].steps() | {step}
    last = json.loads((plain.stage.path / "starts" / "2.json").read_text())
    assert last["world"] == 4 and last["slurm"]["SLURM_RESTART_COUNT"] == "1"


def test_an_error_of_ones_own_is_not_tried_again_nor_a_kill_without_end(
    cluster: Cluster, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    mistaken, killed, builds = (Plain(cluster, tmp_path / name, tiny_shards) for name in ("a", "b", "c"))
    of_build = builds.build(tiny_source, "llama_3.2_3b/layers.99")
    of_mistake = mistaken.train(*WORLDS[2], RAISE_AT="20")
    of_kill = killed.train("--nodes=1", limit=0)
    killed.reaches(20, of_kill)
    killed.kill(of_kill, restart=0, rank=0)
    cluster.wait_for_state(of_kill, "FAILED")
    assert "error: killed once, which is more often than max_requeues=0 allows" in killed.log(of_kill)
    cluster.wait_for_state(of_mistake, "FAILED")
    assert cluster.facts(of_mistake)["ExitCode"] == "1:0"
    assert "task 1 of 2 on n2 ended with status 1: ValueError: a mistake of ours" in mistaken.log(of_mistake)
    assert "error: failed, and is not tried again" in mistaken.log(of_mistake)
    assert mistaken.record(of_mistake, 0, 0)["status"] in (None, 75), "it lost the other one, or was killed with it"
    cluster.wait_for_state(of_build, "FAILED")
    assert cluster.facts(of_build)["ExitCode"] == "2:0", "MPI ends all ranks of a build, and that is no kill"
    assert {cluster.facts(job)["Restarts"] for job in (of_mistake, of_kill, of_build)} == {"0"}


def managers(job: str) -> list[Path]:
    """The processes of SLURM that run a job on its nodes."""
    title = f"slurmstepd: [{job}.".encode()
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if begins_with(path, title)]


def begins_with(path: Path, title: bytes) -> bool:
    try:
        return path.read_bytes().startswith(title)
    except OSError:
        return False


def test_a_lost_node_is_survived_and_a_cancelled_job_stays_so(cluster: Cluster, plain: Plain) -> None:
    job = plain.train("--nodes=1", "--nodelist=n2")
    plain.reaches(EVERY + 4, job)
    for state in ("down", "drain"):  # lost, and not back as soon as it answers
        cluster.scontrol("update", "nodename=n2", f"state={state}", "reason=test")
    try:
        plain.restarts(job, 1)
        cluster.wait_for(lambda: not managers(job), "the end of what ran on the node", 120, job)
    finally:
        cluster.scontrol("update", "nodename=n2", "state=resume")
    saved = (plain.stage.checkpoints / f"step_{EVERY:08d}" / "meta.json").stat().st_mtime_ns
    plain.reaches(2 * EVERY + 4, job)
    assert (plain.stage.checkpoints / f"step_{EVERY:08d}" / "meta.json").stat().st_mtime_ns == saved
    before = plain.steps()
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait_for(lambda: cluster.squeue("--jobs", job, "--format=%t") == ["CA"], "its end", 60, job)
    assert len(plain.steps() - before) == 1, "scancel leaves time to save"
    assert cluster.facts(job)["Restarts"] == "1"


def test_where_requeue_is_forbidden_the_links_finish_the_run_after_a_time_limit(cluster: Cluster, plain: Plain) -> None:
    arguments = [*plain.configured(), "--run", str(plain.run), "stage2.max_steps=4", "stage2.cross_fit=0"]
    submit = ["bash", "slurm/submit.sh", "--no-requeue", "--max-requeues", "3", *arguments]
    limits = {"SBATCH_TIMELIMIT": "1", "SBATCH_SIGNAL": "USR2@20"}
    said = cluster.run(*submit, **limits, **plain.settings, SLOW_UNTIL=str(time.time() + 60)).stdout
    jobs = [(name, job) for name, job in re.findall(r"^(\w+): job (\d+)", said, re.MULTILINE)]
    assert [name for name, _ in jobs] == [
        *["stage1"] * 3,
        *["evaluate1"] * 3,
        *["stage2"] * 3,
        *["evaluate2"] * 3,
        "report",
    ]
    for _, job in jobs[1:]:
        cluster.scontrol("update", f"jobid={job}", "timelimit=60")
    assert "stage2: running already" in cluster.run(*submit, **plain.settings).stdout

    cluster.wait_for_state(jobs[-1][1], "COMPLETED", seconds=900)
    first, second, third = (job for name, job in jobs if name == "stage1")
    assert cluster.state(first) == "FAILED" and plain.ends(first) == ["interrupted"]
    assert "interrupted, and may not be requeued; link 2 of 3 goes on" in plain.log(first)
    assert {cluster.state(job) for _, job in jobs[1:]} == {"COMPLETED"}
    assert plain.ends(second) == ["done"] and plain.ends(third) == []
    assert f"nothing to do: {plain.stage.path / 'finished.json'} is there" in plain.log(third)
    for number in (1, 2):
        stage = RunDirectory(plain.run).stage(number)
        assert stage.finished() is not None
        steps = {int(path.name.removeprefix("step_")) for path in stage.checkpoints.glob("step_*")}
        assert {score["step"] for score in stage.read_scores() if score["set"] == "test"} == steps
    assert (plain.run / "report.html").exists()
    assert "stage1: finished already" in cluster.run(*submit, **plain.settings).stdout


SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def test_the_scripts_are_what_bash_and_sbatch_expect(cluster: Cluster) -> None:
    shellcheck = need_command("shellcheck", "shellcheck")
    assert len(SCRIPTS) == 5
    cluster.run(shellcheck, *SCRIPTS, *(ROOT / "slurm").glob("*.sh"))
    for script in SCRIPTS:
        cluster.run("sbatch", "--test-only", script, "--run", "output/run")


def test_mistakes_are_found_before_anything_is_submitted(cluster: Cluster, plain: Plain) -> None:
    def refused(*arguments: str, **settings: str) -> str:
        command = ["bash", "slurm/submit.sh", "--run", str(plain.run), *plain.configured(), *arguments]
        done = cluster.run(*command, check=False, **{**SETTINGS, **settings})
        assert done.returncode in (1, 2) and not done.stdout
        return done.stderr

    assert "stage1.layers: unknown key" in refused("stage1.layers=3")
    assert "--stage: no such option" in refused("--stage", "1")
    assert "train: expected key=value" in refused("train")
    said = refused(SBATCH_PARTITION="nowhere")
    assert "Invalid partition name" in said and "error: stage1 was not submitted" in said and "partition?" in said
    path = plain.run.parent / "bin"
    path.mkdir()
    for name in ("bash", "dirname"):
        (path / name).symlink_to(need_command(name, name))
    assert "error: sbatch: not found: expected a login node" in refused(PATH=str(path))
    assert not (plain.run / "slurm" / "jobs.json").exists()


def test_tasks_get_the_cores_of_the_job_which_srun_does_not_take_over_itself(cluster: Cluster) -> None:
    told = "srun --ntasks=1 bash -c 'echo cores $SLURM_CPUS_PER_TASK.'"
    begin = f"FMRI_FLOW_PYTHON=true; . {ROOT}/slurm/job.sh; job_begin"
    job = cluster.submit("cores", [told, begin, told], "--cpus-per-task=2", "--ntasks=1")
    cluster.wait_for_state(job, "COMPLETED")
    said = (cluster.folder / f"cores.{job}.out").read_text().splitlines()
    assert said in (["cores .", "cores 2."], ["cores 2.", "cores 2."]), "before SLURM 22.05 srun took it over"

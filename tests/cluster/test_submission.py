"""The batch scripts, the refusals of sbatch in words, and that a chain is submitted whole or not at all."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import MakePlan
from trainer.cluster.chain import Run, pipeline
from trainer.cluster.picture import picture
from trainer.cluster.plan import Plan
from trainer.cluster.submission import Site, refusal, scripts, submit
from trainer.errors import InputError
from trainer.run import jobs as queue

ROOT = Path(__file__).resolve().parents[2]
SITE = Site(ROOT, "/opt/python")
SETTINGS = """
partition: gpu
nodes: 2
tasks_per_node: 4
cpus_per_task: 8
mem_gb: 0.5
time: 12:00:00
setup: [module load cuda]
interface: ib0
sbatch: {exclusive: true, nice: 5, wait: false}
srun: [--cpu-bind=cores]
"""
SBATCH = """#!/bin/sh
# sbatch that counts, and refuses a script that holds the word in the file `refuse`
case "$1" in --test-only) cat > /dev/null; exit 0;; esac
cd "{folder}"
if [ -e refuse ] && grep -q "$(cat refuse)" "$1"; then
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1
fi
echo x >> count
echo "Submitted batch job $((100 + $(wc -l < count)))"
"""


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an sbatch and an scancel that only write down what they are asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"sbatch": SBATCH.format(folder=folder), "scancel": f'#!/bin/sh\necho "$@" >> {folder}/cancelled\n'}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def lines_of(plan: Plan, key: str) -> list[str]:
    return scripts(plan, SITE)[key].splitlines()


def test_a_script_holds_what_was_asked_for(make: MakePlan) -> None:
    plan = make(SETTINGS)
    lines = lines_of(plan, "stage1")
    for option in (
        "partition=gpu", "nodes=2", "ntasks-per-node=4", "cpus-per-task=8", "mem=512MB", "time=720", "exclusive",
        "nice=5", "signal=USR2@120", "requeue", "open-mode=append", "job-name=stage1",
        f"output={plan.home}/slurm/%j_0_log.out", f"error={plan.home}/slurm/%j_0_log.err",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert not any("wckey" in line or "wait" in line or "dependency" in line for line in lines)


def test_a_script_begins_and_ends_the_job_around_srun(make: MakePlan) -> None:
    plan = make(SETTINGS)
    lines = [line for line in lines_of(plan, "stage1") if line and not line.startswith("#")]
    assert lines[:6] == [
        "module load cuda",
        f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export FMRI_FLOW_PYTHON=/opt/python",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
        f". {ROOT}/slurm/job.sh || exit",
        f"job_begin --run {plan.home} --name stage1 --max-requeues 3 --requeue yes",
    ]
    srun, last = lines[-2:]
    assert srun.startswith(f"srun --unbuffered --output {plan.home}/slurm/%j_%t_log.out --error ")
    assert "--kill-on-bad-exit=1 --cpus-per-task=8 --cpu-bind=cores /opt/python -u -m submitit.core._submit" in srun
    assert last == "job_end $?"


def test_a_training_is_told_what_its_processes_share_out(make: MakePlan) -> None:
    plan = make("{zero_stage: 2, stage2: {zero_stage: 1}}")
    shared = {key: [word for line in text.splitlines() if "DEEPSPEED" in line for word in line.split()]
              for key, text in scripts(plan, SITE).items()}  # fmt: skip
    assert shared == {
        "stage1": ["export", "ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_DEEPSPEED_ZERO_STAGE=2"],
        "evaluate1": [],
        "stage2": ["export", "ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_DEEPSPEED_ZERO_STAGE=1"],
        "evaluate2": [],
        "report": [],
    }
    lines = picture(plan.jobs, plan.settings.of, {})
    assert "1 task, ZeRO-2" in lines[0] and "ZeRO-1" in lines[2] and "ZeRO" not in lines[1] + lines[3] + lines[4]
    assert "export ACCELERATE_USE_DEEPSPEED=false" in lines_of(make("zero_stage: 0"), "stage1")
    assert "DEEPSPEED" not in scripts(make("{}"), SITE)["stage1"]


def test_what_waits_is_cancelled_when_it_can_never_begin(make: MakePlan) -> None:
    lines = lines_of(make(), "stage2")
    assert "#SBATCH --dependency='afterok:<stage1>'" in lines
    assert "#SBATCH --kill-on-invalid-dep=yes" in lines


def test_shards_are_made_by_mpi_and_the_report_asks_for_little(make: MakePlan, tmp_path: Path) -> None:
    layout = ROOT / "configs" / "datasets" / "algonauts2025.yaml"
    more = f"{SETTINGS}shards: {{layout: {layout}, root: {tmp_path}, tasks_per_node: 16}}\n"
    plan = make(more, f"data.shards={tmp_path / 'none'}")
    assert "--mpi=pmi2" in "\n".join(lines_of(plan, "shards"))
    assert "#SBATCH --ntasks-per-node=16" in lines_of(plan, "shards")
    report = lines_of(plan, "report")
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1", "#SBATCH --time=30"} <= set(report)
    assert "--mpi" not in "\n".join(report)


def test_links_say_which_they_are_and_that_they_are_not_requeued(make: MakePlan) -> None:
    plan = make("{requeue: false, max_requeues: 2}")
    lines = lines_of(plan, "stage1.2")
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --requeue" not in lines
    rules = "--max-requeues 2 --requeue no --link 2 --links 2 --earlier <stage1>"
    assert f"job_begin --run {plan.home} --name stage1 {rules}" in lines


def test_the_elements_of_an_array_each_have_a_run(make: MakePlan) -> None:
    plan = make()
    runs = [Run(plan.home / name, plan.home / "c.yaml") for name in ("a", "b c")]
    jobs = pipeline(plan.home, runs, links=2)
    text = scripts(Plan(plan.home, plan.settings, plan.source, jobs, [], {}), SITE)["stage1.2"]
    assert "#SBATCH --array=0-1%2" in text
    assert f"runs=({plan.home}/a '{plan.home}/b c')" in text
    assert 'job_begin --run "${runs[SLURM_ARRAY_TASK_ID]}" --name stage1' in text
    assert "--earlier <stage1>_$SLURM_ARRAY_TASK_ID" in text
    assert f"{plan.home}/slurm/%A_%a_%t_log.out" in text


def test_scripts_are_right_bash(make: MakePlan) -> None:
    for text in scripts(make(SETTINGS), SITE).values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_chain_is_submitted_recorded_and_named_by_its_ids(make: MakePlan, pretended: Path) -> None:
    plan = make()
    ids = submit(plan, SITE)
    assert ids == {"stage1": "101", "evaluate1": "102", "stage2": "103", "evaluate2": "104", "report": "105"}
    assert [(job.name, job.id) for job in queue.read(plan.home)] == list(ids.items())
    script = (plan.folder / "104_submission.sh").read_text()
    assert "#SBATCH --dependency=afterok:101,after:103" in script
    assert all(path.exists() for path in plan.configs)
    assert (plan.folder / "104_submitted.pkl").exists()


def test_when_one_job_is_refused_none_stays_in_the_queue(make: MakePlan, pretended: Path) -> None:
    (pretended / "refuse").write_text("job-name=evaluate2")
    plan = make()
    with pytest.raises(InputError, match="evaluate2: SLURM says: Job violates accounting/QOS policy"):
        submit(plan, SITE)
    assert (pretended / "cancelled").read_text().split() == ["101", "102", "103"]
    assert not list(plan.folder.glob("?" * 32 + ".pkl"))


def test_a_missing_sbatch_says_where_to_go(make: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"sbatch: .*login node.*slurm/submit\.sh.*--cluster local"):
        submit(make(), SITE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sbatch: error: invalid partition specified: nope\n"
         "sbatch: error: Batch job submission failed: Invalid partition name specified",
         ["Invalid partition name", "found nope", "slurm.partition=", "`sinfo`"]),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         ["slurm.account=", "sacctmgr"]),
        ("allocation failure: Requested node configuration is not available", ["nodes, tasks_per_node", "sinfo"]),
        ("sbatch: error: Memory specification can not be satisfied\n"
         "sbatch: error: Batch job submission failed: Requested node configuration is not available",
         ["slurm.mem_gb="]),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
         ["Unable to contact slurm controller", "--dry-run"]),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_change(
    make: MakePlan, text: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    plan = make("partition: nope")
    said = str(refusal(text, plan.jobs[0], plan))
    assert all(part in said for part in parts), said
    assert said.startswith(f"{plan.source}: stage1: ") and "\n" not in said

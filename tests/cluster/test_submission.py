"""The batch scripts, the refusals of sbatch in words, and that a chain is submitted whole or not at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import MakePlan
from trainer.cluster.chain import Run, pipeline
from trainer.cluster.limits import Limits
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


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder but the programs of the test: files with their content."""
    paths = (path for path in folder.rglob("*") if "bin" not in path.relative_to(folder).parts[:1])
    inputs = ("site.yaml", "sweep.yaml")
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths if path.name not in inputs}


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


@pytest.mark.parametrize(
    ("refused", "cancelled"),
    [("stage1", []), ("evaluate1", ["101"]), ("evaluate2", ["101", "102", "103"])],
)
def test_when_one_job_is_refused_nothing_is_left(
    make: MakePlan, pretended: Path, refused: str, cancelled: list[str]
) -> None:
    (pretended / "refuse").write_text(f"job-name={refused}")
    plan = make()
    before = tree(plan.home.parent)
    with pytest.raises(InputError, match=f"{refused}: SLURM says: Job violates accounting/QOS policy.*sacctmgr"):
        submit(plan, SITE, snapshot_of=ROOT)
    gone = pretended / "cancelled"
    assert (gone.read_text().split() if gone.exists() else []) == cancelled
    assert tree(plan.home.parent) == before


def test_a_refused_sweep_leaves_no_run_and_keeps_what_was_there(
    make: MakePlan, pretended: Path, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2, 3]}")
    first = submit(make("{}", array=tmp_path / "sweep.yaml"), SITE)
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2, 3, 4]}")
    (tmp_path / "run" / "mine.txt").write_text("of the user")
    before, jobs = tree(tmp_path), queue.read(tmp_path / "run" / "seed=1")
    (pretended / "refuse").write_text("job-name=evaluate2")
    with pytest.raises(InputError, match="evaluate2: SLURM says"):
        submit(make("{}", "stage1.epochs=3", array=tmp_path / "sweep.yaml"), SITE)
    assert tree(tmp_path) == before
    assert queue.read(tmp_path / "run" / "seed=1") == jobs and first["stage1"] == "101"


def test_the_elements_of_a_long_sweep_are_several_arrays_that_share_what_runs_at_once(
    make: MakePlan, pretended: Path, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(f"{{seed: {list(range(300))}}}")
    plan = make("{}", array=tmp_path / "sweep.yaml", ask=lambda _: Limits(array=200, known=True))
    assert plan.notes[-1] == "job arrays of at most 200 runs each: as MaxArraySize says"
    texts = scripts(plan, SITE)
    arrays = {key: line for key, text in texts.items() for line in text.splitlines() if "--array" in line}
    assert arrays == {
        "stage1": "#SBATCH --array=0-199%170",
        "stage2": "#SBATCH --array=0-199%170",
        "stage1+2": "#SBATCH --array=0-99%85",
        "stage2+2": "#SBATCH --array=0-99%85",
    }
    assert "#SBATCH --dependency='aftercorr:<stage1+2>'" in texts["stage2+2"].splitlines()
    assert "#SBATCH --dependency='afterok:<stage1+2>_7,after:<stage2+2>_7'" in texts["evaluate2.seed=207"].splitlines()


def test_an_array_that_slurm_does_not_take_is_refused_before_anything_is_made(
    make: MakePlan, pretended: Path, tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text("{seed: [1, 2, 3]}")
    (pretended / "refuse_test").write_text("array=0-2")
    with pytest.raises(InputError, match=r"stage1: SLURM says: Invalid job array specification.*MaxArraySize"):
        submit(make("{}", array=tmp_path / "sweep.yaml"), SITE)
    assert not (tmp_path / "run").exists() and not (pretended / "count").exists()


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
        ("sbatch: error: AssocMaxSubmitJobLimit\n"
         "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (submit limit, size)",
         ["AssocMaxSubmitJobLimit; Job violates", "Submit fewer jobs", "sacctmgr"]),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", ["MaxArraySize"]),
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

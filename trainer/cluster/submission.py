"""A chain of jobs through submitit to SLURM, or, as a dry run, to the terminal.

submitit writes each batch script, pickles what its tasks run and asks sbatch. What it does not know is written around
its `srun`: `setup` is everything before it, down to `job_begin` of slurm/job.sh, and `teardown` is `job_end`, which
decides about a requeue. All jobs are submitted, or none: when sbatch refuses one, those before it are cancelled, and
what was written is deleted.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from trainer.cluster import snapshot
from trainer.cluster.chain import Job, dependency
from trainer.cluster.plan import Plan, recorded
from trainer.cluster.settings import JobSettings, Settings
from trainer.cluster.task import Task
from trainer.cluster.traces import Traces
from trainer.errors import InputError
from trainer.run import jobs as queue
from trainer.run.code import sha256
from trainer.run.launch import zero_environment

ASK_S = 20
"""How long sinfo, or the question of `check`, may take."""
AT_ONCE = 256
"""So many runs of a sweep train at once (submitit's default)."""


class Executor(SlurmExecutor):
    """submitit's, which can also show a script, where there is no SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        """Whether sbatch is here is asked by `submit`, which says what to do if not."""
        return 2

    def script(self, elements: int) -> str:
        """The batch script, exactly as it would be submitted."""
        parameters = {**self.parameters, **({"map_count": elements} if elements > 1 else {})}
        shown = Executor(self.folder, python=self.python)
        shown.parameters = parameters
        return str(shown._make_submission_file_text(self._submitit_command_str, uid=""))


@dataclass(frozen=True)
class Site:
    """Where the jobs find their code and their interpreter."""

    code: Path
    python: str = sys.executable


def executor_of(job: Job, plan: Plan, site: Site, ids: Mapping[str, str]) -> Executor:
    """What submits a job: its folder, interpreter and options."""
    settings = plan.settings.of(job.name)
    executor = Executor(plan.folder, python=shlex.quote(settings.python or site.python))
    executor.update_parameters(**options_of(job, settings), **_around(job, settings, plan.settings, site, ids))
    # elements that run at once; the arrays of a long sweep share that number
    beside = sum(len(other.elements) for other in plan.jobs if (other.name, other.link) == (job.name, job.link))
    executor.update_parameters(array_parallelism=max(1, AT_ONCE * len(job.elements) // max(beside, 1)))
    return executor


def options_of(job: Job, settings: JobSettings) -> dict[str, Any]:
    """What a job asks sbatch for, by the names of submitit."""
    memory = settings.mem_gb
    asked = {
        **{key: getattr(settings, key) for key in ("partition", "account", "qos", "constraint", "gres", "exclude")},
        **{
            key: getattr(settings, key) for key in ("mail_user", "mail_type", "gpus_per_node", "cpus_per_task", "nodes")
        },
        "ntasks_per_node": settings.tasks_per_node,
        "mem": None if memory is None else f"{int(memory)}GB" if memory == int(memory) else f"{int(memory * 1024)}MB",
    }
    return {
        "job_name": job.name,
        "time": settings.time,
        "signal_delay_s": settings.signal_delay_s,
        "wckey": None,  # submitit's own; a site that checks such keys refuses it
        **{key: value for key, value in asked.items() if value is not None},
    }


def _around(job: Job, settings: JobSettings, all_jobs: Settings, site: Site, ids: Mapping[str, str]) -> dict[str, Any]:
    """What a job waits for, and what stands before and behind srun in its script."""
    extra: dict[str, Any] = {"requeue" if all_jobs.requeue else "no-requeue": True}
    if job.waits:
        extra["kill-on-invalid-dep"] = "yes"
    arguments = ["--kill-on-bad-exit=1"]
    if settings.cpus_per_task:  # since 22.05 srun does not take it over from sbatch
        arguments.append(f"--cpus-per-task={settings.cpus_per_task}")
    mpi = getattr(settings, "mpi", None)
    if mpi:
        arguments.append(f"--mpi={mpi}")
    return {
        **({"dependency": dependency(job.waits, ids)} if job.waits else {}),
        "additional_parameters": extra
        | {key.replace("_", "-"): v for key, v in settings.sbatch.items() if v is not False},
        "srun_args": [*arguments, *settings.srun],
        "setup": _setup(job, settings, all_jobs, site, ids),
        "teardown": ["job_end $?"],
    }


def _setup(job: Job, settings: JobSettings, all_jobs: Settings, site: Site, ids: Mapping[str, str]) -> list[str]:
    """The lines before srun."""
    lines = [*settings.setup, f"export PYTHONPATH={shlex.quote(str(site.code))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    lines.append(f"export FMRI_FLOW_PYTHON={shlex.quote(settings.python or site.python)}")
    if settings.interface:
        name = shlex.quote(settings.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    lines.append(f". {shlex.quote(str(site.code / 'slurm' / 'job.sh'))} || exit")
    if job.kind == "train" and settings.zero_stage is not None:
        words = zero_environment(settings.zero_stage).items()
        lines.append(f"export {' '.join(f'{name}={value}' for name, value in words)}")
    run, index = shlex.quote(str(job.elements[0].run)), ""
    if len(job.elements) > 1:
        lines.append(f"runs=({' '.join(shlex.quote(str(element.run)) for element in job.elements)})")
        run, index = '"${runs[SLURM_ARRAY_TASK_ID]}"', "_$SLURM_ARRAY_TASK_ID"
    rules = f"--max-requeues {all_jobs.max_requeues} --requeue {'yes' if all_jobs.requeue else 'no'}"
    if job.links > 1:
        rules += f" --link {job.link} --links {job.links}"
    if job.earlier:
        rules += " --earlier " + " ".join(ids.get(key, f"<{key}>") + index for key in job.earlier)
    return [*lines, f"job_begin --run {run} --name {job.name} {rules}"]


def scripts(plan: Plan, site: Site) -> dict[str, str]:
    """The batch scripts by the keys of their jobs; ids that are not known yet stand as `<stage1>`."""
    return {job.key: executor_of(job, plan, site, {}).script(len(job.elements)) for job in plan.jobs}


def submit(plan: Plan, site: Site, snapshot_of: Path | None = None) -> dict[str, str]:
    """Submit a chain; the ids of its jobs by their keys.

    Args:
        snapshot_of: the checkout of which a copy is taken, for the jobs to run; None: they run `site.code` as it is.

    Raises:
        InputError: there is no sbatch, or it refuses a job. Then nothing is left in the queue, nor on disk.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch",
            "is not on this machine",
            fix="Run this on a login node of the cluster (there slurm/submit.sh needs no Python packages), or use "
            "--cluster local.",
        )
    check(plan, site)
    traces = Traces(list(dict.fromkeys([plan.home, *(element.run for job in plan.jobs for element in job.elements)])))
    try:
        for run in traces.runs:
            traces.make(run / "slurm")
        if snapshot_of is not None:
            traces.files += [plan.home / "code"] if not (plan.home / "code").exists() else []
            snapshot.take(plan.home, root=snapshot_of)
        plan.prepare(traces.files)
        return _submit_all(plan, site, traces)
    except BaseException as error:
        left = traces.undo()
        if left and isinstance(error, InputError):
            raise InputError(str(error), "", fix=left) from error
        raise


def _submit_all(plan: Plan, site: Site, traces: Traces) -> dict[str, str]:
    ids: dict[str, str] = {}
    code = sha256(site.code)
    for job in plan.jobs:
        ids[job.key] = job_id = _submit(job, plan, site, ids)
        many = len(job.elements) > 1
        traces.ids += [f"{job_id}_{i}" for i in range(len(job.elements))] if many else [job_id]
        _record(job, ids, code)
    return ids


def check(plan: Plan, site: Site) -> None:
    """Ask SLURM whether it could run such jobs and arrays, before anything is written or submitted.

    sbatch takes some jobs that can never run, e.g. of more nodes than a partition has. A site where the question itself
    does not work is left to the submission.

    Raises:
        InputError: it could not, for a reason that the settings can change.
    """
    asked: list[tuple[JobSettings, int]] = []
    for job in sorted(plan.jobs, key=lambda job: -len(job.elements)):  # of arrays, the longest
        settings, number = plan.settings.of(job.name), len(job.elements)
        if any(settings == other and number <= longest for other, longest in asked):
            continue
        asked.append((settings, number))
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            script = executor_of(replace(job, waits=()), plan, site, {}).script(number)
            done = subprocess.run(
                ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=ASK_S
            )
            if done.returncode and _read(done.stderr)[1] is not None:
                raise refusal(done.stderr, job, plan)


def _submit(job: Job, plan: Plan, site: Site, ids: Mapping[str, str]) -> str:
    executor = executor_of(job, plan, site, ids)
    tasks = [Task(element.argv, run=str(element.run), name=job.name) for element in job.elements]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # submitit prints what it then raises
            submitted = executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise refusal(str(error), job, plan) from error
    finally:
        for left in (*plan.folder.glob(".submission_file_*.sh"), *plan.folder.glob("?" * 32 + ".pkl")):
            left.unlink()  # links to scripts that have names by now, and what was not submitted
    return str(submitted[0].job_id).partition("_")[0]


def _record(job: Job, ids: Mapping[str, str], code: str) -> None:
    """Note a job in the run directories that it works for."""
    earlier = [ids[key] for key in job.earlier]
    for index, element in enumerate(job.elements):
        which = index if len(job.elements) > 1 else None
        queue.record(element.run, [recorded(job, ids[job.key], which, earlier, code)])


ADVICE = {
    "partition name": ("partition", "`sinfo` lists them"),
    "account": ("account", "`sacctmgr show associations user=$USER format=account,partition` lists yours"),
    "qos": ("qos", "`sacctmgr show associations user=$USER format=qos` lists yours"),
    "time limit": ("time", "`sinfo -o '%R %l'` lists what the partitions allow"),
    "feature": ("constraint", "`sinfo -o '%n %f'` lists the features of the nodes"),
    "generic resource": ("gres or gpus_per_node", "`sinfo -o '%n %G'` lists what the nodes have"),
    "memory": ("mem_gb", "`sinfo -o '%n %m'` lists the memory of the nodes in MB"),
    "cpu count": ("tasks_per_node and cpus_per_task", "`sinfo -o '%n %c'` lists the cores of the nodes"),
    "node count": ("nodes", "`sinfo -o '%R %D'` lists the nodes of the partitions"),
    "node configuration": (
        "nodes, tasks_per_node, cpus_per_task, gpus_per_node, mem_gb",
        "`sinfo -o '%n %c %m %G'` lists what the nodes have",
    ),
    "node name": ("exclude", "`sinfo -N` lists the nodes"),
}
"""Words of sbatch's refusals -> the key to change, and how to find out what it may be."""
LIMITED = {
    "accounting/qos policy": "Submit fewer jobs at once, for less time, or from another account or QOS (`sacctmgr show "
    "associations user=$USER format=account,qos,maxsubmitjobs,maxwall` and `sacctmgr show qos` list the limits).",
    "job array": "Submit fewer runs at once (`scontrol show config | grep MaxArraySize` says how long arrays may be).",
}
"""Words of refusals that no single key is to blame for -> what to do."""


def refusal(text: str, job: Job, plan: Plan) -> InputError:
    """What sbatch's refusal means for who wrote the settings."""
    lines, advice = _read(text)
    settings = plan.settings.of(job.name)
    what = f"{job.name}: SLURM says: {'; '.join(lines)}"
    if isinstance(advice, tuple):
        keys, how = advice
        first = re.split(r"\W", keys)[0]
        expected = partitions() if first == "partition" else None
        found = getattr(settings, first) if " " not in keys else None
        fix = f"Set {keys} in that file, or slurm.{first}=... on the command line ({how})."
        return InputError(plan.source, what, found=found, expected=expected, fix=fix)
    return InputError(plan.source, what, fix=advice or "`--dry-run` shows the script.")


def _read(text: str) -> tuple[list[str], tuple[str, str] | str | None]:
    """The reasons in what sbatch says, and the advice for the first of them that is known."""
    starts = ("sbatch: error: ", "allocation failure: ", "Batch job submission failed: ")
    lines = [_without(line, starts) for line in text.splitlines() if line.startswith(starts)]
    lines = list(dict.fromkeys(lines)) or [" ".join(text.split())]
    known: dict[str, tuple[str, str] | str] = {**LIMITED, **ADVICE}
    found = (advice for line in lines for words, advice in known.items() if words in line.lower())
    return lines, next(found, None)


def _without(line: str, starts: Sequence[str]) -> str:
    for start in starts:
        line = line.removeprefix(start)
    return line.strip()


def partitions() -> str | None:
    """The partitions of this cluster, as people say them; None where sinfo does not tell."""
    try:
        told = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = sorted(set(told.stdout.split()))
    return " or ".join(names) if names and told.returncode == 0 else None

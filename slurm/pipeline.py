"""Submit both stages as dependent SLURM jobs, with evaluation beside them and a report at the end.

    python slurm/pipeline.py --config configs/full.yaml --slurm configs/slurm/default.yaml --dry-run
    python slurm/pipeline.py --config configs/full.yaml --slurm configs/slurm/default.yaml

`key=value` overrides the configuration of the training, `slurm.key=value` what the jobs ask for. The jobs train with
what was submitted, kept in RUN/slurm; with `--snapshot` they also run a copy of the code. Submitted again, what is
finished or in the queue is left alone, and what failed goes on. `--cluster local` runs the same chain on this machine
without SLURM, `--cluster debug` in this process. `--array` submits many runs as job arrays: the product of the lists in
a YAML file, {stage1.lr: [1e-3, 3e-4], seed: [1, 2]}, or a list of such mappings with one value each.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

CODE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CODE))  # what is submitted is this checkout, as in the jobs

from trainer.cluster import limits  # noqa: E402
from trainer.cluster.picture import picture  # noqa: E402
from trainer.cluster.plan import Plan, make_plan  # noqa: E402
from trainer.errors import exit_on_input_error  # noqa: E402

say = functools.partial(print, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration of the training")
    made.add_argument("--slurm", type=Path, required=True, metavar="FILE", help="what the jobs ask for: configs/slurm")
    made.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: output/<name of the config>)")
    made.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm", help="where the jobs run")
    made.add_argument("--dry-run", action="store_true", help="print the batch scripts and submit nothing")
    made.add_argument("--wait", action="store_true", help="wait for the jobs; the exit status is theirs")
    made.add_argument("--snapshot", action="store_true", help="the jobs run a copy of the code, in the run directory")
    made.add_argument("--array", type=Path, metavar="SWEEP", help="YAML of overrides: a run of each, as job arrays")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. stage1.lr=1e-3 slurm.stage1.nodes=4")
    return made


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Submit, or run here; returns the exit status."""
    arguments, rest = parser().parse_known_args(argv)
    if any(word.startswith("-") for word in rest):  # argparse takes one group of positionals only
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    overrides = [*arguments.overrides, *rest]
    ask = limits.ask if arguments.cluster == "slurm" else None
    plan = make_plan(arguments.config, arguments.slurm, arguments.run, overrides, array=arguments.array, ask=ask)
    for note in plan.notes:
        say(note)
    if not plan.jobs:
        say("Nothing to submit.")
        return 0
    # submitit and what it needs are imported when the input is known to be right
    from trainer.cluster import local, snapshot, submission

    site = submission.Site(plan.home / "code" if arguments.snapshot else CODE)
    if arguments.dry_run:
        return _dry_run(plan, submission.scripts(plan, site))
    if arguments.cluster != "slurm" and arguments.snapshot:
        snapshot.take(plan.home, root=CODE)
    if arguments.cluster == "local":
        return local.run_locally(plan, site, say=say)
    if arguments.cluster == "debug":
        return local.run_here(plan, say=say)
    ids = submission.submit(plan, site, snapshot_of=CODE if arguments.snapshot else None)
    _show(plan, ids)
    if not arguments.wait:
        return 0
    from trainer.cluster.waiting import parts_of, wait

    return wait(parts_of(plan.jobs, ids, plan.folder), say=say)


def _dry_run(plan: Plan, scripts: dict[str, str]) -> int:
    """The scripts, each under its name, and what they are together. All but the scripts are comments."""
    for key, script in scripts.items():
        say(f"# ===== {key} " + "=" * max(3, 100 - len(key)))
        say(script.rstrip() + "\n")
    for line in picture(plan.jobs, plan.settings.of, {}):
        say(f"# {line}")
    say("# Nothing was submitted.")
    return 0


def _show(plan: Plan, ids: dict[str, str]) -> None:
    """What was submitted, and what to do with it."""
    say(f"\n{plan.home}\n")
    for line in picture(plan.jobs, plan.settings.of, ids):
        say(f"  {line}")
    first = next((job for job in plan.jobs if job.kind == "train"), plan.jobs[0])
    if plan.is_one_run:
        say(f"\nwatch   python -m trainer status {plan.home}")
    else:
        say(f"\nwatch   python -m trainer.cluster.sweep {plan.home}")
    say(f"        squeue -j {','.join(ids.values())}")
    say(f"        tail -F {plan.folder}/{ids[first.key]}_0_log.out")
    say(f"cancel  scancel {' '.join(ids.values())}")


if __name__ == "__main__":
    sys.exit(main())

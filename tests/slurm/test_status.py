"""What a run says of its jobs is what the cluster says of them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.slurm.lab import Cluster


def test_the_jobs_of_a_run_are_told_and_its_standing_follows_them(cluster: Cluster, tmp_path: Path) -> None:
    def python(*arguments: str) -> str:
        return cluster.run(sys.executable, "-m", *arguments).stdout

    failed = cluster.submit("fails", ["exit 3"])
    cluster.wait_for_state(failed, "FAILED")
    sleeps = ["sleep 600"]
    trained = cluster.submit("trains", sleeps, "--array=0-2%1", "--time=1-00:00:00", "--no-requeue")
    depends = cluster.submit("depends", sleeps, f"--dependency=afterok:{failed}")
    first = [f"{trained}_0 RUNNING"]
    cluster.wait_for(lambda: cluster.squeue("--states=running", "--format=%i %T") == first, "it to run", jobs=[trained])
    names = [f"stage1={failed}", *(f"stage1={trained}_{i}" for i in range(3)), f"stage2={depends}", "report=99999"]
    python("trainer.run.jobs", "record", str(tmp_path), *names)

    lines = python("trainer", "status", str(tmp_path)).splitlines()
    told = {line.split()[1]: line.split()[2:] for line in lines[lines.index("Jobs") + 1 :]}
    assert told[f"{trained}_0"][0] == "RUNNING" and told[f"{trained}_0"][-1] == "left"
    assert told[f"{trained}_2"] == ["PENDING", "JobArrayTaskLimit"]
    assert told[depends][0] == "PENDING"
    assert told["99999"][0] == "unknown"
    assert python("trainer.run.jobs", "standing", str(tmp_path), "1").split() == [
        "running",
        *(f"{trained}_{i}" for i in range(3)),
    ]
    cluster.wait_for(
        lambda: "DependencyNeverSatisfied" in cluster.facts(depends)["Reason"], "a verdict", jobs=[depends]
    )
    assert python("trainer.run.jobs", "standing", str(tmp_path), "2") == "free\n", "it can never begin"

    cluster.run("scancel", trained)
    cluster.wait_for(lambda: cluster.squeue(f"--jobs={trained}", "--states=running,pending,completing") == [], "an end")
    assert python("trainer.run.jobs", "standing", str(tmp_path), "1") == "free\n"

"""Plans for tests of what is done with them: a run, tiny shards that are only pretended, settings of a test's own."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.cluster.limits import Limits
from trainer.cluster.plan import AskLimits, Plan, make_plan

MakePlan = Callable[..., Plan]
SBATCH = """#!/bin/sh
# sbatch that counts, and refuses a job whose options or script hold the word in the file `refuse`
script= ; for word in "$@"; do [ ! -f "$word" ] || [ -n "$script" ] || script=$word; done
case " $* " in *" --test-only "*)
    if [ -e "{folder}/refuse_test" ] && grep -q "$(cat "{folder}/refuse_test")" ${{script:+"$script"}}; then
        echo "allocation failure: Invalid job array specification" >&2; exit 1
    fi
    exit 0;;
esac
if [ -e "{folder}/refuse" ] && {{ echo "$*"; cat "$script"; }} | grep -q -- "$(cat "{folder}/refuse")"; then
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1
fi
echo x >> "{folder}/count"
id=$((100 + $(wc -l < "{folder}/count")))
case " $* " in *" --parsable "*) echo $id;; *) echo "Submitted batch job $id";; esac
"""


@pytest.fixture
def make(tmp_path: Path, debug_config: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """A function that plans the run tmp_path/run of configs/debug.yaml, with lines of settings and with overrides."""
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").touch()
    slurm = tmp_path / "site.yaml"

    def plan(
        settings: str = "{}",
        *overrides: str,
        array: Path | None = None,
        ask: AskLimits | None = lambda _: Limits(),
    ) -> Plan:
        slurm.write_text(settings)
        given = [f"data.shards={shards}", *overrides]
        return make_plan(debug_config, slurm, tmp_path / "run", given, array=array, ask=ask)

    return plan


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an sbatch and an scancel that only write down what they are asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"sbatch": SBATCH.format(folder=folder), "scancel": f'#!/bin/sh\necho "$@" >> {folder}/cancelled\n'}
    for name in ("squeue", "sacct", "scontrol", "sacctmgr"):  # instead of those that may be installed here
        programs[name] = "#!/bin/sh\necho 'error: Invalid job id specified' >&2; exit 1\n"
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder

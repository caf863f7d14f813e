#!/bin/bash
# Submit a whole run to SLURM: shards (where asked for), stage 1, stage 2 around it, a worker that scores beside each,
# and at last the report. For sites without submitit; otherwise slurm/pipeline.py does this and more.
#   bash slurm/submit.sh --config FILE [--run DIR] [options] [key=value ...] [--shards ARGUMENTS of tools/make_shards.py]
# Options:
#   --max-requeues N   how often a job that was killed is tried again (default: 3; REQUEUES=N)
#   --no-requeue       the site forbids it: N jobs are submitted for each stage, one after the other (REQUEUE=no)
#   --setup FILE       lines that each job runs first: modules, conda, venv, NCCL_SOCKET_IFNAME (FMRI_FLOW_SETUP=FILE)
# Partition, account, time and the like: SBATCH_PARTITION=gpu SBATCH_ACCOUNT=... bash slurm/submit.sh ..., or the lines
# on top of slurm/*.sbatch. Python is .venv/bin/python of this checkout, or FMRI_FLOW_PYTHON.
# What is running or finished is not submitted again; a stage that failed goes on from its newest checkpoint.
set -uo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config="" run="" requeue=${REQUEUE:-yes} limit=${REQUEUES:-3} overrides=() shards=() wanted_shards=no

refuse() {
    echo "error: $1" >&2
    exit 2
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

take_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --config | --run | --max-requeues | --setup)
                [ $# -gt 1 ] || refuse "$1: its value is missing"
                case $1 in
                    --config) config=$2 ;;
                    --run) run=$2 ;;
                    --max-requeues) limit=$2 ;;
                    --setup) FMRI_FLOW_SETUP=$2 ;;
                esac
                shift 2
                ;;
            --no-requeue) requeue=no && shift ;;
            --shards)
                wanted_shards=yes
                shards=("${@:2}")
                return
                ;;
            -h | --help) usage && exit 0 ;;
            -*) refuse "$1: no such option. See bash slurm/submit.sh --help" ;;
            *=*) overrides+=("$1") && shift ;;
            *) refuse "$1: expected key=value, an override of the configuration" ;;
        esac
    done
}

# The value of an option among the arguments of make_shards.
of_shards() {
    local i
    for ((i = 0; i < ${#shards[@]}; i++)); do
        case ${shards[i]} in
            "$1") echo "${shards[i + 1]:-}" ;;
            "$1="*) echo "${shards[i]#*=}" ;;
        esac
    done
}

check() {
    command -v sbatch > /dev/null || refuse "sbatch: not found: expected a login node of a SLURM cluster. \
Run this there, or train here: $python -m trainer train --config FILE"
    [[ $limit =~ ^[0-9]+$ ]] || refuse "--max-requeues: found $limit, expected a number"
    [[ $requeue =~ ^(yes|no)$ ]] || refuse "REQUEUE: found $requeue, expected yes or no"
    [ -n "$config" ] || refuse "--config: missing: expected the configuration of the training"
    [ -z "${FMRI_FLOW_SETUP:-}" ] || [ -r "$FMRI_FLOW_SETUP" ] || refuse "--setup: $FMRI_FLOW_SETUP cannot be read"
    "$python" - "$config" "${overrides[@]}" << 'PYTHON' || exit 2
import sys
from pathlib import Path
from trainer.config import load_config
from trainer.errors import exit_on_input_error
sys.exit(exit_on_input_error(lambda: load_config(Path(sys.argv[1]), sys.argv[2:]) and 0)())
PYTHON
}

# submit NAME SCRIPT RULES DEPENDENCY ARGUMENTS...: submits a job and notes it in the run; its id is in `id`.
submit() {
    local name=$1 script=$2 rules=$3 dependency=$4 options
    shift 4
    options=(--parsable --job-name="$name" --output="$run/slurm/%j_0_log.out" --error="$run/slurm/%j_0_log.err")
    [ "$requeue" = yes ] || options+=(--no-requeue)
    [ -z "$dependency" ] || options+=(--dependency="$dependency" --kill-on-invalid-dep=yes)
    id=$(FMRI_FLOW_RULES="$rules" sbatch "${options[@]}" "$code/slurm/$script.sbatch" --run "$run" "$@") || give_up "$name"
    id=${id%%;*}
    ids+=("$id")
    "$python" -m trainer.run.jobs record "$run" "$name=$id" || give_up "$name"
    echo "$name: job $id${dependency:+ ($dependency)}"
}

give_up() {
    echo "error: $1 was not submitted: see what sbatch said above (partition? account? SBATCH_* in the environment?)." >&2
    [ ${#ids[@]} -eq 0 ] || echo "Those before it were. Cancel them with: scancel ${ids[*]}" >&2
    exit 1
}

# chain NAME SCRIPT FIRST ALWAYS ARGUMENTS...: one job that SLURM requeues, or links that follow each other. FIRST is the
# dependency of the first one, ALWAYS that of each. The id of the first is then in `first`, of the last in `id`.
chain() {
    local name=$1 script=$2 start=$3 always=$4 links=1 link earlier=() dependency
    shift 4
    [ "$requeue" = yes ] || [ "$limit" -lt 2 ] || links=$limit
    for ((link = 1; link <= links; link++)); do
        local rules="--max-requeues $limit --requeue $requeue"
        dependency=$always
        if [ "$link" -eq 1 ]; then
            dependency=${start:-$always}
        else
            rules+=" --link $link --links $links --earlier ${earlier[*]}"
            dependency=${always:+$always,}afterany:$id
        fi
        [ "$links" -eq 1 ] || [ "$link" -gt 1 ] || rules+=" --link 1 --links $links"
        submit "$name" "$script" "$rules" "$dependency" "$@"
        [ "$link" -gt 1 ] || first=$id
        earlier+=("$id")
    done
}

# stage N DEPENDENCY: submits a stage and its worker, unless it is running or finished; leaves in `follows` what the
# next stage waits for.
stage() {
    local number=$1 dependency=$2 standing
    standing=$("$python" -m trainer.run.jobs standing "$run" "$number") || exit
    follows=""
    case $standing in
        finished*) echo "stage$number: finished already" && return ;;
        running*)
            standing=${standing#running}
            echo "stage$number: running already, as job${standing:- of nobody in the queue}"
            [ -z "$standing" ] || follows=afterok:${standing##* }
            return
            ;;
        failed*) echo "stage$number: goes on from its newest checkpoint" ;;
    esac
    chain "stage$number" "stage$number" "" "$dependency" --config "$config" "${overrides[@]}"
    follows=afterok:$id
    last+=("$id")
    chain "evaluate$number" evaluate "after:$first" "" --stage "$number"
    last+=("$id")
}

take_arguments "$@"
python=${FMRI_FLOW_PYTHON:-$code/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=$(command -v python3) || refuse "python3: not found. Set FMRI_FLOW_PYTHON"
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
check
run=$(realpath -m "${run:-output/$(basename "${config%.*}")}")
config=$(realpath "$config")
[ -z "${FMRI_FLOW_SETUP:-}" ] || FMRI_FLOW_SETUP=$(realpath "$FMRI_FLOW_SETUP")
export FMRI_FLOW_CODE=$code FMRI_FLOW_PYTHON=$python FMRI_FLOW_SETUP=${FMRI_FLOW_SETUP:-}
mkdir -p "$run/slurm" || exit 1

ids=() last=() follows="" out=$(of_shards --out)
for script in stage1 stage2 evaluate report; do # mistakes in options are found before anything is submitted
    sbatch --test-only "$code/slurm/$script.sbatch" --run "$run" > "$run/slurm/.test" 2>&1 || {
        cat "$run/slurm/.test" >&2
        give_up "$script"
    }
done
rm -f "$run/slurm/.test"
if [ "$wanted_shards" = yes ] && [ -e "$out/manifest.json" ]; then
    echo "shards: there already: $out"
elif [ "$wanted_shards" = yes ]; then
    chain shards shards "" "" "${shards[@]}"
    follows=afterok:$id
    last+=("$id")
fi
stage 1 "$follows"
stage 2 "$follows"
if [ ${#last[@]} -eq 0 ]; then
    echo "Nothing to submit: $run"
    exit 0
fi
submit report report "--max-requeues $limit --requeue $requeue" "afterany:$(IFS=: && echo "${last[*]}")"
echo "Watch:  $python -m trainer status $run     squeue -j $(IFS=, && echo "${ids[*]}")     tail -f $run/slurm/*.out"
echo "Cancel: scancel ${ids[*]}"

#!/bin/bash
# Submit a whole run to SLURM: shards (where asked for), stage 1, stage 2 around it, a worker that scores beside each,
# and at last the report. For sites without submitit; otherwise slurm/pipeline.py does this and more.
#   bash slurm/submit.sh --config FILE [--run DIR] [options] [key=value ...] [--shards ARGUMENTS of tools/make_shards.py]
# Options:
#   --max-requeues N   how often a job that was killed is tried again (default: 3; REQUEUES=N)
#   --no-requeue       the site forbids it: N jobs are submitted for each stage, one after the other (REQUEUE=no)
#   --zero-stage N     what the processes of a training share out: 1 Adam's moments, 2 gradients too, as configs/large.yaml
#                      needs; 0, or left out, nothing: DDP (ZERO_STAGE=N)
#   --setup FILE       lines that each job runs first: modules, conda, venv, NCCL_SOCKET_IFNAME (FMRI_FLOW_SETUP=FILE)
# Partition, account, time and the like: SBATCH_PARTITION=gpu SBATCH_ACCOUNT=... bash slurm/submit.sh ..., or the lines
# on top of slurm/*.sbatch. Python is .venv/bin/python of this checkout, or FMRI_FLOW_PYTHON.
# What is running or finished is not submitted again; a stage that failed goes on from its newest checkpoint. All jobs are
# submitted, or none: where SLURM refuses one, those before it are cancelled, and what was written is deleted.
set -uo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config="" run="" requeue=${REQUEUE:-yes} limit=${REQUEUES:-3} zero=${ZERO_STAGE:-} overrides=() shards=() wanted_shards=no

refuse() {
    echo "error: $1" >&2
    exit 2
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

take_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --config | --run | --max-requeues | --setup | --zero-stage)
                [ $# -gt 1 ] || refuse "$1: its value is missing"
                case $1 in
                    --config) config=$2 ;;
                    --run) run=$2 ;;
                    --max-requeues) limit=$2 ;;
                    --setup) FMRI_FLOW_SETUP=$2 ;;
                    --zero-stage) zero=$2 ;;
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
    [[ $zero =~ ^[012]?$ ]] || refuse "--zero-stage: found $zero, expected 0 (DDP), 1 or 2"
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
    id=$(FMRI_FLOW_RULES="$rules" sbatch "${options[@]}" "$code/slurm/$script.sbatch" --run "$run" "$@" 2> "$said") ||
        give_up "$name was not submitted: $(one_line)"
    cat "$said" >&2 # warnings
    id=${id%%;*}
    ids+=("$id")
    "$python" -m trainer.run.jobs record "$run" "$name=$id" 2> "$said" || give_up "$name: $(one_line)"
    lines+=("$name: job $id${dependency:+ ($dependency)}")
}

# What was said last, without the words that all of it begins with.
one_line() {
    sed -e 's/^sbatch: error: //; s/^allocation failure: //; s/^Batch job submission failed: //; s/^error: //' "$said" |
        paste -sd ';' | sed 's/;/; /g'
}

# give_up WHY: takes back what was submitted and written so far, and leaves.
give_up() {
    local left
    trap '' INT TERM HUP
    left=$("$python" -m trainer.cluster.traces undo "$run" --made "${made[@]}" --jobs "${ids[@]}")
    echo "error: $1 (partition? account? SBATCH_* in the environment?). ${left:-Nothing of this submission is left.}" >&2
    exit 2
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

# stage N STANDING DEPENDENCY: submits a stage and its worker, unless it is running or finished; leaves in `follows` what
# the next stage waits for.
stage() {
    local number=$1 standing=$2 dependency=$3
    follows=""
    case $standing in
        finished*) lines+=("stage$number: finished already") && return ;;
        running*)
            standing=${standing#running}
            lines+=("stage$number: running already, as job${standing:- of nobody in the queue}")
            [ -z "$standing" ] || follows=afterok:${standing##* }
            return
            ;;
        failed*) lines+=("stage$number: goes on from its newest checkpoint") ;;
    esac
    chain "stage$number" "stage$number" "" "$dependency" --config "$config" ${zero:+--zero-stage "$zero"} "${overrides[@]}"
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
standing1=$("$python" -m trainer.run.jobs standing "$run" 1) || exit 2
standing2=$("$python" -m trainer.run.jobs standing "$run" 2) || exit 2

ids=() made=() lines=() last=() follows="" out=$(of_shards --out) said=$(mktemp)
trap 'rm -f "$said"' EXIT
scripts=(stage1 stage2 evaluate report)
[ "$wanted_shards" = no ] || [ -e "$out/manifest.json" ] || scripts=(shards "${scripts[@]}")
for script in "${scripts[@]}"; do # mistakes in options are found before anything is written or submitted
    sbatch --test-only "$code/slurm/$script.sbatch" --run "$run" > "$said" 2>&1 ||
        give_up "$script was not submitted: $(one_line)"
done

trap 'give_up "interrupted"' INT TERM HUP
mapfile -t made < <("$python" -m trainer.cluster.traces make "$run")
[ -d "$run/slurm" ] || exit 2
if [ "$wanted_shards" = yes ] && [ -e "$out/manifest.json" ]; then
    lines+=("shards: there already: $out")
elif [ "$wanted_shards" = yes ]; then
    chain shards shards "" "" "${shards[@]}"
    follows=afterok:$id
    last+=("$id")
fi
stage 1 "$standing1" "$follows"
stage 2 "$standing2" "$follows"
if [ ${#last[@]} -eq 0 ]; then
    printf '%s\n' "${lines[@]}" "Nothing to submit: $run"
    exit 0
fi
submit report report "--max-requeues $limit --requeue $requeue" "afterany:$(IFS=: && echo "${last[*]}")"
trap - INT TERM HUP
printf '%s\n' "${lines[@]}"
echo "Watch:  $python -m trainer status $run     squeue -j $(IFS=, && echo "${ids[*]}")     tail -f $run/slurm/*.out"
echo "Cancel: scancel ${ids[*]}"

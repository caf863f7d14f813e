# shellcheck shell=bash
# Sourced by every batch script, whoever wrote it: what a job does before and after its tasks.
#
#   . CODE/slurm/job.sh
#   job_begin --run RUN --name stage1 --max-requeues 3 --requeue yes [--link 2 --links 4 --earlier 12 13]
#   srun ... python -u -m trainer.cluster.task --run RUN --name stage1 -- ARGUMENTS
#   job_end $?
#
# job_begin leaves where there is nothing to do, and else sets MASTER_ADDR and MASTER_PORT. job_end looks at what the
# tasks left behind: it requeues the job, or leaves with a status that says how it ended (see trainer/cluster/ending.py).
# Each task gets the cores that sbatch was asked for, which srun since SLURM 22.05 does not take over by itself.
# FMRI_FLOW_PYTHON is the Python that runs all this (default: python).
# The plain scripts beside this file take their arguments with `job_arguments`, and do all three with `job`.

job_begin() {
    local answer
    JOB_RULES=("$@")
    # a signal to the batch shell must not end it before srun has ended, and the tasks with it
    trap : TERM USR1 USR2
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
    answer=$("${FMRI_FLOW_PYTHON:-python}" -m trainer.cluster.ending begin "$@") || exit 1
    eval "$answer"
}

job_end() {
    "${FMRI_FLOW_PYTHON:-python}" -m trainer.cluster.ending end --status "$1" "${JOB_RULES[@]}"
    exit $?
}

# From the arguments of a plain script: RUN is the value of --run, STAGE that of --stage, ZERO_STAGE that of --zero-stage,
# ARGUMENTS are all others.
job_arguments() {
    RUN="" STAGE="" ZERO_STAGE="" ARGUMENTS=()
    while [ $# -gt 0 ]; do
        case $1 in
            --run | --stage | --zero-stage)
                [ $# -gt 1 ] || job_refuse "$1: its value is missing"
                # shellcheck disable=SC2034  # evaluate.sbatch reads STAGE
                case $1 in
                    --run) RUN=$2 ;;
                    --stage) STAGE=$2 ;;
                    --zero-stage) ZERO_STAGE=$2 ;;
                esac
                shift 2
                ;;
            *)
                ARGUMENTS+=("$1")
                shift
                ;;
        esac
    done
    [ -n "$RUN" ] || job_refuse "--run: missing: expected the run directory. sbatch slurm/NAME.sbatch --run DIR ..."
}

job_refuse() {
    echo "error: $1" >&2
    exit 2
}

# Tell the tasks of a training what they share out, in the words that trainer/run/launch.py reads (zero_environment).
job_share() {
    case $1:${ZERO_STAGE:-} in
        *:) ;;
        stage*:0) export ACCELERATE_USE_DEEPSPEED=false ;;
        stage*:[12]) export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE="$ZERO_STAGE" ;;
        stage*) job_refuse "--zero-stage: found $ZERO_STAGE, expected 0 (DDP), 1 or 2" ;;
        *) job_refuse "--zero-stage: is for trainings, not for $1" ;;
    esac
}

# The whole job of a plain script: job NAME [options of srun] -- arguments of the command line.
# By the environment, from slurm/submit.sh: FMRI_FLOW_SETUP, a file with the lines that a job needs first (modules,
# conda, venv, interfaces), and FMRI_FLOW_RULES, how it may go on.
job() {
    local name=$1 options=() rules
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    # shellcheck source=/dev/null
    . "${FMRI_FLOW_SETUP:-/dev/null}" || job_refuse "$FMRI_FLOW_SETUP: its last line failed"
    job_share "$name"
    read -ra rules <<< "${FMRI_FLOW_RULES:---max-requeues 3 --requeue yes}"
    job_begin --run "$RUN" --name "$name" "${rules[@]}"
    [ -z "${SRUN_CPUS_PER_TASK:-}" ] || options=(--cpus-per-task="$SRUN_CPUS_PER_TASK" "${options[@]}")
    srun --unbuffered --kill-on-bad-exit=1 "${options[@]}" \
        --output="$RUN/slurm/%j_%t_log.out" --error="$RUN/slurm/%j_%t_log.err" \
        "${FMRI_FLOW_PYTHON:-python}" -u -m trainer.cluster.task --run "$RUN" --name "$name" -- "$@"
    job_end $?
}

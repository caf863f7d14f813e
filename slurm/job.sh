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
# FMRI_FLOW_PYTHON is the Python that runs all this (default: python).
# The plain scripts beside this file take their arguments with `job_arguments`, and do all three with `job`.

job_begin() {
    local answer
    JOB_RULES=("$@")
    # a signal to the batch shell must not end it before srun has ended, and the tasks with it
    trap : TERM USR1 USR2
    answer=$("${FMRI_FLOW_PYTHON:-python}" -m trainer.cluster.ending begin "$@") || exit 1
    eval "$answer"
}

job_end() {
    "${FMRI_FLOW_PYTHON:-python}" -m trainer.cluster.ending end --status "$1" "${JOB_RULES[@]}"
    exit $?
}

# From the arguments of a plain script: RUN is the value of --run, STAGE that of --stage, ARGUMENTS are all others.
job_arguments() {
    RUN="" STAGE="" ARGUMENTS=()
    while [ $# -gt 0 ]; do
        case $1 in
            --run | --stage)
                [ $# -gt 1 ] || job_refuse "$1: its value is missing"
                # shellcheck disable=SC2034  # evaluate.sbatch reads STAGE
                if [ "$1" = --run ]; then RUN=$2; else STAGE=$2; fi
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
    read -ra rules <<< "${FMRI_FLOW_RULES:---max-requeues 3 --requeue yes}"
    job_begin --run "$RUN" --name "$name" "${rules[@]}"
    srun --unbuffered --kill-on-bad-exit=1 "${options[@]}" \
        --output="$RUN/slurm/%j_%t_log.out" --error="$RUN/slurm/%j_%t_log.err" \
        "${FMRI_FLOW_PYTHON:-python}" -u -m trainer.cluster.task --run "$RUN" --name "$name" -- "$@"
    job_end $?
}

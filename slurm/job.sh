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

# The value of --run among the arguments of a plain script; an error where there is none.
run_of() {
    local argument given=no
    for argument in "$@"; do
        if [ "$given" = yes ]; then
            echo "$argument"
            return 0
        fi
        case $argument in
            --run) given=yes ;;
            --run=*)
                echo "${argument#--run=}"
                return 0
                ;;
        esac
    done
    echo "error: --run: missing: expected the run directory. sbatch slurm/NAME.sbatch --run DIR ..." >&2
    return 2
}

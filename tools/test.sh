#!/usr/bin/env bash
# Installs the project with its test extra into .venv, then lints, checks types and runs the tests.
#   bash tools/test.sh [--system] [pytest arguments]
# --system also installs the Debian packages that some tests need (chromium, which opens the report; Slurm and munge, of
# which tests/slurm makes a cluster; shellcheck), and turns a skip for a missing package into a failure; without it such
# tests are skipped and listed at the end. The tests on a cluster are for root alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
. tools/system.sh
if [ "${1:-}" = --system ]; then
    shift
    export FMRI_FLOW_SYSTEM=1
    install_commands chromium slurmctld slurmd srun=slurm-client munged=munge shellcheck
fi
make_venv test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# A real Slurm cluster of some virtual nodes on this machine, for tests: no systemd, no cgroups, no accounting.
#   CLUSTER_DIR=/tmp/x tests/slurm/cluster.sh up           starts it anew, unless it runs; takes a second or two
#   CLUSTER_DIR=/tmp/x tests/slurm/cluster.sh down         ends it and its jobs at once; leaves no process and no state
#   CLUSTER_DIR=/tmp/x tests/slurm/cluster.sh processes    numbers of its daemons and of the processes of its jobs
#   eval "$(CLUSTER_DIR=/tmp/x tests/slurm/cluster.sh env)"           sbatch, srun, squeue, ... are this cluster's now
# Settings in the environment:
#   CLUSTER_DIR      folder of its own, short: Unix sockets in it have at most 108 characters
#   CLUSTER_NODES    nodes n1, n2, ..., each with its own host name, address (127.0.1.1, ...) and /dev/shm     [2]
#   CLUSTER_CPUS     CPUs that each node pretends to have                                                 [4]
#   CLUSTER_PORT     first of NODES + 1 free ports                                                        [26800]
#   CLUSTER_REQUEUE  0: JobRequeue=0, a job is requeued only where it asked for it                        [1]
#   CLUSTER_ARRAY    MaxArraySize                                                                         [1001]
#   CLUSTER_JOBS     MaxJobCount                                                                          [10000]
# Partitions: main, and urgent, whose jobs preempt those of main: these get the signal that they asked for (SIGTERM
# without --signal), have a minute, and are requeued.
set -euo pipefail
shopt -s inherit_errexit
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}" # of a job that this may run in
base=${CLUSTER_DIR:?a short folder of its own for the cluster}
nodes=${CLUSTER_NODES:-2} cpus=${CLUSTER_CPUS:-4} port=${CLUSTER_PORT:-26800} requeue=${CLUSTER_REQUEUE:-1}
array=${CLUSTER_ARRAY:-1001} jobs=${CLUSTER_JOBS:-10000}
export SLURM_CONF=$base/slurm.conf

fail() {
    echo "error: $*" >&2
    exit 1
}

# slurm.conf. What its names do not say:
#   CommunicationParameters  the controller listens on 127.0.0.1 alone. A slurmd has to listen on all addresses, as an
#                            srun in a job is called back on another one; munge keeps strangers out.
#   FirstJobId               folders are named by job numbers, and torch's port follows from them: each cluster its own
#   cred_expire              a requeued job waits for it, for two minutes if nothing is said
#   MinJobAge                squeue knows ended jobs for an hour, as there is no accounting that would
write_configuration() {
    cat >"$SLURM_CONF" <<EOF
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$base/munge.socket,cred_expire=5
FirstJobId=$((1000 + RANDOM))
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool.%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd.%n.pid
SlurmctldLogFile=$base/slurmctld.log
SlurmdLogFile=$base/slurmd.%n.log
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=$requeue
MaxArraySize=$array
MaxJobCount=$jobs
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=DEFAULT CPUs=$cpus RealMemory=64000
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.1.[1-$nodes] Port=[$((port + 1))-$((port + nodes))]
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
EOF
    cp /etc/hosts "$base/hosts"
    for ((i = 1; i <= nodes; i++)); do echo "127.0.1.$i n$i" >>"$base/hosts"; done
}

# munged and slurmctld are known by their environment. What runs on a node is known by the /dev/shm of the node, which
# names the cluster: a job may have any environment, and slurmstepd overwrites its own.
processes() {
    { grep -lzxF "CLUSTER_DAEMON=$SLURM_CONF" /proc/[0-9]*/environ || true
        grep -lF " - tmpfs $base " /proc/[0-9]*/mountinfo || true; } 2>/dev/null | tr -dc '0-9\n' | sort -nu
}

launch() { # NAME COMMAND...   in the background, away from this terminal
    local name=$1
    shift
    CLUSTER_DAEMON=$SLURM_CONF setsid "$@" </dev/null >>"$base/$name.out" 2>&1 &
}

wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || {
            tail -n 5 "$base"/*.out >&2
            fail "waited in vain for $what"; }
        sleep 0.05
    done
}

ready() { # all nodes are there and can be given jobs
    [ "$(timeout 10 sinfo -h -N -p main -t idle,alloc,mix,comp -o %N | sort -u | wc -l)" -eq "$nodes" ]
}

up() {
    [ "$EUID" -eq 0 ] || fail "only root can give each virtual node a host name of its own"
    [ -n "$(processes)" ] && ready 2>/dev/null && return 0
    down
    mkdir -p "$base"/{state,munge}
    chmod 755 "$base"
    chmod 700 "$base/munge"
    write_configuration
    (umask 077 && head -c 128 /dev/urandom >"$base/munge/key")
    launch munged munged -F --socket="$base/munge.socket" --key-file="$base/munge/key" --num-threads=2 \
        --log-file="$base/munge/log" --pid-file="$base/munge/pid" --seed-file="$base/munge/seed"
    wait_for 30 munged munge -n -S "$base/munge.socket"
    launch slurmctld slurmctld -D -c
    for ((i = 1; i <= nodes; i++)); do
        mkdir "$base/spool.n$i"
        launch "slurmd.n$i" unshare --uts --mount "$0" node "n$i"
    done
    wait_for 60 "the nodes" ready
}

node() { # NAME   in namespaces of its own: a host name, names of the other nodes, shared memory, and slurmd
    hostname "$1"
    mount --bind "$base/hosts" /etc/hosts
    mount -t tmpfs "$base" /dev/shm
    exec slurmd -D -N "$1"
}

down() {
    local found=
    for ((i = 0; i < 400; i++)); do
        found=$(processes)
        [ -z "$found" ] && break
        # shellcheck disable=SC2086 # one word a process; some may have ended since
        kill -KILL $found 2>/dev/null || true
        sleep 0.05
    done
    [ -z "$found" ] || fail "SIGKILL does not end process ${found//$'\n'/, }"
    rm -rf "$base"/{state,munge*,spool.*,slurm.conf,hosts,*.pid,*.log,*.out}
}

case ${1:-} in
    up | down | processes) "$1" ;;
    node) node "$2" ;; # of `up`
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) fail "usage: CLUSTER_DIR=FOLDER $0 up|down|processes|env" ;;
esac

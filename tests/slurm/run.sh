#!/usr/bin/env bash
# A cluster of two nodes on this machine (munge, slurmctld, two slurmd; nothing outside a temporary folder is touched), and a batch on it.
# Needs Debian's packages: apt-get install slurm-wlm munge. Usage: tests/slurm/run.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-python3}"
export PATH="$PATH:/usr/sbin"
for tool in munged slurmctld slurmd sbatch squeue; do
    command -v "$tool" > /dev/null || { echo "there is no $tool: apt-get install slurm-wlm munge"; exit 1; }
done

place="$(mktemp -d /tmp/ddil-slurm.XXXXXX)"
mkdir -m 700 "$place/munge"
mkdir "$place/state" "$place/one" "$place/two"
daemons=()
finish() {
    status=$?
    for daemon in "${daemons[@]}"; do kill "$daemon" 2> /dev/null || true; done
    wait
    if [ "$status" = 0 ]; then rm -rf "$place"; else echo "the logs are in $place"; fi
}
trap finish EXIT

dd if=/dev/urandom bs=1 count=128 of="$place/munge/key" status=none
chmod 400 "$place/munge/key"
munged --foreground --force --key-file="$place/munge/key" --socket="$place/munge/socket" --pid-file="$place/munge/pid" --log-file="$place/munge/log" --seed-file="$place/munge/seed" > "$place/munged.out" 2>&1 &
daemons+=($!)

host="$(hostname -s)"
export SLURM_CONF="$place/slurm.conf"
cat > "$SLURM_CONF" << END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
AuthType=auth/munge
AuthInfo=socket=$place/munge/socket
CredType=cred/munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/%n
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/%n.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=17818 CPUs=4 RealMemory=4000
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=17819 CPUs=4 RealMemory=4000
PartitionName=main Nodes=one,two Default=YES MaxTime=INFINITE State=UP
END
slurmctld -D > /dev/null 2>&1 &  # they log to files
daemons+=($!)
for node in one two; do
    slurmd -D -N "$node" > /dev/null 2>&1 &
    daemons+=($!)
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format '%D %t' 2> /dev/null)" = "2 idle" ] && break
    sleep 0.5
done
sinfo
OMP_NUM_THREADS=1 PYTHONPATH="$PWD" "$python" tests/slurm/batch.py

#!/bin/bash
# A real Slurm in this machine: slurmctld, munge, and two nodes (slurmd) with network, processes, host name and Ray's
# folder of their own. The shipped cluster/slurm.sh, unchanged, trains 2-way DDP over both: undisturbed; ended by its time
# limit and requeued by itself; cancelled and submitted again; on a node where Ray cannot start. Prints how each job ended
# and whether the losses are those of the undisturbed one. Needs root, and Debian's slurm-wlm and munge:
#   sudo benchmarks/slurm.sh [FOLDER FOR RESULTS [JSON FILE]]
set -euo pipefail

if [[ $EUID -ne 0 ]]; then
    echo "slurm.sh: namespaces need root: sudo $0" >&2
    exit 2
fi
for program in slurmctld slurmd munged sbatch ip unshare; do
    if ! command -v "$program" > /dev/null; then
        echo "slurm.sh: no $program here: install slurm-wlm, munge, iproute2 and util-linux" >&2
        exit 2
    fi
done

root="$(cd "$(dirname "$0")/.." && pwd)"
out="${1:-$(mktemp -d)}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
state="$(mktemp -d /tmp/hsl.XXXX)"
net=10.78.0
export HARNESS_VENV="${HARNESS_VENV:-$root/.venv}" SLURM_CONF="$state/slurm.conf"
export PATH="$HARNESS_VENV/bin:$PATH" GLOO_SOCKET_IFNAME=eth0
cd "$root"

node_pid() { # NAME: the first process of its PID namespace
    pgrep --parent "$(< "$state/$1.pid")" | head -n 1
}
cleanup() {
    for name in n1 n2; do
        if [[ -s $state/$name.pid ]]; then kill -KILL "$(node_pid "$name")" 2> /dev/null || true; fi
        ip netns delete "harness-$name" 2> /dev/null || true
    done
    for daemon in slurmctld munged; do
        if [[ -s $state/$daemon.pid ]]; then
            pid="$(< "$state/$daemon.pid")"
            kill "$pid" 2> /dev/null || true
            timeout 20 tail --pid="$pid" -f /dev/null || true # it writes below $state until its end
        fi
    done
    ip link delete harness-slurm 2> /dev/null || true
    rm -rf "$state"
}
start_node() { # NAME NUMBER
    ip netns add "harness-$1"
    ip link add "harness-v$1" type veth peer name eth0 netns "harness-$1"
    ip link set "harness-v$1" master harness-slurm up
    ip -n "harness-$1" link set lo up
    ip -n "harness-$1" address add "$net.$2/24" dev eth0
    ip -n "harness-$1" link set eth0 up
    nsenter --net="/run/netns/harness-$1" unshare --uts --pid --mount --fork --kill-child --mount-proc bash -c '
        hostname "$1"
        mount --bind "$2/hosts" /etc/hosts
        mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
        exec slurmd -D -N "$1" -f "$2/slurm.conf"' node "$1" "$state" > "$out/$1.log" 2>&1 &
    echo $! > "$state/$1.pid"
}
submit() { # FOLDER [sbatch's options]: the job's number
    local folder=$1
    shift
    sbatch --parsable --nodes=2 --output="$out/$folder.log" "$@" cluster/slurm.sh --dataset digits --depths 8 --limit-train 512 \
        --epochs 40 --gpus 0 --loader resident --workers 2 --placement spread --out "$out/$folder"
}
field() { # JOB NAME
    scontrol show job -o "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"
}
wait_for() { # WORDS FILE: up to three minutes
    for ((i = 0; i < 900; i++)); do
        if grep -q "$1" "$2" 2> /dev/null; then return 0; fi
        sleep 0.2
    done
    echo "slurm.sh: no \"$1\" in $2 within three minutes" >&2
    tail -n 20 "$2" >&2
    return 1
}
wait_job() { # JOB: until it has ended, up to fifteen minutes
    for ((i = 0; i < 900; i++)); do
        if [[ ! $(field "$1" JobState) =~ ^(PENDING|RUNNING|CONFIGURING|COMPLETING|REQUEUED)$ ]]; then return 0; fi
        sleep 1
    done
    echo "slurm.sh: job $1 is still $(field "$1" JobState) after fifteen minutes" >&2
    return 1
}
losses() { # FOLDER: every epoch's loss, as stored
    python - "$out/$1" << 'PYTHON'
import json, pathlib, sys
paths = list(pathlib.Path(sys.argv[1]).glob("*/epochs.jsonl"))
print([json.loads(line)["loss"] for path in paths for line in path.read_text().splitlines()])
PYTHON
}
left() { # how many processes of Ray or harness the nodes still have
    local count=0
    for name in n1 n2; do
        count=$((count + $(ip netns pids "harness-$name" | xargs -r ps -o args= -p | grep -Ec "raylet|gcs_server|harness run" || true)))
    done
    echo "$count"
}
row() { # WHAT JOB FOLDER
    local equal=no
    if [[ "$(losses "$3")" == "$(losses whole)" ]]; then equal=yes; fi
    printf '{"what happened": "%s", "job": "%s", "requeued": %s, "losses as undisturbed": "%s", "processes left": %s}\n' \
        "$1" "$(field "$2" JobState)" "$(field "$2" Restarts)" "$equal" "$(left)" | tee -a "$out/slurm.jsonl"
}

rm -f "$out/slurm.jsonl"
trap cleanup EXIT
trap 'exit 143' INT TERM
cat > "$state/hosts" << HOSTS
127.0.0.1 localhost
$net.1 n1
$net.2 n2
$net.254 $(hostname -s)
HOSTS
cat > "$state/slurm.conf" << CONF
ClusterName=harness
SlurmctldHost=$(hostname -s)($net.254)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$out/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=n1 NodeAddr=$net.1 CPUs=1 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeAddr=$net.2 CPUs=1 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP OverTimeLimit=0
CONF
mkdir "$state/ctld" "$state/spool-n1" "$state/spool-n2"
touch "$state"/gpu{0..7} # slurm.sh asks for eight a node; nothing here uses them
echo "Name=gpu File=$state/gpu[0-7]" > "$state/gres.conf"

ip link add harness-slurm type bridge
ip address add "$net.254/24" dev harness-slurm
ip link set harness-slurm up
dd if=/dev/urandom of="$state/munge.key" bs=1024 count=1 status=none
chmod 400 "$state/munge.key"
munged --force --socket="$state/munge.socket" --key-file="$state/munge.key" --pid-file="$state/munged.pid" \
    --log-file="$out/munged.log" --seed-file="$state/munge.seed" 2> /dev/null
slurmctld -f "$SLURM_CONF" -c
start_node n1 1
start_node n2 2
for ((i = 0; i < 60; i++)); do
    if [[ "$(sinfo --noheader --states=idle --format=%D 2> /dev/null)" == 2 ]]; then break; fi
    sleep 1
done
sinfo

job="$(submit whole)"
wait_job "$job"
row "undisturbed" "$job" whole

job="$(submit limited --time=4 --signal=B:USR1@60)"
wait_job "$job"
row "time limit, requeued by itself" "$job" limited

job="$(submit cancelled)"
wait_for "epoch 4/" "$out/cancelled.log"
scancel "$job"
wait_job "$job"
sleep 15 # KillWait
row "cancelled" "$job" cancelled
job="$(submit cancelled)"
wait_job "$job"
row "cancelled, submitted again" "$job" cancelled

nsenter --target "$(node_pid n2)" --mount mount -o remount,ro /tmp/ray
job="$(submit untrained)"
wait_job "$job"
row "Ray cannot start on one node" "$job" untrained
python benchmarks/slurm.py --lines "$out/slurm.jsonl" ${2:+--json "$2"}
echo "logs and results: $out"

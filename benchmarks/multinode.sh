#!/bin/bash
# Nodes with networks of their own, in this machine: three network namespaces on a bridge, a real `ray start` in each.
# 2-way DDP over two of them: undisturbed; with the link cut and restored; with the link dropping everything until a rank is
# said to hang; with a node killed and replaced.
# Prints what survived, and whether the losses are those of the undisturbed run. Needs root:
#   sudo [EPOCHS=40] benchmarks/multinode.sh [FOLDER FOR RESULTS [FILE OF READINGS]]
set -euo pipefail

if [[ $EUID -ne 0 ]]; then
    echo "multinode.sh: network namespaces need root: sudo $0" >&2
    exit 2
fi
if ! command -v ip > /dev/null || ! ip netns add harness-probe 2> /dev/null; then
    echo "multinode.sh: no network namespaces here: \`ip netns add\` from iproute2 must work" >&2
    exit 2
fi
ip netns delete harness-probe

root="$(cd "$(dirname "$0")/.." && pwd)"
bin="${HARNESS_BIN:-$root/.venv/bin}"
out="${1:-$(mktemp -d)}"
session="$(mktemp -d /tmp/hmn.XXXX)" # short: Ray's sockets lie below it
net=10.77.0
port=6390
cd "$root"

export PYTHONPATH="$root" PATH="$bin:$PATH"
export RAY_AUTH_MODE=token # nodes and driver share it; a process without it is turned away, which is tried below
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN
export GLOO_SOCKET_IFNAME=eth0 # in the environment of `ray start`: workers inherit the node's, not the driver's
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_enable_worker_prestart=0
# a silent node is given up after 12 s: longer than the cut below, shorter than 40 s, the default
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=4

cleanup() {
    for name in a b c; do
        kill_node "$name" 2> /dev/null || true
        ip netns delete "harness-$name" 2> /dev/null || true
    done
    ip link delete harness-br 2> /dev/null || true
    rm -rf "$session"
}
kill_node() { # every process of a namespace, at once
    ip netns pids "harness-$1" | xargs --no-run-if-empty kill -KILL
}
add_network() { # NAME NUMBER
    ip netns add "harness-$1"
    ip link add "harness-v$1" type veth peer name eth0 netns "harness-$1"
    ip link set "harness-v$1" master harness-br up
    ip -n "harness-$1" link set lo up
    ip -n "harness-$1" address add "$net.$2/24" dev eth0
    ip -n "harness-$1" link set eth0 up
}
start_node() { # NAME NUMBER [ray start's words]
    local name=$1 number=$2
    shift 2
    ip netns exec "harness-$name" ray start --node-ip-address="$net.$number" --num-cpus=1 \
        --object-store-memory=100000000 "$@" > "$out/node-$name.log" 2>&1
}
train() { # FOLDER [harness run's words]: in the head's namespace, lines into FOLDER.log
    ip netns exec harness-a harness run --dataset digits --depths 8 --limit-train 512 --epochs "${EPOCHS:-40}" --gpus 0 \
        --loader resident --workers 2 --placement spread --address "$net.1:$port" --out "$out/$1" "${@:2}" > "$out/$1.log" 2>&1
}
wait_for() { # WORDS FILE: up to two minutes
    for ((i = 0; i < 1200; i++)); do
        if grep -q "$1" "$2" 2> /dev/null; then return 0; fi
        sleep 0.1
    done
    echo "multinode.sh: no \"$1\" in $2 within two minutes" >&2
    tail -n 20 "$2" >&2
    return 1
}
losses() { # FOLDER: every epoch's loss, as stored
    python - "$out/$1" << 'PYTHON'
import json, pathlib, sys
(path,) = pathlib.Path(sys.argv[1]).glob("*/epochs.jsonl")
print([json.loads(line)["loss"] for line in path.read_text().splitlines()])
PYTHON
}
row() { # WHAT FOLDER SECONDS
    local equal=no attempts
    if [[ "$(losses "$2")" == "$(losses whole)" ]]; then equal=yes; fi
    attempts="$(python -c 'import json, pathlib, sys
print(json.loads(next(pathlib.Path(sys.argv[1]).glob("*/record.json")).read_text())["result"]["attempts"])' "$out/$2")"
    printf '{"what happened": "%s", "attempts": %s, "losses as undisturbed": "%s", "seconds": %s}\n' \
        "$1" "$attempts" "$equal" "$3" >> "$out/multinode.jsonl"
}

mkdir -p "$out"
trap cleanup EXIT
ip link add harness-br type bridge
ip link set harness-br up
add_network a 1
add_network b 2
add_network c 3
start_node a 1 --head --port=$port --include-dashboard=false --temp-dir="$session"
start_node b 2 --address="$net.1:$port"

if ip netns exec harness-b env RAY_AUTH_TOKEN="$(printf '0%.0s' {1..64})" \
    python -c "import ray; ray.init('$net.1:$port', logging_level='ERROR')" > "$out/stranger.log" 2>&1; then
    echo "multinode.sh: a process with another token was let in" >&2
    exit 1
fi
echo "a process with another token: turned away"
open="$(ip netns exec harness-a ss -Hltn | awk '{print $4}' | grep -Ev "^(127\.|\[::1\]|$net\.)" | wc -l)"
echo "ports of the head that listen on every address of its namespace: $open"
rm -f "$out/multinode.jsonl"

SECONDS=0
train whole
row "nothing" whole $SECONDS

SECONDS=0
train cut &
wait_for "epoch 5/" "$out/cut.log"
ip link set harness-vb down
sleep 5
ip link set harness-vb up
wait $! || { tail -n 20 "$out/cut.log" >&2; exit 1; }
row "link cut for 5 s" cut $SECONDS

SECONDS=0
train dropped --stall-seconds 10 &
wait_for "epoch 5/" "$out/dropped.log"
tc qdisc add dev harness-vb root netem loss 100%
dropped=$SECONDS
wait_for "trying again\\|waiting for room" "$out/dropped.log"
noticed=$SECONDS
tc qdisc delete dev harness-vb root
wait $! || { tail -n 20 "$out/dropped.log" >&2; exit 1; }
grep "no step for" "$out/dropped.log"
row "link drops everything ($((noticed - dropped)) s until the rank that hangs was named)" dropped $SECONDS

SECONDS=0
train killed &
wait_for "epoch 5/" "$out/killed.log"
kill_node b
killed=$SECONDS
wait_for "waiting for room" "$out/killed.log"
start_node c 3 --address="$net.1:$port"
wait_for "trying again" "$out/killed.log"
back=$SECONDS
wait $! || { tail -n 20 "$out/killed.log" >&2; exit 1; }
row "node killed, replaced after its loss was noticed ($((back - killed)) s to the next attempt)" killed $SECONDS
echo
python benchmarks/multinode.py --lines "$out/multinode.jsonl" ${2:+--json "$2"}
echo "logs and results: $out"

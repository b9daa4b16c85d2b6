#!/bin/bash
# sbatch --nodes=2 cluster/slurm.sh --depths 20,32,56,110 --data-dir /shared/data --out /shared/runs
# What follows the script's name goes to `harness run`. At its time limit the job is requeued, and goes on from its
# checkpoints. It ends as COMPLETED only if `harness run` ended well.
#SBATCH --job-name=resnet-harness
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --time=08:00:00
#SBATCH --output=harness-%j.log
set -euo pipefail

# the environment that the wheel of this repository is installed in, at one path on every node
source "${HARNESS_VENV:-$HOME/harness-venv}/bin/activate"

# one token a job: nobody else on these nodes can talk to its Ray processes
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # 30 by default: too short for imports from a shared file system
export RAY_USAGE_STATS_ENABLED=0
# where a host name maps to 127.0.x.x, name the interface that joins the nodes:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r head _ < <(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname -I)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one network do not meet

# symmetric-run gives its options to `ray start` on all nodes, so none may be for the head alone; and it ends with 0
# where Ray did not start: the command itself says here that it ran, and how it ended
export HARNESS_EXIT_CODE_FILE="${TMPDIR:-/tmp}/harness-exit-code-$SLURM_JOB_ID"
rm -f "$HARNESS_EXIT_CODE_FILE"*
# --force trains again what was finished before the job first began, not what it has finished before it was requeued
began=".harness-began-$SLURM_JOB_ID"
[[ ${SLURM_RESTART_COUNT:-0} != 0 && -s $began ]] || date +%s >"$began"
HARNESS_FORCE_SINCE="$(<"$began")"
export HARNESS_FORCE_SINCE
requeue() { # the command first, so that its runs stop at a step with a checkpoint: Slurm would end their nodes with it
    kill -TERM "$(<"$HARNESS_EXIT_CODE_FILE.pid")" || true
    for _ in {1..60}; do [[ -s $HARNESS_EXIT_CODE_FILE ]] && break || sleep 0.5; done
    echo "time limit: requeued, goes on from the last checkpoints"
    began= # it stays
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1
per_node=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
# where Slurm follows processes by their parents, Ray's daemons outlive a requeued job; the nodes are this job's alone
srun "${per_node[@]}" ray stop --force >/dev/null || true
# shellcheck disable=SC2016  # for the shell on the head node
run='(echo "$BASHPID" >"$HARNESS_EXIT_CODE_FILE.pid"; exec harness run "$@"); code=$?; '
run+='echo "$code" >"$HARNESS_EXIT_CODE_FILE"; exit "$code"'
srun "${per_node[@]}" \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-8}" \
    -- bash -c "$run" \
    harness --address "$head:$port" "$@" &
steps=$!
while true; do # a signal ends `wait` too
    ended=0
    wait "$steps" || ended=$?
    kill -0 "$steps" 2>/dev/null || break
done
if [[ ! -s $HARNESS_EXIT_CODE_FILE ]]; then
    echo "nothing was trained: Ray did not start on all $SLURM_JOB_NUM_NODES nodes; its messages are above" >&2
    exit $((ended ? ended : 1))
fi
code=$(<"$HARNESS_EXIT_CODE_FILE")
rm -f "$HARNESS_EXIT_CODE_FILE"* "$began"
exit "$code"

#!/bin/bash
# sbatch --nodes=2 cluster/slurm.sh --depths 20,32,56,110 --data-dir /shared/data --out /shared/runs
# What follows the script's name goes to `harness run`. A job that is requeued goes on from its checkpoints.
#SBATCH --job-name=resnet-harness
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
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

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-8}" --include-dashboard=false \
    -- harness run --address "$head:$port" "$@"

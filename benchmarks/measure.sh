#!/bin/bash
# Every benchmark, one after the other, on an otherwise idle machine with a clean tree; about an hour on two CPU cores.
#   benchmarks/measure.sh OUT DATA [PEER ...]       OUT/NAME.json for each; what is there already is not measured again
#   SMOKE=1 benchmarks/measure.sh OUT DATA          whether each works, in a few minutes; its figures mean nothing
set -euo pipefail

out="$1" data="$2"
shift 2
here="$(dirname "$0")"
python="${PYTHON:-python}"
peers=()
for peer in "$@"; do peers+=(--peer "$peer"); done
mkdir -p "$out"
if [[ -z "${SMOKE:-}" && -n "$(git -C "$here" status --porcelain)" ]]; then
    echo "measure.sh: the tree has changes that are not committed: commit or stash them" >&2
    exit 2
fi

measure() { # NAME SCRIPT WORDS-OF-A-SMOKE-TEST WORDS...
    local name=$1 script=$2 short=()
    if [[ -n "${SMOKE:-}" ]]; then read -ra short <<< "$3"; fi
    if [[ -e "$out/$name.json" ]]; then return 0; fi
    echo "== $name" >&2
    "$python" "$here/$script" "${@:4}" "${short[@]}" --json "$out/$name.json.new" ||
        echo "measure.sh: $script ended with exit code $?" >&2 # a target was missed, or it does not work
    if [[ -e "$out/$name.json.new" ]]; then mv "$out/$name.json.new" "$out/$name.json"; fi
}

few=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    few=(--images 1280)
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
once="--rounds 1"
measure speed speed.py "$once --images 128 --epochs 1 --engines eager --precisions fp32" --data-dir "$data" --depths 20 "${few[@]}" "${peers[@]}"
measure scaling scaling.py "$once --images 1024" --data-dir "$data" "${few[@]}"
measure loaders loader_speed.py "$once --seconds 0.1" --data-dir "$data"
measure images images.py "$once --seconds 0.1 --times 2" --data-dir "$data"
measure report report.py "$once --warmup 0 --runs 50" --runs 1000,10000
measure startup startup.py "$once --warmup 0"
measure kept_workers kept_workers.py "$once --warmup 0"
measure marks marks.py "$once --epochs 4"
measure scale scale.py "--runs 20" --out "$scratch/scale"
measure chaos chaos.py "--faults 3 --epochs 3 --images 64" --out "$scratch/chaos"
measure quickstart quickstart.py "$once"
if [[ $EUID -eq 0 ]] && command -v ip > /dev/null; then
    measure clusters chaos.py "--faults 3 --epochs 3 --images 64" --where "2 nodes;3 nodes;3 nodes, tune" --strikes 3 --faults 200 --out "$out/clusters"
else
    echo "measure.sh: nodes with networks of their own need root and iproute2: sudo $0 ..." >&2
fi
if [[ $EUID -eq 0 && ! -e "$out/slurm.json" ]] && command -v slurmctld > /dev/null; then
    "$here/slurm.sh" "$scratch/slurm" "$out/slurm.json"
else
    echo "measure.sh: slurm.sh needs root and slurm-wlm: sudo $here/slurm.sh FOLDER $out/slurm.json" >&2
fi

#!/bin/bash
# Every benchmark, one after the other, on an otherwise idle machine with a clean tree; about an hour on two CPU cores.
#   benchmarks/measure.sh OUT DATA [PEER ...]       OUT/NAME.json for each; what is there already is not measured again
set -euo pipefail

out="$1" data="$2"
shift 2
here="$(dirname "$0")"
python="${PYTHON:-python}"
peers=()
for peer in "$@"; do peers+=(--peer "$peer"); done
mkdir -p "$out"
if [[ -n "$(git -C "$here" status --porcelain)" ]]; then
    echo "measure.sh: the tree has changes that are not committed: commit or stash them" >&2
    exit 2
fi

measure() { # NAME SCRIPT WORDS...
    local name=$1
    shift
    if [[ -e "$out/$name.json" ]]; then return 0; fi
    echo "== $name" >&2
    "$python" "$here/$1" "${@:2}" --json "$out/$name.json.new" && mv "$out/$name.json.new" "$out/$name.json"
}

few=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    few=(--images 1280)
fi
measure speed speed.py --data-dir "$data" --depths 20 "${few[@]}" "${peers[@]}"
measure scaling scaling.py --data-dir "$data" "${few[@]}"
measure loaders loader_speed.py --data-dir "$data" --rounds 10
measure report report.py 1000 10000
measure startup startup.py
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
measure scale scale.py --out "$scratch/scale"
measure chaos chaos.py --out "$scratch/chaos"

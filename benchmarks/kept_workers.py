"""Seeds of one row in kept workers beside fresh processes: python benchmarks/kept_workers.py [--rounds 10] [--json FILE]

Three seeds of a row by one command, whose second and third are trained by the workers of the first, and the same two seeds by
commands of their own, which take turns. Shown: peak resident memory as a ratio with its interval, how far that of fresh processes
scatters, and whether losses, errors and weights are the same bit for bit. What a further seed takes is startup.py's.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from chaos import hash_weights
from rounds import harness, make_table, parse_options, process_seconds, publish, ratio, take_turns

RUN = "run --dataset digits --depths 8 --gpus 0 --launcher ray --loader resident --limit-train 256 --epochs 3"
SEEDS = (1, 2)


def measure(workers: int, *commands: str) -> dict[str, Any]:
    """The runs of some commands, by seed: peak memory in MiB, hash of what was computed."""
    with tempfile.TemporaryDirectory() as folder:
        for seeds in commands:
            process_seconds(harness(*RUN.split(), "--workers", workers, "--seeds", seeds, "--out", folder))
        runs = {}
        for path in Path(folder).glob("*/record.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            lines = path.with_name("epochs.jsonl").read_text(encoding="utf-8").splitlines()
            computed: list[Any] = [
                (row["loss"], row["train_error"], row["error"]) for row in map(json.loads, lines)
            ]
            computed.append(hash_weights(path.with_name("weights.safetensors")))
            runs[str(record["spec"]["seed"])] = {
                "rss_mib": record["result"]["memory"]["rss_mib"]["value"],
                "sha256": hashlib.sha256(json.dumps(computed).encode()).hexdigest(),
            }
    return runs


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows = []
    for workers in content["workers"]:
        kept, fresh = (content["readings"][f"{name} {workers}"] for name in ("kept", "fresh"))
        pairs = [(a[str(seed)], b[str(seed)]) for a, b in zip(kept, fresh, strict=True) for seed in SEEDS]
        peak = ratio([a["rss_mib"] for a, _ in pairs], [b["rss_mib"] for _, b in pairs])
        rows.append((
            workers,
            f"{peak.value:.3f} [{peak.low:.3f}, {peak.high:.3f}]",
            f"{max(b['rss_mib'] for _, b in pairs) / min(b['rss_mib'] for _, b in pairs):.3f}",
            f"{sum(a['sha256'] == b['sha256'] for a, b in pairs)} of {len(pairs)}",
        ))  # fmt: skip
    header = ("workers", "peak memory, kept / fresh", "largest / smallest fresh", "equal bit for bit")
    return make_table(header, rows)


def main() -> None:
    options = parse_options(__doc__, rounds=10, warmup=1)
    ways = {}
    for workers in (1, 2):
        ways[f"kept {workers}"] = partial(measure, workers, "3")
        ways[f"fresh {workers}"] = partial(measure, workers, *(f"{seed}," for seed in SEEDS))
    publish(
        describe, options.json, workers=[1, 2], readings=take_turns(ways, options.rounds, warmup=options.warmup)
    )


if __name__ == "__main__":
    main()

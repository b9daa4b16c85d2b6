"""What slurm.sh measured, as a table and a file of readings: slurm.py --lines FILE [--json FILE]"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rounds import make_table, parse_options, publish


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    return make_table(tuple(content["readings"][0]), [tuple(reading.values()) for reading in content["readings"]])


def main() -> None:
    options = parse_options(__doc__, lines=Path)
    readings = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    publish(describe, options.json, readings=readings)


if __name__ == "__main__":
    main()

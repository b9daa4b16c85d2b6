"""The command line, run in the tests' own process."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from harness import cli


def harness(line: str, capsys: Any) -> tuple[int, str, str]:
    """Run a command line in this process; exit code, standard output, standard error."""
    before = sys.argv
    sys.argv = ["harness", *shlex.split(line)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err

"""Run the command line in this process, for the tests of its commands."""

from __future__ import annotations

import json

from twn_kernels.cli import main


def failure(capsys, *argv: str) -> str:
    """Run a command that must fail; its one line on stderr."""
    assert main(list(argv)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def report(capsys, *argv: str, code: int = 0) -> dict:
    """Run a command with ``--json``; the document that it prints."""
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)

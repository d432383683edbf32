"""The journal of a run: one JSON object a line, appended at once, so that a killed run loses at most what was running.

A line is written whole or is cut by the kill; a cut last line is dropped when the run resumes, and the step that it
belonged to is done again. A step that ended the process twice, not by Ctrl-C, is not tried
a third time.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from twn_kernels.benchmarking.results import SCHEMA, Row, parse_row
from twn_kernels.errors import ResultError

__all__ = ["FATAL", "Journal"]

FATAL = 2  # times that a step may end the process before it is left out
_NAME = "journal.jsonl"


class Journal:
    """A run's record in a folder.

    Args:
        folder: of the run; made where missing.
        identity: what must not change between a run and its resumption, such as device and commit.
        resume: go on where a journal is; else there must be none.

    Raises:
        ResultError: there is a journal and ``resume`` was not asked for, it is damaged, or it is of another run.

    Attributes:
        stages: what each finished stage left, by name.
        rows: of each finished case, by its id.
        broken: ``(case, contender)`` to the reason why it must not run again.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(folder) / _NAME
        self.stages: dict[str, Any] = {}
        self.rows: dict[str, list[Row]] = {}
        self.broken: dict[tuple[str, str], str] = {}
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._open: tuple[str, str] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"{folder} cannot hold a run: {error.strerror}. Name another folder.") from None
        identity = json.loads(json.dumps(identity))
        if self.path.exists() and not resume:
            raise ResultError(
                f"{self.path} holds a run already. Continue it with --resume, or name another folder with --out."
            )
        entries = self._read()
        for number, entry in enumerate(entries, 1):
            self._take(entry, number, identity)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._take(self._append({"event": "start", "schema": SCHEMA, **identity}), len(entries) + 1, identity)

    def begin(self, case: str, contender: str) -> None:
        """Note that ``contender`` of ``case`` (or a stage, with an empty contender) touches the device from now on."""
        self._append({"event": "begin", "case": case, "contender": contender})

    def stage(self, name: str, value: Any) -> None:
        """Record what a stage left."""
        self._append({"event": "stage", "name": name, "value": value})
        self.stages[name] = value

    def case(self, case: str, rows: list[Row]) -> None:
        """Record a finished case."""
        self._append({"event": "case", "case": case, "rows": [row.to_dict() for row in rows]})
        self.rows[case] = rows

    def breaks(self, case: str, contender: str, reason: str) -> None:
        """Record that a contender broke the device for this process."""
        self._append({"event": "broken", "case": case, "contender": contender, "reason": reason})
        self.broken[case, contender] = reason

    def interrupted(self) -> None:
        """Record that the user stopped the run, so that what was running is not blamed for its end."""
        self._append({"event": "interrupted"})

    def excluded(self, case: str) -> dict[str, str]:
        """Contenders of a case that must not run, each with the sentence why; key ``""`` stands for the case itself."""
        found = {
            name: f"The process ended {deaths} times while it ran."
            for (of, name), deaths in self._deaths.items()
            if of == case and deaths >= FATAL
        }
        return found | {
            name: f"It broke the device, so that a new process had to go on: {reason}"
            for (of, name), reason in self.broken.items()
            if of == case
        }

    def all_rows(self) -> tuple[Row, ...]:
        """Rows of all finished cases, in the order in which they were measured."""
        return tuple(row for rows in self.rows.values() for row in rows)

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> dict[str, Any]:
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])
        os.fsync(self._file)
        return entry

    def _read(self) -> list[Any]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        entries = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entries.append(json.loads(line))
            except ValueError:
                raise ResultError(
                    f"{self.path}, line {number} is no JSON; only a last line can be cut by a kill. "
                    "Start a new run in another folder."
                ) from None
        return entries

    def _take(self, entry: Any, number: int, identity: dict[str, Any]) -> None:
        event = entry.get("event") if isinstance(entry, dict) else None
        source = f"{self.path}, line {number}"
        try:
            if event == "start":
                self._started(entry, identity, source)
            elif event == "begin":
                self._open = (entry["case"], entry["contender"])
                return
            elif event == "stage":
                self.stages[entry["name"]] = entry["value"]
            elif event == "case":
                self.rows[entry["case"]] = [parse_row(row, f"{source}: rows") for row in entry["rows"]]
            elif event == "broken":
                self.broken[entry["case"], entry["contender"]] = entry["reason"]
            elif event != "interrupted":
                raise ResultError(f"{source} holds no event of a run, got {event!r}. Start a new run elsewhere.")
        except KeyError as error:
            raise ResultError(f"{source}: the event {event!r} has no {error.args[0]!r}.") from None
        self._open = None

    def _started(self, entry: dict[str, Any], identity: dict[str, Any], source: str) -> None:
        if entry["schema"] != SCHEMA:
            raise ResultError(f"{source} has schema {entry['schema']!r}; this version writes schema {SCHEMA}.")
        for name, now in identity.items():
            if entry.get(name) != now:
                raise ResultError(
                    f"{source}: the run has {name} {entry.get(name)!r}, and now it is {now!r}; a document cannot hold "
                    "both. Name another folder with --out."
                )
        if self._open is not None:
            # The process ended while this ran, by its fault or by a kill from outside.
            self._deaths[self._open] += 1

"""Keeps scores in an SQLite file, which makes writes atomic and lets processes share it.

A row's key is the digest of everything that determines the score (`PlanScorer.context`) and
the plan as a JSON object of items and levels. Its checksum covers key and values, so that an
edited or damaged row raises an error instead of giving a wrong score.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rap_env.artifacts import canonical_json, digest
from rap_env.errors import StorageFullError, StoreError
from rap_env.plan import Plan

_FORMAT = 2
_LEVELS_VERSION = 1  # raised when lowered items get other values
_BUSY_TIMEOUT_S = 60.0
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS contexts (key TEXT PRIMARY KEY, context TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS scores (
    context TEXT NOT NULL, mask TEXT NOT NULL, metric TEXT NOT NULL,
    "values" TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (context, mask, metric)
) WITHOUT ROWID""",
)
_INSERT = "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)"


class ScoreStore:
    """A file of scores that processes can share, intact if a process is killed at any moment.

    Args:
        path: The SQLite file; created with its folder if missing.

    Raises:
        StoreError: The file is not a score store, is damaged, or is of a newer format.
        StorageFullError: The disk is full.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._known_contexts: set[str] = set()
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            verdict = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(str(verdict))
            if self._format() != _FORMAT:
                self._prepare()

    def get(self, context: Mapping[str, Any], plan: Plan, metric: str) -> list[float] | None:
        """Values of a metric of a plan, or None if they are not stored.

        Args:
            context: What determines the scores, besides the plan.
            plan: The plan.
            metric: A name, such as ``"window_nll"``.

        Raises:
            StoreError: The row or the file is damaged.
        """
        return self._read(digest(dict(_stored_context(context, plan))), plan, metric)

    def put(
        self, context: Mapping[str, Any], plan: Plan, metric: str, values: Sequence[float]
    ) -> None:
        """Store the values of a metric of a plan, see `get`; durable when it returns.

        The context itself is kept once for people and exports.

        Raises:
            StorageFullError: The disk is full.
            StoreError: The file is damaged.
        """
        whole = dict(_stored_context(context, plan))
        key = (digest(whole), plan.to_json(), metric)
        text = canonical_json([float(value) for value in values])
        with self._errors(), self._connection as connection:
            if key[0] not in self._known_contexts:
                connection.execute(
                    "INSERT OR IGNORE INTO contexts VALUES (?, ?)", (key[0], canonical_json(whole))
                )
            connection.execute(_INSERT, (*key, text, _checksum(*key, text)))
        self._known_contexts.add(key[0])

    def rows(self, context: Mapping[str, Any], metric: str) -> Iterator[tuple[Plan, list[float]]]:
        """All plans with their values for one context and metric, those that lower items last."""
        query = "SELECT mask FROM scores WHERE context = ? AND metric = ? ORDER BY mask"
        for key in (digest(dict(context)), digest(with_levels(context))):
            with self._errors():
                plans = self._connection.execute(query, (key, metric)).fetchall()
            for (text,) in plans:
                plan = Plan.from_json(text)
                values = self._read(key, plan, metric)
                if values is not None:
                    yield plan, values

    def _read(self, context_key: str, plan: Plan, metric: str) -> list[float] | None:
        query = 'SELECT "values", sha256 FROM scores WHERE context = ? AND mask = ? AND metric = ?'
        key = (context_key, plan.to_json(), metric)
        with self._errors():
            row = self._connection.execute(query, key).fetchone()
        if row is None:
            return None
        if row[1] != _checksum(*key, row[0]):
            raise StoreError(
                f"A score in {self.path} was altered (checksum differs for {plan}); delete the "
                "file: scores are computed again when they are needed."
            )
        return [float(value) for value in json.loads(row[0])]

    def __len__(self) -> int:
        with self._errors():
            return int(self._connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0])

    def close(self) -> None:
        """Close this thread's connection; the store opens again when used."""
        connection = self._local.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _format(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _prepare(self) -> None:
        """Create the tables of a new file."""
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")  # one process at a time
            written = self._format()
            if written not in (0, _FORMAT):
                raise StoreError(
                    f"The score store {self.path} has format {written}, but this version reads "
                    f"{_FORMAT}; give another path or delete it."
                )
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_FORMAT}")

    @property
    def _connection(self) -> sqlite3.Connection:
        # One connection per thread and process: SQLite connections must not cross a fork.
        connection = self._local.__dict__.get("connection")
        if connection is None or self._local.pid != os.getpid():
            connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # consistent after any kill
            self._local.connection, self._local.pid = connection, os.getpid()
        return connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert SQLite's errors into errors that state what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise StorageFullError(
                    f"No space left for the score store {self.path}; free some and run the same "
                    "command again: all scores stored before are intact."
                ) from error
            raise StoreError(f"The score store {self.path} cannot be used: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"The score store {self.path} is damaged or no score store ({error}); delete it: "
                "scores are computed again when they are needed."
            ) from error


def with_levels(context: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the scores of plans that lower items, besides the plan."""
    return {**context, "levels": _LEVELS_VERSION}


def _stored_context(context: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    # Scores of plans that only remove blocks do not depend on how levels are made.
    return context if plan.is_mask else with_levels(context)


def _checksum(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()

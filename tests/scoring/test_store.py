"""The score store: durable, shared by processes, and protected by checksums."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from rap_env.artifacts import digest
from rap_env.errors import StorageFullError, StoreError
from rap_env.plan import Plan
from rap_env.scoring.store import ScoreStore

MASK = Plan.removing("layer01.ffn", 0)
CONTEXT = {"model": "m", "tokens": "t"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "scores.sqlite"


def test_values_come_back_exactly_by_every_part_of_their_key(path):
    values = [0.1 + 0.2, 1e-300, 12345.678901234567]
    ScoreStore(path).put(CONTEXT, MASK, "nll", values)
    store = ScoreStore(path)
    store.put(CONTEXT, Plan(), "nll", [2.0])
    store.put(CONTEXT, Plan(), "acc", [3.0])
    store.put({"model": "other"}, MASK, "nll", [4.0])
    assert dict(store.rows(CONTEXT, "nll")) == {MASK: values, Plan(): [2.0]}
    assert store.get(CONTEXT, MASK, "nll") == values
    assert store.get(CONTEXT, MASK, "acc") is None
    assert len(store) == 4


def test_keys_of_lowered_plans_depend_on_how_levels_are_made(path):
    """Stores of earlier versions have these keys."""
    store, lowered = ScoreStore(path), Plan.of({"layer00.cache": "int4"})
    for plan in (MASK, lowered):
        store.put(CONTEXT, plan, "nll", [1.0])
    with sqlite3.connect(path) as connection:
        rows = dict(connection.execute("SELECT mask, context FROM scores").fetchall())
    assert rows == {
        MASK.to_json(): digest(CONTEXT),
        lowered.to_json(): digest({**CONTEXT, "levels": 1}),
    }
    assert set(dict(store.rows(CONTEXT, "nll"))) == {MASK, lowered}


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("""UPDATE scores SET "values" = '[0.5]'""", r"altered .*delete the file"),
        ("PRAGMA user_version = 99", "has format 99"),
    ],
)
def test_an_altered_row_or_a_newer_format_is_rejected(path, statement, message):
    store = ScoreStore(path)
    store.put(CONTEXT, MASK, "nll", [1.0])
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    with pytest.raises(StoreError, match=message):
        ScoreStore(path).get(CONTEXT, MASK, "nll")


def test_a_truncated_file_and_another_kind_of_file_are_rejected(path):
    store = ScoreStore(path)
    for index in range(200):
        store.put(CONTEXT, Plan.removing(index), "nll", [float(index)] * 20)
    store.close()
    data = path.read_bytes()
    for damaged, message in (
        (data[: len(data) // 2 - 100], r"damaged .*delete it"),
        (b"these are no scores, " * 100, "no score store"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=message):
            ScoreStore(path)


def test_a_full_disk_raises_an_error_and_loses_nothing(path):
    store = ScoreStore(path)
    store.put(CONTEXT, MASK, "nll", [1.0])
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFullError, match="No space left"):
        _fill(store)
    assert store.get(CONTEXT, MASK, "nll") == [1.0]


def _fill(store):
    for index in range(1000):
        store.put(CONTEXT, Plan.removing(index), "nll", [1.0] * 50)


def _write(path, start):
    store = ScoreStore(path)
    for index in range(start, start + 50):
        store.put(CONTEXT, Plan.removing(index), "nll", [float(index)])


def test_several_processes_write_concurrently(path):
    context = multiprocessing.get_context("fork")
    parent = ScoreStore(path)  # open before the fork: children must not share its connection
    workers = [context.Process(target=_write, args=(path, 40 * n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [parent.get(CONTEXT, Plan.removing(i), "nll") for i in range(170)] == [
        [float(i)] for i in range(170)
    ]


WRITER = """
import itertools, sys
from rap_env.plan import Plan
from rap_env.scoring.store import ScoreStore
store = ScoreStore(sys.argv[1])
for i in itertools.count():
    store.put({}, Plan.removing(i), "nll", [float(i)])
    print(i, flush=True)
"""


def test_a_kill_at_any_moment_keeps_all_that_was_stored(path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 30:
            break
    os.kill(writer.pid, signal.SIGKILL)
    last = max([30, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    store = ScoreStore(path)
    for index in range(last + 1):
        assert store.get({}, Plan.removing(index), "nll") == [float(index)]
    store.put({}, MASK, "nll", [7.0])
    assert store.get({}, MASK, "nll") == [7.0]

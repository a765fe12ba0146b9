"""The table of engines and features says what the tests of this tree show."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from tests.engine_features import FeatureRecord

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results" / "engines" / "features.json"
MARK = re.compile(r"pytest\.mark\.engine_feature\(\s*((?:\"[^\"]*\",?\s*){3})\)")


def test_the_record_has_what_the_marks_of_tests_say_and_no_test_was_left_out():
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for arguments in MARK.findall(path.read_text(encoding="utf-8")):
            marked.add(tuple(re.findall(r"\"([^\"]*)\"", arguments)))
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    assert {(row["engine"], row["feature"], row["what"]) for row in rows} == marked
    assert len({(row["engine"], row["feature"]) for row in rows}) == len(rows), "one cell each"
    assert all(row["passed"] > 0 and not row.get("skipped") for row in rows)


def report(outcome, when="call", engine="an engine"):
    shown = [("engine_feature", [engine, "Streams", "all"]), ("other", 1)]
    return SimpleNamespace(
        user_properties=shown, when=when, outcome=outcome, passed=outcome == "passed"
    )


def test_outcomes_are_counted_and_a_failure_leaves_the_old_record(tmp_path):
    path = tmp_path / "new" / "features.json"
    record = FeatureRecord(str(path))
    for one in (
        report("passed", "setup"), report("passed"), report("passed", "teardown"),
        report("skipped", "setup"), report("passed", engine="another"),
    ):  # fmt: skip
        record.pytest_runtest_logreport(one)
    record.pytest_sessionfinish(exitstatus=1)
    assert not path.exists()
    record.pytest_sessionfinish(exitstatus=0)
    assert json.loads(path.read_text())["rows"] == [
        {"engine": "an engine", "feature": "Streams", "what": "all", "passed": 1, "skipped": 1},
        {"engine": "another", "feature": "Streams", "what": "all", "passed": 1},
    ]

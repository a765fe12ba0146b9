"""The record of what each engine can do with a plan, from the tests that show it.

A test with ``@pytest.mark.engine_feature(engine, feature, what)`` shows that the engine has `what`
of a feature. ``pytest -m engine_feature --engine-features results/engines/features.json`` runs them
(with ``llama-cpp-py-sync`` installed) and writes the record, unless one fails.
"""

import json
from collections import Counter
from pathlib import Path

from experiments.study.run_folder import package_versions

PACKAGES = ("transformers", "llama-cpp-py-sync")


class FeatureRecord:
    """Collects the outcomes of marked tests, and writes them at the end.

    Args:
        path: The file to write.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._outcomes: dict[tuple[str, str, str], Counter[str]] = {}

    def pytest_runtest_logreport(self, report):
        """Count the outcome of a marked test."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            for name, shown in report.user_properties:
                if name == "engine_feature":
                    self._outcomes.setdefault(tuple(shown), Counter())[report.outcome] += 1

    def pytest_sessionfinish(self, exitstatus):
        """Write the record if nothing failed."""
        if exitstatus != 0:
            return
        rows = [
            {"engine": engine, "feature": feature, "what": what, **counts}
            for (engine, feature, what), counts in sorted(self._outcomes.items())
        ]
        record = {"versions": package_versions(PACKAGES), "rows": rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

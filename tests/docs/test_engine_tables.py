"""The table of engines and features has a cell for each mark of a test, and no other cell."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"pytest\.mark\.engine_feature\(\s*((?:\"[^\"]*\",?\s*){3})\)")


def test_each_cell_of_the_table_is_what_the_marks_of_tests_say():
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for arguments in MARK.findall(path.read_text(encoding="utf-8")):
            marked.add(tuple(re.findall(r"\"([^\"]*)\"", arguments)))
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    section = text.partition("## What each engine can do\n")[2].partition("\n\nEach cell")[0]
    header, _, *rows = [line[2:-2].split(" | ") for line in section.strip().splitlines()]
    cells = {
        (engine, row[0], cell)
        for row in rows
        for engine, cell in zip(header[1:], row[1:], strict=True)
        if cell != "no"
    }
    assert cells == marked

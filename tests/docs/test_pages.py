"""README and docs: length, links, and numbers that come from the records."""

import re
import subprocess
import sys

import pytest

import rap_env
from experiments.live import recorded
from tests.docs.test_code_blocks import PAGES, ROOT
from tests.programs import run_python
from tests.test_layers import LAYERS

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md"])
def test_repository_links_have_targets(page):
    path = ROOT / page
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    made = ("_generated", "/details/")  # by docs/generate.py, not committed
    own = [t for t in targets if "://" not in t and not any(part in t for part in made)]
    assert [target for target in own if not (path.parent / target).exists()] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path / "html")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "environment.html").exists()


def test_committed_tables_are_those_of_the_records():
    code = f"""
import generate, re, sys
sys.path.insert(0, {str(ROOT)!r})  # after the import, as `python docs/generate.py`
from experiments.study.harness import marked_pages, with_tables
names = set()
for page in marked_pages():
    text = page.read_text(encoding="utf-8")
    names |= set(re.findall("<!-- (.*): begin -->", text))
    stale = with_tables(text, generate.TABLES) != text
    print("tables of", page.name, "stale" if stale else "fresh")
assert names == generate.TABLES.keys(), names ^ generate.TABLES.keys()
"""
    done = run_python("-c", code, cwd=ROOT / "docs", env={"PATH": "/usr/bin:/bin"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "README.md fresh" in done.stdout
    assert "stale" not in done.stdout, f"run `python docs/generate.py`: {done.stdout}"


def test_the_api_page_has_the_public_names():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto(?:class|function):: rap_env\.(\w+)$", text, re.M)
    assert {*named, "__version__"} == {*rap_env.__all__}
    assert re.findall(r"^## (\w+)$", text, re.M) == named


def test_the_page_of_contributors_has_the_layers_of_the_package():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    shown: list[set[str]] = []
    for number, names, file in re.findall(r"^\| *(\d*) *\| (.*?) \|.*\| `(.*)` \|$", text, re.M):
        if number:
            shown.append(set())
        shown[-1] |= set(re.findall(r"`(\w+)`", names))
        assert (ROOT / file).is_file()
    assert len(shown) == len(LAYERS)
    for names, layer in zip(shown, LAYERS, strict=True):
        assert names <= set(layer)
        assert {name for name in layer if (ROOT / "rap_env" / name).is_dir()} <= names
    for way in re.findall(r"^- \*\*.*\n(?:  .*\n)*", text, re.M):
        for file in re.findall(r"`([a-z_/]+(?:\.py|/))`", way):
            assert (ROOT / "rap_env" / file).exists()


def test_the_readme_says_of_its_picture_what_the_record_has():
    recording = recorded(ROOT / "results" / "live")
    right, answers = sum(answer.right for answer in recording.answers), len(recording.answers)
    over = [step for step in recording.steps if step[2] > step[1]]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{right} of {answers} answers right, no pass above the limit" in text
    assert over == []

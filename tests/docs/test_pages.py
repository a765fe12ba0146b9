"""README and docs: links, public names, and tables that come from records and tests."""

import re
import subprocess
import sys

import pytest

import rap_env
from rap_env.cli import cli
from rap_env.memory import MemoryModel
from rap_env.policies.loading import load_policy
from rap_env.policies.packaged_files import default_facts
from rap_env.request import Request
from tests.docs.test_code_blocks import PAGES, ROOT
from tests.programs import run_python

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MARK = re.compile(r"pytest\.mark\.engine_feature\(\s*((?:\"[^\"]*\",?\s*){3})\)")

FROM_RECORDS = re.compile(r"<!-- (?!environment)(.*): begin -->.*?<!-- \1: end -->", re.DOTALL)
MOST_LINES = 3_600
"""Of all pages of the documentation, tables from records included."""
MOST_TEXT_LINES = 120
"""Of a page, without its tables and blank lines."""


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md"])
def test_repository_links_have_targets(page):
    path = ROOT / page
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    made = ("_generated", "/details/")  # by docs/generate.py, not committed
    own = [t for t in targets if "://" not in t and not any(part in t for part in made)]
    assert [target for target in own if not (path.parent / target).exists()] == []


def test_pages_are_short():
    pages = {page: page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md")}
    made = ("_generated", "details", "_build")  # by docs/generate.py and Sphinx
    own = {page: text for page, text in pages.items() if not {*page.parts} & {*made}}
    assert sum(len(text.splitlines()) for text in own.values()) <= MOST_LINES
    lines = {
        str(page.relative_to(ROOT)): sum(
            bool(line.strip()) and not line.startswith("|")
            for line in FROM_RECORDS.sub("", text).splitlines()
        )
        for page, text in own.items()
    }
    assert {page: count for page, count in lines.items() if count > MOST_TEXT_LINES} == {}


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
    stale = with_tables(text, generate.TABLES, generate.readme_numbers) != text
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


def test_options_of_the_command_exist():
    files = [*PAGES, "SECURITY.md", "Dockerfile", *map(str, ROOT.glob("docs/operations/*.*"))]
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    used = {
        (command, option)
        for command, rest in re.findall(r"\brap ([a-z]+) ([^`|;]*?)(?=[`|;]|\n\n|\brap |$)", text)
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest)
        if command in cli.commands
    }
    known = {
        (name, option)
        for name, command in cli.commands.items()
        for parameter in command.params
        for option in parameter.opts
    }
    assert ("serve", "--memory") in used
    assert used - {(name, "--help") for name in cli.commands} - known == set()


@pytest.mark.parametrize(
    ("page", "batch", "budget_mib", "words"),
    [
        ("quickstart.md", 8, 128, "128 MiB loses {:.2f} nats"),
        ("out_of_memory.md", 8, 200, "save 273 MiB for {:.3f} nats"),
        ("server.md", 1, 110, "110 MiB lose {:.2f}"),
        ("server.md", 1, 90, "90 MiB {:.2f} nats"),
    ],
)
def test_plans_lose_what_pages_say(page, batch, budget_mib, words, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path))  # costs of the package alone
    policy = load_policy("knapsack", MemoryModel(default_facts("native")))
    plan = policy.choose(Request(batch, 2048, budget_mib * 2**20))
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    assert words.format(policy.delta_nll(plan, 2048)) in text

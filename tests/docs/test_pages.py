"""README and docs: length, links, and numbers that come from the records."""

import re
import subprocess
import sys

import pytest

from tests.docs.test_code_blocks import PAGES, ROOT
from tests.programs import run_python

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md"])
def test_repository_links_have_targets(page):
    path = ROOT / page
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    own = [target for target in targets if "://" not in target and "_generated" not in target]
    assert [target for target in own if not (path.parent / target).exists()] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(tmp_path / "html")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "environment.html").exists()


def test_pages_that_hold_generated_text_are_fresh():
    code = (
        "import generate, pathlib; pages = generate.committed_pages(pathlib.Path.cwd())\n"
        "stale = [p.name for p, text in pages.items() if p.read_text(encoding='utf-8') != text]\n"
        "print(stale, len(pages))"
    )
    done = run_python("-c", code, cwd=ROOT / "docs", env={"PATH": "/usr/bin:/bin"}, timeout=120)
    assert done.stdout == "[] 3\n", done.stderr or f"run `python docs/generate.py`: {done.stdout}"


def test_the_readme_has_the_numbers_of_the_records():
    path = f"sys.path.insert(0, {str(ROOT)!r})"  # after the import, as `python docs/generate.py`
    code = f"import readme_results, sys; {path}; print(readme_results.readme_results(), end='')"
    done = run_python("-c", code, cwd=ROOT / "docs", env={"PATH": "/usr/bin:/bin"}, timeout=120)
    assert done.returncode == 0, done.stderr
    results = (ROOT / "README.md").read_text(encoding="utf-8")
    assert done.stdout in results, "run `python docs/generate.py`"

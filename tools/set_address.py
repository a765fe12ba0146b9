"""Writes the address of the public repository into every file that names it.

Usage, from a checkout: ``python tools/set_address.py https://github.com/OWNER/NAME``. The address
is kept in ``project.urls`` of ``pyproject.toml``; without an argument, that one is written again.

``set_address.toml`` has the text of each place with an address and without one. In a file it stands
between ``address: PLACE`` and ``address: end``; in the notebook it is the cell of that id.

With ``--index`` the command makes the links of README.md absolute instead: a package index shows
that page without the files beside it.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FILES: list[str] = _DATA["files"]
PLACES: dict[str, dict[str, str]] = _DATA["places"]
_PLACE = re.compile(r"^(.*\baddress: (?!end\b)(\w+).*\n)(?:.*\n)*?(?=.*\baddress: end\b)", re.M)


def place_texts(url: str | None) -> dict[str, str]:
    """The text of each place, by its name."""
    if url is None:
        return {place: text["without"] for place, text in PLACES.items()}
    match = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", url)
    if match is None:
        sys.exit(
            f"The address {url!r} is not supported: it must be https://github.com/OWNER/NAME, "
            "because workflows, pages and badges are those of that host."
        )
    names = {"url": url, "owner": match[1], "name": match[2]}
    return {place: text["with"].format(**names) for place, text in PLACES.items()}


def filled(text: str, texts: dict[str, str]) -> str:
    """The text of a file with new texts in its places."""
    if not text.startswith("{"):
        return _PLACE.sub(lambda match: match[1] + texts[match[2]], text)
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["id"] in texts:
            cell["source"] = texts[cell["id"]].strip().splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_absolute_links(text: str, url: str) -> str:
    """The text of README.md for a package index."""
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{url}/raw/main/", text)
    text = re.sub(r"(\]\()(?!\w+:|#)", rf"\1{url}/blob/main/", text)
    return re.sub(rf'"(rap-env\S*) @ git\+{re.escape(url)}"', r'"\1"', text)


def main(arguments: list[str]) -> None:
    """Write the address, or the README of a package index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project["urls"].get("Repository")
    readme = ROOT / "README.md"
    if arguments == ["--index"]:
        if url is None:
            sys.exit("There is no address yet: python tools/set_address.py URL")
        text = with_absolute_links(readme.read_text(encoding="utf-8"), url)
        readme.write_text(text, encoding="utf-8")
        return
    texts = place_texts(arguments[0] if arguments else url)
    for path in (ROOT / name for name in FILES):
        path.write_text(filled(path.read_text(encoding="utf-8"), texts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What a Python program imports, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path


def loaded_by(code: str, *arguments: object, of: tuple[str, ...] = ("torch", "transformers")):
    """The modules among `of` that a program loads, which must end without an error."""
    program = (
        f"{code}\nimport json, sys\nprint(json.dumps([n for n in {of!r} if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

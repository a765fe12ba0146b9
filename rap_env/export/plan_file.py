"""Plan files: JSON with the levels of the items of a plan. Without torch."""

from __future__ import annotations

import json
from pathlib import Path

from rap_env.errors import ArtifactError
from rap_env.plan import Plan


def read_plan(path: Path) -> Plan:
    """Read a plan from a file.

    The file holds what `Plan.to_json` gives (an object of items and levels), or what
    ``rap choose --json`` prints, whose entry ``levels`` is such an object.

    Raises:
        ArtifactError: There is no such file, or it holds no plan.
        UnknownNameError: It names an item or a level that does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"Cannot read a plan from {path}: {error}.") from None
    try:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("levels"), dict):
            text = json.dumps(found["levels"])
        return Plan.from_json(text)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no plan ({error}); write it with `rap choose ... --json`, or as a JSON "
            'object such as {"layer03.ffn": "removed"}.'
        ) from None

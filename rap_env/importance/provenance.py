"""What an importance artifact says of its origin, and the check that it is this model's."""

from __future__ import annotations

import os
from typing import Any

from rap_env.artifacts import load_artifact
from rap_env.errors import ArtifactError
from rap_env.memory import HasFacts
from rap_env.scoring.scorer import MaskScorer


def provenance_of(scorer: MaskScorer) -> dict[str, Any]:
    """Model, text and everything else that determined the scores."""
    facts = scorer.llm.facts
    return {
        "model": facts.name,
        "fingerprint": facts.fingerprint,
        "text": scorer.corpus.provenance,
        "scoring": dict(scorer.context),
    }


def load_profile(
    path: str | os.PathLike[str], kind: str, version: int, model: HasFacts
) -> dict[str, Any]:
    """The fields of a saved profile, lists as tuples, checked to be of this model.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactError: It is truncated, altered, or made from other weights or with other stubs.
    """
    body = load_artifact(path, kind, version)
    provenance = body["provenance"]
    if provenance["fingerprint"] != model.facts.fingerprint:
        raise ArtifactError(
            f"{os.fspath(path)} was made from {provenance['model']} with other weights or another "
            f"dtype than the {model.facts.name} ({model.facts.dtype}) that is loaded; profile "
            "this model, or load the other one."
        )
    theirs, ours = provenance["scoring"].get("repair", ""), model.facts.repair
    if theirs != ours:
        raise ArtifactError(
            f"{os.fspath(path)} was measured {_with_stubs(theirs)}, but {model.facts.name} is "
            f"loaded {_with_stubs(ours)}; profile it as it is loaded, or load it with the repair "
            "that it was profiled with."
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}


def _with_stubs(repair: str) -> str:
    return f"with the stubs {repair[:12]}" if repair else "without stubs"

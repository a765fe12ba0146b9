"""A model's config, read and judged before anything large is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rap_env.errors import ChecksumError, ModelNotAvailableError, UnsupportedModelError
from rap_env.llm.adapter import adapter_for
from rap_env.llm.families import FAMILIES


def read_config(folder: Path) -> Any:
    """The config of a model folder, if its family is known; reads no weights.

    Raises:
        ModelNotAvailableError: It has no config, so it is no model folder.
        ChecksumError: The config is damaged.
        UnsupportedModelError: The family is not known.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotAvailableError(
            f"{folder} has no config.json; give a folder that model.save_pretrained() wrote, or a "
            "GGUF file."
        )
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ChecksumError(f"{path} is truncated or damaged; get the model again.") from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is raised depends on the entry that is wrong
        refuse_unknown_family(model_type)
        raise UnsupportedModelError(f"transformers cannot read {path}: {error}") from error
    adapter_for(config)
    return config


def refuse_unknown_family(model_type: object) -> None:
    """Refuse a family by its name alone, where transformers makes no config of it.

    Raises:
        UnsupportedModelError: It is not known; the message lists those that are.
    """
    if str(model_type) not in FAMILIES:
        adapter_for(SimpleNamespace(model_type=model_type))

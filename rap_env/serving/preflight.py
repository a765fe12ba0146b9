"""Checks of a server's settings before torch is imported and the model's weights are read."""

from __future__ import annotations

import json
from pathlib import Path

from rap_env.errors import ArtifactError, ModelNotAvailableError, ServingSettingsError, check_name
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.policies.loading import check_policy, load_policy, policy_blocks
from rap_env.policies.packaged_files import KNAPSACKS, default_facts
from rap_env.policies.registry import policy_names
from rap_env.request import Request
from rap_env.runtime.plan_chooser import no_prediction_text
from rap_env.serving.settings import ServerSettings

_PREDICTING = (*KNAPSACKS, "rap", "rap-recall")
"""Names of the policies that predict the rise in NLL of their plans."""
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_before_loading(settings: ServerSettings) -> None:
    """Check policy, model and memory as far as files and the facts in the package tell.

    The facts of the default model are known. Of another one only its folder is looked at: whether
    it exists and has as many layers as a policy file needs. `build_stack` checks the rest.

    Raises:
        UnknownNameError: There is no such dtype, or no policy of this name and no such file.
        ArtifactError: The policy file is damaged, or of another model.
        PluginError: Several packages offer the policy.
        ModelNotAvailableError: The model's folder or file does not exist.
        ServingSettingsError: `model_memory` is less than the smallest plan needs, or the policy
            predicts nothing for a floor of quality.
    """
    check_name("dtype", settings.dtype, _DTYPES)
    known = {*policy_names()}
    for name in ("max_delta_nll", "min_quality_per_request"):
        bound = getattr(settings, name)
        if bound not in (None, "auto") and settings.policy in known - {*_PREDICTING}:
            raise ServingSettingsError(no_prediction_text(name, bound, settings.policy))
    check_policy(settings.policy)
    wanted = policy_blocks(settings.policy)
    facts = _known_facts(settings)
    blocks = _blocks_of_folder(settings.model) if facts is None else facts.num_blocks
    if wanted is not None and blocks is not None and wanted != blocks:
        raise ArtifactError(
            f"The policy {settings.policy} is of a model with {wanted} blocks, but "
            f"{settings.model} has {blocks}; choose a policy for this model, or dense."
        )
    if facts is None:
        return
    memory = MemoryModel(facts)
    least = memory.least_peak_bytes(Request(1, 1, 1))
    if settings.model_bytes is not None and settings.model_bytes < least:
        raise ServingSettingsError(too_little(settings.model, least, settings.model_bytes))
    certain = settings.policy in known or settings.dtype == facts.dtype
    if certain and settings.policy not in ("dense", *KNAPSACKS):  # these serve any model
        load_policy(settings.policy, memory)


def too_little(model: str, least_bytes: int, given_bytes: int) -> str:
    """The message for a limit of the model in which its smallest plan does not fit."""
    return (
        f"model_memory must be at least {least_bytes:,} bytes for {model}, which it needs for one "
        f"token without any block, not {given_bytes:,}; give more."
    )


def _known_facts(settings: ServerSettings) -> ModelFacts | None:
    """Facts of the default model in bfloat16, whatever its dtype; None for any other."""
    if settings.weights not in ("native", "bf16"):
        return None
    facts = default_facts(settings.weights)
    same = settings.model.partition("@")[0] == facts.name.partition("@")[0]
    return facts if same else None


def _blocks_of_folder(model: str) -> int | None:
    """Number of blocks by the config of a model's folder; None if that is not known here.

    Raises:
        ModelNotAvailableError: It is a path, and there is no such folder or file.
    """
    path = Path(model).expanduser()
    if model.startswith((".", "~", "/")) and not path.exists():
        raise ModelNotAvailableError(
            f"There is no model folder or GGUF file {path}; check the path, or use an alias or a "
            "hub id."
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return 2 * int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

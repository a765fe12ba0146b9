"""Checks of a server's settings before torch is imported and the model's weights are read."""

from __future__ import annotations

from rap_env.errors import ServingSettingsError, check_name
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.policies.loading import check_policy, load_policy
from rap_env.policies.packaged_files import KNAPSACKS, default_facts
from rap_env.policies.registry import policy_names
from rap_env.request import Request
from rap_env.runtime.plan_chooser import no_prediction_text
from rap_env.serving.settings import ServerSettings

_PREDICTING = (*KNAPSACKS, "rap", "rap-low-bits", "rap-recall")
"""Names of the policies that predict the rise in NLL of their plans."""
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def check_before_loading(settings: ServerSettings) -> None:
    """Check policy, model and memory as far as files and the facts in the package tell.

    The facts of the default model are known. `build_stack` checks the rest.

    Raises:
        UnknownNameError: There is no such dtype, or no policy of this name and no such file.
        ArtifactError: The policy file is damaged, or of another model.
        PluginError: Several packages offer the policy.
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
    facts = _known_facts(settings)
    if facts is None:
        return
    memory = MemoryModel(facts)
    least = memory.peak_bytes_without_blocks(Request(1, 1, 1))
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

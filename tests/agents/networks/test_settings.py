from __future__ import annotations

import pytest

from agents.errors import AgentConfigError
from agents.networks.settings import PolicySettings
from rap_env.errors import UnknownNameError


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"hiden": 3}, UnknownNameError, "policy: 'hiden'.*Did you mean 'hidden'"),
        ({"hidden": 0}, AgentConfigError, "hidden must be a whole number of at least 1, not 0"),
        ({"hidden": True}, AgentConfigError, "hidden.*not True"),
        ({"block_vectors": -1}, AgentConfigError, "block_vectors.*at least 0, not -1"),
        ({"block_vectors": 2.5}, AgentConfigError, "block_vectors.*not 2.5"),
        ({"without": ["gsy"]}, UnknownNameError, "without: 'gsy'.*Did you mean 'gsi'"),
        ({"without": "gsi"}, AgentConfigError, "without must be a list of ablations, not 'gsi'"),
    ],
)
def test_impossible_settings_are_named(given, error, text):
    with pytest.raises(error, match=text):
        PolicySettings.of(given)


def test_what_is_not_given_keeps_its_default():
    settings = PolicySettings.of({"without": ["gsi", "request"]})
    assert settings == PolicySettings(without=("gsi", "request"))
    assert settings.policy_kwargs() == {
        "hidden": 32,
        "features_extractor_kwargs": {"block_vectors": 0, "without": ("gsi", "request")},
    }

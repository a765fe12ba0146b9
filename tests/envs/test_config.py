import ast
import inspect
import re
from dataclasses import fields

import pytest

from rap_env.context.base import ContextConfig
from rap_env.envs.config import EnvConfig, LadderEnvConfig
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.envs.prune import RAPPruneEnv
from rap_env.errors import RapError, UnknownNameError
from rap_env.specs import settings_of


@pytest.mark.parametrize("kind", [RAPPruneEnv, RAPLadderEnv])
@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"model": "smollm2-135"}, "smollm2-135m"),
        ({"importance": "oneshot"}, "one_shot"),
        ({"workload": "azure_conv"}, "azure-conv"),
        ({"workload": {"name": "fixed", "batch": 2}}, "batch_size"),
        ({"reward": "perplexty"}, "perplexity"),
        ({"reward": {"name": "perplexity", "relative_to": "oneshot"}}, "one_shot"),
        ({"infeasible": "eror"}, "error"),
        ({"gsi_method": "lasy"}, "lazy"),
        ({"calibration": "slef"}, "self"),
        ({"calibration": {"sorce": "self"}}, "source"),
        ({"tasks": ["rap_choise"]}, "rap_choice"),
        ({"tasks": {"name": ["rap_choice"]}}, "names"),
        ({"render_mode": "ansii"}, "ansi"),
        ({"info": "array"}, "arrays"),
        ({"device": "cpuu"}, "cpu"),
        ({"dtype": "bfloat"}, "bfloat16"),
    ],
    ids=str,
)
def test_misspelt_names_are_found_before_a_model_loads(kind, settings, nearest):
    with pytest.raises(UnknownNameError, match=f"known are .* Did you mean '{nearest}'"):
        kind(**{"model": "no-such-model", **settings})


def wrong_arguments():
    """Wrong values of every argument, with words of the error."""
    types_of = {name: types for name, (*_, types) in settings_of(EnvConfig).items()}
    for name in EnvConfig.names():
        for value in (5, None, float("nan"), "x", [], {}, object(), True, ["a"]):
            numbers = {int: int, float: (int, float)}
            allowed = tuple(numbers.get(kind, kind) for kind in types_of[name])
            if not isinstance(value, allowed) or value is True:
                yield {name: value}, f"{name} must be of type"
    for source in (5, None):
        yield {"calibration": {"source": source}}, "source must be of type str"
    for windows in ("1", True, 1.5):
        yield {"calibration": {"windows": windows}}, "windows must be of type int"
    yield {"reward": len}, "reward must be of type str or Mapping"
    yield {"gsi_removals": 0}, "gsi_removals must be .* at least 1"
    yield {"gsi_method": "fast"}, "Unknown GSI method 'fast'"
    yield {"importance": "absent.json"}, "Unknown importance 'absent.json'.*no such file"


@pytest.mark.parametrize(("settings", "words"), list(wrong_arguments()))
def test_a_wrong_type_is_named_before_a_model_loads(settings, words):
    with pytest.raises(RapError, match=words):
        RAPPruneEnv(**{"model": "no-such-model", **settings})


@pytest.mark.parametrize(
    ("environment", "config"), [(RAPPruneEnv, EnvConfig()), (RAPLadderEnv, LadderEnvConfig())]
)
def test_the_table_of_arguments_is_that_of_the_configuration(environment, config):
    rows = re.findall(r"^ *\| `(\w+)` \| `(.+?)` \| ", environment.__doc__, re.MULTILINE)
    documented = {name: ast.literal_eval(default) for name, default in rows}
    names = [entry.name for entry in fields(config) if entry.name not in config.unused]
    assert documented == {**{name: getattr(config, name) for name in names}, "context": None}
    parameters = inspect.signature(environment.__init__).parameters
    assert parameters["model"].default == config.model


def test_v1_loads_native_weights_and_long_windows():
    context = LadderEnvConfig("m", calibration={"source": "text.txt"}).context_config()
    assert context.weights == "native"
    assert (context.calibration.windows, context.calibration.window_tokens) == (3, 1024)
    short = LadderEnvConfig("m", calibration={"window_tokens": 256}).context_config()
    assert (short.calibration.windows, short.calibration.window_tokens) == (3, 256)
    table = LadderEnvConfig("score_table:t.json").context_config()  # has a text of its own
    assert table.calibration == ContextConfig().calibration

"""The environment on a score table: the episodes of the live model, without the model."""

import gymnasium as gym
import numpy as np
import pytest

from rap_env.context.base import ContextConfig
from rap_env.context.opening import open_context
from rap_env.envs.prune import RAPPruneEnv
from rap_env.errors import ArtifactError, ModelNotAvailableError
from rap_env.importance.gsi_search import gsi
from rap_env.scoring.corpus import CorpusConfig
from tests.envs.playing import play
from tests.envs.tiny_contexts import live_context, make_context
from tests.scoring.tiny_table import all_masks, table_of

BLOCKS = 6
WORKLOAD = {
    "name": "grid", "batch_sizes": [1, 2], "seq_lens_tokens": [16, 48],
    "budget_fractions": [0.6, 0.8, 0.9],
}  # fmt: skip


@pytest.fixture(scope="module")
def live():
    return make_context()


@pytest.fixture
def model(live, tmp_path):
    """The name of a table with every mask."""
    table_of(live, all_masks(BLOCKS)).save(tmp_path / "t.json")
    return f"score_table:{tmp_path / 't.json'}"


@pytest.fixture
def shallow(live, tmp_path):
    """The name of a table that lacks masks of three removals and more."""
    table_of(live, all_masks(BLOCKS, 2)).save(tmp_path / "s.json")
    return f"score_table:{tmp_path / 's.json'}"


@pytest.mark.parametrize("timing", ["terminal", "dense"])
def test_the_same_episodes_as_with_the_live_model(live, model, timing):
    settings = {"workload": WORKLOAD, "reward": {"name": "perplexity", "timing": timing}}
    single = RAPPruneEnv(context=live, **settings)
    table = gym.make("RAPPrune-v0", model=model, importance="one_shot", **settings)
    expected, found = (
        [step for seed in range(6) for step in play(e, seed)] for e in (single, table)
    )
    assert len(found) == len(expected) > 12
    for (seen, *rest), (wanted, *others) in zip(found, expected, strict=True):
        assert rest == others, "rewards and infos to the last bit"
        assert all(np.array_equal(seen[key], wanted[key]) for key in wanted)
    assert not any("predicted" in info for *_, info in found)


def test_operations_that_need_the_model_raise_an_error(live, model):
    context = open_context(ContextConfig(model=model, importance="one_shot"))
    with pytest.raises(ModelNotAvailableError, match="no model, which .*tasks.*give the model"):
        _ = context.llm
    with pytest.raises(ModelNotAvailableError, match=r"score table .*t\.json"):
        gym.make("RAPPrune-v0", model=model, importance="one_shot", reward="accuracy")
    assert context.store is None
    assert context.memory.facts == live.memory.facts
    assert context.one_shot == live.one_shot


def test_kinds_of_importance(live, model):
    def opened(importance):
        return open_context(ContextConfig(model=model, importance=importance))

    assert not opened("none").features.one_shot.any()
    assert np.array_equal(opened("one_shot").features.gsi_rank, live.features.gsi_rank)
    with pytest.raises(ArtifactError, match=r"no GSI order; pass importance='one_shot'"):
        opened("gsi")


def test_a_table_with_gsi_equals_the_live_model(tmp_path):
    base = make_context()
    live = live_context(base.llm, base.scorer.corpus, gsi_removals=2)
    table = table_of(live, all_masks(BLOCKS, 2), importance="gsi", gsi_removals=2)
    table.save(tmp_path / "g.json")
    name = f"score_table:{tmp_path / 'g.json'}"
    context = open_context(ContextConfig(model=name))
    for array in ("one_shot", "gsi_rank", "gsi_marginal_loss"):
        assert np.array_equal(getattr(context.features, array), getattr(live.features, array))
    assert context.gsi == live.gsi
    single = open_context(ContextConfig(model=name, importance="one_shot"))
    assert np.array_equal(single.features.one_shot, live.one_shot.delta_nll)
    gsi(live.scorer, stop=3, path=tmp_path / "mine.json", progress=False)
    other = open_context(ContextConfig(model=name, importance=str(tmp_path / "mine.json")))
    assert len(other.gsi.order) == 3
    assert np.array_equal(other.features.gsi_rank, other.gsi.rank)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dtype": "bfloat16"}, "dtype='float32', so it cannot give dtype='bfloat16'"),
        ({"device": "cuda"}, "cannot give device='cuda'"),
        ({"gsi_removals": 3}, "cannot give gsi_removals=3"),
        ({"calibration": CorpusConfig(windows=9)}, r"calibration\.windows=2, so .*windows=9"),
        ({"calibration": CorpusConfig(source="text.txt")}, r"calibration\.source='text\.txt'"),
    ],
)
def test_only_the_settings_of_the_table_are_accepted(model, settings, text):
    own = CorpusConfig(windows=2, window_tokens=8)
    fitting = ContextConfig(
        model, device="cpu", dtype="float32", calibration=own, importance="one_shot"
    )
    assert open_context(fitting) is open_context(fitting)
    with pytest.raises(ArtifactError, match=text):
        open_context(ContextConfig(model=model, importance="one_shot", **settings))


def test_a_rewritten_table_is_read_again(live, model, tmp_path):
    config = ContextConfig(model=model, importance="one_shot")
    assert len(open_context(config).table.scores) == 2**BLOCKS
    table_of(live, all_masks(BLOCKS, 2)).save(tmp_path / "t.json")
    assert len(open_context(config).table.scores) == 22


def test_without_an_artifact_the_best_known_plans_are_those_of_the_table(shallow, tmp_path):
    context = open_context(ContextConfig(model=shallow, importance="one_shot"))
    assert context.frontier.scores == context.table.scores
    assert context.frontier.dense_nll == context.scorer.native_nll
    assert (context.frontier.num_layers, context.frontier.evaluations) == (BLOCKS // 2, 22)
    named = ContextConfig(model=shallow, importance="one_shot", frontier=str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match="no frontier artifact"):
        _ = open_context(named).frontier

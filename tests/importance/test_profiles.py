"""Artifacts of importance load without torch."""

from dataclasses import asdict

from rap_env.importance.gsi_search import gsi
from rap_env.importance.one_shot_scores import one_shot
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import GSIProfile, OneShotProfile
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer
from tests.imports import loaded_by
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_llm

LOAD = """
import sys
from types import SimpleNamespace
from rap_env.importance.plan_table import PlanTable
from rap_env.importance.profiles import GSIProfile, OneShotProfile
from rap_env.ladder.observation import ImportanceFeatures
folder, fingerprint = sys.argv[1:]
model = SimpleNamespace(facts=SimpleNamespace(fingerprint=fingerprint, repair=""))
one_shot = OneShotProfile.load(f"{folder}/one_shot.json", model)
gsi = GSIProfile.load(f"{folder}/gsi.json", model)
frontier = PlanTable.load(f"{folder}/frontier.json", model)
ImportanceFeatures(gsi.first_pass, gsi.rank, gsi.marginal_delta_nll)
frontier.entries
"""


def test_loading_profiles_and_frontiers_imports_no_torch(tmp_path):
    scorer = MaskScorer(tiny_llm(), tokens())
    facts = scorer.llm.facts
    single = one_shot(scorer, progress=False)
    single.save(tmp_path / "one_shot.json")
    order = gsi(scorer, progress=False)
    order.save(tmp_path / "gsi.json")
    PlanTable(
        num_layers=facts.num_layers,
        dense_nll=scorer.dense_nll,
        scores={mask: scorer.nll(mask) for mask in scorer.candidates(Plan()).values()},
        evaluations_run=0,
        seconds=0.0,
        settings={},
        provenance=scorer.provenance,
    ).save(tmp_path / "frontier.json")
    heavy = ("torch", "transformers", "rap_env.models", "rap_env.scoring.scorer")
    assert loaded_by(LOAD, tmp_path, facts.fingerprint, of=heavy) == []
    assert asdict(GSIProfile.load(tmp_path / "gsi.json", scorer.llm)) == asdict(order)
    assert asdict(OneShotProfile.load(tmp_path / "one_shot.json", scorer.llm)) == asdict(single)

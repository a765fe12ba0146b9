"""Item-wise policies without torch: choices, files, and rejection of damaged ones.

`tests/agents/test_ladder_export.py` compares choices with those of trained networks.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rap_env.errors import ArtifactError, InvalidRequestError, UnknownNameError
from rap_env.ladder.item_rows import NEIGHBOURS, neighbours, row_columns
from rap_env.ladder.items import Ladder
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies import packaged_files
from rap_env.policies.delta_nll import find_delta_nll
from rap_env.policies.item_network import ItemNetwork
from rap_env.policies.loading import load_policy
from rap_env.policies.network import LadderPolicy, LadderPolicyFile
from rap_env.policies.packaged_networks import NetworkPolicy
from rap_env.policies.policy_file import PolicyFile
from rap_env.request import Request
from tests.policies import made_policies
from tests.policies.made_ladder import builder, importance, ladder, memory, policy_file, weights
from tests.policies.test_policy_file import rewritten
from tests.runtime.harness import SHAPE, Harness

SHAPES = [(1, 10), (8, 2000), (4, 500)]
FRACTIONS = (0.3, 0.5, 0.7, 0.9, 0.99)


def requests(model):
    return [Request.at_fraction(model, *shape, f) for shape in SHAPES for f in FRACTIONS]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "policy.safetensors"
    policy_file(item_vectors=3, without=("gsi",)).save(path)
    return path


@pytest.mark.parametrize("item_vectors", [0, 3])
def test_the_parts_of_a_row_are_contiguous_and_fill_it(item_vectors):
    parts = list(row_columns(item_vectors).values())
    assert parts[0].start == 0
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))


def test_neighbours_are_the_items_of_the_same_and_of_adjacent_layers():
    model = memory()
    items = ladder(model).items
    rows = builder(model).build(Request(1, 1, 1), Plan())["ladder"]
    names = {(item.layer, item.kind): number for number, item in enumerate(items)}
    for item, near in zip(items, neighbours(rows), strict=True):
        wanted = [
            -1 if item.layer is None else names.get((item.layer + step, kind), -1)
            for step, kind in NEIGHBOURS
        ]
        assert near.tolist() == wanted


def test_it_stops_at_the_first_plan_that_fits():
    model = memory()
    network = ItemNetwork(weights(10), builder(model))
    plans = set()
    for request in requests(model):
        plan = network.plan(request)
        costs = network.builder.item_bytes.costs(request.batch_size, request.seq_len_tokens)
        if costs.least_peak_bytes <= request.budget_bytes:
            assert model.peak_bytes(plan, request) <= request.budget_bytes
            plans.add(plan)
        else:
            assert model.peak_bytes(plan, request) == costs.least_peak_bytes
    assert len(plans) > 5
    assert network.plan(Request.at_fraction(model, 1, 10, 1.0)) == Plan()


def test_samples_end_where_no_plan_fits():
    model = memory()
    network = ItemNetwork(weights(10), builder(model))
    lowest = network.plan(Request(1, 10, 1))
    assert network.sample(Request(1, 10, 1), 3) == [lowest] * 3


def test_threads_share_a_policy():
    model = memory()
    policy = LadderPolicy(model, policy_file(item_vectors=3), cached_choices=0)
    asked = requests(model) * 10
    alone = [policy.choose(request) for request in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(policy.choose, asked)) == alone


def test_a_request_that_the_model_cannot_serve_is_rejected():
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        LadderPolicy(memory(), policy_file()).choose(Request(1, 5000, 10**9))


def test_it_reads_what_was_written(path, tmp_path):
    before, after = policy_file(item_vectors=3, without=("gsi",)), LadderPolicyFile.load(path)
    for name, array in before.weights.arrays().items():
        assert np.array_equal(after.weights.arrays()[name], array)
    for name, values in vars(before.importance).items():
        assert np.array_equal(getattr(after.importance, name), values)
    assert after.weights.without == ("gsi",)
    for name in ("ladder", "items", "model", "provenance"):
        assert getattr(after, name) == getattr(before, name)
    after.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_load_policy_opens_both_kinds(path, tmp_path):
    assert isinstance(load_policy(path, memory()), LadderPolicy)
    masks = tmp_path / "masks.safetensors"
    made_policies.policy_file().save(masks)
    assert isinstance(load_policy(masks, made_policies.memory()), NetworkPolicy)
    with pytest.raises(ArtifactError, match="'exported ladder policy' and format 1, but this"):
        PolicyFile.load(path)
    with pytest.raises(ArtifactError, match="'exported policy' and format 1, but this version"):
        LadderPolicyFile.load(masks)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file_is_rejected(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="is truncated or not an exported policy"):
        load_policy(path, memory())


def test_altered_content_is_rejected(path):
    def nudge(arrays):
        arrays["importance.one_shot"][0, 1] += 1

    before = path.read_bytes()
    for changed in (
        {"change_arrays": nudge},
        {"change_arrays": lambda arrays: arrays.pop("importance.place")},
        {"change_header": lambda header: header["body"].pop("ladder")},
        {"change_header": lambda header: header["body"].update(items=None)},
    ):
        path.write_bytes(before)
        with pytest.raises(ArtifactError, match="was altered after it was written"):
            load_policy(rewritten(path, **changed), memory())
    rewritten(path, lambda header: header.update(format=2))
    with pytest.raises(ArtifactError, match="format 2, but this version reads"):
        load_policy(path, memory())


def test_parts_of_different_models_are_rejected():
    made, other = policy_file(), policy_file(memory(5), item_vectors=3)
    with pytest.raises(ArtifactError, match="must have 10 x 7 values of one_shot"):
        replace(made, importance=other.importance)
    with pytest.raises(ArtifactError, match="vectors for 16 items, but made has 10"):
        replace(made, weights=other.weights)
    with pytest.raises(ArtifactError, match=r"first_weight must have the shape \(8, "):
        replace(made.weights, first_bias=np.zeros(8, np.float32), vectors=other.weights.vectors)


def test_models_with_other_items_or_weights(caplog):
    file, vectors = policy_file(), policy_file(item_vectors=3)
    with pytest.raises(ArtifactError, match=r"as it is loaded \(packed weights\): 10 and"):
        LadderPolicy(memory(packed=True), file)
    with pytest.raises(ArtifactError, match="vectors for 10 items, but made has 16 items"):
        LadderPolicy(memory(5), vectors, importance(ladder(memory(5))))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        LadderPolicy(memory(fingerprint="b" * 64, name="other"), vectors)
    assert "exported for made (bfloat16), and other (bfloat16) has other weights" in caplog.text


def test_the_order_of_removal_is_that_over_items():
    model, file = memory(), policy_file()
    items = ladder(model)
    policy = LadderPolicy(model, file)
    places = [
        file.importance.place[items.numbers[f"layer{index // 2:02}.{kind}"], 3]
        for index, kind in enumerate(["attn", "ffn"] * 3)
    ]
    assert list(policy.order) == np.argsort(places).tolist()
    spec = {"levels": "caches", "together": []}
    assert LadderPolicy(model, policy_file(spec=spec)).order is None


def test_predictions_come_from_the_order_where_it_has_the_levels():
    model, file = memory(), policy_file()
    policy = LadderPolicy(model, file)
    number = policy.ladder.numbers["layer01.cache"]
    plan = Plan.of({"layer01.cache": "int4"})
    rise = pytest.approx(file.importance.reached[number, 2])
    assert policy.delta_nll(plan, 500) == rise
    assert policy.delta_nll(Plan.of({"layer01.cache": "int2"})) is None
    found, source = find_delta_nll(model, policy, plan)
    assert found == rise
    assert source == "predicted from the order over items in the policy file"
    zeros = importance(ladder(model))
    blind = replace(file, importance=type(zeros).none(ladder(model)))
    assert LadderPolicy(model, blind).delta_nll(plan) is None


@pytest.mark.parametrize("blind", [False, True])
def test_a_controller_lowers_and_raises_a_live_model(blind):
    harness = Harness(layers=3, hold_s=1.0)
    model = MemoryModel(harness.llm)
    file = policy_file(model, {"levels": "all", "together": []})
    if blind:
        file = replace(file, importance=type(file.importance).none(Ladder.of(model.facts)))
    harness.controller.chooser.policy = LadderPolicy(model, file)
    native = harness.need(Plan(), SHAPE)
    seen = []
    for time_s, share in enumerate((0.9, 0.6, 2.0, 2.0, 2.0)):
        harness.time_s, harness.budget_bytes = 2.0 * time_s, int(share * native)
        assert harness.controller.check(SHAPE)
        assert harness.need(harness.llm.plan, SHAPE) <= harness.budget_bytes
        seen.append(harness.llm.plan)
    assert len({*seen[:2], Plan()}) == 3
    assert not seen[-1]


def test_the_packaged_policies_have_names(path, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="'rap', 'rap-recall', 'rap-v0'"):
        load_policy("rap-v9", memory())
    with pytest.raises(ArtifactError, match="smollm2-135m@pypi has vectors for 60 blocks"):
        load_policy("rap-v0", memory())
    monkeypatch.setattr(packaged_files, "PACKAGED", tmp_path)
    with pytest.raises(ArtifactError, match=r"no exported policy at .*ladder.*\"rap-v0\""):
        load_policy("rap", memory())
    path.rename(tmp_path / "smollm2-135m.ladder.safetensors")
    shutil.copy(
        tmp_path / "smollm2-135m.ladder.safetensors", tmp_path / "smollm2-135m.recall.safetensors"
    )
    assert load_policy("rap-recall", memory()).name == "rap-recall"
    policy, request = load_policy("rap", memory()), Request.at_fraction(memory(), 1, 100, 0.5)
    assert isinstance(policy, LadderPolicy)
    assert policy.name == "rap"
    assert policy.choose(request) == LadderPolicy(memory(), policy.file).choose(request)


def test_other_weights_are_told_which_packaged_policy_serves_them(tmp_path, monkeypatch):
    policy_file().save(tmp_path / "smollm2-135m.ladder.safetensors")
    monkeypatch.setattr(packaged_files, "PACKAGED", tmp_path)
    packed = memory(packed=True)
    with pytest.raises(ArtifactError, match=r'packed weights.*policy "rap-v0"'):
        load_policy("rap", packed)
    given = LadderPolicy(packed, policy_file(), importance(ladder(packed)))
    assert given.choose(Request.at_fraction(packed, 1, 100, 0.5))


def test_choosing_loads_neither_torch_nor_a_training_library():
    code = (
        "import sys\n"
        "from tests.policies.made_ladder import memory, policy_file\n"
        "from rap_env.policies.network import LadderPolicy\n"
        "from rap_env.request import Request\n"
        "model = memory()\n"
        "score = lambda plans: [len(plan.levels) for plan in plans]\n"
        "policy = LadderPolicy(model, policy_file(), best_of=4, score=score)\n"
        "assert policy.choose(Request.at_fraction(model, 4, 500, 0.7))\n"
        "heavy = ('torch', 'transformers', 'stable_baselines3', 'sb3_contrib', 'hydra', 'agents')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr

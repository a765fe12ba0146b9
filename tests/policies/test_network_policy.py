"""Exported policies: the file, its rejection when damaged, and choices for a model."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from rap_env.artifacts import canonical_json, digest
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.ladder.features import ImportanceFeatures
from rap_env.plan import Plan
from rap_env.policies import packaged_files
from rap_env.policies.loading import load_policy
from rap_env.policies.network_policy import NetworkPolicy, PolicyFile
from rap_env.policies.network_rows import ROWS
from rap_env.policies.packaged_files import find_delta_nll
from rap_env.request import Request
from tests.policies import made_ladder, made_policies
from tests.policies.made_ladder import ladder

MADE = {"blocks": made_policies, "ladder": made_ladder}


@pytest.fixture(params=ROWS)
def made(request):
    """A module that makes policies of blocks, or of the items of a ladder."""
    return MADE[request.param]


@pytest.fixture
def path(tmp_path, made):
    path = tmp_path / "policy.safetensors"
    made.policy_file(vectors=3, without=("gsi",)).save(path)
    return path


def rewritten(path, change_header=lambda header: None, change_arrays=lambda arrays: None):
    """The file with altered content and a valid checksum of the header."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["rap_policy"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change_header(header)
    change_arrays(arrays)
    header["sha256"] = digest(header["body"])
    metadata = {"rap_policy": canonical_json(header)}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    return path


def nudge(arrays):
    arrays["network.last_weight"][0] += 1


def test_it_reads_what_was_written(path, made, tmp_path):
    before, after = made.policy_file(vectors=3, without=("gsi",)), PolicyFile.load(path)
    for name, array in before.weights.arrays().items():
        read = after.weights.arrays()[name]
        assert np.array_equal(read, array)
        assert read.dtype == np.float32
    for name, values in vars(before.importance).items():
        assert np.array_equal(vars(after.importance)[name], values)
    assert (after.weights.rows, after.weights.without) == (before.weights.rows, ("gsi",))
    for name in ("ladder", "items", "model", "provenance"):
        assert getattr(after, name) == getattr(before, name)
    after.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *((lambda path, n=size: path.write_bytes(path.read_bytes()[:n]), "is truncated or not an")
          for size in (0, 4, 100, -1, -200)),
        (lambda path: path.write_text("{}"), "truncated or not an exported policy; use a packaged"),
        (lambda path: path.write_bytes(safetensors.numpy.save({"x": np.zeros(2)})),
         "holds tensors, but no exported policy"),
        (lambda path: rewritten(path, lambda header: header.update(format=9)),
         "format 9, but this version reads .* of format 2"),
        (lambda path: rewritten(path, lambda header: header["body"]["features"].append("width")),
         "observes .*'width'.*, but this version observes"),
        (lambda path: path.unlink(), "There is no exported policy at"),
        (lambda path: (path.unlink(), path.mkdir()), "truncated or not an exported policy"),
        (lambda path: rewritten(path, change_arrays=nudge), "altered"),
        (lambda path: rewritten(path, change_arrays=lambda a: a.pop("importance.one_shot")),
         "altered"),
        (lambda path: rewritten(path, lambda header: header["body"].pop("model")), "altered"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"_ppo", b"_dqn")), "altered"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "altered"),
    ],
)  # fmt: skip
def test_files_that_are_no_exported_policy_are_rejected(path, damage, words):
    damage(path)
    with pytest.raises(ArtifactError, match=words):
        PolicyFile.load(path)


def test_its_own_model_is_served_without_a_warning_and_other_weights_with_one(made, caplog):
    file = made.policy_file(vectors=3)
    assert file.encoder_for(made.memory()).importance is file.importance
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        NetworkPolicy(made.memory(fingerprint="b" * 64, name="other"), file)
    assert "exported for made (bfloat16), and other (bfloat16) has other weights" in caplog.text


def test_a_policy_of_other_items_is_rejected():
    with pytest.raises(ArtifactError, match="12 and 8 items"):
        NetworkPolicy(made_policies.memory(4), made_policies.policy_file())
    with pytest.raises(ArtifactError, match=r"as it is loaded \(packed weights\): 10 and"):
        NetworkPolicy(made_ladder.memory(packed=True), made_ladder.policy_file())


def test_the_order_of_removal_follows_the_ranks_or_the_places():
    file = made_policies.policy_file(3)
    order = NetworkPolicy(made_policies.memory(3), file).order
    ranks = file.importance.gsi_rank
    assert [ranks[index] for index in order] == sorted(ranks)
    blind = replace(file, importance=ImportanceFeatures.none(6))
    assert NetworkPolicy(made_policies.memory(3), blind).order is None
    model, file = made_ladder.memory(), made_ladder.policy_file()
    items = ladder(model)
    places = [
        file.importance.place[items.numbers[f"layer{index // 2:02}.{kind}"], 3]
        for index, kind in enumerate(["attn", "ffn"] * 3)
    ]
    assert list(NetworkPolicy(model, file).order) == np.argsort(places).tolist()
    spec = {"levels": "caches", "together": []}
    assert NetworkPolicy(model, made_ladder.policy_file(spec=spec)).order is None


def test_predictions_come_from_the_order_where_it_has_the_levels():
    model, file = made_ladder.memory(), made_ladder.policy_file()
    policy = NetworkPolicy(model, file)
    number = policy.ladder.numbers["layer01.cache"]
    plan = Plan.of({"layer01.cache": "int4"})
    rise = pytest.approx(file.importance.reached[number, 2])
    assert policy.delta_nll(plan, 500) == rise
    assert policy.delta_nll(Plan.of({"layer01.cache": "int2"})) is None
    found, source = find_delta_nll(model, policy, plan)
    assert found == rise
    assert source == "predicted from the order over items in the policy file"
    blind = replace(file, importance=type(file.importance).none(ladder(model)))
    assert NetworkPolicy(model, blind).delta_nll(plan) is None
    masks = NetworkPolicy(made_policies.memory(), made_policies.policy_file())
    assert masks.delta_nll(Plan.removing(1)) is None


def test_the_packaged_policies_have_names(tmp_path, monkeypatch):
    model, masks = made_ladder.memory(), made_policies.memory()
    with pytest.raises(UnknownNameError, match="'rap', 'rap-low-bits', 'rap-recall', 'rap-v0'"):
        load_policy("rap-v9", model)
    with pytest.raises(ArtifactError, match="smollm2-135m@pypi, whose items .* 60 and 12"):
        load_policy("rap-v0", masks)
    monkeypatch.setattr(packaged_files, "PACKAGED", tmp_path)
    with pytest.raises(ArtifactError, match=r"no exported policy at .*ladder"):
        load_policy("rap", model)
    for name in ("ladder", "low-bits", "recall"):
        made_ladder.policy_file().save(tmp_path / f"smollm2-135m.{name}.safetensors")
    made_policies.policy_file().save(tmp_path / "smollm2-135m.blocks.safetensors")
    for name, served in (
        ("rap", model),
        ("rap-low-bits", model),
        ("rap-recall", model),
        ("rap-v0", masks),
    ):
        policy, request = load_policy(name, served), Request.at_fraction(served, 1, 100, 0.5)
        assert (policy.name, bool(policy.weight_levels)) == (name, name != "rap-v0")
        assert policy.choose(request) == NetworkPolicy(served, policy.file).choose(request)

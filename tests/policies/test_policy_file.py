"""The exported file: round trip, reproducible bytes, and rejection of damaged files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from rap_env.artifacts import canonical_json, digest
from rap_env.errors import ArtifactError
from rap_env.ladder.observation import ImportanceFeatures
from rap_env.policies.policy_file import PolicyFile, order_of
from tests.policies.made_policies import facts, features, policy_file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "policy.safetensors"
    policy_file(block_vectors=3, without=("gsi",)).save(path)
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


def test_it_reads_what_was_written(path):
    before, after = policy_file(block_vectors=3, without=("gsi",)), PolicyFile.load(path)
    for name, array in before.weights.arrays().items():
        found = after.weights.arrays()[name]
        assert np.array_equal(found, array)
        assert found.dtype == np.float32
    for name, values in vars(before.features).items():
        assert np.array_equal(getattr(after.features, name), values)
    assert after.weights.without == ("gsi",)
    assert (after.order, after.model) == (before.order, before.model)
    assert after.provenance == before.provenance
    assert sorted(after.order) == list(range(12))


def test_the_same_policy_gives_the_same_bytes(path, tmp_path):
    PolicyFile.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("size", [0, 4, 100, -1, -200])
def test_a_truncated_file_is_rejected(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ArtifactError, match=r"is truncated or not an exported policy; use the packaged policy"
    ):
        PolicyFile.load(path)


def test_a_file_of_another_kind_is_rejected(path, tmp_path):
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="truncated or not an exported policy"):
        PolicyFile.load(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(2)}))
    with pytest.raises(ArtifactError, match="holds tensors, but no exported policy"):
        PolicyFile.load(path)
    with pytest.raises(ArtifactError, match="truncated or not an exported policy"):
        PolicyFile.load(tmp_path)  # a folder
    with pytest.raises(ArtifactError, match="There is no exported policy at"):
        PolicyFile.load(tmp_path / "nothing.safetensors")


def test_a_newer_format_is_rejected(path):
    rewritten(path, lambda header: header.update(format=2))
    with pytest.raises(ArtifactError, match="format 2, but this version reads .* of format 1"):
        PolicyFile.load(path)


def test_altered_content_is_rejected(path):
    def nudge(arrays):
        arrays["network.last_weight"][0] += 1

    before = path.read_bytes()
    for changed in (
        {"change_arrays": nudge},
        {"change_arrays": lambda arrays: arrays.pop("order")},
        {"change_header": lambda header: header["body"].pop("model")},
        {"change_header": lambda header: header["body"].update(settings=None)},
    ):
        path.write_bytes(before)
        with pytest.raises(ArtifactError, match="was altered after it was written"):
            PolicyFile.load(rewritten(path, **changed))
    flipped = bytearray(before)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ArtifactError, match="was altered"):
        PolicyFile.load(path)
    path.write_bytes(before.replace(b"maskable_ppo", b"maskable_dqn"))
    with pytest.raises(ArtifactError, match="was altered"):
        PolicyFile.load(path)


def test_parts_of_different_models_are_rejected():
    made = policy_file()
    with pytest.raises(ArtifactError, match="importance of made must have 12 values"):
        replace(made, features=features(4))
    with pytest.raises(ArtifactError, match="each of its 12 blocks once"):
        replace(made, order=(0, 1))
    with pytest.raises(ArtifactError, match="vectors for 8 blocks, but made has 12"):
        replace(made, weights=policy_file(4, block_vectors=3).weights)


def test_its_own_model_gets_the_features_of_the_file(caplog):
    made = policy_file(block_vectors=3)
    assert made.features_for(facts()) == (made.features, made.order)
    assert not caplog.records


def test_other_weights_of_the_same_shape_are_served_with_a_warning(caplog):
    made = policy_file(block_vectors=3)
    with caplog.at_level(logging.WARNING):
        assert made.features_for(facts(fingerprint="b" * 64, name="other"))[1] == made.order
    assert "exported for made (bfloat16), and other (bfloat16) has other weights" in caplog.text


def test_another_number_of_blocks_needs_features_and_no_vectors(caplog):
    made, given = policy_file(), features(4, seed=3)
    with pytest.raises(ArtifactError, match="12 blocks, but made has 8; give the importance"):
        made.features_for(facts(4))
    assert made.features_for(facts(4), given) == (given, order_of(given))
    with pytest.raises(ArtifactError, match="must have 10 values of one_shot"):
        made.features_for(facts(5), given)
    with pytest.raises(ArtifactError, match="vectors for 12 blocks, but made has 8"):
        policy_file(block_vectors=3).features_for(facts(4), given)
    assert not caplog.records


def test_the_order_follows_the_ranks():
    seen = features(3)
    order = order_of(seen)
    assert [seen.gsi_rank[index] for index in order] == sorted(seen.gsi_rank)
    assert order_of(ImportanceFeatures.none(6)) == ()

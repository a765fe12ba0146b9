"""The network in NumPy; `tests/agents/test_export.py` compares it with the trained one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rap_env.block_rows import row_columns, row_width
from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.ladder.observation import ObservationBuilder
from rap_env.plan import Plan
from rap_env.policies.block_network import BlockNetwork
from rap_env.policies.packaged_networks import NetworkPolicy
from rap_env.request import Request
from tests.policies.made_policies import features, memory, policy_file, weights
from tests.policies.test_policies import frontier

SHAPES = [(1, 10), (16, 2000), (4, 500)]


def network(layers=6, **settings):
    builder = ObservationBuilder(memory(layers), features(layers))
    return BlockNetwork(weights(layers, **settings), builder)


def requests(model, fractions=(0.3, 0.5, 0.7, 0.9, 0.99)):
    return [Request.at_fraction(model, *shape, f) for shape in SHAPES for f in fractions]


@pytest.mark.parametrize("block_vectors", [0, 3])
def test_the_parts_of_a_row_are_contiguous_and_fill_it(block_vectors):
    parts = list(row_columns(block_vectors).values())
    assert parts[0].start == 0
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    assert parts[-1].stop == row_width(block_vectors) == row_width(0) + 2 * block_vectors


@pytest.mark.parametrize("block_vectors", [0, 3])
def test_it_stops_at_the_first_mask_that_fits(block_vectors):
    made, model = network(block_vectors=block_vectors), memory()
    for request in requests(model):
        removed = made.removals(request)
        assert len(set(removed)) == len(removed) > 0
        peaks = [
            model.peak_bytes(Plan.removing(*removed[:n]), request) for n in range(len(removed))
        ]
        assert all(peak > request.budget_bytes for peak in peaks)
        assert model.peak_bytes(Plan.removing(*removed), request) <= request.budget_bytes


def test_nothing_is_removed_where_the_dense_model_fits():
    model = memory()
    assert network().removals(Request.at_fraction(model, 1, 10, 1.0)) == []


def test_where_no_mask_fits_all_blocks_are_removed():
    assert sorted(network().removals(Request(1, 10, 1))) == list(range(12))


def test_the_last_ffn_block_frees_its_workspace():
    """A budget that the mask without ffn blocks meets only because its workspace is smaller."""
    model, blind = memory(2), weights(2)
    kind_first = np.zeros_like(blind.linear_weight)
    kind_first[0] = 100.0  # ffn blocks first
    silent = np.zeros_like(blind.last_weight)
    blind = replace(blind, linear_weight=kind_first, last_weight=silent)
    made = BlockNetwork(blind, ObservationBuilder(model, features(2)))
    least = model.peak_bytes(Plan.removing(1, 3), Request(4, 500, 1))
    assert sorted(made.removals(Request(4, 500, least))) == [1, 3]
    assert len(made.removals(Request(4, 500, least - 1))) == 3


def test_without_the_request_the_order_is_static():
    blind, seeing = network(without=("request",)), network()
    for made, static in ((blind, True), (seeing, False)):
        orders = sorted((made.removals(r) for r in requests(memory())), key=len)
        assert static == all(b[: len(a)] == a for a, b in itertools.pairwise(orders))


def test_a_request_that_the_model_cannot_serve_is_rejected():
    with pytest.raises(InvalidRequestError, match="from 1 to 4096 tokens"):
        network().removals(Request(1, 5000, 10**9))


def test_threads_share_it():
    made, asked = network(block_vectors=3), requests(memory()) * 20
    alone = [made.removals(request) for request in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made.removals, asked)) == alone


def test_it_is_deterministic_and_stateless():
    made, asked = network(block_vectors=3), requests(memory())
    assert [made.removals(r) for r in asked] == [made.removals(r) for r in reversed(asked)][::-1]


def test_vectors_serve_only_their_own_number_of_blocks():
    builder = ObservationBuilder(memory(4), features(4))
    with pytest.raises(ArtifactError, match="vectors for 12 blocks, but made has 8"):
        NetworkPolicy(memory(4), policy_file(6, block_vectors=3), features(4))
    assert BlockNetwork(weights(6), builder).removals(Request.at_fraction(memory(4), 1, 10, 0.7))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"first_bias": np.zeros(5, np.float32)}, r"first_weight must have the shape \(5, "),
        ({"linear_weight": np.zeros(5, np.float32)}, r"linear_weight .*not \(5,\)"),
        ({"last_weight": np.full(8, np.nan, np.float32)}, "last_weight contains NaN"),
        ({"without": ("gis",)}, "without 'gis', which is unknown to this version"),
    ],
)
def test_invalid_weights_are_rejected(changed, text):
    with pytest.raises(ArtifactError, match=text):
        replace(weights(), **changed)


def test_choosing_loads_neither_torch_nor_a_training_library(tmp_path):
    frontier().save(tmp_path / "masks.json")
    code = (
        "import sys\n"
        "from tests.policies.made_policies import memory, policy_file\n"
        "from rap_env.policies.loading import load_policy\n"
        "from rap_env.policies.packaged_networks import NetworkPolicy\n"
        "from rap_env.request import Request\n"
        "model = memory()\n"
        "policy = NetworkPolicy(model, policy_file())\n"
        "assert policy.choose(Request.at_fraction(model, 4, 500, 0.7))\n"
        "table = load_policy(sys.argv[1], model)\n"
        "assert table.choose(Request.at_fraction(model, 1, 10, 0.8))\n"
        "heavy = ('torch', 'transformers', 'stable_baselines3', 'sb3_contrib', 'hydra', 'agents')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "masks.json")],
        capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr

"""Scoring on Ray workers: the scores of one process, also if a node dies in the middle."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from rap_env.errors import NonFiniteScoreError, WorkerError
from rap_env.importance.gsi_search import gsi
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from rap_env.scoring.plan_runner import sharing_order
from rap_env.scoring.scorer import METRIC, PlanScorer
from rap_env.scoring.store import ScoreStore
from rap_env.scoring.workers import ScoringWorker, WorkerPool, batches_of
from tests.scoring.fake_ray import FakeRay
from tests.scoring.test_scorer import tokens
from tests.scoring.worker_models import open_together
from tests.tiny import tiny_llm, tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray")

PAIRS = [removed for size in (1, 2) for removed in itertools.combinations(range(6), size)]
MASKS = [Plan.removing(*removed) for removed in PAIRS]
LOWERED = [Plan.uniform(3, caches="int8"), Plan.of({"layer01.ffn": "int8"})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama_tied", layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return load_llm(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a core each; the death of one is noticed within seconds."""
    from ray.cluster_utils import Cluster

    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300,
              "health_check_timeout_ms": 1000, "health_check_failure_threshold": 2}  # fmt: skip
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**small, "include_dashboard": False, "_system_config": checks},
    )
    cluster.second = cluster.add_node(**small)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def check_scores_of_a_pool_that_loses_a_worker(llm, workers, folder, caplog, end_one=None):
    """They are those of one process to the last bit, each reported and stored once."""
    ids, plans = tokens(windows=5), [*MASKS, *LOWERED]
    alone, scored = PlanScorer(llm, ids, batch_tokens=18), Counter()
    store = ScoreStore(folder / "scores.sqlite")
    spread = PlanScorer(llm, ids, store, batch_tokens=18, workers=workers)

    def on_score(plan):
        if not scored and end_one is not None:
            end_one()
        scored[plan] += 1

    spread.nll_many(plans, on_score)
    assert caplog.text.count("A scoring worker was lost") == 1
    assert scored == Counter(plans)
    assert spread.evaluations == len(plans) <= spread.block_forwards
    expected = {plan: alone.window_nll(plan).tolist() for plan in plans}
    assert {plan: spread.window_nll(plan).tolist() for plan in plans} == expected
    assert dict(store.rows(spread.context, METRIC)) == expected


@pytest.mark.slow  # the next test shows the same without the processes of a cluster
def test_a_node_killed_in_the_middle_changes_no_score(cluster, folder, llm, tmp_path, caplog):
    workers = WorkerPool(partial(open_together, str(folder), 2), 2, address=cluster.address)
    (folder / f"hold-{cluster.second.node_id}").touch()  # it begins a batch, and finishes none
    remove = partial(cluster.remove_node, cluster.second, allow_graceful=False)
    check_scores_of_a_pool_that_loses_a_worker(llm, workers, tmp_path, caplog, remove)
    workers.close()


def test_a_worker_whose_scores_would_differ_is_an_error():
    llm, ids = tiny_llm(), tokens()
    worker = ScoringWorker(lambda: llm, torch.get_num_threads())
    worker.load()
    scorer = PlanScorer(llm, ids, batch_tokens=18)
    found = worker.measure(scorer.job, MASKS[:3])
    assert [values.mean() for values in found.window_nll.values()] == scorer.nll_many(MASKS[:3])
    with pytest.raises(WorkerError, match=r"other scores than this process \(threads: 1, not 2\)"):
        worker.measure(replace(scorer.job, context={**scorer.context, "threads": 2}), MASKS)


def test_batches_are_neighbours_that_get_smaller():
    order = partial(sharing_order, num_blocks=6)
    plans = sorted(MASKS, key=order)
    batches = batches_of(plans, 2)
    assert [plan for batch in batches for plan in batch] == plans
    sizes = [len(batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 6
    assert sizes[-1] == 1
    assert all(len(batch) >= 5 for batch in batches_of(range(32), 2, least=5)[:-1])


def pool_on(worker, llm, count=2):
    workers = WorkerPool(lambda: llm, count)
    workers._ray = FakeRay(ray, worker)
    return workers


def test_a_worker_lost_in_the_middle_changes_no_score(tmp_path, caplog):
    lost = []

    class DyingOnce(ScoringWorker):
        def measure(self, job, plans):
            if len(lost) < 1 and len(plans) < 6:
                lost.append(plans)
                raise ray.exceptions.RayActorError(error_msg="killed")
            return super().measure(job, plans)

    llm, ids = tiny_llm("llama_tied", layers=3), tokens(windows=5)
    workers = pool_on(DyingOnce, llm)
    check_scores_of_a_pool_that_loses_a_worker(llm, workers, tmp_path, caplog)
    assert len(lost) == 1
    here, there = (
        gsi(PlanScorer(llm, ids, workers=pool), method="lazy", progress=False)
        for pool in (None, workers)
    )
    assert (there.order_indices, there.nll_after) == (here.order_indices, here.nll_after)
    part = PlanScorer(llm, ids, workers=workers).nll_on(MASKS[:4], [0, 3])
    assert part == PlanScorer(llm, ids).nll_on(MASKS[:4], [0, 3])


def test_workers_that_always_die_end_in_an_error():
    class Dying(ScoringWorker):
        def measure(self, job, plans):
            raise ray.exceptions.RayActorError(error_msg="killed\nmore")

    llm = tiny_llm("llama", layers=3)
    workers = pool_on(Dying, llm)
    with pytest.raises(WorkerError, match="died one after the other; .* The last error: killed$"):
        PlanScorer(llm, tokens(), workers=workers).nll_many(MASKS)
    assert workers._ray.started == 2 + 7


def test_an_error_in_a_worker_is_that_of_one_process_and_the_pool_goes_on():
    class Broken(ScoringWorker):
        broken = True

        def measure(self, job, plans):
            if Broken.broken:
                Broken.broken = False
                raise ray.exceptions.RayTaskError("measure", "", NonFiniteScoreError("NaN"))
            return super().measure(job, plans)

    llm = tiny_llm("llama", layers=3)
    workers = pool_on(Broken, llm)
    scorer = PlanScorer(llm, tokens(), workers=workers)
    with pytest.raises(NonFiniteScoreError):
        scorer.nll_many(MASKS)
    assert scorer.nll_many(MASKS) == PlanScorer(llm, tokens()).nll_many(MASKS)
    assert workers._ray.started == 4, "the error ended the first two"


def test_workers_run_where_ray_has_fewer_cores():
    llm = tiny_llm("llama", layers=3)
    workers = pool_on(ScoringWorker, llm, 3)
    nll = PlanScorer(llm, tokens(), workers=workers).nll_many(MASKS)
    assert nll == PlanScorer(llm, tokens()).nll_many(MASKS)
    assert workers._ray.asked["num_cpus"] == 0


@pytest.mark.parametrize("address", ["here", "http://here:8265", ":6379"])
def test_addresses_of_another_form(address):
    with pytest.raises(WorkerError, match="An address is HOST:PORT"):
        WorkerPool(tiny_llm, 1, address=address)


def test_an_address_that_does_not_answer_is_an_error_within_seconds():
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"Nothing answers at 127\.0\.0\.1:1 .*ray start --head"):
        WorkerPool(tiny_llm, 2, address="127.0.0.1:1")
    assert time.monotonic() - began < 10

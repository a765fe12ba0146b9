import dataclasses
import logging

import numpy as np
import pytest
import torch

from rap_env.artifacts import digest
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.errors import CorpusError, InvalidRequestError, NonFiniteScoreError, UnknownNameError
from rap_env.models.files.pruned_checkpoint import save_pruned
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring import lm_eval_tasks
from rap_env.scoring.store import ScoreStore
from tests.scoring.local_tasks import ROWS, write_task
from tests.scoring.test_scorer import tokens
from tests.tiny import FAMILIES, tiny_llm, tiny_tokenizer

pytest.importorskip("lm_eval")

from rap_env import PlanLM
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.plan_lm import likelihoods, make_batches
from rap_env.scoring.tasks import TaskResult, TaskScorer

GENERATED = ("rap_minimal_pairs", "rap_recall", "rap_choice")
SOME = Plan.removing("layer00.attn", "layer01.ffn")


def make_llm(positions=768, **settings):
    """A tiny Llama that is long enough for the tasks' letters."""
    return tiny_llm(positions=positions, tokenizer=tiny_tokenizer(), **settings)


@pytest.fixture(scope="module")
def llm():
    return make_llm()


def loaded(config):
    """The tasks of a config as lm-eval's objects."""
    with lm_eval_tasks.quiet():
        return {name: lm_eval_tasks.load_task(name, config) for name in config.names}


def lm_evals_results(config, monkeypatch, plan, llm, **options):
    """The same tasks through lm-eval's own `evaluate`, with the forward passes of its `HFLM`.

    `options` are more arguments of its model; ``pretrained`` replaces `llm`.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    with lm_eval_tasks.quiet(), llm.applied(plan):
        given = {"pretrained": llm.model, "tokenizer": tiny_tokenizer(), **options}
        lm = HFLM(**given, batch_size=7, softmax_dtype=torch.float32)
        return evaluate(lm, loaded(config), limit=config.limit, bootstrap_iters=2)


@pytest.mark.parametrize(
    "plan", [pytest.param(Plan(), marks=pytest.mark.slow), SOME], ids=["dense", "masked"]
)
def test_scores_equal_lm_evals_own(tmp_path, monkeypatch, plan):
    """Equal metrics and likelihoods, for every kind of task: cut contexts, few-shot."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    llm = make_llm(positions=96)  # shorter than some prompts
    names = [name for name in ROWS if not name.startswith("blimp_")]
    for name in names:
        write_task(tmp_path, name)
    config = TaskConfig((*GENERATED, *names), limit=3, data_root=str(tmp_path), num_fewshot=1)
    expected = lm_evals_results(config, monkeypatch, plan, llm)
    with lm_eval_tasks.quiet():
        through_lm = simple_evaluate(
            model=PlanLM(llm, plan),
            tasks=list(loaded(config).values()),
            limit=3,
            bootstrap_iters=2,
            fewshot_random_seed=config.seed,
            task_manager=TaskManager(include_defaults=False),
        )
    results = TaskScorer(llm, config).results(plan)
    assert set(results) == set(config.names)
    for name, result in results.items():
        theirs, ours = expected["results"][name], through_lm["results"][name]
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            assert ours[metric] == (
                pytest.approx(value, rel=1e-5, nan_ok=True) if isinstance(value, float) else value
            )
        assert result.metrics, name
        for metric, value in result.metrics.items():
            assert value == pytest.approx(theirs[f"{metric},none"], rel=1e-5), (name, metric)
        assert result.documents == len(expected["samples"][name])


def test_lm_eval_scores_the_folder_of_a_pruned_model_as_we_score_the_mask(
    tmp_path, monkeypatch, llm
):
    """``lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True``."""
    folder = save_pruned(llm, SOME, tmp_path / "pruned")
    config = TaskConfig(GENERATED, limit=4)
    scorer = TaskScorer(llm, config)
    arguments = {"pretrained": str(folder), "tokenizer": None, "device": "cpu"}
    found = lm_evals_results(config, monkeypatch, Plan(), llm, **arguments, trust_remote_code=True)
    for name, result in scorer.results(SOME).items():
        for metric, value in result.metrics.items():
            assert value == pytest.approx(found["results"][name][f"{metric},none"], rel=1e-5)
    for name, samples in found["samples"].items():
        theirs = [float(pair[0]) for sample in samples for pair in sample["filtered_resps"]]
        assert np.allclose(theirs, scorer._outputs(SOME)[name][:, 0], rtol=1e-5)


def test_whole_texts_have_lm_evals_likelihoods_under_a_plan(llm):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood_rolling", {}, (text,), number)
        for number, text in enumerate(("a b c " * 300, "d e."))  # the first is longer than a window
    ]
    with lm_eval_tasks.quiet():
        plain = HFLM(pretrained=llm.model, tokenizer=tiny_tokenizer(), batch_size=1)
        with llm.applied(SOME):
            expected = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    found = PlanLM(llm, SOME).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UnknownNameError, match="generate text with llm.generate"):
        PlanLM(llm).generate_until(requests)
    with pytest.raises(UnknownNameError, match=r"layer02\.attn"):
        PlanLM(llm, Plan.removing(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_on_continuations_alone_changes_nothing(family):
    """For every family, soft caps included: the whole model's logits give the same sums."""
    llm = tiny_llm(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (6, 12), generator=generator).tolist()
    requests = [
        (row[:-size], row[-size:]) for row, size in zip(ids, (1, 2, 3, 1, 5, 4), strict=True)
    ]
    requests += [(ids[0][:-1], [7]), (ids[0][:-2], [ids[0][-2], 9]), (ids[1][:3], ids[1][3:5])]
    mask = Plan.removing("layer00.attn")
    with llm.applied(mask), torch.no_grad():
        found = likelihoods(PartialForward(llm), make_batches(requests, 64))
        for (context, target), (likelihood, greedy) in zip(requests, found, strict=True):
            whole = torch.tensor([context + target])
            logits = llm.model(whole[:, :-1]).logits[0, len(context) - 1 :].float()
            logs = logits.log_softmax(-1)
            expected = logs[range(len(target)), target].sum().item()
            assert likelihood == pytest.approx(expected, abs=1e-4)
            assert greedy == float(logs.argmax(-1).tolist() == target)


def test_a_long_context_loses_tokens_on_the_left_and_equal_inputs_run_once():
    llm = tiny_llm()
    context, target = list(range(3, 53)), [5, 6]
    cut = make_batches([(context, target), (context, [5, 7])], 20)
    short = make_batches([(context[-19:], target)], 20)
    assert [[batch.tokens.numel() for batch in batches] for batches in (cut, short)] == [[20]] * 2
    partial = PartialForward(llm)
    assert likelihoods(partial, cut)[0, 0] == pytest.approx(likelihoods(partial, short)[0, 0])


def numbered(count: int) -> list[dict]:
    """Rows of hellaswag with different texts."""
    return [{**ROWS["hellaswag"], "ctx_a": f"a {number} b."} for number in range(count)]


def contexts_of(scorer: TaskScorer) -> list[str]:
    """The texts of the documents that a scorer has chosen."""
    (member,) = scorer._tasks.values()
    return list(dict.fromkeys(instance.args[0] for instance in member.task.instances))


def test_a_limit_takes_a_seeded_sample_of_documents(tmp_path, llm):
    write_task(tmp_path, "hellaswag", rows=numbered(30))

    def scorer(**settings) -> TaskScorer:
        return TaskScorer(llm, TaskConfig(("hellaswag",), data_root=str(tmp_path), **settings))

    every = contexts_of(scorer())
    drawn = contexts_of(scorer(limit=8))
    assert len(drawn) == 8
    assert drawn == [text for text in every if text in drawn] != every[:8]
    assert contexts_of(scorer(limit=8)) == drawn
    assert contexts_of(scorer(limit=8, seed=1)) != drawn
    assert set(contexts_of(scorer(limit=12))) > set(drawn)
    assert contexts_of(scorer(limit=30)) == contexts_of(scorer(limit=99)) == every
    results = [scorer(limit=limit).results(SOME)["hellaswag"] for limit in (8, None)]
    assert results[0].documents == 8
    places = [every.index(text) for text in drawn]
    np.testing.assert_allclose(results[0].choice_nll, results[1].choice_nll[places])


def test_tasks_without_likelihoods_of_answers_are_rejected_before_anything_loads(monkeypatch, llm):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model or a data set was loaded")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    monkeypatch.setattr("rap_env.envs.task.open_context", fail)
    for name in ("gsm8k", "wikitext"):  # reading all of lm-eval's configs takes ten seconds
        monkeypatch.setitem(lm_eval_tasks.TASK_FOLDERS, name, name)
    with pytest.raises(UnknownNameError, match="likelihood task 'gsm8k'.*by generate_until"):
        lm_eval_tasks.check_scorable(["gsm8k"])
    with pytest.raises(UnknownNameError, match="likelihood task 'gsm8k'"):
        RAPLadderEnv("no-such-model", reward="accuracy", tasks=["gsm8k"])
    with pytest.raises(UnknownNameError, match="'wikitext'.*scored by loglikelihood_rolling"):
        TaskScorer(llm, TaskConfig(("wikitext",)))
    lm_eval_tasks.check_scorable(["piqa", "rap_choice", "blimp_causative"])


def test_groups_and_tags_stand_for_their_tasks(tmp_path, llm, monkeypatch):
    monkeypatch.setitem(lm_eval_tasks.TASK_FOLDERS, "ai2_arc", "arc")  # as above
    names = list(lm_eval_tasks.members(["rap_choice", "ai2_arc", "blimp"]))
    assert names[:3] == ["rap_choice", "arc_challenge", "arc_easy"]
    assert len(names) == 3 + 67
    assert all(name.startswith("blimp_") for name in names[3:])
    for name in ("arc_easy", "arc_challenge"):
        write_task(tmp_path, name)
    scorer = TaskScorer(llm, TaskConfig(("ai2_arc",), data_root=str(tmp_path)))
    assert set(scorer.accuracies(SOME)) == {"arc_easy", "arc_challenge"}


def test_an_untied_head_is_not_tied_again():
    """lm-eval's model class ties weights when it is built, which would undo a quantised head."""
    llm = tiny_llm("llama_tied", tokenizer=tiny_tokenizer())
    own = torch.nn.Parameter(torch.randn_like(llm.model.lm_head.weight))
    llm.model.lm_head.weight = own
    PlanLM(llm)
    assert llm.model.lm_head.weight is own


def test_the_context_changes_with_all_that_decides_a_score(tmp_path, llm):
    base = TaskConfig(("rap_recall",), limit=4)
    contexts = [TaskScorer(llm, base).context]
    for change in ({"limit": 5}, {"seed": 1}, {"num_fewshot": 1}):
        contexts.append(TaskScorer(llm, dataclasses.replace(base, **change)).context)
    for other in (make_llm(seed=1), make_llm(dtype=torch.bfloat16), make_llm(positions=300)):
        contexts.append(TaskScorer(other, base).context)
    for text in ("a b.", "a c."):
        write_task(
            tmp_path, "blimp_causative", rows=[{**ROWS["blimp_causative"], "sentence_good": text}]
        )
        config = TaskConfig(("blimp_causative",), data_root=str(tmp_path))
        contexts.append(TaskScorer(llm, config).context)
    assert len({digest(dict(context)) for context in contexts}) == len(contexts)
    assert digest(dict(TaskScorer(llm, base).context)) == digest(dict(contexts[0]))
    assert str(tmp_path) not in str(contexts[-1])  # the data counts, not where it lies


def test_nothing_is_printed_or_logged(tmp_path, capfd, caplog):
    write_task(tmp_path, "hellaswag")
    llm = make_llm(positions=64)
    with caplog.at_level(logging.INFO):
        config = TaskConfig(("rap_choice", "hellaswag"), limit=2, data_root=str(tmp_path))
        TaskScorer(llm, config).accuracies(Plan())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [record.getMessage() for record in caplog.records] == []


def test_nan_is_an_error_with_its_location():
    llm = make_llm()
    with torch.no_grad():
        llm.model.model.norm.weight[0] = torch.nan
    scorer = TaskScorer(llm, TaskConfig(("rap_choice",), limit=2))
    with pytest.raises(NonFiniteScoreError, match="non-finite likelihood"):
        scorer.accuracies(Plan())
    assert llm.plan == Plan()


def test_names_must_be_a_list_of_different_names():
    with pytest.raises(UnknownNameError, match="Unknown list of tasks 'piqa'"):
        TaskConfig("piqa")
    assert TaskConfig(["piqa"]).names == ("piqa",)
    for names in ((), ("piqa", "piqa")):
        with pytest.raises(InvalidRequestError, match="one task at least and none twice"):
            TaskConfig(names)


def test_a_model_without_tokenizer_is_rejected():
    with pytest.raises(CorpusError, match="tiny-llama has no tokenizer to read tasks with"):
        TaskScorer(tiny_llm(), TaskConfig(("rap_choice",)))


def test_an_answer_longer_than_the_model_is_rejected(tmp_path):
    write_task(
        tmp_path, "blimp_causative", rows=[{"sentence_good": "a " * 80, "sentence_bad": "b"}]
    )
    with pytest.raises(CorpusError, match="'blimp_causative' .* has 1 context and .* at most 64"):
        TaskScorer(
            make_llm(positions=64), TaskConfig(("blimp_causative",), data_root=str(tmp_path))
        )


def test_without_network_hub_tasks_raise_an_error_with_a_remedy(monkeypatch, llm):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="data of the task 'piqa' from the hub .*set data_root"):
        TaskScorer(llm, TaskConfig(("piqa",)))


CACHES = {"layer00.cache": "int4", "layer01.cache": "int2"}


def requests():
    """Contexts and continuations of very different lengths, most longer than one cache group."""
    rows = tokens(6, 60).tolist()
    lengths = (58, 41, 34, 33, 20, 5)
    return [(row[: n - 2], row[n - 2 : n]) for row, n in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_scores_as_each_sequence_alone_under_lowered_caches(family):
    llm = tiny_llm(family)
    with llm.applied(Plan.of(CACHES)):
        partial, together = PartialForward(llm, widen=True), make_batches(requests(), 63)
        assert len(together) == 1
        found = likelihoods(partial, together)
        alone = [likelihoods(partial, make_batches([one], 63))[0] for one in requests()]
    for one, other in zip(found, alone, strict=True):
        # Rounding may move a state across a step of its quantisation; int2 has large steps.
        assert one[0] == pytest.approx(other[0], rel=2e-3)


def test_tasks_are_scored_under_plans_and_stored_by_plan(tmp_path):
    llm = make_llm()
    plan, mask = Plan.of(CACHES), Plan.removing("layer00.attn")
    config = TaskConfig(("rap_minimal_pairs", "rap_recall"), limit=4)
    scorer = TaskScorer(llm, config, ScoreStore(tmp_path / "s.sqlite"))
    with llm.applied(mask):
        results = scorer.results(plan)
        assert llm.plan == mask
    assert scorer.accuracies(plan) == {n: r.metrics["acc"] for n, r in results.items()}
    assert 0 <= scorer.mean_accuracy(plan) <= 1
    assert scorer.results(mask) == scorer.results(mask)
    assert scorer.evaluations == 2
    again = TaskScorer(llm, config, ScoreStore(tmp_path / "s.sqlite"))
    for one in (plan, mask):
        metrics = {name: result.metrics for name, result in scorer.results(one).items()}
        assert metrics == {name: result.metrics for name, result in again.results(one).items()}
    alone = TaskScorer(llm, TaskConfig(("rap_recall",), limit=4), again.store)
    assert alone.results(mask)["rap_recall"].metrics == metrics["rap_recall"]
    assert again.evaluations == alone.evaluations == 0
    with pytest.raises(UnknownNameError, match=r"layer02\.attn"):
        scorer.results(Plan.of({"layer02.cache": "int4"}))


def result(acc, acc_norm=None):
    """A result with these right answers, and nothing else of use."""
    answers = {"acc": acc} if acc_norm is None else {"acc": acc, "acc_norm": acc_norm}
    values = {name: np.array(right, dtype=float) for name, right in answers.items()}
    return TaskResult({}, len(acc), values, np.zeros(0))


def test_answers_are_compared_with_those_of_the_native_model(caplog):
    scorer, plan = TaskScorer(make_llm(), TaskConfig(("rap_minimal_pairs",), limit=2)), Plan()
    lowered = Plan.of(CACHES)
    scorer.chance = {"normed": 0.5, "plain": 0.25, "open": 0.0}
    results = {
        plan: {
            "normed": result([0, 0, 0, 0], [1, 1, 0, 1]),
            "plain": result([1, 0, 1, 0] * 5),
            "open": result([0, 1, 1, 0] * 5),
            "other": TaskResult({}, 4, {}, np.zeros(0)),
        },
        lowered: {
            "normed": result([1, 1, 1, 1], [1, 0, 1, 1]),
            "plain": result([1, 0, 1, 1] * 5),
            "open": result([0, 0, 0, 0] * 5),
        },
    }
    scorer.results = results.__getitem__
    answers = scorer.right_answers(lowered)
    assert {name: list(right[:4]) for name, right in answers.items()} == {
        "normed": [1, 0, 1, 1], "plain": [1, 0, 1, 1], "open": [0, 0, 0, 0],
    }  # fmt: skip
    # One answer became wrong and one right of four, and five of twenty became right.
    assert scorer.flipped_answers_share(lowered) == 7 / 24
    assert scorer.flipped_answers_share(plan) == 0.0
    # 0.75 of four and 0.5 of twenty right answers are not three standard errors above chance.
    assert scorer.above_chance == ("open",)
    assert "not above chance in normed, plain" in caplog.text
    scorer.chance = dict.fromkeys(scorer.chance, 0.0)
    assert scorer.flipped_answers_share(lowered) is None

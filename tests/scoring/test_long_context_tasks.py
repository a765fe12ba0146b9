"""Tasks of long contexts: their texts, and that they are scored with the caches of a plan."""

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from rap_env.errors import CorpusError, InvalidRequestError, UnknownNameError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.plan import Plan
from rap_env.scoring.generated_tasks import NAMES, OBJECTS
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.long_context_tasks import CHOICES, DEPTHS, LongContextTask, long_context_task
from rap_env.scoring.plan_lm import likelihoods, make_batches
from rap_env.scoring.tasks import TaskScorer
from tests.scoring.local_tasks import write_task
from tests.tiny import LAYERS, randomise, tiny_config, tiny_tokenizer, word_tokenizer

WORDS = word_tokenizer()


def word_llm(positions: int = 1024, seed: int = 0) -> ElasticLLM:
    """A tiny model that reads words, long enough for the shortest tasks."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.vocab_size, config.max_position_embeddings = len(WORDS), positions
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return ElasticLLM(model, word_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def llm() -> ElasticLLM:
    return word_llm()


def count(text: str) -> int:
    return len(WORDS(text)["input_ids"])


@pytest.mark.parametrize("tokens", [512, 1500])
def test_texts_have_the_length_of_the_task(tokens):
    task = LongContextTask(tokens)
    documents = task.documents(WORDS, 0, 24)  # texts have 8 questions
    texts = {document["context"].partition("\n\n")[0]: document for document in documents}
    for last in list(texts.values())[:-1]:
        whole = f"{last['context']} {last['choices'][last['gold']]}"
        assert tokens - 20 <= count(whole) <= tokens


def test_documents_depend_on_the_seed_and_fewer_are_the_first_of_more():
    task = LongContextTask(512)
    documents = task.documents(WORDS, 3, 30)
    assert task.documents(WORDS, 3, 11) == documents[:11]
    assert task.documents(WORDS, 4, 30) != documents
    assert len({(d["context"], *d["choices"]) for d in documents}) == 30


def test_questions_do_not_tell_the_answer():
    """No choice occurs after the text, so what has not seen the text can only guess."""
    for document in LongContextTask(512).documents(WORDS, 1, 60):
        questions = document["context"].rpartition("\n\n")[2]
        asked = questions.rpartition(".")[2]
        answered = Counter(questions.removesuffix(asked).replace(",", ".").replace(".", "").split())
        named = [choice for choice in document["choices"] if answered[choice]]
        assert not named, questions
        assert len(set(document["choices"])) == CHOICES
        assert set(document["choices"]) <= {*NAMES, *OBJECTS}


def test_the_text_has_the_fact_once_and_the_questions_repeat_it():
    for document in LongContextTask(512).documents(WORDS, 2, 48):
        text, _, questions = document["context"].rpartition("\n\n")
        asked = questions.split(". ")[-1]
        fact = f"{asked} {document['choices'][document['gold']]}."
        assert text.count(fact) == 1
        where = text.index(fact) / len(text)
        low, high = (int(n) for n in document["kind"].split()[1].split("-"))
        assert low - 8 <= 100 * where <= high + 8  # in characters, and filler is of pieces


def test_wrong_passwords_do_not_occur_in_the_text():
    for document in LongContextTask(512).documents(WORDS, 0, 16):
        named = [c for c in document["choices"] if f"is {c}." in document["context"]]
        assert named == [document["choices"][document["gold"]]]


def test_facts_are_spread_over_the_whole_text():
    documents = LongContextTask(1024).documents(WORDS, 0, 240)
    counts = Counter(document["kind"] for document in documents)
    assert len(counts) == DEPTHS
    assert min(counts.values()) > 240 / DEPTHS / 2


def test_names_of_tasks():
    assert long_context_task("rap_recall") is None
    assert long_context_task("arc_easy") is None
    assert long_context_task("rap_recall_4096") == LongContextTask(4096)
    assert LongContextTask(512).name == "rap_recall_512"
    with pytest.raises(UnknownNameError, match="'rap_recal_1024'.*Did you mean 'rap_recall_1024'"):
        long_context_task("rap_recal_1024")
    with pytest.raises(InvalidRequestError, match="at least 512 tokens, not 100"):
        long_context_task("rap_recall_100")
    with pytest.raises(InvalidRequestError, match="more than 512 tokens with this model's"):
        LongContextTask(512).documents(tiny_tokenizer(), 0)


class TestScores:
    """The model runs once for each text, with the caches of the plan."""

    def scorer(self, llm, *names, limit=16):
        return TaskScorer(llm, TaskConfig(names, limit=limit))

    def test_one_pass_answers_all_questions_about_a_text(self, llm):
        scorer = self.scorer(llm, "rap_recall_512", limit=24)
        batches = scorer._tasks["rap_recall_512"].batches
        assert sum(len(batch.tokens) for batch in batches) == 3

    def test_shared_beginnings_change_nothing(self, llm):
        rows = torch.randint(3, 200, (3, 90), generator=torch.Generator().manual_seed(0)).tolist()
        requests = [(row[:n], row[n : n + size]) for row in rows for n, size in ((80, 3), (70, 1))]
        requests += [(rows[0][:70], [5]), (rows[1][:40], [6, 7]), (rows[2][:40], rows[2][40:41])]
        plan = Plan.uniform(LAYERS, caches="int8")
        with llm.applied(plan):
            shared = make_batches(requests, 128, share_prefixes=True)
            alone = make_batches(requests, 128)
            assert sum(len(batch.tokens) for batch in shared) == 4
            assert sum(len(batch.tokens) for batch in alone) > 4
            partial = PartialForward(llm)
            assert np.allclose(likelihoods(partial, shared), likelihoods(partial, alone), rtol=1e-3)

    def test_the_nll_of_choices_by_hand(self, llm):
        scorer = self.scorer(llm, "rap_recall_512")
        result = scorer.results(Plan())["rap_recall_512"]
        logs = scorer._outputs(Plan())["rap_recall_512"][:, 0].reshape(-1, CHOICES)
        docs = LongContextTask(512).documents(llm.tokenizer, 0, 16)
        chances = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
        expected = [-np.log(row[doc["gold"]]) for row, doc in zip(chances, docs, strict=True)]
        assert result.choice_nll == pytest.approx(np.array(expected))
        assert scorer.mean_choice_nll(Plan()) == pytest.approx(np.mean(expected))
        right = logs.argmax(axis=1) == [doc["gold"] for doc in docs]
        assert result.per_document["acc"].tolist() == right.astype(float).tolist()
        assert scorer.chance == {"rap_recall_512": 0.25}

    def test_a_task_that_is_longer_than_the_model_is_rejected(self, llm):
        message = "rap_recall_2048 have 2048 tokens, more than the 1024 positions of tiny"
        with pytest.raises(CorpusError, match=message):
            self.scorer(llm, "rap_recall_2048")
        with pytest.raises(UnknownNameError, match="'rap_recal_512'"):
            self.scorer(llm, "rap_recal_512")

    def test_open_answers_have_no_choices(self, tmp_path, llm):
        write_task(tmp_path, "lambada_openai")
        scorer = TaskScorer(llm, TaskConfig(("lambada_openai",), data_root=str(tmp_path)))
        with pytest.raises(UnknownNameError, match="multiple-choice task 'lambada_openai'"):
            scorer.mean_choice_nll(Plan())

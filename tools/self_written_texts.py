"""Writes the chats and articles of the package with the default model, in 15 CPU minutes.

Usage, from the root of the checkout: ``python -m tools.self_written_texts``. The tokens are
sampled, so another machine writes other text; the file in the package is one run's.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch

from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration_text import SELF_WRITTEN
from rap_env.models.live.elastic import ElasticLLM

CHARACTERS = 50_000
"""At least so many of each kind: more than ten thousand tokens of most tokenizers."""

BATCH = 48

TOPICS = (
    "baking bread", "learning to swim", "the water cycle", "a noisy neighbour",
    "sorting a list", "Rome", "saving money", "the heart", "houseplants", "fractions",
    "moving to a new city", "volcanoes", "job interviews", "solar panels", "the violin",
    "email", "back pain", "chess", "earthquakes", "coffee", "public libraries",
    "database indexes", "bees", "the French Revolution", "camping with children",
    "probability", "headaches", "railways", "recursion", "growing tomatoes", "the Moon",
    "a lost parcel", "vaccines", "choosing a laptop", "jazz", "glaciers",
    "negotiating a salary", "whales", "cycling to work", "regular expressions",
    "the printing press", "sleep", "wind turbines", "a birthday party", "photography",
    "electric cars", "Antarctica", "unit tests", "allergies", "the olive tree",
    "marathon training", "bridges",
)  # fmt: skip
QUESTIONS = (
    "Can you explain {} to me?", "What should a beginner know about {}?",
    "Write a short email to a colleague about {}.", "Give me five tips about {}.",
    "Tell me a short story about {}.", "What are the most common mistakes with {}?",
    "Write a small Python function that has to do with {}, and explain it.",
    "I have to give a talk on {}. How should I begin?", "Make up a quiz about {} with answers.",
    "Write a dialogue between two friends who disagree about {}.",
    "What is the history of {}, and why does it matter today?",
)  # fmt: skip
FOLLOW_UPS = (
    "Can you give me an example?", "Please say that in two sentences.", "Why is that so?",
    "What would be different with very little money or time?", "What should I do next?",
    "Are you sure? What speaks against it?", "Make a list of the main points.",
)  # fmt: skip
ARTICLES = (
    "Write a long encyclopaedia article about {}.", "Write a newspaper report about {}.",
    "Write an essay about {} for a magazine.", "Write a chapter of a textbook about {}.",
    "Write a long blog post about {} from your own experience.",
)  # fmt: skip
UNWANTED = (
    "as an ai", "language model", "i'm sorry", "i can't", "i cannot", "smollm", "hugging face",
)  # fmt: skip


def answers(
    llm: ElasticLLM, chats: list[list[dict[str, str]]], new_tokens: int, least_words: int
) -> list[str]:
    """The model's answer to each chat, as far as it is sensible; empty otherwise."""
    render: Callable[..., Any] = llm.tokenizer.apply_chat_template
    inputs = render(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    written = llm.generate(
        **inputs, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=new_tokens
    )[:, inputs["input_ids"].shape[1] :]
    texts = [llm.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return [sensible(text, least_words) for text in texts]


def sensible(text: str, least_words: int) -> str:
    """The whole sentences of a text before it repeats itself; empty if they are too few.

    It is empty as well if it is a refusal or speaks of the model.
    """
    kept = ""
    for sentence in re.findall(r"[^.!?\n]*[.!?\n]+", text):
        words = (kept + sentence).lower().split()
        runs = list(zip(words, words[1:], words[2:], strict=False))
        if len(set(runs)) < 0.9 * len(runs):
            break
        kept += sentence
    refused = any(phrase in kept.lower() for phrase in UNWANTED)
    return "" if refused or len(kept.split()) < least_words else kept.strip()


def chats(
    llm: ElasticLLM, questions: Sequence[str], turns: int, new_tokens: int, least_words: int
) -> Iterator[list[dict[str, str]]]:
    """Chats of one to so many questions, in equal shares, without end."""
    for number in count():
        running = []
        for i in range(BATCH):
            topic = TOPICS[(BATCH * number + i) % len(TOPICS)]
            running.append([_user(questions[(number + i) % len(questions)].format(topic))])
        for turn in range(1, turns + 1):
            texts = answers(llm, running, new_tokens, least_words) if running else []
            answered = [
                [*chat, {"role": "assistant", "content": text}]
                for chat, text in zip(running, texts, strict=True)
                if text
            ]
            yield from (chat for i, chat in enumerate(answered) if i % turns < turn)
            running = [
                [*chat, _user(FOLLOW_UPS[(number + i) % len(FOLLOW_UPS)])]
                for i, chat in enumerate(answered)
                if i % turns >= turn
            ]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def enough(texts: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of JSON until there are `CHARACTERS`."""
    total = 0
    for text in texts:
        line = json.dumps(text, ensure_ascii=False)
        yield line
        total += len(line)
        print(text["kind"], total, flush=True)
        if total >= CHARACTERS:
            return


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    llm = load_llm("smollm2-135m", device="cpu")
    told = ({"kind": "chat", "messages": chat} for chat in chats(llm, QUESTIONS, 3, 240, 40))
    wanted = chats(llm, ARTICLES, 1, 700, 150)
    written = ({"kind": "article", "text": chat[-1]["content"]} for chat in wanted)
    lines = [*enough(told), *enough(written)]
    SELF_WRITTEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes the chats and articles of the package with the default model, in 15 CPU minutes.

Usage, from the root of the checkout: ``python -m tools.self_written_texts``. The questions are
in ``self_written_texts.json``. The tokens are sampled, so another machine writes other text;
the file in the package is one run's.
"""

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch

from rap_env.models.files.loading import load_llm
from rap_env.models.live.calibration_text import SELF_WRITTEN
from rap_env.models.live.elastic import ElasticLLM

ASKED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CHARACTERS = 50_000
"""At least so many of each kind: more than ten thousand tokens of most tokenizers."""
BATCH = 16


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
    refused = any(phrase in kept.lower() for phrase in ASKED["unwanted"])
    return "" if refused or len(kept.split()) < least_words else kept.strip()


def chats(
    llm: ElasticLLM, kind: str, turns: int, new_tokens: int, least_words: int
) -> Iterator[list[dict[str, str]]]:
    """Chats of one question, then of two, up to `turns`, in batches without end.

    A chat ends without a word where an answer is not `sensible`.
    """
    tokenizer: Any = llm.tokenizer
    for number in count():
        numbers = range(BATCH * number, BATCH * (number + 1))
        running: list[list[dict[str, str]]] = [[] for _ in numbers]
        for turn in range(number % turns + 1):
            questions = ASKED["follow_ups" if turn else kind]
            for i, chat in zip(numbers, running, strict=False):
                topic = ASKED["topics"][i % len(ASKED["topics"])]
                question = questions[i % len(questions)].format(topic)
                chat.append({"role": "user", "content": question})
            inputs = tokenizer.apply_chat_template(
                running, add_generation_prompt=True, padding=True, return_tensors="pt",
                return_dict=True,
            )  # fmt: skip
            sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
            written = llm.generate(**inputs, **sampling, max_new_tokens=new_tokens)
            answers = written[:, inputs["input_ids"].shape[1] :]
            for chat, ids in zip(running, answers, strict=True):
                text = sensible(tokenizer.decode(ids, skip_special_tokens=True), least_words)
                chat.append({"role": "assistant", "content": text})
            running = [chat for chat in running if chat[-1]["content"]]
        yield from running


@click.command(help=__doc__)
def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    llm, lines = load_llm("smollm2-135m", device="cpu"), []
    for kind, *settings in (("chat", 3, 240, 40), ("article", 1, 700, 150)):
        total = 0
        for chat in chats(llm, kind, *settings):
            text = {"messages": chat} if kind == "chat" else {"text": chat[-1]["content"]}
            lines.append(json.dumps({"kind": kind, **text}, ensure_ascii=False))
            total += len(lines[-1])
            print(kind, total, flush=True)
            if total >= CHARACTERS:
                break
    SELF_WRITTEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

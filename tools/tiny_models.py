"""Trains the tiny models of the package: ``python -m tools.tiny_models [NAME ...]``.

``record.json`` has the recipe of each. Without names those without results are trained, so that a
stopped run continues. Each takes 10 to 60 seconds on one core, with no network. They are trained on
the chats and articles of the package, which its default model wrote, and on sentences, lists and
questions from templates. A fifth of the chats and articles, with other draws from the same
templates, is in ``held_out.txt``: text that no tiny model has seen. The record has the size of
each, its NLL on that text, and the time. The same machine writes the same weights again; another
one rounds otherwise.

The models of the zoo differ in family, shape, amount of training and mixture of texts, which were
drawn at random; sizes are multiples of 64, so that all levels exist. Their weights are rounded to
23 values a row, so that the package stays small.
"""

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import tokenizers
import torch
import transformers
from torch.nn import functional

from rap_env.artifacts import read_rows, save_artifact
from rap_env.models.files.loading import load_llm
from rap_env.models.files.sources import TINY_MODELS, ZOO
from rap_env.models.files.zoo import TINY, save_rounded
from rap_env.models.live.calibration_text import SELF_WRITTEN, TINY_TEXT
from rap_env.scoring.generated_tasks import GENERATED_TASKS
from rap_env.scoring.long_context_tasks import recall_text


@dataclass(frozen=True)
class Recipe:
    """The shape of a model, and how it is trained.

    Attributes:
        layers: Decoder layers.
        width: Width of the hidden states.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        ffn: Width of the feed-forward blocks.
        family: ``llama``, ``qwen2`` or ``gpt_neox``.
        head_size: Channels of a head.
        steps: Updates.
        rows: The text of each row of a batch: ``w`` written by the default model, ``t`` from
            templates.
        recalls: Texts with facts to recall among those from templates.
        seed: Seed of the first weights and of the batches.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    family: str = "llama"
    head_size: int = 16
    steps: int = 400
    rows: str = "wtwt"
    recalls: int = 400
    seed: int = 0


VOCABULARY, POSITIONS = 512, 256
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 4e-3, 30, 0.1
SEED = 0
HELD_OUT_EVERY = 5
"""Each fifth row of the chats and articles is held out."""
RECALLS, QUESTIONS = 400, 1_200
"""Texts with facts to recall, and sentences or lists of each kind of question, to train on."""
LEVEL_WINDOWS = 24


def written(held_out: bool) -> list[str]:
    """The chats and articles of the package as plain text, those held out or the others."""
    texts = []
    for number, row in enumerate(read_rows(SELF_WRITTEN)):
        if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out:
            said = (f"{m['role']}: {m['content']}" for m in row.get("messages", ()))
            texts.append("\n".join([row.get("text", ""), *said]).strip() + "\n\n")
    return texts


def templates(tokenizer: Any, seed: int, recalls: int, questions: int) -> list[str]:
    """Texts from templates, shuffled: a right answer follows each question."""
    texts = [
        document["context"] + " " + document["choices"][document["gold"]] + "\n\n"
        for task in GENERATED_TASKS.values()
        for document in task.documents(seed, questions)
    ]
    rng = random.Random(f"tiny {seed}")
    for _ in range(recalls):
        texts.append(f"{recall_text(tokenizer, rng.randrange(120, 240), rng)}\n\n")
    rng.shuffle(texts)
    return texts


def make_tokenizer() -> Any:
    """A byte-level BPE of the training text."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    questions = (task.documents(SEED + 1, 200) for task in GENERATED_TASKS.values())
    texts = [document["context"] for documents in questions for document in documents]
    bpe.train_from_iterator(
        written(held_out=False) + texts, VOCABULARY, show_progress=False, special_tokens=["<s>"]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>"
    )


def encoded(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids of texts in a row."""
    return torch.tensor(tokenizer("".join(texts), verbose=False)["input_ids"])


def batches(streams: Sequence[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Endless batches, (B, T): a window at a random place of the stream of each row."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        rows = []
        for stream in streams:
            start = int(torch.randint(len(stream) - POSITIONS, (), generator=rng))
            rows.append(stream[start : start + POSITIONS])
        yield torch.stack(rows)


def make_model(recipe: Recipe) -> Any:
    """A model with random weights."""
    torch.manual_seed(recipe.seed)
    own = {"num_key_value_heads": recipe.kv_heads, "head_dim": recipe.head_size}
    config = transformers.AutoConfig.for_model(
        recipe.family,
        vocab_size=VOCABULARY,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **({} if recipe.family == "gpt_neox" else own),
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean NLL of windows, (B, T), nats per token."""
    logits = model(ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: Any, streams: Sequence[torch.Tensor], steps: int, seed: int) -> None:
    """Train with AdamW on a row of each stream; the learning rate falls along a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    for step, ids in zip(range(steps), batches(streams, seed), strict=False):
        warm, done = (step + 1) / WARM_UP, step / steps
        factor = min(1.0, warm) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        optimizer.zero_grad(set_to_none=True)
        nll(model, ids).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def held_out_text(tokenizer: Any) -> str:
    """The text of `held_out.txt`: chats and articles with texts from templates between them."""
    ours = written(held_out=True)
    others = templates(tokenizer, SEED + 2, 5 * len(ours) // 2, 5 * len(ours))
    each = len(others) // len(ours)
    parts = [[text, *others[each * n : each * (n + 1)]] for n, text in enumerate(ours)]
    return "".join(text for part in parts for text in part)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(TINY_MODELS))
def main(names: Sequence[str]) -> None:
    """Train some models, or those that are missing, and write what the package holds of them."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer, path = make_tokenizer(), TINY / "record.json"
    text = held_out_text(tokenizer)
    (TINY / "held_out.txt").write_text(text, encoding="utf-8")
    written_ids = encoded(tokenizer, written(held_out=False))
    from_templates = {
        recalls: encoded(tokenizer, templates(tokenizer, SEED, recalls, QUESTIONS))
        for recalls in (0, RECALLS)
    }
    levels = torch.cat(
        [s[: LEVEL_WINDOWS * POSITIONS // 2] for s in (written_ids, from_templates[RECALLS])]
    )
    tokens = {"tokens": levels.view(-1, POSITIONS).tolist()}
    save_artifact(TINY_TEXT, "calibration text", 1, tokens)
    unseen = encoded(tokenizer, [text])
    windows = unseen[: len(unseen) // POSITIONS * POSITIONS].view(-1, POSITIONS)
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in names or [name for name in record if "fingerprint" not in record[name]]:
        began, recipe = time.process_time(), Recipe(**record[name]["recipe"])
        model, streams = make_model(recipe), {"w": written_ids, "t": from_templates[recipe.recalls]}
        train(model, [streams[row] for row in recipe.rows], recipe.steps, recipe.seed)
        cpu_s = time.process_time() - began
        if name in ZOO:
            save_rounded(model, name)
        else:
            model.to(torch.bfloat16).save_pretrained(TINY / name)
            tokenizer.save_pretrained(TINY / name)
        llm = load_llm(name, device="cpu", dtype="float32")
        with torch.no_grad():
            held_out = float(nll(llm.model, windows))
        record[name] |= {
            "parameters": sum(weight.numel() for weight in llm.model.parameters()),
            "held_out_nll": round(held_out, 4),
            "cpu_s": round(cpu_s, 1),
            "fingerprint": llm.fingerprint,
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

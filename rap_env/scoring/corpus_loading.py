"""Loads a text: written by the native model, made of facts, read from a file or a hub data set.

By default the native model generates the text, so no data set is needed and no benchmark can
leak into the search. For the default model, the generated texts of published results are in
the package.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rap_env.artifacts import digest, load_artifact, read_rows, save_artifact
from rap_env.errors import CorpusError
from rap_env.extras import require_extra
from rap_env.models.files.zoo import TINY
from rap_env.models.live.calibration_text import (
    TEMPERATURE,
    TOP_P,
    generate_windows,
    opening_tokens,
    start_token,
)
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.lean_llama import LeanLlama
from rap_env.models.progress import progress_bar
from rap_env.paths import cache_dir
from rap_env.scoring.corpus import ROLE_SPANS, TINY_HELD_OUT, Corpus, CorpusConfig
from rap_env.scoring.long_context_tasks import recall_text

log = logging.getLogger(__name__)

TEXTS = Path(__file__).parent / "texts"
"""Folder of the generated texts in the package, named after what determines them."""

WIKITEXT = TEXTS / "wikitext.json"
"""Token ids of the texts of pinned tasks that come from WikiText, by the hash of the tokens,
with licence and attribution."""

_FORMAT = 1
_MORE_TOKENS = 64  # generated and cut off: a text of facts may be a piece of filler shorter


def load_corpus(config: CorpusConfig, llm: ElasticLLM, *, progress: bool = True) -> Corpus:
    """Read the text that `config` describes, or let the native model generate it.

    Generated text is cached, so that every later run measures on the same tokens.

    Raises:
        CorpusError: The text is missing, malformed or too short, its tokens have another hash
            than ``config.sha256``, or the model has no start token to generate from.
        MissingDependencyError: A hub data set without the `datasets` package.
    """
    corpus = _packaged_text(config) or _corpus(config, llm, progress)
    if config.sha256 is not None and corpus.sha256 != config.sha256:
        raise CorpusError(
            f"{config.source} gives other tokens (SHA-256 {corpus.sha256[:12]}) than asked for "
            f"({config.sha256[:12]}): {dict(corpus.provenance)}. Give the text that they come "
            "from, or no sha256."
        )
    return corpus


def _packaged_text(config: CorpusConfig) -> Corpus | None:
    """The text of a pinned task from `WIKITEXT`, if it is the one that is asked for."""
    if config.sha256 is None:
        return None
    text = load_artifact(WIKITEXT, "token ids", _FORMAT)["texts"].get(config.sha256)
    if text is None or not config.source.endswith(text["source"]):
        return None
    tokens, _ = torch.tensor(text.pop("token_ids")), text.pop("tokenizer")
    return Corpus.of_tokens(tokens, **text)


def _corpus(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> Corpus:
    if config.source == "self":
        return _generated_text(config, llm, progress)
    if config.source == "recall":
        return _recall_text(config, llm)
    if config.source == "self+recall":
        windows = {"self": config.windows - config.windows // 2, "recall": config.windows // 2}
        return Corpus.concatenated(
            {
                name: _corpus(replace(config, source=name, windows=count), llm, progress)
                for name, count in windows.items()
                if count
            }
        )
    return _cut_text(config, llm)


def _generated_text(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> Corpus:
    """Text by the native model, from the package or the cache if it is there.

    The tokens are sampled, so that rounding decides some of them: the same settings give
    other text with another instruction set, number of threads or version of torch. The texts
    that published scores of the default model were measured on are therefore in the package.
    """
    described = {"model": llm.facts.fingerprint, "format": _FORMAT, **_generation_settings(config)}
    name = f"{digest(described)[:24]}.json"
    path, packaged = cache_dir() / "corpora" / name, TEXTS / name
    try:
        source = packaged if packaged.is_file() else path
        tokens = torch.tensor(load_artifact(source, "corpus", _FORMAT)["tokens"])
    except FileNotFoundError:
        tokens = _generate(config, llm, progress)
        save_artifact(path, "corpus", _FORMAT, {"made_by": described, "tokens": tokens.tolist()})
    return Corpus.of_tokens(tokens, **_generation_settings(config), writer=llm.name)


def _generation_settings(config: CorpusConfig) -> dict[str, Any]:
    names = ("source", "role", "seed", "windows", "window_tokens")
    settings = {name: value for name, value in asdict(config).items() if name in names}
    return {**settings, "temperature": TEMPERATURE, "top_p": TOP_P}


def _generate(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> torch.Tensor:
    """Generate one sequence per window with the native model, from its start token."""
    if start_token(llm) is None:
        raise CorpusError(
            f"{llm.name} has no start token to generate text from; give a text file as `source`."
        )
    if isinstance(llm.model, LeanLlama):
        raise CorpusError(
            f"{llm.name} is too small to write a text; give '{TINY_HELD_OUT}' or a text file as "
            "`source`."
        )
    # The role is part of the seed: each role gets another text under the same seed.
    seed = int(digest([config.role, config.seed])[:12], 16)
    total = config.windows * config.window_tokens
    desc = f"generating {config.role} text"
    with progress_bar(progress, total=total, unit="token", leave=False, desc=desc) as bar:
        return generate_windows(llm, config.windows, config.window_tokens, seed, bar.update)


def _recall_text(config: CorpusConfig, llm: ElasticLLM) -> Corpus:
    """Generated facts and questions about them: windows whose answers need the whole context."""
    opening = opening_tokens(_tokenizer_of(llm, config))
    room = config.window_tokens - len(opening)
    windows = []
    for number in range(config.windows):
        rng = random.Random(f"recall {config.role} {config.seed} {number}")
        text = recall_text(llm.tokenizer, room + _MORE_TOKENS, rng)
        ids = [] if text is None else llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < room:
            raise CorpusError(
                f"Two facts with questions do not fit into {config.window_tokens} tokens of "
                f"{llm.name}'s tokenizer; set longer windows for the source 'recall'."
            )
        windows.append([*opening, *ids[len(ids) - room :]])
    named = {"source": config.source, "role": config.role, "seed": config.seed}
    return Corpus.of_tokens(torch.tensor(windows), **named)


def _tokenizer_of(llm: ElasticLLM, config: CorpusConfig) -> Any:
    if llm.tokenizer is None:
        raise CorpusError(f"{llm.name} has no tokenizer to read {config.source} with.")
    return llm.tokenizer


def _cut_text(config: CorpusConfig, llm: ElasticLLM) -> Corpus:
    """Windows from the part of a file or data set that belongs to the role.

    If the tokenizer starts each text with special tokens, each window starts with them:
    Gemma's predictions without its start token, for example, are useless.
    """
    hub = config.source.startswith("hub:")
    text = _hub_text(config) if hub else _file_text(config)
    tokenizer = _tokenizer_of(llm, config)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_tokens(tokenizer)
    length = max(1, config.window_tokens - len(opening))
    low, high = (round(share * len(ids)) for share in ROLE_SPANS[config.role])
    available = (high - low) // length
    if available < config.windows:
        raise CorpusError(
            f"{config.source} has {len(ids)} tokens, of which the role {config.role!r} may use "
            f"{high - low}: enough for {available} windows of {config.window_tokens}, but "
            f"{config.windows} are needed. Give a longer text, or set fewer or shorter windows."
        )
    span = torch.tensor(ids[low : low + available * length])
    chosen = np.random.default_rng(config.seed).permutation(available)[: config.windows]
    tokens = span.view(available, length)[torch.from_numpy(np.sort(chosen))]
    before = torch.tensor(opening, dtype=tokens.dtype).expand(len(tokens), -1)
    tokens = torch.cat([before, tokens], dim=1)[:, : config.window_tokens]
    # The file and its folder: results contain no path of a machine.
    name = config.source if hub else "/".join(Path(config.source).parts[-2:])
    text_sha256 = hashlib.sha256(text.encode()).hexdigest()
    log.info(
        "%s: the role %r reads the part from %.0f %% to %.0f %% of its %d tokens.",
        name,
        config.role,
        *(100 * share for share in ROLE_SPANS[config.role]),
        len(ids),
    )
    return Corpus.of_tokens(
        tokens, source=name, role=config.role, seed=config.seed, text_sha256=text_sha256
    )


def _file_text(config: CorpusConfig) -> str:
    path = Path(config.source).expanduser()
    if config.source == TINY_HELD_OUT:
        path = TINY / "held_out.txt"
    if path.suffix == ".jsonl":
        rows = read_rows(path, tuple(config.field.split("+")))
        return _concatenated(_field_text(row, config.field) for row in rows)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"Cannot read the text {path}: {error}. Give 'self', 'recall', a UTF-8 text or "
            "JSON-lines file, or 'hub:ID'."
        ) from None


def _concatenated(documents: Iterable[str]) -> str:
    """Concatenate the distinct documents: data sets repeat a passage for each question on it.

    Otherwise two roles could read the same passage.
    """
    return "\n\n".join(dict.fromkeys(documents))


def _field_text(row: Mapping[str, Any], names: str) -> str:
    """The text of one document: one field, or several fields joined by spaces."""
    return " ".join(str(row[name]) for name in names.split("+"))


def _hub_text(config: CorpusConfig) -> str:
    require_extra("eval", "A hub data set as text")
    from datasets import load_dataset

    _, name, *subset = config.source.split(":")
    try:
        rows = load_dataset(name, *subset, split=config.split)
        return _concatenated(_field_text(row, config.field) for row in rows)
    except Exception as error:  # the hub's client has no common base class for its errors
        raise CorpusError(
            f"Cannot load the data set {name!r} ({config.split}, field {config.field!r}): "
            f"{error}. Check the name and the network, or give 'self' or a file."
        ) from error

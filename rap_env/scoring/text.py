"""Where the tokens of a text come from: the dense model's own writing, a file, or a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.blocks import BlockMask
from rap_env.errors import CorpusError, MissingDependencyError
from rap_env.llm.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.scoring.corpus import ROLE_SPANS, CorpusConfig

_FORMAT = 1
_TEMPERATURE, _TOP_P = 0.9, 0.95
_GENERATION_BATCH = 16


class Found(NamedTuple):
    """Token ids of shape (windows, window_tokens), and where they are from."""

    tokens: torch.Tensor
    origin: dict[str, Any]


def self_written(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> Found:
    """Text by the dense model, kept in the cache: every later run measures on the same tokens.

    Raises:
        CorpusError: The model has no start token to write from.
    """
    described = {"model": llm.facts.fingerprint, "format": _FORMAT, **_generation_settings(config)}
    path = cache_dir() / "corpora" / f"{digest(described)[:24]}.json"
    try:
        tokens = torch.tensor(load_artifact(path, "corpus", _FORMAT)["tokens"])
    except FileNotFoundError:
        tokens = _write_text(config, llm, progress)
        save_artifact(path, "corpus", _FORMAT, {"made_by": described, "tokens": tokens.tolist()})
    return Found(tokens, {**_generation_settings(config), "writer": llm.name})


def _generation_settings(config: CorpusConfig) -> dict[str, Any]:
    names = ("source", "role", "seed", "windows", "window_tokens")
    settings = {name: value for name, value in asdict(config).items() if name in names}
    return {**settings, "temperature": _TEMPERATURE, "top_p": _TOP_P}


def _write_text(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> torch.Tensor:
    """Let the dense model write, from its own start token, one sequence for each window."""
    start = llm.model.generation_config.bos_token_id
    start = llm.model.config.bos_token_id if start is None else start
    if start is None:
        raise CorpusError(
            f"{llm.name} has no start token to write text from; give a text file as `source`."
        )
    special = sorted({*getattr(llm.tokenizer, "all_special_ids", ()), start})
    # The role is part of the seed: roles write different texts under the same seed.
    seed = int(digest([config.role, config.seed])[:12], 16)
    sizes = [
        min(_GENERATION_BATCH, config.windows - i)
        for i in range(0, config.windows, _GENERATION_BATCH)
    ]
    bar = tqdm(
        total=config.windows * config.window_tokens,
        unit="token",
        leave=False,
        desc=f"the model writes {config.role} text",
        disable=None if progress else True,
    )
    devices = [llm.device] if llm.device.type == "cuda" else []
    parts = []
    with bar, torch.random.fork_rng(devices), llm.masked(BlockMask()):
        torch.manual_seed(seed)
        for size in sizes:
            ids = torch.full((size, 1), start, device=llm.device)
            written = llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                temperature=_TEMPERATURE,
                top_p=_TOP_P,
                suppress_tokens=special,
                min_new_tokens=config.window_tokens,
                max_new_tokens=config.window_tokens,
                pad_token_id=start,
            )
            parts.append(written[:, 1:].cpu())
            bar.update(size * config.window_tokens)
    return torch.cat(parts)


def cut_text(config: CorpusConfig, llm: ElasticLLM) -> Found:
    """Windows from the part of a file or data set that belongs to the role.

    Raises:
        CorpusError: The text is missing, malformed or too short.
        MissingDependencyError: A hub data set without the `datasets` package.
    """
    hub = config.source.startswith("hub:")
    text = _hub_text(config) if hub else _file_text(config)
    if llm.tokenizer is None:
        raise CorpusError(f"{llm.name} has no tokenizer to read {config.source} with.")
    ids = llm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    low, high = (round(share * len(ids)) for share in ROLE_SPANS[config.role])
    available = (high - low) // config.window_tokens
    if available < config.windows:
        raise CorpusError(
            f"{config.source} has {len(ids)} tokens, of which the role {config.role!r} may use "
            f"{high - low}: enough for {available} windows of {config.window_tokens}, but "
            f"{config.windows} were asked for. Give a longer text, or ask for fewer or shorter "
            "windows."
        )
    span = torch.tensor(ids[low : low + available * config.window_tokens])
    chosen = np.random.default_rng(config.seed).permutation(available)[: config.windows]
    tokens = span.view(available, config.window_tokens)[torch.from_numpy(np.sort(chosen))]
    # The file and its folder: no path of a machine goes into results.
    name = config.source if hub else "/".join(Path(config.source).parts[-2:])
    origin = {
        "source": name,
        "role": config.role,
        "seed": config.seed,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return Found(tokens, origin)


def _file_text(config: CorpusConfig) -> str:
    path = Path(config.source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"Cannot read the text {path}: {error}. Give 'self', a UTF-8 text or JSON-lines "
            "file, or 'hub:ID'."
        ) from None
    if path.suffix != ".jsonl":
        return text
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            documents.append(_field_text(json.loads(line), config.field))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise CorpusError(
                f"Line {number} of {path} is no JSON object with the field {config.field!r}; "
                "set `field` to the one that holds the text."
            ) from None
    return _joined(documents)


def _joined(documents: Iterable[str]) -> str:
    """Documents one after the other; one that is repeated is read once.

    Data sets of questions repeat a passage for each question. Roles are cut by position, so two
    of them could read the same passage.
    """
    return "\n\n".join(dict.fromkeys(documents))


def _field_text(row: Mapping[str, Any], names: str) -> str:
    """The text of one document: a field, or several one after the other."""
    return " ".join(str(row[name]) for name in names.split("+"))


def _hub_text(config: CorpusConfig) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingDependencyError("datasets", "A hub data set as text", "eval") from None
    _, name, *subset = config.source.split(":")
    try:
        rows = load_dataset(name, *subset, split=config.split)
        return _joined(_field_text(row, config.field) for row in rows)
    except Exception as error:  # the hub's client has no common base class for its errors
        raise CorpusError(
            f"Cannot load the data set {name!r} ({config.split}, field {config.field!r}): "
            f"{error}. Check the name and the network, or give 'self' or a file."
        ) from error

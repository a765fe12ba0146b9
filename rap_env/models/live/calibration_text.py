"""The text that a model's levels and costs are made with.

For the packaged model its levels' text is in the package as token ids. For all others the
text is a mixture of kinds in equal shares: chats and articles of the package, which the
default model wrote, and source files of the Python that runs. Windows of text that a
tokenizer cannot represent are dropped; the model writes as many itself. A user can give a
text file instead.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import load_artifact, read_rows, save_artifact
from rap_env.errors import CorpusError, UnsupportedModelError, counted
from rap_env.models.files.sources import TINY_MODELS
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import cache_dir
from rap_env.plan import Plan

log = logging.getLogger(__name__)

TEXTS = Path(__file__).parent / "texts"
"""Folder of the texts in the package that levels of packaged models are made with."""

TINY_TEXT = TEXTS / "tiny.json"
"""The text that the levels of all tiny models are made with."""

SELF_WRITTEN = TEXTS / "self_written.jsonl"
"""Chats and articles that the default model wrote, by a program in commit 9cb9fee4."""

PROSE = TEXTS / "prose.txt"
"""Articles that were written for this package."""

TEXT_KINDS = ("chat", "article", "code")
"""Kinds of text of a mixture, in the order of its windows."""

COST_KINDS = ("prose", "code", "chat")
"""Kinds of text that costs are computed on, those first on which models lose most. Plans lose
far less on what the default model wrote, which is easy to predict, than on other text: ``prose``
was written for this package, about places and people that do not exist, so that no model knows
it."""

SOURCE_FILES = (
    "calendar.py", "configparser.py", "csv.py", "fractions.py", "heapq.py", "json/decoder.py",
    "queue.py", "shlex.py", "statistics.py", "textwrap.py", "tokenize.py",
)  # fmt: skip
"""Files of Python's standard library that are read as code; measure no result on them."""

TEMPERATURE, TOP_P = 0.9, 0.95
"""How tokens are sampled."""

_BATCH = 16  # sequences at a time

_LEVEL_WINDOWS, _LEVEL_TOKENS = 48, 256
_SEED = 0
_TEXT_KIND, _TEXT_FORMAT = "calibration text", 1
_DATE = "01 Jan 2025"
"""The date of all chats: some templates write today's, but the same model gets the same tokens."""


def calibration_windows(llm: ElasticLLM) -> torch.Tensor:
    """The text that a model's levels are made with by default, (windows, tokens).

    Raises:
        UnsupportedModelError: As for `mixed_windows`.
    """
    if (packaged := packaged_windows(llm)) is not None:
        return packaged
    return mixed_windows(llm, *level_windows(llm))


def level_windows(llm: ElasticLLM) -> tuple[int, int]:
    """Windows of the text that levels are made with, and the tokens of each."""
    return _LEVEL_WINDOWS, min(_LEVEL_TOKENS, llm.adapter.max_positions - 1)


def packaged_windows(llm: ElasticLLM) -> torch.Tensor | None:
    """The text in the package that a packaged model's levels are made with, if it is one."""
    tiny = llm.name in TINY_MODELS
    path = TINY_TEXT if tiny else TEXTS / f"{llm.fingerprint[:16]}.json"
    if not path.is_file():
        return None
    return torch.tensor(load_artifact(path, _TEXT_KIND, _TEXT_FORMAT)["tokens"])


def mixed_windows(
    llm: ElasticLLM, windows: int, window_tokens: int, kinds: Sequence[str] = TEXT_KINDS
) -> torch.Tensor:
    """Text of several kinds, (windows, window_tokens); kinds take turns.

    The text is encoded without special tokens and then cut; a window begins with the tokens
    that the tokenizer puts before each text, if there are any (`opening_tokens`). Windows of
    a kind are spread evenly over its text. A window with unknown tokens, or whose decoded
    text has replacement characters, is dropped; what is missing is written by the model
    itself. The same model gets the same tokens from the same Python.

    Args:
        llm: The model.
        windows: Number of windows.
        window_tokens: Tokens of each, fewer than the model's longest sequence.
        kinds: The kinds.

    Raises:
        UnsupportedModelError: The tokenizer encodes text as no tokens, or the model must write
            windows and has no start token.
    """
    rows: list[torch.Tensor | None] = [None] * windows
    for number, kind in enumerate(kinds if llm.tokenizer is not None else ()):
        places = range(number, windows, len(kinds))
        readable = _cut(llm.tokenizer, _kind_ids(llm, kind), window_tokens, _readable)
        for place, row in zip(places, _spread(readable, len(places)), strict=False):
            rows[place] = row
    missing = sum(row is None for row in rows)
    written = iter(_written(llm, missing, window_tokens) if missing else ())
    return torch.stack([next(written) if row is None else row for row in rows])


def user_windows(
    llm: ElasticLLM, path: str | Path, windows: int, window_tokens: int, *, fewest: int = 0
) -> torch.Tensor:
    """A user's text, (windows, window_tokens), spread evenly over it.

    It is encoded and cut as in `mixed_windows`, but no window is dropped.

    Args:
        llm: The model.
        path: UTF-8 text, or JSON lines (``.jsonl``, ``.ndjson``, ``.json``) of chats
            (``{"messages": [{"role": ..., "content": ...}]}``), prompts (``{"prompt": ...}``)
            or texts (``{"text": ...}``).
        windows: Number of windows.
        window_tokens: Tokens of each.
        fewest: Windows that are enough where the text has no more; 0 for all of them.

    Raises:
        CorpusError: The file cannot be read as UTF-8 text, a row has none of these fields, or
            the text is too short.
        UnsupportedModelError: The model has no tokenizer, or one that encodes text as no
            tokens.
    """
    path = Path(path).expanduser()
    if llm.tokenizer is None:
        raise UnsupportedModelError(f"{llm.name} has no tokenizer to read {path} with.")
    ids = _encoded(llm, _user_texts(llm.tokenizer, path))
    cut = _cut(llm.tokenizer, ids, window_tokens)
    if len(cut) < (needed := fewest or windows):
        raise CorpusError(
            f"{path} has {counted(len(ids), 'token')} of {llm.name}'s tokenizer, but "
            f"{needed * window_tokens:,} are needed ({needed} windows of {window_tokens}); "
            "give a longer text."
        )
    return torch.stack(_spread(cut, windows))


def _cut(
    tokenizer: Any,
    ids: list[int],
    window_tokens: int,
    usable: Callable[[Any, list[int]], bool] = lambda tokenizer, part: True,
) -> list[torch.Tensor]:
    """The usable windows of a text, each with the opening tokens, without the text's rest."""
    opening = opening_tokens(tokenizer)
    size = max(1, window_tokens - len(opening))
    parts = (ids[at : at + size] for at in range(0, len(ids) - size + 1, size))
    return [torch.tensor([*opening, *part]) for part in parts if usable(tokenizer, part)]


def _spread(rows: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """So many rows at regular distances; all if there are not as many."""
    count = min(count, len(rows))
    return [rows[(2 * number + 1) * len(rows) // (2 * count)] for number in range(count)]


def _readable(tokenizer: Any, ids: list[int]) -> bool:
    """Whether ids have no unknown tokens and are text when they are decoded."""
    text = "" if tokenizer.unk_token_id in ids else tokenizer.decode(ids)
    return bool(text) and "\N{REPLACEMENT CHARACTER}" not in text


def _kind_ids(llm: ElasticLLM, kind: str) -> list[int]:
    """Token ids of all text of a kind."""
    if kind == "code":
        texts = list(_source_files())
    elif kind == "prose":
        texts = [PROSE.read_text(encoding="utf-8")]
    else:
        rows = (row for row in read_rows(SELF_WRITTEN) if row["kind"] == kind)
        texts = [_row_text(llm.tokenizer, row) for row in rows]
    return _encoded(llm, texts)


def _source_files() -> Iterator[str]:
    for name in SOURCE_FILES:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # the library may be an archive
            yield (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")


def _user_texts(tokenizer: Any, path: Path) -> list[str]:
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"Cannot read {path} as UTF-8 text: {error}.") from None
    texts = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            texts.append(_row_text(tokenizer, row))
        except (KeyError, TypeError):
            raise CorpusError(
                f"Row {number} of {path} has no text; it must have 'messages' (a list of "
                "objects with the texts 'role' and 'content'), 'prompt' or 'text'."
            ) from None
    return texts


def _row_text(tokenizer: Any, row: dict[str, Any]) -> str:
    """The text of a chat, a prompt or a text, with a break after it.

    Raises:
        KeyError: It is none of them.
        TypeError: It is one of them, with another type.
    """
    if "messages" not in row:
        text: str = row["prompt" if "prompt" in row else "text"]
        return text + "\n\n"
    lines = [message["role"] + ": " + message["content"] for message in row["messages"]]
    with contextlib.suppress(Exception):  # no template, or one that rejects these messages
        # A call for today's date becomes one of a text's method, which returns the text.
        template = tokenizer.get_chat_template().replace("strftime_now(", f"{_DATE!r}.format(")
        return str(
            tokenizer.apply_chat_template(row["messages"], chat_template=template, tokenize=False)
        )
    return "\n".join([*lines, "\n"])


def _encoded(llm: ElasticLLM, texts: Iterable[str]) -> list[int]:
    """Token ids of texts without special tokens, which chat templates write."""
    added = llm.tokenizer.added_tokens_decoder.values()
    special = {*llm.tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
    pattern = re.compile("|".join(map(re.escape, special)))
    ids: list[int] = []
    for text in texts:
        plain = pattern.sub("", text)
        ids += llm.tokenizer.encode(plain, add_special_tokens=False, verbose=False)
        if plain.strip() and not ids:
            raise UnsupportedModelError(
                f"The tokenizer of {llm.name} encodes text as no tokens ({plain[:20]!r}); use "
                "the tokenizer that belongs to the model."
            )
    return ids


def _written(llm: ElasticLLM, windows: int, window_tokens: int) -> torch.Tensor:
    """Text that the model writes once, (windows, window_tokens); then it is in the cache."""
    name = f"{llm.fingerprint[:16]}-{windows}x{window_tokens}-text.json"
    path = cache_dir() / "calibrated" / name
    with contextlib.suppress(FileNotFoundError):
        return torch.tensor(load_artifact(path, _TEXT_KIND, _TEXT_FORMAT)["tokens"])
    log.warning(
        "%s writes %s of %d tokens itself, because its tokenizer cannot represent other text",
        llm.name,
        counted(windows, "window"),
        window_tokens,
    )
    tokens = generate_windows(llm, windows, window_tokens, _SEED)
    save_artifact(path, _TEXT_KIND, _TEXT_FORMAT, {"tokens": tokens.tolist()})
    return tokens


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before each text, such as a start token; often none.

    A window begins with them: Gemma's predictions without its start token are useless.
    """
    plain, whole = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
        for special in (False, True)
    )
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:at] for at in starts if whole[at : at + len(plain)] == plain), [])


def start_token(llm: ElasticLLM) -> int | None:
    """The token that a model's text starts with, if it has one."""
    start: int | None = llm.model.generation_config.bos_token_id
    other: int | None = llm.model.config.bos_token_id
    return other if start is None else start


def generate_windows(
    llm: ElasticLLM,
    windows: int,
    window_tokens: int,
    seed: int,
    note: Callable[[int], object] = lambda tokens: None,
) -> torch.Tensor:
    """Windows of text that the native model writes, (windows, window_tokens); each is a sequence.

    They follow the model's start token, which is not part of them.

    Args:
        llm: The model.
        windows: Number of windows.
        window_tokens: Tokens of each.
        seed: Seed of the sampling; the process's own random numbers are not touched.
        note: Called with the number of new tokens, from time to time.

    Raises:
        UnsupportedModelError: The model has no start token.
    """
    start = start_token(llm)
    if start is None:
        raise UnsupportedModelError(
            f"{llm.name} has no start token (bos_token_id) to write text from."
        )
    special = sorted({*getattr(llm.tokenizer, "all_special_ids", ()), start})
    devices = [llm.device] if llm.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices), llm.applied(Plan()):
        torch.manual_seed(seed)
        for first in range(0, windows, _BATCH):
            size = min(_BATCH, windows - first)
            ids = torch.full((size, 1), start, device=llm.device)
            written = llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                suppress_tokens=special,
                min_new_tokens=window_tokens,
                max_new_tokens=window_tokens,
                pad_token_id=start,
            )
            parts.append(written[:, 1:].cpu())
            note(size * window_tokens)
    return torch.cat(parts)

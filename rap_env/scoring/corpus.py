"""Text to measure on, cut into windows of tokens, with its provenance.

By default the dense model writes the text itself, so no data set is needed and no benchmark
can leak into the search. A file or a hub data set is divided among the roles (calibration,
selection, report) by position, so that no role ever sees another's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import CorpusError, MissingDependencyError, UnknownNameError
from rap_env.paths import cache_dir

if TYPE_CHECKING:  # a `CorpusConfig` alone loads no torch
    import torch

    from rap_env.llm.elastic import ElasticLLM

log = logging.getLogger(__name__)

ROLE_SPANS = {"calibration": (0.0, 0.4), "selection": (0.4, 0.6), "report": (0.6, 1.0)}
"""Which part of a file or data set each role reads, as fractions of its tokens."""

OVERLAP_TOKENS = 32
"""Two texts overlap if they share a run of so many tokens."""

_FORMAT = 1
_COUNTS = ("windows", "window_tokens", "tokens", "sha256")
_TEMPERATURE, _TOP_P = 0.9, 0.95
_GENERATION_BATCH = 16


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, how much of it, and for what.

    Attributes:
        source: ``"self"`` (written by the dense model), the path of a text file (``.txt`` or
            any other ending) or of a JSON-lines file (``.jsonl``), or ``"hub:ID"`` /
            ``"hub:ID:SUBSET"`` for a data set of the hub.
        windows: How many windows.
        window_tokens: Tokens of one window.
        seed: Chooses the windows, or seeds the model's writing.
        field: The text field of JSON lines and data sets; several are joined by ``+``, as in
            ``"question+answer"``.
        split: The split of a hub data set.
        role: ``"calibration"``, ``"selection"`` or ``"report"``; roles never share text.

    Raises:
        CorpusError: A number is out of range.
        UnknownNameError: An unknown role.
    """

    source: str = "self"
    windows: int = 4
    window_tokens: int = 128
    seed: int = 0
    field: str = "text"
    split: str = "train"
    role: str = "calibration"

    def __post_init__(self) -> None:
        if self.role not in ROLE_SPANS:
            raise UnknownNameError("corpus role", self.role, ROLE_SPANS)
        for name, least in (("windows", 1), ("window_tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CorpusError(f"{name} must be a whole number >= {least}, not {value!r}.")

    @classmethod
    def of(cls, value: CorpusConfig | dict[str, Any] | None) -> CorpusConfig:
        """The config itself, one made from a plain dict, or the default.

        Raises:
            UnknownNameError: The dict has a key that is no setting.
        """
        if isinstance(value, CorpusConfig):
            return value
        known = {f.name for f in fields(cls)}
        for key in value or {}:
            if key not in known:
                raise UnknownNameError("corpus setting", key, known)
        return cls(**(value or {}))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Windows of tokens.

    Attributes:
        tokens: Token ids, int64, shape (windows, window_tokens).
        provenance: Where they came from: source, role, seed, counts and hash.
    """

    tokens: torch.Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, tokens: torch.Tensor, **origin: Any) -> Corpus:
        """A corpus from token ids of shape (windows, window_tokens).

        Raises:
            CorpusError: It is no whole-number tensor of two dimensions with at least one window.
        """
        if tokens.ndim != 2 or not len(tokens) or tokens.is_floating_point():
            raise CorpusError(
                "Tokens must be whole numbers of shape (windows, window_tokens) with at least "
                f"one window, not {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        tokens = tokens.detach().long().cpu().contiguous()
        counts = {
            "windows": tokens.shape[0],
            "window_tokens": tokens.shape[1],
            "tokens": tokens.numel(),
            "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        }
        return cls(tokens, {"source": "tokens", **origin, **counts})

    @classmethod
    def joined(cls, parts: Mapping[str, Corpus]) -> Corpus:
        """Several texts as one, one after the other.

        Args:
            parts: By name; all of the same window length.

        Raises:
            CorpusError: The windows differ in length, or there is no text.
        """
        import torch

        lengths = {name: part.tokens.shape[1] for name, part in parts.items()}
        if len(set(lengths.values())) != 1:
            raise CorpusError(
                f"Texts are joined where their windows have one length, but these have {lengths}; "
                "give each the same window_tokens."
            )
        described = {name: part.provenance for name, part in parts.items()}
        tokens = torch.cat([part.tokens for part in parts.values()])
        return cls.of_tokens(tokens, source="+".join(parts), parts=described)

    def spread(self, windows: int) -> Corpus:
        """So many windows, taken from all over the text at regular distances.

        Raises:
            CorpusError: There are not so many.
        """
        have = len(self.tokens)
        if not 1 <= windows <= have:
            raise CorpusError(
                f"From 1 to {have} windows can be taken of this text, not {windows}; give more."
            )
        chosen = [number * have // windows for number in range(windows)]
        kept = {k: v for k, v in self.provenance.items() if k not in _COUNTS}
        return Corpus.of_tokens(self.tokens[chosen], **kept, spread_over=have)

    @property
    def sha256(self) -> str:
        """Hash of the token ids, in hex."""
        return str(self.provenance["sha256"])


def load_corpus(config: CorpusConfig, llm: ElasticLLM, *, progress: bool = True) -> Corpus:
    """Read, or let the dense model write, the text that `config` describes.

    Self-written text is kept in the cache, so that every later run measures on the same tokens.

    Raises:
        CorpusError: The text is missing, empty or too short.
        MissingDependencyError: A hub data set without the `datasets` package.
    """
    if config.source != "self":
        return _cut(config, llm)
    import torch

    described = {"model": llm.facts.fingerprint, "format": _FORMAT, **_generation_settings(config)}
    path = cache_dir() / "corpora" / f"{digest(described)[:24]}.json"
    try:
        tokens = torch.tensor(load_artifact(path, "corpus", _FORMAT)["tokens"])
    except FileNotFoundError:
        tokens = _write_text(config, llm, progress)
        save_artifact(path, "corpus", _FORMAT, {"made_by": described, "tokens": tokens.tolist()})
    return Corpus.of_tokens(tokens, **_generation_settings(config), writer=llm.name)


def ensure_disjoint(first: Corpus, second: Corpus) -> None:
    """Refuse two texts that share a run of `OVERLAP_TOKENS` tokens.

    Raises:
        CorpusError: They do.
    """
    seen = set(_runs(first))
    for number, run in enumerate(_runs(second)):
        if run in seen:
            raise CorpusError(
                f"The {first.provenance.get('role', 'first')} and the "
                f"{second.provenance.get('role', 'second')} text share {len(run)} tokens in a row "
                f"(run {number}); results would be measured on text that was searched on. Choose "
                "another source, seed or role for one of them."
            )


def _runs(corpus: Corpus) -> Iterator[tuple[int, ...]]:
    for window in corpus.tokens.tolist():
        size = min(OVERLAP_TOKENS, len(window))
        yield from (tuple(window[i : i + size]) for i in range(len(window) - size + 1))


def _generation_settings(config: CorpusConfig) -> dict[str, Any]:
    names = ("source", "role", "seed", "windows", "window_tokens")
    settings = {name: value for name, value in asdict(config).items() if name in names}
    return {**settings, "temperature": _TEMPERATURE, "top_p": _TOP_P}


def _write_text(config: CorpusConfig, llm: ElasticLLM, progress: bool) -> torch.Tensor:
    """Let the dense model write, from its own start token, one sequence for each window."""
    import torch

    from rap_env.blocks import BlockMask

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


def _cut(config: CorpusConfig, llm: ElasticLLM) -> Corpus:
    """Tokenise a file or data set and choose windows from its role's part."""
    import torch

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
    return Corpus.of_tokens(
        tokens,
        source=name,
        role=config.role,
        seed=config.seed,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


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
    return "\n\n".join(documents)


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
        return "\n\n".join(_field_text(row, config.field) for row in rows)
    except Exception as error:  # the hub's client has no common base class for its errors
        raise CorpusError(
            f"Cannot load the data set {name!r} ({config.split}, field {config.field!r}): "
            f"{error}. Check the name and the network, or give 'self' or a file."
        ) from error


__all__ = ["Corpus", "CorpusConfig", "ensure_disjoint", "load_corpus"]

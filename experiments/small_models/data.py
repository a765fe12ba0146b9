"""Training data of a small language model: its tokenizer, and windows of tokens.

Only the calibration part of each file is used, as in searches for masks: neither the model nor its
tokenizer sees the parts that masks are selected on or reported on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from rap_env.errors import CorpusError
from rap_env.models.files.loading import shared_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import Corpus, CorpusConfig, ensure_disjoint
from rap_env.scoring.corpus_loading import load_corpus

if TYPE_CHECKING:
    from collections.abc import Iterable

BOS, EOS = "<s>", "</s>"
_CHARACTERS_PER_TOKEN = 2  # a lower bound of the average
_MARGIN = 8  # the last eighth is left out
_WRITTEN = TextConfig(source="self", windows=512, window_tokens=128, seed=1)


@dataclass(frozen=True)
class TrainingText:
    """Text by name, in tokens of the small model.

    Attributes:
        held_out: Text of the same sources that the finished model is measured on.
    """

    fit: Mapping[str, Corpus]
    held_out: Mapping[str, Corpus]

    @property
    def joined(self) -> Corpus:
        """All training text, shape (windows, window_tokens)."""
        return Corpus.joined(self.fit)


class _Characters:
    """A tokenizer of single characters, which cuts text before the real tokenizer exists."""

    name = "the character tokenizer"

    @property
    def tokenizer(self) -> _Characters:
        return self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class TextSource:
    """Reads the texts: first as characters, then, with a tokenizer, as windows of tokens."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.texts = config.small_models.texts or {"self": _WRITTEN}

    def characters(self) -> list[str]:
        """Return the training text of the tokenizer, one string per text."""
        return [self._characters(text) for text in self.texts.values()]

    def tokens(self, llm: ElasticLLM) -> TrainingText:
        """Return the text that the model is trained and measured on.

        Args:
            llm: The small model, trained or not; only its tokenizer is used.

        Raises:
            CorpusError: A text is too short, windows differ in length, or training and held-out
                text overlap.
        """
        windows = self._config.small_models.held_out_windows
        part = {name: replace(text, windows=windows) for name, text in self.texts.items()}
        found = TrainingText(
            {name: self._tokens(text, "calibration", llm) for name, text in self.texts.items()},
            {name: self._tokens(text, "selection", llm) for name, text in part.items()},
        )
        ensure_disjoint(Corpus.joined(found.held_out), found.joined)
        return found

    def _characters(self, text: TextConfig) -> str:
        if text.source == "self":
            return self._written(text, "calibration")
        cut = replace(text, window_tokens=_CHARACTERS_PER_TOKEN * text.window_tokens)
        settings = CorpusConfig(**asdict(cut), role="calibration")
        corpus = load_corpus(settings, cast("ElasticLLM", _Characters()))
        # Parts are cut by tokens, so their borders may lie slightly before those by characters.
        kept = corpus.tokens[: len(corpus.tokens) - len(corpus.tokens) // _MARGIN]
        return "".join(map(chr, kept.flatten().tolist()))

    def _tokens(self, text: TextConfig, role: str, llm: ElasticLLM) -> Corpus:
        if text.source != "self":
            return load_corpus(CorpusConfig(**asdict(text), role=role), llm)
        ids = llm.tokenizer(self._written(text, role), add_special_tokens=False, verbose=False)
        tokens = torch.tensor(ids["input_ids"])
        available = len(tokens) // text.window_tokens
        if not available:
            raise CorpusError(
                f"The text written by {self._config.small_models.writer} has {len(tokens)} tokens, "
                f"too few for a window of {text.window_tokens}; increase its windows."
            )
        windows = tokens[: available * text.window_tokens].view(available, -1)
        origin = {"writer": self._config.small_models.writer, "seed": text.seed, "role": role}
        return Corpus.of_tokens(windows, **{**origin, "source": "self"})

    def _written(self, text: TextConfig, role: str) -> str:
        """Return text written by another language model; it is cached."""
        model = self._config.model
        writer = shared_llm(
            self._config.small_models.writer, device=model.device, dtype=model.dtype, weights="bf16"
        )
        settings = CorpusConfig(**asdict(text), role=role)
        corpus = load_corpus(settings, writer, progress=self._config.progress)
        return "\n\n".join(writer.tokenizer.batch_decode(corpus.tokens.tolist()))


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_positions: int) -> Any:
    """Train a byte-level BPE tokenizer; it reproduces any text exactly.

    Args:
        texts: Training text.
        vocab_size: Maximum number of entries; little text gives fewer.
        max_positions: Longest sequence of the model, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )

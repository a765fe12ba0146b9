"""``python -m experiments.studies.small_models``: train a small model from scratch in minutes.

With 6 layers it has 12 blocks and 4,096 masks, few enough to evaluate all of them. There are two
families: one whose blocks cost the same, and one whose blocks do not. The model is saved as an
ordinary folder. Only the calibration part of each text is used, as in searches for masks: neither
the model nor its tokenizer sees the parts that masks are selected on or reported on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.studies import SmallModelConfig
from experiments.contexts import load_texts
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.errors import ExperimentError
from experiments.study.run_folder import RunFolder
from rap_env.models.device import choose_device, choose_dtype
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import made_once, manifest_source
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.progress import progress_bar, transformers_bars
from rap_env.scoring.corpus import Corpus, CorpusConfig, ensure_disjoint
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

BOS, EOS = "<s>", "</s>"
EXPERTS_PER_TOKEN = 2

_CHARACTERS_PER_TOKEN = 2  # a lower bound of the average
_MARGIN = 8  # the last eighth is left out
_BALANCE = 0.01  # weight of the auxiliary loss that balances the experts
_LOGGED_STEPS = 100
_CLIP_NORM = 1.0
_FINAL_RATE = 0.05  # learning rate at the end, as a share
_WARMUP_SHARE = 0.05  # of all updates
_WEIGHT_DECAY = 0.1


def train_small_model(config: Config, folder: Path) -> Path:
    """Train a small model, unless it exists.

    Returns:
        The model's folder, which can be used as any model.

    Raises:
        RapError: A setting is invalid, a text is missing or too short, or the folder holds
            something else.
    """
    if not config.small_models.texts:
        raise ExperimentError(
            "small_models.texts has no text to train on; name files, or give "
            "experiment=small_uniform or small_unequal."
        )
    run, started = RunFolder(folder), time.monotonic()
    path = Path(config.small_models.path) if config.small_models.path else folder / "model"
    _check_place(path, _settings(config))
    run.start(config)
    made_once(path, partial(_make, config), f"Training {path}")
    record = manifest_source(path)
    run.finish(started, **record)
    nll = ", ".join(f"{name} {value:.3f}" for name, value in record["held_out_nll"].items())
    say(
        f"{record['parameters'] / 1e6:.2f} million weights, {record['steps']} steps in "
        f"{record['training_s']:.0f} s; held-out NLL in nats per token: {nll}."
    )
    say(f"The model is in {path}; use it as model.name={path}")
    return path


def _settings(config: Config) -> dict[str, Any]:
    """Everything that a model depends on, except the content of its text."""
    settings = asdict(config.small_models)
    del settings["path"]
    return {**settings, "seed": config.seed, "dtype": config.model.dtype}


def _check_place(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise an error if the folder holds anything but the model of these settings."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        made_with = manifest_source(path).get("settings", {})
    except (FileNotFoundError, NotADirectoryError):
        raise ExperimentError(
            f"{path} holds something else than a small model; choose another small_models.path."
        ) from None
    if changed := sorted(name for name in settings if made_with.get(name) != settings[name]):
        raise ExperimentError(
            f"{path} holds a model with another {', '.join(changed)}; choose another "
            "small_models.path, or delete the folder to train it again."
        )


def _make(config: Config, work: Path) -> dict[str, Any]:
    """Train a model and save it; return settings, text and results for the folder's manifest."""
    settings = config.small_models
    characters = map(_characters, settings.texts.values())
    tokenizer = train_tokenizer(characters, settings.vocab_size, settings.max_positions)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    model = untrained(settings, tokenizer, config.seed).to(device)
    llm = ElasticLLM(model, tokenizer, name=settings.family)
    fewer = {n: replace(t, windows=settings.held_out_windows) for n, t in settings.texts.items()}
    held_out = load_texts(fewer, "selection", llm)
    text = Corpus.joined(load_texts(settings.texts, "calibration", llm))
    ensure_disjoint(Corpus.joined(held_out), text)
    log.info(
        "Training %.1f million weights on %d tokens for %.1f epochs in %s on %s.",
        model.num_parameters() / 1e6, text.tokens.numel(),
        settings.steps * settings.batch_windows / len(text.tokens), dtype, device,
    )  # fmt: skip
    trainer, started = Trainer(model, text, settings, config.seed, dtype), time.perf_counter()
    losses = trainer.train(progress=config.progress)
    with transformers_bars(shown=False):
        model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    saved = load_llm(work, device=config.model.device, dtype=config.model.dtype, weights="bf16")
    return {
        "settings": _settings(config),
        "text_sha256": text.sha256,
        "parameters": model.num_parameters(),
        "steps": len(losses),
        "training_s": time.perf_counter() - started,
        "held_out_nll": {n: MaskScorer(saved, t).dense_nll for n, t in held_out.items()},
    }


class _Characters:
    """A tokenizer of single characters, which cuts text before the real tokenizer exists."""

    name = "the character tokenizer"

    @property
    def tokenizer(self) -> _Characters:
        return self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def _characters(text: TextConfig) -> str:
    """The part of a text that the tokenizer is trained on."""
    cut = replace(text, window_tokens=_CHARACTERS_PER_TOKEN * text.window_tokens)
    settings = CorpusConfig(**asdict(cut), role="calibration")
    corpus = load_corpus(settings, cast("ElasticLLM", _Characters()))
    # Parts are cut by tokens, so their borders may lie slightly before those by characters.
    kept = corpus.tokens[: len(corpus.tokens) - len(corpus.tokens) // _MARGIN]
    return "".join(map(chr, kept.flatten().tolist()))


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


def untrained(settings: SmallModelConfig, tokenizer: Any, seed: int) -> Any:
    """Build a causal language model with random weights in float32."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(_architecture(settings, tokenizer), dtype=torch.float32)


def _architecture(settings: SmallModelConfig, tokenizer: Any) -> Any:
    """Llama, whose blocks of a kind cost the same, or Qwen2-MoE, whose blocks do not.

    In the latter every other attn block has a sliding window, and pairs of layers alternate
    experts. With at least four layers, each of the four combinations of cheap and expensive blocks
    occurs.
    """
    from transformers import LlamaConfig, Qwen2MoeConfig

    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.ffn_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": settings.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.family == "uniform":
        return LlamaConfig(**shared)
    layers = range(settings.layers)
    return Qwen2MoeConfig(
        **shared,
        use_sliding_window=True,
        sliding_window=settings.sliding_window_tokens,
        layer_types=["full_attention" if n % 2 else "sliding_attention" for n in layers],
        mlp_only_layers=[n for n in layers if n % 4 in (0, 3)],
        num_experts=settings.experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        moe_intermediate_size=settings.expert_size,
        shared_expert_intermediate_size=settings.expert_size,
        router_aux_loss_coef=_BALANCE,
    )


class Trainer:
    """Trains a causal language model in float32: AdamW, cosine decay with warmup.

    Args:
        model: The model; it is trained in place.
        text: The training text.
        settings: Steps, batch size and learning rate.
        seed: Seed of the order of the text.
        dtype: Type of matrix products, ``torch.bfloat16`` (autocast) or ``torch.float32``.
    """

    def __init__(
        self, model: Any, text: Corpus, settings: SmallModelConfig, seed: int, dtype: torch.dtype
    ) -> None:
        self._model, self._tokens, self._settings, self._seed = model, text.tokens, settings, seed
        self._half = dtype == torch.bfloat16
        grouped: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for parameter in model.parameters():
            grouped[parameter.ndim > 1].append(parameter)  # no weight decay for norms and biases
        self._adam = torch.optim.AdamW(
            [
                {"params": grouped[True], "weight_decay": _WEIGHT_DECAY},
                {"params": grouped[False], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )

    def train(self, *, progress: bool) -> list[float]:
        """Train; return the loss of each update in nats per token (with the balance loss)."""
        steps, losses = range(self._settings.steps), []
        desc = f"train the {self._settings.family} model"
        self._model.train()
        for step in progress_bar(progress, steps, desc=desc, unit="step"):
            losses.append(self._update(step))
            if not len(losses) % _LOGGED_STEPS:
                recent = np.mean(losses[-_LOGGED_STEPS:])
                log.info("Step %d of %d: loss %.3f.", len(losses), len(steps), recent)
        self._model.eval()
        return losses

    def _update(self, step: int) -> float:
        ids = self._batch(step).to(self._model.device)
        routed = {"output_router_logits": True} if self._settings.family == "unequal" else {}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._half):
            loss = self._model(input_ids=ids, labels=ids, use_cache=False, **routed).loss
        self._adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._rate(step)
        self._adam.step()
        return float(loss.detach())

    def _rate(self, step: int) -> float:
        """Learning rate of an update; the first update has step 0."""
        steps = self._settings.steps
        warmup = min(1.0, (step + 1) / max(1.0, _WARMUP_SHARE * steps))
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return self._settings.learning_rate * warmup * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _batch(self, step: int) -> torch.Tensor:
        """Windows of an update; each epoch visits all windows in a new random order."""
        count, size = len(self._tokens), self._settings.batch_windows
        chosen = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, count)
            order = np.random.default_rng([self._seed, epoch]).permutation(count)
            chosen.append(order[at])
        ids = self._tokens[torch.tensor(chosen)]
        # Scores use windows without a start token, but generation begins with one.
        start = torch.full_like(ids[:, :1], self._model.config.bos_token_id)
        ids[::2] = torch.cat([start, ids[:, :-1]], dim=1)[::2]
        return ids


if __name__ == "__main__":
    launch("small_models", train_small_model)

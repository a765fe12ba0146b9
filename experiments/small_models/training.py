"""Build and train a small language model: AdamW, cosine decay with warmup, and checkpoints.

There are two families: one whose blocks cost the same, and one whose blocks do not.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.config.studies import SmallModelConfig
from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError
from rap_env.models.progress import progress_bar
from rap_env.scoring.corpus import Corpus

log = logging.getLogger(__name__)

EXPERTS_PER_TOKEN = 2
_BALANCE = 0.01  # weight of the auxiliary loss that balances the experts

SAVE_EVERY = 100
"""Updates between two checkpoints."""

_CLIP_NORM = 1.0
_FINAL_RATE = 0.05  # learning rate at the end, as a share
_WARMUP_SHARE = 0.05  # of all updates
_WEIGHT_DECAY = 0.1

# Raised by torch.load, or by reading its result, if a file is truncated, edited or foreign.
_DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError
)  # fmt: skip


def untrained(settings: SmallModelConfig, tokenizer: Any, seed: int) -> Any:
    """Build a causal language model with random weights in float32."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    make = {"uniform": _uniform, "unequal": _unequal}[settings.family]
    config = make(settings, _shared(settings, tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32)


def _shared(settings: SmallModelConfig, tokenizer: Any) -> dict[str, Any]:
    return {
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


def _uniform(settings: SmallModelConfig, shared: dict[str, Any]) -> Any:
    """Llama: all attn blocks cost a request the same, and so do all ffn blocks."""
    from transformers import LlamaConfig

    return LlamaConfig(**shared)


def _unequal(settings: SmallModelConfig, shared: dict[str, Any]) -> Any:
    """Qwen2-MoE: every other attn block has a sliding window; pairs of layers alternate experts.

    With at least four layers, each of the four combinations of cheap and expensive blocks occurs.
    """
    from transformers import Qwen2MoeConfig

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
    """Trains a causal language model in float32.

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
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
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

    def train(self, path: Path, run: str, *, progress: bool) -> None:
        """Train to the last step; an interrupted run resumes from the checkpoint in `path`.

        The checkpoint must have the same `run`, a hash of all that the training depends on.

        Raises:
            ArtifactError: The checkpoint is damaged or of another run.
        """
        if path.exists():
            self._restore(path, run)
        total = self._settings.steps
        desc = f"train the {self._settings.family} model"
        bar = progress_bar(progress, total=total, initial=self.step, desc=desc, unit="step")
        self._model.train()
        with bar:
            while self.step < total:
                bar.set_postfix_str(f"loss {self._update():.3f}")
                bar.update()
                if self.step % SAVE_EVERY and self.step < total:
                    continue
                recent = np.mean(self.losses[-SAVE_EVERY:])
                log.info("Step %d of %d: loss %.3f nats per token.", self.step, total, recent)
                self._save(path, run)
        self._model.eval()

    @property
    def curve(self) -> list[float]:
        """Mean training loss of every `SAVE_EVERY` updates, nats per token."""
        return [
            float(np.mean(self.losses[at : at + SAVE_EVERY]))
            for at in range(0, self.step, SAVE_EVERY)
        ]

    def _update(self) -> float:
        """Make one update; return its loss in nats per token (with the balance loss, if any)."""
        started = time.perf_counter()
        ids = self._batch(self.step).to(self._model.device)
        routed = (
            {"output_router_logits": True} if hasattr(self._model, "router_aux_loss_coef") else {}
        )
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._half):
            loss = self._model(input_ids=ids, labels=ids, use_cache=False, **routed).loss
        self._adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._rate(self.step)
        self._adam.step()
        self.step += 1
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started
        return self.losses[-1]

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
            chosen.append(self._order(epoch)[at])
        ids = self._tokens[torch.tensor(chosen)]
        # Scores use windows without a start token, but generation begins with one.
        start = torch.full_like(ids[:, :1], self._model.config.bos_token_id)
        ids[::2] = torch.cat([start, ids[:, :-1]], dim=1)[::2]
        return ids

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._tokens))

    def _save(self, path: Path, run: str) -> None:
        state = {
            "run": run, "step": self.step, "seconds": self.seconds, "losses": self.losses,
            "model": self._model.state_dict(), "adam": self._adam.state_dict(),
        }  # fmt: skip
        with atomic_write(path) as file:
            torch.save(state, file)

    def _restore(self, path: Path, run: str) -> None:
        try:
            state = dict(torch.load(path, map_location=self._model.device, weights_only=True))
            found = state["run"]
        except _DAMAGE as error:
            raise ArtifactError(
                f"{path} is damaged or is no checkpoint of a small model; delete it to start again."
            ) from error
        if found != run:
            raise ArtifactError(
                f"{path} is a checkpoint with other text or settings; delete it to start again."
            )
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self._model.load_state_dict(state["model"])
        self._adam.load_state_dict(state["adam"])
        log.info("Resumed after step %d.", self.step)

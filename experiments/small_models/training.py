"""How a small language model is trained: AdamW, half a cosine, and progress that is kept."""

from __future__ import annotations

import logging
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from experiments.config import SmallLMConfig
from rap_env.artifacts import atomic_write
from rap_env.errors import ArtifactError
from rap_env.scoring.corpus import Corpus

log = logging.getLogger(__name__)

SAVE_EVERY = 100
"""Updates after which progress is saved."""

_CLIP_NORM = 1.0
_LAST_RATE = 0.05  # share of the learning rate that is left at the end
_WARMUP_SHARE = 0.05  # of all updates
_DECAY = 0.1

# What torch.load and the first look at its result raise if a file is cut, edited or another's.
_DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError
)  # fmt: skip


class SmallTrainer:
    """A model in float32 with its optimizer and its text.

    Args:
        model: A causal language model; it is trained in place.
        text: What to train on.
        settings: How long and how fast.
        seed: Seeds the order of the text.
        dtype: Of the products, ``torch.bfloat16`` or ``torch.float32``; weights are in float32.
    """

    def __init__(
        self, model: Any, text: Corpus, settings: SmallLMConfig, seed: int, dtype: torch.dtype
    ) -> None:
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self._model, self._tokens, self._settings, self._seed = model, text.tokens, settings, seed
        self._half = dtype == torch.bfloat16
        grouped: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for parameter in model.parameters():
            grouped[parameter.ndim > 1].append(parameter)  # norms and biases do not decay
        self._adam = torch.optim.AdamW(
            [
                {"params": grouped[True], "weight_decay": _DECAY},
                {"params": grouped[False], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )

    def train(self, path: Path, run: str, *, progress: bool) -> None:
        """Train to the end.

        Args:
            path: Where progress is kept, so that a killed run goes on.
            run: Hash of all that the training depends on.
            progress: Whether to draw a progress bar.

        Raises:
            ArtifactError: What lies at `path` is damaged or of another run.
        """
        if path.exists():
            self._restore(path, run)
        total = self._settings.steps
        bar = tqdm(
            total=total, initial=self.step, desc=f"train the {self._settings.family} model",
            unit="step", dynamic_ncols=True, disable=None if progress else True,
        )  # fmt: skip
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
        """Mean loss of every `SAVE_EVERY` updates, nats per token."""
        return [
            float(np.mean(self.losses[at : at + SAVE_EVERY]))
            for at in range(0, self.step, SAVE_EVERY)
        ]

    def _update(self) -> float:
        """One update; gives its loss in nats per token (with the experts' balance, if any)."""
        began = time.perf_counter()
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
        self.seconds += time.perf_counter() - began
        return self.losses[-1]

    def _rate(self, step: int) -> float:
        """Learning rate of an update, the first one being 0."""
        steps = self._settings.steps
        rise = min(1.0, (step + 1) / max(1.0, _WARMUP_SHARE * steps))
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        return self._settings.learning_rate * rise * (_LAST_RATE + (1 - _LAST_RATE) * fall)

    def _batch(self, step: int) -> torch.Tensor:
        """Windows of an update: all of them in a random order, then in another one, and so on."""
        count, size = len(self._tokens), self._settings.batch_windows
        chosen = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, count)
            chosen.append(self._order(epoch)[at])
        ids = self._tokens[torch.tensor(chosen)]
        # Scores are of windows without a start token, but a model that writes begins with one.
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
                f"{path} is damaged or holds no training of a small model; delete it to begin anew."
            ) from error
        if found != run:
            raise ArtifactError(
                f"{path} holds a training with other text or settings; delete it to begin anew."
            )
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self._model.load_state_dict(state["model"])
        self._adam.load_state_dict(state["adam"])
        log.info("Going on after step %d.", self.step)

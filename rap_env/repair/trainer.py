"""What a distillation does at each update, and what it needs to go on after a kill."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rap_env.artifacts import atomic_write
from rap_env.blocks import BlockMask
from rap_env.errors import ArtifactError, InvalidRequestError
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.partial_forward import PartialForward
from rap_env.llm.placeholders import Stub
from rap_env.repair.divergence import divergence
from rap_env.repair.library import StubLibrary
from rap_env.repair.masks import MaskDraw
from rap_env.scoring.corpus import Corpus

_TEACHER_BYTES = 512 * 2**20
_CLIP_NORM = 1.0
_LAST_RATE = 0.05  # share of the learning rate that is left at the end

# What torch.load and the first look at its result raise if a file is cut, edited or another's.
_DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError
)  # fmt: skip


@dataclass(frozen=True)
class DistillConfig:
    """How long and how fast stubs are distilled.

    Attributes:
        steps: Updates, each under one mask.
        windows: Windows of the text in each update.
        learning_rate: Adam's after the warm-up; it falls along half a cosine.
        warmup_steps: Updates over which the rate rises.
        seed: Seeds the masks and the order of the text.
        save_every: Updates after which progress is saved.

    Raises:
        InvalidRequestError: A number is out of its range.
    """

    steps: int = 1200
    windows: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("windows", 1), ("warmup_steps", 0), ("save_every", 1)):
            value = getattr(self, name)
            if value < least:
                raise InvalidRequestError(
                    f"{name} of a distillation must be at least {least}, not {value}."
                )
        if not 0 < self.learning_rate < float("inf"):
            raise InvalidRequestError(
                f"The learning rate must be above 0, not {self.learning_rate}."
            )

    def rate(self, step: int) -> float:
        """Learning rate of an update, the first one being 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = (1 + np.cos(np.pi * step / self.steps)) / 2
        return float(self.learning_rate * rise * (_LAST_RATE + (1 - _LAST_RATE) * fall))


class Trainer:
    """Stubs in float32 with their optimizer, and what they learn from."""

    def __init__(
        self,
        llm: ElasticLLM,
        library: StubLibrary,
        text: Corpus,
        masks: MaskDraw,
        config: DistillConfig,
    ) -> None:
        self.step = 0
        self._seconds = 0.0
        self._divergences: list[float] = []
        self._config, self._masks = config, masks
        self._tokens = text.tokens
        self._stubs = {index: stub.on(llm.device).float() for index, stub in library.stubs.items()}
        self._llm = library.attach(llm).repaired(self._stubs, "in training")
        self._partial = PartialForward(self._llm)
        self._taught: dict[int, torch.Tensor] = {}
        self._taught_bytes = 0
        self._parameters = [p for stub in self._stubs.values() for p in stub.parameters()]
        for parameter in self._parameters:
            parameter.requires_grad_()
        self._adam = torch.optim.Adam(self._parameters, betas=(0.9, 0.99))

    def update(self) -> float:
        """One update; gives its divergence in nats per token."""
        began = time.perf_counter()
        windows = self._windows(self.step)
        self._masks.requests.restart(self.step)  # a replayed trace goes on where it stood
        mask = self._masks.draw(np.random.default_rng([self._config.seed, self.step]))
        ids = self._tokens[windows].to(self._llm.device)
        teacher = torch.cat([self._teach(int(window)) for window in windows])
        with torch.enable_grad(), self._llm.masked(mask):
            student = self._llm.hidden(ids).flatten(end_dim=1)
        value, gradient = divergence(self._partial, student, teacher)
        self._adam.zero_grad()
        if student.requires_grad:  # else nothing is removed, or no stub stands there
            # The base model's own weights may want gradients too; they get none.
            torch.autograd.backward(student, gradient, inputs=self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._config.rate(self.step)
        self._adam.step()
        self.step += 1
        self._divergences.append(value)
        self._seconds += time.perf_counter() - began
        return value

    @property
    def recent(self) -> str:
        """The mean divergence since progress was last saved, in words."""
        mean = np.mean(self._divergences[-self._config.save_every :])
        return f"divergence {mean:.3f} nats per token"

    def save(self, path: Path, run: str) -> None:
        """Write down where training stands, in one move."""
        state = {
            "run": run,
            "step": self.step,
            "seconds": self._seconds,
            "divergences": self._divergences,
            "stubs": {index: stub.state_dict() for index, stub in self._stubs.items()},
            "adam": self._adam.state_dict(),
        }
        with atomic_write(path) as file:
            torch.save(state, file)

    def restore(self, path: Path, run: str) -> None:
        """Go on from what `save` wrote.

        Raises:
            ArtifactError: It is damaged, or of another run.
        """
        try:
            state = dict(torch.load(path, map_location=self._llm.device, weights_only=True))
            found = state["run"]
        except _DAMAGE as error:
            raise ArtifactError(
                f"{path} is damaged or holds no distillation; delete it to begin anew."
            ) from error
        if found != run:
            raise ArtifactError(
                f"{path} holds a distillation of another model, text or settings; give another "
                "path, or delete it to begin anew."
            )
        self.step, self._seconds = state["step"], state["seconds"]
        self._divergences = state["divergences"]
        for index, stub in self._stubs.items():
            stub.load_state_dict(state["stubs"][index])
        self._adam.load_state_dict(state["adam"])

    def library(self, start: StubLibrary, made_from: Mapping[str, Any]) -> StubLibrary:
        """The stubs as they are now, in the model's dtype."""
        stubs = {
            index: Stub(*(part.detach().to("cpu", self._llm.dtype) for part in stub.parameters()))
            for index, stub in self._stubs.items()
        }
        every = self._config.save_every
        means = [
            float(np.mean(self._divergences[at : at + every])) for at in range(0, self.step, every)
        ]
        provenance = {
            "method": "distillation under many masks",
            **made_from,
            "divergence_every": every,
            "divergences": means,
            "seconds": self._seconds,
            "library": start.provenance,
        }
        return StubLibrary(start.model, start.fingerprint, stubs, provenance)

    def _windows(self, step: int) -> torch.Tensor:
        """Windows of an update: all of them in a random order, then in another one, and so on."""
        count, size = len(self._tokens), self._config.windows
        first = step * size
        chosen = []
        for place in range(first, first + size):
            epoch, at = divmod(place, count)
            chosen.append(self._order(epoch)[at])
        return torch.tensor(chosen)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._config.seed, epoch, 1]).permutation(len(self._tokens))

    @torch.no_grad()
    def _teach(self, window: int) -> torch.Tensor:
        """What the dense decoder gives for a window, (T, H); kept for the next time."""
        if window not in self._taught:
            ids = self._tokens[window : window + 1].to(self._llm.device)
            with self._llm.masked(BlockMask()):
                hidden = self._llm.hidden(ids)[0]
            if self._taught_bytes + hidden.nbytes > _TEACHER_BYTES:
                return hidden
            self._taught[window] = hidden
            self._taught_bytes += hidden.nbytes
        return self._taught[window]

"""Distils stubs: the masked model learns to predict what the dense model predicts.

The masks go from those of a good policy to random ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rap_env.errors import UnsupportedModelError
from rap_env.memory import MemoryModel
from rap_env.models.families.placeholders import Stub
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.plan import Plan
from rap_env.repair.config import DistillConfig
from rap_env.repair.stub_library import StubLibrary
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.nll import HEAD_TOKENS
from rap_env.workload import RequestSampler

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Standard deviations of the noise on the logarithm of a block's price, equally likely. At 0 the
mask is that of a policy that follows the prices; at 4 it is close to random."""

_LEAST_DELTA_NLL = 1e-3  # nats per token; lower values, including negative ones, count as this


@dataclass(frozen=True)
class MaskSampler:
    """Samples a request and removes blocks in the order of a noisy price until it fits.

    The price of a block is its delta_nll divided by the bytes that its removal frees for the
    request, so long requests lose attention blocks and short ones feed-forward blocks.

    Attributes:
        memory: The model's byte arithmetic, including stubs.
        requests: Samples requests.
        delta_nll: Rise in NLL at the removal of each block, nats per token, (2L,), such as
            `rap_env.importance.profiles.GSIProfile.marginal_delta_nll`.
        noise: Standard deviations to choose from.
    """

    memory: MemoryModel
    requests: RequestSampler
    delta_nll: npt.NDArray[np.float64]
    noise: tuple[float, ...] = NOISE

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the sampler, without the model, for records."""
        return {
            "losses": self.delta_nll.tolist(),
            "requests": type(self.requests).__name__,
            "noise": list(self.noise),
        }

    def draw(self, rng: np.random.Generator) -> Plan:
        """Sample a mask; all randomness comes from the generator."""
        request = self.requests.sample(rng)
        freed = np.maximum(self.memory.freed_bytes(request), 1)
        price = np.log(np.maximum(self.delta_nll, _LEAST_DELTA_NLL)) - np.log(freed)
        price = price + rng.choice(self.noise) * rng.standard_normal(len(price))
        mask = Plan()
        for block in np.argsort(price, kind="stable").tolist():
            if self.memory.peak_bytes(mask, request) <= request.budget_bytes:
                break
            mask = mask.without(block)
        return mask


_ROWS = 16  # float32 rows over the vocabulary in memory at a time: they stay in the CPU cache
_TEACHER_BYTES = 512 * 2**20
_CLIP_NORM = 1.0
_LOGGED_STEPS = 50  # updates over which a divergence is averaged


def distill(
    llm: ElasticLLM,
    library: StubLibrary,
    text: Corpus,
    masks: MaskSampler,
    config: DistillConfig = DistillConfig(),
    *,
    progress: bool = True,
) -> StubLibrary:
    """Train all stubs of a library together, under a new mask at each update.

    The dense model is the teacher: its next-token probabilities are the targets, and only stubs
    are trained. One set of stubs serves all masks, as Once-for-All (Cai et al. 2020) trains one
    set of weights for all subnetworks.

    Do not report results on the text that the stubs are trained on.

    Raises:
        UnsupportedModelError: The model is streamed from files; gradients need all layers.
        ArtifactError: The library is of another model.
    """
    if llm.spare_bytes is not None:
        raise UnsupportedModelError(
            f"{llm.name} is streamed from files, a layer at a time, but distillation needs "
            "gradients through all layers; load it with load_llm()."
        )
    run = {
        "settings": asdict(config),
        "started_from": library.sha256,
        "text": text.sha256,
        **masks.settings,
    }
    trainer = Trainer(llm, library, text, masks, config)
    bar = progress_bar(
        progress, total=config.steps, desc="distilling stubs", unit="step", leave=False
    )
    with bar:
        while trainer.step < config.steps:
            value = trainer.update()
            bar.update()
            bar.set_postfix_str(f"divergence {value:.3f}")
    return trainer.library(library, {"run": run, "text": dict(text.provenance)})


class Trainer:
    """The stubs in float32, their optimizer, and the data they are trained on."""

    def __init__(
        self,
        llm: ElasticLLM,
        library: StubLibrary,
        text: Corpus,
        masks: MaskSampler,
        config: DistillConfig,
    ) -> None:
        self.step = 0
        self._seconds = 0.0
        self._divergences: list[float] = []
        self._config, self._masks = config, masks
        self._tokens = text.tokens
        self._stubs = {
            index: stub.on(llm.device_of(index)).float() for index, stub in library.stubs.items()
        }
        self._llm = library.attach(llm).repaired(self._stubs, "in training")
        self._partial = PartialForward(self._llm, widen=True)
        self._teacher_states: dict[int, torch.Tensor] = {}
        self._teacher_bytes = 0
        self._parameters = [p for stub in self._stubs.values() for p in stub.parameters()]
        for parameter in self._parameters:
            parameter.requires_grad_()
        self._adam = torch.optim.Adam(self._parameters, betas=(0.9, 0.99))

    def update(self) -> float:
        """Make one update and return its divergence in nats per token."""
        began = time.perf_counter()
        windows = self._windows(self.step)
        self._masks.requests.restart(self.step)  # a replayed trace goes on
        mask = self._masks.draw(np.random.default_rng([self._config.seed, self.step]))
        ids = self._tokens[windows].to(self._llm.device)
        teacher = torch.cat([self._teacher(int(window)) for window in windows])
        with torch.enable_grad(), self._llm.masked(mask):
            student = self._partial.hidden(ids).flatten(end_dim=1)
        value, gradient = divergence(self._partial, student, teacher)
        self._adam.zero_grad()
        if student.requires_grad:  # else no block is removed, or none has a stub
            # The base model's own weights may require gradients too; they get none.
            torch.autograd.backward(student, gradient, inputs=self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = self._config.rate(self.step)
        self._adam.step()
        self.step += 1
        self._divergences.append(value)
        self._seconds += time.perf_counter() - began
        return value

    def library(self, start: StubLibrary, made_from: Mapping[str, Any]) -> StubLibrary:
        """The current stubs, in the model's dtype."""
        stubs = {
            index: Stub(*(part.detach().to("cpu", self._llm.dtype) for part in stub.parameters()))
            for index, stub in self._stubs.items()
        }
        parts = range(0, self.step, _LOGGED_STEPS)
        means = [float(np.mean(self._divergences[at : at + _LOGGED_STEPS])) for at in parts]
        provenance = {
            "method": "distillation under many masks",
            **made_from,
            "divergence_every": _LOGGED_STEPS,
            "divergences": means,
            "seconds": self._seconds,
            "library": start.provenance,
        }
        return StubLibrary(start.model, start.fingerprint, stubs, provenance)

    def _windows(self, step: int) -> torch.Tensor:
        """Windows of an update: epochs in random order, one after the other."""
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
    def _teacher(self, window: int) -> torch.Tensor:
        """Output of the dense decoder for a window, (T, H), cached up to `_TEACHER_BYTES`."""
        if window not in self._teacher_states:
            ids = self._tokens[window : window + 1].to(self._llm.device)
            with self._llm.masked(Plan()):
                hidden = self._partial.hidden(ids)[0]
            if self._teacher_bytes + hidden.nbytes > _TEACHER_BYTES:
                return hidden
            self._teacher_states[window] = hidden
            self._teacher_bytes += hidden.nbytes
        return self._teacher_states[window]


def divergence(
    partial: PartialForward, student: torch.Tensor, teacher: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """``KL(teacher || student)`` of next-token predictions, and its gradient by `student`, (N, H).

    The divergence is the mean in nats per token. `student` and `teacher` are decoder outputs,
    (N, H), of models that share their head. Only the logits of a few tokens exist at a time, and
    no graph over the vocabulary is kept.
    """
    total, gradients = torch.zeros((), dtype=torch.float64, device=student.device), []
    pairs = zip(
        torch.split(student.detach(), HEAD_TOKENS), torch.split(teacher, HEAD_TOKENS), strict=True
    )
    for hidden, wanted in pairs:
        with torch.enable_grad():
            hidden.requires_grad_()
            logits = partial.head_logits(hidden)
        by_logits = torch.empty_like(logits)
        with torch.no_grad():
            truth = partial.head_logits(wanted)
            for start in range(0, len(logits), _ROWS):
                rows = slice(start, start + _ROWS)
                log_p = truth[rows].float().log_softmax(dim=-1)
                log_q = logits[rows].float().log_softmax(dim=-1)
                p = log_p.exp()
                total += (p * (log_p - log_q)).sum()
                by_logits[rows] = (log_q.exp() - p) / len(student)
        gradients.append(torch.autograd.grad(logits, hidden, by_logits)[0])
    return float(total) / len(student), torch.cat(gradients)

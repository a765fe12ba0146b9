"""All stubs trained together: the masked model learns to predict what the dense one predicts."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from rap_env.artifacts import digest
from rap_env.errors import UnsupportedModelError
from rap_env.llm.elastic import ElasticLLM
from rap_env.repair.library import StubLibrary
from rap_env.repair.masks import MaskDraw
from rap_env.repair.trainer import DistillConfig, Trainer
from rap_env.scoring.corpus import Corpus

log = logging.getLogger(__name__)


def distill(
    llm: ElasticLLM,
    library: StubLibrary,
    text: Corpus,
    masks: MaskDraw,
    config: DistillConfig = DistillConfig(),
    *,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> StubLibrary:
    """Train all stubs of a library together, under a new mask at each update.

    The dense model teaches (its next-token probabilities are the target) and nothing but stubs
    is changed: one set of stubs for all masks, as Once-for-All (Cai et al. 2020) trains one set
    of weights for all subnetworks.

    Args:
        llm: The live model that the library belongs to; its mask is restored.
        library: Where training starts.
        text: Tokens to train on; nothing may be reported on them.
        masks: Draws the mask of each update.
        config: Length and rate of the training.
        path: Where progress is kept, so that a killed run goes on. It stays there at the end:
            remove it once the library is saved.
        progress: Whether to draw a progress bar.

    Returns:
        A library in the model's dtype.

    Raises:
        UnsupportedModelError: The model is streamed from files: gradients need all its layers.
        ArtifactError: The library is of another model, or what lies at `path` of another run.
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
    if path is not None and Path(path).exists():
        trainer.restore(Path(path), digest(run))
    bar = tqdm(
        total=config.steps, initial=trainer.step, desc="distilling stubs", unit="step",
        leave=False, disable=None if progress else True,
    )  # fmt: skip
    with bar:
        while trainer.step < config.steps:
            value = trainer.update()
            bar.update()
            bar.set_postfix_str(f"divergence {value:.3f}")
            if trainer.step % config.save_every and trainer.step < config.steps:
                continue
            log.info("Distilling: %d of %d steps, %s.", trainer.step, config.steps, trainer.recent)
            if path is not None:
                trainer.save(Path(path), digest(run))
    return trainer.library(library, {"run": run, "text": dict(text.provenance)})

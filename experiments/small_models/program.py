"""``python -m experiments.small_models``: train a small language model from scratch in minutes.

With 6 layers it has 12 blocks and 4,096 masks, few enough to evaluate all of them, and its blocks
can differ strongly in cost. It is saved as an ordinary model folder.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.console import say
from experiments.errors import ExperimentError
from experiments.small_models.data import TextSource, train_tokenizer
from experiments.small_models.training import Trainer, untrained
from experiments.study.run_folder import RunFolder, provenance
from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.models.device import choose_device, choose_dtype
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import made_once
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.progress import transformers_bars
from rap_env.scoring.scorer import MaskScorer

log = logging.getLogger(__name__)

RECORD = "small_lm.json"
"""Record of settings, text and results, in the folder of the weights."""

_KIND, _VERSION = "rap-env.small-lm", 1
_PROGRESS = "training.pt"


def train_small_model(config: Config, folder: Path) -> Path:
    """Train a small model, unless it exists; an interrupted run resumes.

    Returns:
        The model's folder, which can be used as any model.

    Raises:
        RapError: A setting is invalid, a text is missing or too short, or the folder holds
            something else.
    """
    run, started = RunFolder(folder), time.monotonic()
    path = Path(config.small_models.path) if config.small_models.path else folder / "model"
    _check_place(path, _settings(config))
    run.start(config)
    made_once(path, functools.partial(_make, config, folder), f"Training {path}")
    (folder / _PROGRESS).unlink(missing_ok=True)
    record = read_record(path)
    run.finish(started, held_out_nll=record["held_out_nll"])
    _report(path, record)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of the model in a folder.

    Raises:
        FileNotFoundError: The folder holds no model of this program.
        ArtifactError: The record is damaged.
    """
    return load_artifact(path / RECORD, _KIND, _VERSION)


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
        found = read_record(path)["settings"]
    except (FileNotFoundError, NotADirectoryError):
        raise ExperimentError(
            f"{path} holds something else than a small model; choose another small_models.path."
        ) from None
    if changed := sorted(name for name in settings if found.get(name) != settings[name]):
        raise ExperimentError(
            f"{path} holds a model with another {', '.join(changed)}; choose another "
            "small_models.path, or delete the folder to train it again."
        )


def _make(config: Config, folder: Path, work: Path) -> dict[str, Any]:
    """Train a model and save it; return what the folder's manifest records."""
    settings, source = config.small_models, TextSource(config)
    tokenizer = train_tokenizer(source.characters(), settings.vocab_size, settings.max_positions)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device)
    model = untrained(settings, tokenizer, config.seed).to(device)
    texts = source.tokens(ElasticLLM(model, tokenizer, name=settings.family))
    log.info(
        "Training %.1f million weights on %d tokens for %.1f epochs in %s on %s.",
        model.num_parameters() / 1e6, texts.joined.tokens.numel(),
        settings.steps * settings.batch_windows / len(texts.joined.tokens), dtype, device,
    )  # fmt: skip
    made_of = {"settings": _settings(config), "text_sha256": texts.joined.sha256}
    trainer = Trainer(model, texts.joined, settings, config.seed, dtype)
    trainer.train(folder / _PROGRESS, digest(made_of), progress=config.progress)
    with transformers_bars(shown=False):
        model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    saved = load_llm(work, device=config.model.device, dtype=config.model.dtype, weights="bf16")
    record = {
        **made_of,
        "parameters": model.num_parameters(),
        "trained_in": str(dtype).removeprefix("torch."),
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "loss_every_100_steps": trainer.curve,
        "held_out_nll": {n: MaskScorer(saved, t).dense_nll for n, t in texts.held_out.items()},
        "texts": {name: dict(text.provenance) for name, text in texts.fit.items()},
        "held_out_texts": {name: dict(text.provenance) for name, text in texts.held_out.items()},
        "provenance": provenance({"run": config.seed}),
    }
    save_artifact(work / RECORD, _KIND, _VERSION, record)
    return made_of


def _report(path: Path, record: Mapping[str, Any]) -> None:
    nll = ", ".join(f"{name} {value:.3f}" for name, value in record["held_out_nll"].items())
    say(
        f"{record['parameters'] / 1e6:.2f} million weights, {record['steps']} steps in "
        f"{record['seconds']:.0f} s; held-out NLL in nats per token: {nll}."
    )
    say(f"The model is in {path}; use it as model.name={path}")

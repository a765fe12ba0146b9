"""A replay of a tiny model: its settings, and random policies and tables for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.replay_settings import ReplayConfig
from experiments.config.training_settings import ModelConfig
from rap_env.importance.plan_table import PlanTable
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.plan import Plan
from tests.policies import made_policies
from tests.tiny import tiny_model, tiny_tokenizer

LAYERS = 4
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
STEPS = ((0, 1.1), (2, 0.36), (3, 1.1))
"""Seconds, and budgets as shares of the peak of 3 x 30 tokens."""


def write_model(base: Path) -> None:
    """A model folder, a text, a trace of 24 requests in 6 s, a budget, a policy and a frontier."""
    tiny_model(layers=LAYERS).save_pretrained(base / "model")
    tiny_tokenizer().save_pretrained(base / "model")
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz ,."), 2400)
    (base / "story.txt").write_text("".join(letters))
    lines = [f"2023-11-16 18:00:{n / 4:09.6f},{8 + 7 * n % 23},{3 + n % 6}" for n in range(24)]
    (base / "trace.csv").write_text(HEAD + "\n".join(lines) + "\n")
    llm = load_llm(str(base / "model"), device="cpu", dtype="float32")
    peak = MemoryModel(llm).dense_peak_bytes(3, 30)
    steps = "".join(f"{time_s},{int(share * peak)}\n" for time_s, share in STEPS)
    (base / "budget.csv").write_text(f"time_s,budget_bytes\n{steps}")
    made_policies.policy_file(model=MemoryModel(llm)).save(base / "policy.safetensors")
    rng = np.random.default_rng(1)
    masks = [Plan.removing(*rng.permutation(2 * LAYERS)[:k].tolist())
             for k in range(2 * LAYERS + 1) for _ in range(4)]  # fmt: skip
    provenance = {"model": llm.name, "fingerprint": llm.facts.fingerprint, "scoring": {}}
    scores = {mask: 4.0 + len(mask.removed) + float(rng.random()) for mask in masks}
    PlanTable(LAYERS, scores[Plan()], scores, 0, 0.0, {}, provenance).save(base / "frontier.json")


def tiny_replay(base: Path, **changed) -> Config:
    """Settings of a replay of what `write_model` wrote."""
    text = TextConfig(source=str(base / "story.txt"), windows=6, window_tokens=36)
    settings = ReplayConfig(
        trace=str(base / "trace.csv"), minutes=1, every=1, time_scale=1.0, token_scale=1.0,
        max_prompt_tokens=28, max_new_tokens=8,
        text=text, known_share=0.25, reference="3x30",
        policy=str(base / "policy.safetensors"), frontier=str(base / "frontier.json"),
        max_batch_size=3, max_queue=8, queue_timeout_s=1.5, prefill_chunk_tokens=16, hold_s=0.2,
        greedy_tokens=8, meter="tensors", residency="drop", mask_loss_windows=1,
    )  # fmt: skip
    config = Config(
        stage="replay", name="tiny", runs_dir=str(base / "runs"), progress=False, store=None,
        model=ModelConfig(name=str(base / "model"), device="cpu", dtype="float32"),
        calibration=TextConfig(source="self", windows=2, window_tokens=12, seed=9),
        budget={"name": "file", "path": str(base / "budget.csv")}, replay=settings,
    )  # fmt: skip
    return replace(config, **changed)

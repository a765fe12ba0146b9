"""A model family of your own: OLMo 2, whose norms follow the blocks.

    python examples/custom_model_family.py

The families that rap_env knows are in `FAMILIES`. Another one needs the names of its modules, and
two conditions: each layer adds the outputs of both blocks to the residual stream outside of the
modules named here, and no norm with a bias is between a block and that sum. `check` tests what
follows from them. A small model that learns the text of this file stands for a real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from rap_env.context.live import LiveContext
from rap_env.envs.prune import RAPPruneEnv
from rap_env.models.families.families import FAMILIES, Family
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.corpus import Corpus

FAMILIES["olmo2"] = Family(  # by config.model_type; `rap_env.load_llm` then takes such models too
    decoder="model",
    attn="self_attn",
    attn_norms=("post_attention_layernorm",),
    ffn_norms=("post_feedforward_layernorm",),
)
WINDOW, LAYERS, STEPS = 48, 4, 150
WORKLOAD = {"name": "grid", "batch_sizes": [1, 4], "seq_lens_tokens": [32, 128],
            "budget_fractions": [0.6, 0.8]}  # fmt: skip


def text() -> torch.Tensor:
    """The bytes of this file, (windows, tokens)."""
    found = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    return found[: len(found) // WINDOW * WINDOW].view(-1, WINDOW)


def trained(steps: int = STEPS, seed: int = 0) -> Olmo2ForCausalLM:
    """A small model that has learned half of the text."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = Olmo2Config(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Olmo2ForCausalLM(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    windows = text()[::2]
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def check(model: Olmo2ForCausalLM, llm: ElasticLLM) -> None:
    """Test the family: nothing removed changes nothing, all removed leaves embeddings and head."""
    tokens = text()[:2]
    before = model(tokens).logits
    with llm.masked(Plan.removing(*range(2 * LAYERS))):
        left = model(tokens).logits
    torch.testing.assert_close(
        left, model.lm_head(model.model.norm(model.model.embed_tokens(tokens)))
    )
    for block in range(2 * LAYERS):
        with llm.masked(Plan.removing(block)):
            assert not torch.equal(model(tokens).logits, before), f"block {block} is not removed"
    assert torch.equal(model(tokens).logits, before), "removed blocks come back unchanged"


def mean_loss(env: RAPPruneEnv, place: np.ndarray, episodes: int = 16) -> float:
    """Mean ΔNLL at the end of an episode in which blocks are removed in an order, nats/token."""
    losses = []
    for number in range(episodes):
        observation, info = env.reset(seed=number)
        over = False
        while not over:
            valid = np.where(observation["action_mask"], place, np.inf)
            observation, _, terminated, truncated, info = env.step(int(valid.argmin()))
            over = terminated or truncated
        losses.append(info["loss"])
    return float(np.mean(losses))


def compared(model: Olmo2ForCausalLM) -> dict[str, float]:
    """Check the family with a model, and compare two orders of removal in the environment."""
    llm = ElasticLLM(model, None, name="tiny-olmo2")
    check(model, llm)
    corpus = Corpus.of_tokens(text()[1::2])
    context: Any = LiveContext(llm, corpus, importance="one_shot", progress=False)
    env = RAPPruneEnv(context=context, workload=WORKLOAD)
    places = {
        "most important first": -context.one_shot.delta_nll,
        "least important first": context.one_shot.delta_nll,
    }
    return {name: mean_loss(env, np.asarray(place)) for name, place in places.items()}


if __name__ == "__main__":
    for name, loss in compared(trained()).items():
        print(f"{name:22} mean ΔNLL {loss:.4f} nats/token")

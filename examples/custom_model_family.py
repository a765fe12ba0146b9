"""A model family of your own: OLMo 2, whose norms follow the blocks.

    python examples/custom_model_family.py

The families that rap_env knows are in `FAMILIES`. Another one needs the names of its modules,
and two conditions: each layer adds the outputs of both blocks to the residual stream outside
of the modules named here, and no norm with a bias is between a block and that sum. `check`
tests what follows from them. A small model that learns the text of this file stands for a
real one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

import rap_env
from rap_env.importance.profiles import GSIProfile
from rap_env.models.families.families import FAMILIES, Family
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.corpus import Corpus

# By config.model_type; `rap_env.load_llm` then takes such models too.
FAMILIES["olmo2"] = Family(
    decoder="model",
    attn="self_attn",
    attn_norms=("post_attention_layernorm",),
    ffn_norms=("post_feedforward_layernorm",),
)
WINDOW, LAYERS, STEPS = 48, 4, 150


def text() -> torch.Tensor:
    """The bytes of this file, (windows, tokens)."""
    tokens = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


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
    with llm.applied(Plan.removing(*range(2 * LAYERS))):
        left = model(tokens).logits
    torch.testing.assert_close(
        left, model.lm_head(model.model.norm(model.model.embed_tokens(tokens)))
    )
    for block in range(2 * LAYERS):
        with llm.applied(Plan.removing(block)):
            assert not torch.equal(model(tokens).logits, before), f"block {block} is not removed"
    assert torch.equal(model(tokens).logits, before), "removed blocks come back unchanged"


def order(model: Olmo2ForCausalLM, removals: int = 3) -> GSIProfile:
    """Check the family with a model, and find the blocks that it needs least."""
    llm = ElasticLLM(model, None, name="tiny-olmo2")
    check(model, llm)
    scorer = rap_env.PlanScorer(llm, Corpus.of_tokens(text()[1::2]))
    return rap_env.gsi(scorer, stop=removals, progress=False)


if __name__ == "__main__":
    profile = order(trained())
    for block, nll in zip(profile.order, profile.nll_after, strict=True):
        print(f"without {block} too: {nll:.4f} nats/token")

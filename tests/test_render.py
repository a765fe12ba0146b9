import re

import numpy as np
import pytest

from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.render import SIZE, Scene, render_ansi, render_rgb
from rap_env.request import Request, human_bytes
from tests.made_facts import made_facts

_MIB = 2**20


def make_scene(
    plan: Plan, layers: int = 4, delta_nll: float | None = None, fraction: float = 0.7
) -> Scene:
    """A plan of a model that has every level."""
    facts = made_facts(
        layers,
        _MIB,
        4 * _MIB,
        name="paper-model",
        base_bytes=3 * _MIB,
        kv_bytes_per_token=(512,) * layers,
        kv_heads=(1,) * layers,
        kv_head_size=(128,) * layers,
        level_param_bytes=dict.fromkeys(WEIGHT_LEVELS[1:-1], (_MIB, 4 * _MIB) * layers),
        hidden_size=4,
        ffn_width=8,
        vocab_size=64,
    )
    memory = MemoryModel(facts)
    return Scene(memory, Request.at_fraction(memory, 2, 1024, fraction), plan, delta_nll)


def test_text_shows_each_block_once_and_the_bytes():
    text = render_ansi(make_scene(Plan.removing(0, 3, 7), delta_nll=0.25))
    assert re.search(r"^attn +\.###$", text, re.M)
    assert re.search(r"^ffn +#\.#\.$", text, re.M)
    assert "paper-model: 2 sequences of 1,024 tokens" in text
    assert "70% of the native peak" in text
    assert "1 of 4 attention blocks, 2 of 4 FFN blocks" in text
    assert "+0.250 nats per token (perplexity x 1.28)" in text
    unmeasured = render_ansi(make_scene(Plan()))
    assert "nats" not in unmeasured
    assert re.search(r"\d MiB over the budget", unmeasured)
    fitting = render_ansi(make_scene(Plan.removing(1, 3, 5)))
    assert re.search(r"fits, [\d.]+ (MiB|KiB) to spare", fitting)


def test_text_shows_the_bits_of_each_level():
    weights = ("int8", "int4", "int4-compact", "int3", "int2")
    caches = ("int8", "int4", "int2", "int4-window512", "window128")
    levels = {f"layer{n:02}.ffn": level for n, level in enumerate(weights)}
    levels |= {f"layer{n:02}.cache": level for n, level in enumerate(caches)}
    text = render_ansi(make_scene(Plan.of(levels), layers=5))
    assert re.search(r"^attn +#####$", text, re.M)
    assert re.search(r"^ffn +84432$", text, re.M)
    assert re.search(r"^cache +842ww$", text, re.M)
    assert "1 block int4-compact, 1 block int3" in text


def test_text_breaks_deep_models_into_lines():
    rows = re.findall(
        r"^attn +(\S+)$", render_ansi(make_scene(Plan.removing(2 * 75), layers=80)), re.M
    )
    assert len(rows) == 2
    assert "".join(rows) == "#" * 75 + "." + "#" * 4


def test_the_picture_changes_with_the_plan_and_nothing_else():
    dense, pruned = (render_rgb(make_scene(plan)) for plan in (Plan(), Plan.removing(1)))
    assert dense.shape == (SIZE[1], SIZE[0], 3)
    assert dense.dtype == np.uint8
    assert np.array_equal(dense, render_rgb(make_scene(Plan())))
    assert not np.array_equal(dense, pruned)


@pytest.mark.parametrize("layers", [1, 6, 400])
def test_a_plan_of_any_depth_stays_inside_the_picture_and_its_parts_add_up(layers):
    levels = ("int8", "int4", "int2", "int4-window512", "int4-window256", "window128")
    plan = {f"layer{n:02}.cache": levels[n % len(levels)] for n in range(layers)}
    scene = make_scene(Plan.of({**plan, "layer00.ffn": "removed"}), layers, 0.1)
    assert sum(scene.parts.values()) == scene.memory.peak_bytes(scene.plan, scene.request)
    picture = render_rgb(scene)
    edges = [picture[:8], picture[-8:], picture[:, :8], picture[:, -20:]]
    assert all((edge == 255).all() for edge in edges)


def test_bytes_are_formatted_with_units():
    found = [human_bytes(count) for count in (0, 1023, 1536, _MIB, 3 * 2**31)]
    assert found == ["0 B", "1,023 B", "1.5 KiB", "1.0 MiB", "6.00 GiB"]

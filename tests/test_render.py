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


def make_memory(layers: int = 4, **changed) -> MemoryModel:
    sizes = {"base_bytes": 3 * _MIB, "kv_bytes_per_token": (512,) * layers, "hidden_size": 4,
             "ffn_width": 8, "vocab_size": 64, "max_positions": 2048}  # fmt: skip
    facts = made_facts(layers, _MIB, 4 * _MIB, name="paper-model", **{**sizes, **changed})
    return MemoryModel(facts)


def make_scene(*blocks: int, layers: int = 4, loss: float | None = None, fraction: float = 0.7):
    memory = make_memory(layers)
    request = Request.at_fraction(memory, 2, 1024, fraction)
    return Scene(memory, request, Plan.removing(*blocks), loss)


def test_text_shows_each_block_once_and_the_bytes():
    text = render_ansi(make_scene(0, 3, 7, loss=0.25))
    assert re.search(r"^attn +\.###$", text, re.M)
    assert re.search(r"^ffn +#\.#\.$", text, re.M)
    assert "paper-model: 2 sequences of 1,024 tokens" in text
    assert "70% of the native peak" in text
    assert "removed  1 of 4 attention blocks, 2 of 4 FFN blocks" in text
    assert "ΔNLL     +0.250 nats per token (perplexity x 1.28)" in text


def test_text_shows_the_bits_of_each_level():
    made = make_memory(5).facts
    sizes = dict.fromkeys(WEIGHT_LEVELS[1:-1], made.block_param_bytes)
    memory = make_memory(5, level_param_bytes=sizes)
    levels = ("int8", "int4", "int4-compact", "int3", "int2")
    plan = Plan.of({f"layer{n:02}.ffn": level for n, level in enumerate(levels)})
    text = render_ansi(Scene(memory, Request.at_fraction(memory, 2, 1024, 0.7), plan))
    assert re.search(r"^attn +#####$", text, re.M)
    assert re.search(r"^ffn +84432$", text, re.M)
    assert "1 block int4-compact, 1 block int3" in text


def test_text_shows_whether_the_request_fits():
    assert re.search(r"\d MiB over the budget", render_ansi(make_scene()))
    assert re.search(r"fits, [\d.]+ (MiB|KiB) to spare", render_ansi(make_scene(1, 3, 5)))


def test_text_marks_the_budget_in_a_bar_as_long_as_the_dense_peak():
    bar = re.search(r"\[(.*)\]", render_ansi(make_scene(fraction=0.5)))[1]
    assert (len(bar), bar.index("|")) == (60, 30)
    assert bar.replace("|", "=") == "=" * 60


def test_text_breaks_deep_models_into_lines():
    text = render_ansi(make_scene(2 * 75, layers=80))
    rows = re.findall(r"^attn +(\S+)$", text, re.M)
    assert [len(row) for row in rows] == [60, 20]
    assert "".join(rows).index(".") == 75
    assert "layer    60   65   70   75\n" in text


def test_an_unmeasured_loss_is_not_shown_as_a_number():
    assert "ΔNLL     measured when the episode ends" in render_ansi(make_scene(1))


def test_picture_changes_with_the_mask_and_nothing_else():
    dense, pruned = render_rgb(make_scene()), render_rgb(make_scene(1))
    assert dense.shape == (SIZE[1], SIZE[0], 3)
    assert dense.dtype == np.uint8
    assert np.array_equal(dense, render_rgb(make_scene()))
    assert not np.array_equal(dense, pruned)


@pytest.mark.parametrize("removed", [(), (0, 3), range(8)])
def test_the_parts_of_the_bar_add_up_to_the_peak(removed):
    memory = make_memory()
    request = Request.at_fraction(memory, 2, 1024, 0.7)
    scene = Scene(memory, request, Plan.removing(*removed))
    assert sum(scene.parts.values()) == memory.peak_bytes(scene.plan, request)


@pytest.mark.parametrize("layers", [1, 3, 30, 80, 400])
def test_any_depth_stays_inside_the_picture(layers):
    picture = render_rgb(make_scene(0, layers=layers))
    edges = [picture[:8], picture[-8:], picture[:, :8], picture[:, -8:]]
    assert all((edge == 255).all() for edge in edges)


CACHES = ("int8", "int4", "int2", "int4-window512", "int4-window256", "window128")


@pytest.mark.parametrize("levels", [CACHES[:1], CACHES], ids=len)
def test_a_plan_shows_its_levels_and_stays_inside_the_picture(levels):
    memory = make_memory(6, kv_heads=(1,) * 6, kv_head_size=(128,) * 6)
    request = Request.at_fraction(memory, 2, 1024, 0.7)
    plan = {f"layer{n:02}.cache": levels[n % len(levels)] for n in range(6)}
    scene = Scene(memory, request, Plan.of({**plan, "layer05.ffn": "removed"}), 0.1)
    assert sum(scene.parts.values()) == memory.peak_bytes(scene.plan, request)
    text = render_ansi(scene)
    assert re.search(rf"^cache +{'842www' if len(levels) > 1 else '888888'}$", text, re.M)
    assert "lowered  " in text
    picture = render_rgb(scene)
    assert all((edge == 255).all() for edge in (picture[:, -20:], picture[-8:]))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (_MIB, "1.0 MiB"), (3 * 2**31, "6.00 GiB")],
)
def test_bytes_are_formatted_with_units(count, text):
    assert human_bytes(count) == text

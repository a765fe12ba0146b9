"""Draw a plan under a request as text or as a picture: levels, bytes against the budget."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rap_env.errors import counted
from rap_env.memory import MemoryModel
from rap_env.plan import BLOCK_KINDS, EMBEDDINGS, Plan, is_cache
from rap_env.request import Request, human_bytes

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

SIZE = (960, 640)
"""Width and height of the picture in pixels; video encoders need even numbers."""

_INK, _GREY, _FAINT, _PAPER = "#1f2933", "#7b8794", "#d5dae0", "#ffffff"
_EDGE = "#b8c2cc"
_GOOD, _BAD = "#2f855a", "#c53030"
# Distinguishable by colour-blind people; in the order in which the bar stacks them.
_COLOURS = {
    "embeddings": "#9aa5b1",
    "workspace": "#cbd2d9",
    "FFN weights": "#0072b2",
    "attention weights": "#e69f00",
    "KV cache": "#f6d281",
}
_STACK = (32, 118, 400, 606)  # left, top, right, bottom of the two columns of blocks
_PANEL = (440, 928)  # left and right of the words and the bar
_LINE_CHARACTERS = 66  # of words in the panel
_LINE_LAYERS = 60  # layers per line of text, and characters of its bar
_Box = tuple[float, float, float, float]
_SYMBOLS = {"native": "#", "removed": "."}  # of other levels, their bits


@dataclass(frozen=True)
class Scene:
    """The content of a picture.

    Attributes:
        plan: The plan.
        delta_nll: Its NLL minus that of the native model, nats per token; None if not
            measured.
    """

    memory: MemoryModel
    request: Request
    plan: Plan
    delta_nll: float | None = None

    @property
    def over_bytes(self) -> int:
        """Bytes above the budget; negative if the request fits."""
        return self.memory.peak_bytes(self.plan, self.request) - self.request.budget_bytes

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they hold, in the order of the bar; they add up to the peak."""
        parts = self.memory.breakdown(self.plan, self.request)
        sizes = (
            parts.embeddings,
            parts.workspace,
            parts.ffn_weights,
            parts.attn_weights,
            parts.kv_cache,
        )
        return dict(zip(_COLOURS, sizes, strict=True))

    @property
    def request_words(self) -> str:
        """The request in words."""
        sequences = counted(self.request.batch_size, "sequence")
        return f"{sequences} of {self.request.seq_len_tokens:,} tokens"

    @property
    def budget_words(self) -> str:
        """The budget in words."""
        native = self.memory.native_peak_bytes(self.request.batch_size, self.request.seq_len_tokens)
        budget = self.request.budget_bytes
        return f"{human_bytes(budget)}, {budget / native:.0%} of the native peak"

    @property
    def verdict(self) -> str:
        """The bytes over the budget or to spare, in words."""
        amount = human_bytes(abs(self.over_bytes))
        return f"{amount} over the budget" if self.over_bytes > 0 else f"fits, {amount} to spare"

    @property
    def delta_nll_words(self) -> str:
        """The ΔNLL in words."""
        if self.delta_nll is None:
            return "measured when the episode ends"
        factor = np.exp(min(self.delta_nll, 99.0))
        times = f"{factor:.2f}" if factor < 100 else f"{factor:,.0f}"
        return f"{self.delta_nll:+.3f} nats per token (perplexity x {times})"

    @property
    def removed_words(self) -> str:
        """The number of removed blocks of each kind, in words."""
        layers = self.memory.facts.num_layers
        attn, ffn = (self.plan.count_removed(kind) for kind in BLOCK_KINDS)
        return f"{attn} of {layers} attention blocks, {ffn} of {layers} FFN blocks"

    @property
    def lowered_words(self) -> str:
        """The number of lowered items of each kind and level, in words; empty if there are none."""
        kept = ((item, level) for item, level in self.plan.levels.items() if level != "removed")
        counts = Counter((_kind(item), level) for item, level in kept)
        return ", ".join(
            f"{kind if kind == EMBEDDINGS else counted(count, kind)} {level}"
            for (kind, level), count in counts.items()
        )

    def share_left(self, index: int) -> float:
        """Share of a block's native bytes that its weights have at their level."""
        facts, level = self.memory.facts, self.plan.weight_level(index)
        native = max(1, facts.block_param_bytes[index])
        return 0.0 if level == "removed" else facts.weight_levels(index)[level] / native

    def cache_share_left(self, layer: int) -> float:
        """Share of a layer's native cache bytes that its cache has at its level, at most 1."""
        if 2 * layer in self.plan.removed:
            return 0.0
        shape = self.request.batch_size, self.request.seq_len_tokens
        held = self.memory.cache_bytes(self.plan.cache_level(layer), layer, *shape)
        return min(1.0, held / max(1, int(self.memory.kv_bytes_by_layer(*shape)[layer])))


def _kind(item: str) -> str:
    return EMBEDDINGS if item == EMBEDDINGS else "cache" if is_cache(item) else "block"


def render_ansi(scene: Scene) -> str:
    """Draw the scene as text: one column per layer, ``#`` native and ``.`` removed.

    If items are lowered, digits are their bits, ``w`` is a window, and caches have a line
    too.
    """
    facts, width, plan = scene.memory.facts, _LINE_LAYERS, scene.plan
    lines = [f"{facts.name}: {scene.request_words}", f"budget   {scene.budget_words}"]
    for start in range(0, facts.num_layers, width):
        layers = range(start, min(start + width, facts.num_layers))
        lines.append("layer    " + "".join(f"{n:<5}" for n in layers[::5]).rstrip())
        for number, kind in enumerate(BLOCK_KINDS):
            symbols = (_symbol(plan.weight_level(2 * n + number)) for n in layers)
            lines.append(f"{kind:<8} " + "".join(symbols))
        if plan.caches:
            symbols = ("." if 2 * n in plan.removed else _cache_symbol(plan, n) for n in layers)
            lines.append("cache    " + "".join(symbols))
    peak, budget = scene.memory.peak_bytes(plan, scene.request), scene.request.budget_bytes
    native = scene.memory.native_peak_bytes(scene.request.batch_size, scene.request.seq_len_tokens)
    bar = ["=" if n < round(width * peak / max(native, budget)) else " " for n in range(width)]
    bar[min(width - 1, round(width * budget / max(native, budget)))] = "|"
    lines += [
        f"peak     [{''.join(bar)}] {human_bytes(peak)}",
        f"         {scene.verdict}",
        f"removed  {scene.removed_words}",
        *([f"lowered  {scene.lowered_words}"] if scene.lowered_words else []),
        f"ΔNLL     {scene.delta_nll_words}",
    ]
    return "\n".join(lines) + "\n"


def _symbol(level: str) -> str:
    return _SYMBOLS.get(level) or level.removeprefix("int")[0]


def _cache_symbol(plan: Plan, layer: int) -> str:
    level = plan.cache_level(layer)
    return _symbol(level.name) if level.window_tokens is None else "w"


def render_rgb(scene: Scene) -> npt.NDArray[np.uint8]:
    """Draw the scene as a picture, shape (height, width, 3) of `SIZE`.

    Left: the stack of blocks, layer 0 at the bottom; a block's width is proportional to the
    bytes that it holds for this request, and what a lower level saves is hollow. Right: the
    request, the bytes by what they hold, and the ΔNLL.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, _PAPER)
    draw = ImageDraw.Draw(image)
    facts = scene.memory.facts
    draw.text((32, 24), facts.name.partition("@")[0], _INK, _font(26))
    draw.text((32, 60), scene.request_words, _GREY, _font(17))
    _draw_stack(draw, scene)
    _draw_bar(draw, scene)
    _draw_words(draw, scene)
    return np.array(image, dtype=np.uint8)


def _draw_stack(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    left, top, right, bottom = _STACK
    facts, middle = scene.memory.facts, (left + right) / 2
    kv = scene.memory.kv_bytes_by_layer(scene.request.batch_size, scene.request.seq_len_tokens)
    params = np.array(facts.block_param_bytes)
    attn, ffn = params[0::2] + kv, params[1::2]
    scale = (middle - left - 18) / max(1, int(attn.max()), int(ffn.max()))
    row = min(40, max(1, (bottom - top) // facts.num_layers))  # whole pixels give even gaps
    gap = min(2, row // 3)
    draw.text((middle - 18, top - 22), "attention", _INK, _font(15), anchor="ra")
    draw.text((middle + 18, top - 22), "FFN", _INK, _font(15))
    every = next(n for n in (1, 2, 5, 10, 20, 50) if n * row >= 13 or n == 50)
    for layer in range(facts.num_layers):
        y0 = top + (facts.num_layers - 1 - layer) * row
        y1 = y0 + row - gap - 1
        if layer % every == 0:
            draw.text((middle, (y0 + y1) / 2), str(layer), _GREY, _font(11), anchor="mm")
        inner = middle - 18
        cut = inner - scale * params[2 * layer]
        _block(draw, (cut, y0, inner, y1), "attention weights", scene.share_left(2 * layer))
        if kv[layer]:
            outer = (cut - scale * kv[layer], y0, cut, y1)
            _block(draw, outer, "KV cache", scene.cache_share_left(layer))
        span = (middle + 18, y0, middle + 18 + scale * ffn[layer], y1)
        _block(draw, span, "FFN weights", scene.share_left(2 * layer + 1), from_left=True)
    draw.text((left, bottom + 6), "white: bytes that are freed", _GREY, _font(13))


def _block(
    draw: ImageDraw.ImageDraw, box: _Box, part: str, share: float, from_left: bool = False
) -> None:
    """Draw a rectangle that is filled by the share of its bytes that is left.

    Below a share of 1, the rest is empty and has a grey edge.
    """
    x0, y0, x1, y1 = box
    if x1 - x0 < 1:
        return
    if share < 1:
        draw.rectangle((x0, y0, x1 - 1, y1), _PAPER, _EDGE)
    width = share * (x1 - x0)
    start, end = (x0, x0 + width) if from_left else (x1 - width, x1)
    if width >= 1:
        draw.rectangle((start, y0, end - 1, y1), _COLOURS[part])


def _draw_bar(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Draw the bytes by what they hold, stacked along a bar on which the budget is marked."""
    left, right = _PANEL
    native = scene.memory.native_peak_bytes(scene.request.batch_size, scene.request.seq_len_tokens)
    scale = (right - left) / max(native, scene.request.budget_bytes)
    y0, y1, x = 250, 292, float(left)
    draw.rectangle((left, y0, left + scale * native, y1), "#f5f7fa", _FAINT)
    for part, size in scene.parts.items():
        if scale * size >= 1:
            draw.rectangle((x, y0, x + scale * size, y1), _COLOURS[part])
        x += scale * size
    mark = left + scale * scene.request.budget_bytes
    draw.line((mark, y0 - 10, mark, y1 + 10), _BAD if scene.over_bytes > 0 else _GOOD, 3)
    near_edge = "ra" if mark > (left + right) / 2 else "la"
    draw.text((mark, y0 - 30), "budget", _INK, _font(15), anchor=near_edge)
    for n, (part, size) in enumerate(scene.parts.items()):
        y = 322 + 26 * n
        draw.rectangle((left, y + 3, left + 13, y + 16), _COLOURS[part])
        draw.text((left + 24, y), part, _INK, _font(16))
        draw.text((right, y), human_bytes(size), _INK, _font(16), anchor="ra")


def _draw_words(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    left, right = _PANEL
    peak = scene.memory.peak_bytes(scene.plan, scene.request)
    colour = _BAD if scene.over_bytes > 0 else _GOOD
    draw.text((left, 118), "Peak memory", _GREY, _font(15))
    draw.text((left, 138), human_bytes(peak), _INK, _font(30))
    draw.text((left, 178), scene.verdict, colour, _font(17))
    draw.text((right, 118), "Budget", _GREY, _font(15), anchor="ra")
    draw.text((right, 138), human_bytes(scene.request.budget_bytes), _INK, _font(30), anchor="ra")
    share = scene.budget_words.split(", ")[-1]
    draw.text((right, 178), share, _GREY, _font(17), anchor="ra")
    words = {"Removed so far": scene.removed_words, "Lowered so far": scene.lowered_words}
    words["NLL increase so far"] = scene.delta_nll_words  # the font has no Greek letters
    shown = [pair for pair in words.items() if pair[1]]
    step = 64 if len(shown) == 2 else 50
    for number, (head, text) in enumerate(shown):
        y = 606 - step * (len(shown) - number)
        draw.text((left, y), head, _GREY, _font(15))
        lines = textwrap.fill(text, _LINE_CHARACTERS)
        draw.multiline_text((left, y + 18), lines, _INK, _font(14), spacing=2)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # part of Pillow: identical on every machine

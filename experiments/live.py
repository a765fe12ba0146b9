"""``python -m experiments.live experiment=demo``: serve while the memory falls and returns.

Chats about texts run in rounds, and short questions come one after the other. The memory
limit begins a tenth above what the native model needs for them, falls by half, and returns.
Plans above the server's quality floor are not run: requests wait instead. The run is recorded
and drawn: as a figure, and as an animation.
"""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.config import Config
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.json_records import read_json, write_text
from experiments.study.plotting import (
    FAINT,
    INK,
    item_levels,
    level_colour,
    level_legend,
    save_png,
    style,
)
from rap_env.artifacts import atomic_write
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.serving.settings import DEFAULT_MAX_DELTA_NLL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.records import StepRecord
    from rap_env.runtime.request_handle import RequestHandle

FILE = "live.json"

Step = tuple[float, int, int, int]
"""A pass: its end in seconds, bytes of the limit, measured bytes, and the number of its
plan."""

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Greece?": "Athens",
}
"""What is asked in turn, and what a right answer contains; the native default model knows
them."""

CHATS, TEXT_CHARACTERS, CHAT_TOKENS, ANSWER_TOKENS = 4, 3600, 120, 24

CAPTION = "A language model keeps answering while half of its memory is taken away"
"""One sentence above the animation."""

LIMIT = {0.0: 1.1, 0.2: 1.1, 0.45: 0.55, 0.62: 0.55, 0.7: 1.1, 1.0: 1.1}
"""The memory limit as a share of the native need, by the share of the time that has
passed."""

_FRAMES, _FRAMES_PER_S = 96, 8  # of the animation, however long the run was
_CHARACTERS = 60  # of an answer that are shown
_BLUE = "#2171B5"
_WORDS = {
    "native": "as shipped",
    "int8": "8 bits",
    "int4": "4 bits",
    "int4-compact": "4 bits, compact",
    "int3": "3 bits",
    "int2": "2 bits",
    "removed": "left out",
    **{f"int4-window{n}": f"4 bits, last {n} tokens" for n in (512, 256, 128)},
}


@dataclass
class Question:
    """A question with its answer, as pairs of a time in seconds and the text by then."""

    question: str
    asked_s: float
    texts: list[tuple[float, str]] = field(default_factory=list)

    @property
    def begun(self) -> list[tuple[float, str]]:
        """The texts from the first token on."""
        return [text for text in self.texts if text[1]]

    @property
    def right(self) -> bool:
        """Whether the answer contains what a right one does."""
        return bool(self.texts) and QUESTIONS[self.question] in self.texts[-1][1]


@dataclass
class Recording:
    """What an engine did.

    Attributes:
        native_bytes: What the native model needs for all that runs.
        steps: The passes.
        plans: The levels of the plans, native ones left out.
    """

    num_layers: int
    seconds: float
    native_bytes: int
    steps: list[Step] = field(default_factory=list)
    plans: list[dict[str, str]] = field(default_factory=list)
    answers: list[Question] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The run in a sentence."""
        _, limits, measured, _ = zip(*self.steps, strict=True)
        right = sum(answer.right for answer in self.answers)
        over = sum(used > limit for limit, used in zip(limits, measured, strict=True))
        wait_s = max(time_s - a.asked_s for a in self.answers for time_s, _ in a.begun[:1])
        last = "native again" if not self.plans[self.steps[-1][3]] else "not native yet"
        return (
            f"The limit falls from {max(limits) / 2**20:.0f} to {min(limits) / 2**20:.0f} MiB and "
            f"returns. {right} of {len(self.answers)} short answers are right, after at most "
            f"{wait_s:.1f} s for a first token; {over} of {len(self.steps)} passes of the model "
            f"measure more than the limit, and the last plan is {last}."
        )


def chat_ids(llm: ElasticLLM, text: str) -> list[int]:
    """Tokens of a chat that begins with a text; the text alone without a template of chats."""
    if llm.tokenizer.chat_template is None:
        return list(llm.tokenizer(text)["input_ids"])
    chat = [{"role": "user", "content": text}]
    ids = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return list(ids)


def record(llm: ElasticLLM, policy: Policy, seconds: float) -> Recording:
    """Serve for some seconds within the moving limit; the model is native afterwards."""
    from rap_env.runtime.controller import RuntimeController
    from rap_env.runtime.engine import Engine
    from rap_env.runtime.memory_estimator import BatchShape
    from rap_env.runtime.memory_meter import make_levels
    from rap_env.runtime.memory_monitor import GivenMemory
    from rap_env.runtime.sampling import SamplingParams

    llm.set_residency("offload")
    make_levels(llm, policy)
    texts = [text[:TEXT_CHARACTERS] for text in topics.values() if len(text) >= TEXT_CHARACTERS]
    chats = [chat_ids(llm, f"Summarise this text.\n\n{text}") for text in texts[:CHATS]]
    started, native_bytes = float("inf"), 2**62

    def limit_bytes() -> float:
        passed = max(0.0, time.monotonic() - started) / seconds
        return float(native_bytes * np.interp(passed, list(LIMIT), list(LIMIT.values())))

    controller = RuntimeController(
        llm, policy, GivenMemory(limit_bytes), max_delta_nll=DEFAULT_MAX_DELTA_NLL
    )
    engine = Engine(llm, controller, max_batch_size=CHATS + 1)
    shape = BatchShape(CHATS + 1, max(map(len, chats)) + CHAT_TOKENS)
    native_bytes = controller.estimator.peak_bytes(Plan(), shape)
    recording = Recording(llm.facts.num_layers, seconds, native_bytes)

    def on_step(step: StepRecord) -> None:
        if not recording.plans or recording.plans[-1] != step.plan.levels:
            recording.plans.append(step.plan.levels)
        passed, plan = step.time_s + step.duration_s - started, len(recording.plans) - 1
        recording.steps.append((round(passed, 3), step.budget_bytes, step.peak_bytes, plan))

    def submit(ids: list[int], tokens: int, **sampling: Any) -> RequestHandle:
        stop = (llm.tokenizer.eos_token_id,)
        params = SamplingParams(max_new_tokens=tokens, stop_token_ids=stop, **sampling)
        return engine.submit(ids, params)

    engine.observers.append(on_step)
    questions = itertools.cycle(QUESTIONS)
    asked: RequestHandle | None = None
    round_of_chats: list[RequestHandle] = []
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if asked:
            text = llm.tokenizer.decode(asked.token_ids, skip_special_tokens=True).strip()
            texts_so_far = recording.answers[-1].texts
            if not texts_so_far or texts_so_far[-1][1] != text:
                texts_so_far.append((round(passed, 3), text))
            asked = None if asked.done else asked
        ready = asked is None
        if ready and len(round_of_chats) < CHATS:  # one more chat, then the next question
            number = len(round_of_chats)
            round_of_chats.append(submit(chats[number], CHAT_TOKENS, temperature=1.0, seed=number))
        elif ready and all(chat.done for chat in round_of_chats):
            round_of_chats = []  # nothing runs, so that caches may rise as well
        if ready and round_of_chats:
            recording.answers.append(Question(next(questions), round(passed, 3)))
            asked = submit(chat_ids(llm, recording.answers[-1].question), ANSWER_TOKENS)
        engine.step()
    engine.close()
    llm.apply(Plan())
    if asked:  # the time ended before the answer
        recording.answers.pop()
    return recording


def recorded(folder: Path) -> Recording | None:
    """The recording in a folder; None if there is none."""
    body = read_json(folder / FILE, made_by="the live run")
    if body is None:
        return None
    answers = [Question(**answer) for answer in body.pop("answers")]
    return Recording(answers=answers, **body)


def record_once(folder: Path, llm: ElasticLLM, policy: Policy, seconds: float) -> Recording:
    """The recording in a folder; without one, `record` makes it."""
    if recording := recorded(folder):
        return recording
    recording = record(llm, policy, seconds)
    write_text(folder / FILE, json.dumps(asdict(recording)))
    return recording


def live_figure(recording: Recording, until_s: float | None = None) -> Figure:
    """Draw limit, measured bytes and levels over time, and the last question with its answer.

    Args:
        recording: The run.
        until_s: The moment that it is drawn at; None for the end.
    """
    from matplotlib.figure import Figure

    now_s = recording.seconds if until_s is None else until_s
    past = [step for step in recording.steps if step[0] <= now_s] or recording.steps[:1]
    asked = [answer for answer in recording.answers if answer.asked_s <= now_s]
    answer = asked[-1] if asked else recording.answers[0]
    text = next((text for time_s, text in answer.texts[::-1] if time_s <= now_s), "")
    with style():
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        axes = figure.subplots(6, 1, height_ratios=(3, 1.3, 1.3, 1.3, 0.3, 0.9), sharex=True)
        _draw_memory(axes[0], recording, past, now_s)
        _draw_levels(axes[1:5], recording, past, now_s)
        axes[4].set_xlabel("seconds")
        axes[4].tick_params(labelbottom=True)
        axes[5].axis("off")
        for y, line, colour in ((0.8, f"Q: {answer.question}", FAINT), (0.0, f"A: {text}", INK)):
            short = line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} ..."
            place = {"transform": axes[5].transAxes, "in_layout": False}
            axes[5].text(0, y, short, fontsize=11, color=colour, **place)
        figure.suptitle(CAPTION, fontsize=10.5, fontweight="bold", wrap=True)
    used = {"native"}.union(*(plan.values() for plan in recording.plans))
    level_legend(figure, used, 4, _WORDS)
    return figure


def save_gif(recording: Recording, path: Path) -> None:
    """Write the figure at moments of the run as an animation."""
    from PIL import Image

    images: list[Image.Image] = []
    for now_s in np.linspace(0, recording.seconds, _FRAMES):
        buffer = io.BytesIO()
        with style():
            live_figure(recording, until_s=float(now_s)).savefig(buffer, format="png", dpi=125)
        images.append(Image.open(buffer).convert("RGB"))
    palette = images[-1].quantize(64)  # the last one has all colours
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times_ms = [1000 // _FRAMES_PER_S] * (_FRAMES - 1) + [2500]
    with atomic_write(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=times_ms,
                       loop=0)  # fmt: skip


def _draw_memory(axis: Axes, recording: Recording, past: Sequence[Step], now_s: float) -> None:
    """Draw limit and measured bytes up to a moment."""
    ends, limit, used, _ = np.array(past).T
    top = 1.1 * max(step[1] for step in recording.steps)
    axis.plot(ends, limit / 2**20, color=INK, linewidth=2.0, label="memory limit")
    axis.fill_between(ends, used / 2**20, color=_BLUE, alpha=0.35, linewidth=0)
    axis.plot(ends, used / 2**20, color=_BLUE, linewidth=1.4, label="measured")
    for right, marker in ((True, "o"), (False, "x")):
        given = [a.texts[-1][0] for a in recording.answers if a.texts and a.right == right]
        at = [end for end in given if end <= now_s]
        word = f"{'right' if right else 'wrong'} answer" if at else None
        axis.plot(at, [top / 2**20] * len(at), marker, color=INK, markersize=4, label=word)
    axis.set_xlim(0, recording.seconds)
    axis.set_ylim(0, 1.08 * top / 2**20)
    axis.set_ylabel("MiB")
    axis.legend(loc="lower left", ncols=4)


def _draw_levels(
    axes: Sequence[Axes], recording: Recording, past: Sequence[Step], now_s: float
) -> None:
    """Draw the levels of the items of each kind up to a moment, the first layer on top."""
    from matplotlib.colors import to_rgb

    runs = [next(steps) for _, steps in itertools.groupby(past, key=lambda step: step[3])]
    edges = [0.0, *(step[0] for step in runs[1:]), now_s]
    plans = [item_levels(recording.plans[step[3]], recording.num_layers) for step in runs]
    for axis, kind in zip(axes, ("KV caches", "Attention", "FFN", "Embeddings"), strict=True):
        columns = [[to_rgb(level_colour(level)) for level in plan[kind]] for plan in plans]
        rows = len(columns[0])
        colours = np.array(columns).swapaxes(0, 1)
        axis.pcolormesh(edges, np.arange(rows + 1), colours, shading="flat", rasterized=True)
        axis.set_ylim(rows, 0)
        axis.set_yticks([])
        axis.grid(False)
        axis.set_ylabel(kind, rotation=0, ha="right", va="center")


def program(config: Config, folder: Path) -> Path:
    """Record a run with the packaged policy, and draw it."""
    from rap_env.models.files.loading import shared_llm
    from rap_env.policies.loading import load_policy

    llm = shared_llm(config.model.name, dtype=config.model.dtype, weights=config.model.weights)
    recording = record_once(folder, llm, load_policy("rap", llm), config.demo.live_s)
    save_png(live_figure(recording), folder / "live.png")
    save_gif(recording, folder / "live.gif")
    say(f"{recording.summary}\n{folder / 'live.gif'}")
    return folder


if __name__ == "__main__":
    launch("live", program)

"""``python -m experiments.live experiment=demo``: serve while the memory falls and returns.

Chats write about texts, beside a conversation that begins with a text and goes on with
questions. The memory limit of the model begins a tenth above what it needs natively for them,
falls to a share of that, and returns. Plans above the server's quality floor are not run:
requests wait instead. The run is recorded and drawn: as a figure, and as an animation.
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
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from experiments.config import Config
from experiments.config.program_settings import DemoConfig
from experiments.launch import launch
from experiments.study.console import say
from experiments.study.json_records import read_json, write_text
from experiments.study.plotting import FAINT, INK, LEVEL_COLOURS, item_levels, save_gif, style
from rap_env.errors import counted
from rap_env.models.files.loading import shared_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.loading import load_policy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_limit import GivenMemory
from rap_env.runtime.memory_monitor import make_levels
from rap_env.runtime.records import ControllerSettings, EngineSettings, StepRecord
from rap_env.runtime.request_handle import RequestHandle
from rap_env.runtime.sampling import SamplingParams
from rap_env.serving.settings import DEFAULT_MAX_DELTA_NLL, DEFAULT_MOST_DELTA_NLL

FILE = "live.json"


class RecordedStep(NamedTuple):
    """A pass through the model.

    Attributes:
        end_s: Its end.
        limit_bytes: The memory limit.
        used_bytes: What was measured.
        kept_bytes: Those of them that are kept for later turns of conversations.
        plan: The number of its plan.
        requests: How many run, the one that is read included.
        tokens: The length of the longest of them.
    """

    end_s: float
    limit_bytes: int
    used_bytes: int
    kept_bytes: int
    plan: int
    requests: int
    tokens: int


TEXT_CHARACTERS, CHAT_TOKENS, ANSWER_TOKENS = 3600, 480, 24
_FIRST_ANSWER = "I have read it. What is your question?"

LIMIT = {0.0: 0.0, 0.1: 0.0, 0.25: 1.0, 0.75: 1.0, 0.85: 0.0, 1.0: 0.0}
"""How far the memory limit has fallen, by the share of the time that has passed."""
_MOST = 1.1
"""The memory limit before it falls, as a share of the native need."""

_FRAMES = 95  # of the animation, however long the run was
_CHARACTERS = 60  # of an answer that are shown
_BLUE = "#2171B5"


@dataclass
class Question:
    """A question with its answer.

    Attributes:
        expected: What a right answer contains.
        asked_s: When it was asked.
        first_s: When the first token came.
        end_s: When the answer was complete.
    """

    question: str
    expected: str
    asked_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    answer: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer contains what a right one does."""
        return self.expected in self.answer


@dataclass
class Recording:
    """What an engine did.

    Attributes:
        steps: The passes.
        plans: The levels of the plans, native ones left out.
    """

    num_layers: int
    seconds: float
    steps: list[RecordedStep] = field(default_factory=list)
    plans: list[dict[str, str]] = field(default_factory=list)
    answers: list[Question] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The run in a few sentences."""
        limits = [step.limit_bytes for step in self.steps]
        low = [step.end_s for step in self.steps if step.limit_bytes < max(limits)]
        right = sum(answer.right for answer in self.answers)
        squeezed = sum(low[0] < answer.end_s < low[-1] for answer in self.answers)
        over = sum(step.used_bytes > step.limit_bytes for step in self.steps)
        return (
            f"The limit falls from {max(limits) / 2**20:.0f} to {min(limits) / 2**20:.0f} MiB and "
            f"returns. {right} of {len(self.answers)} answers are right, and {squeezed} end while "
            f"it is low. Memory exceeds the limit in {over} of {len(self.steps)} passes."
        )


def chat_ids(llm: ElasticLLM, *messages: str) -> list[int]:
    """Tokens of a chat whose user begins; those of the texts without a template of chats."""
    if llm.tokenizer.chat_template is None:
        return list(llm.tokenizer("\n".join(messages))["input_ids"])
    roles = itertools.cycle(("user", "assistant"))
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    ids = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return list(ids)


class LiveRun:
    """Chats and a conversation that an engine serves while its memory limit moves.

    Attributes:
        recording: What the engine has done.
    """

    def __init__(self, llm: ElasticLLM, policy: Policy, settings: DemoConfig) -> None:
        self._llm, self._settings = llm, settings
        texts = [text[:TEXT_CHARACTERS] for text in topics.values() if len(text) >= TEXT_CHARACTERS]
        chats = [f"Summarise this text.\n\n{text}" for text in texts[: settings.chats]]
        self._prompts = [chat_ids(llm, chat) for chat in chats]
        self._conversation = [f"Read this text.\n\n{texts[-1]}"]
        self._started_s, self._native_bytes = float("inf"), 2**62
        controller = RuntimeController(
            llm,
            policy,
            GivenMemory(self._limit_bytes),
            ControllerSettings(
                max_delta_nll=DEFAULT_MAX_DELTA_NLL, most_delta_nll=DEFAULT_MOST_DELTA_NLL
            ),
            clock=time.thread_time,
        )
        rows = settings.chats + 1
        self._engine = Engine(controller, EngineSettings(max_batch_size=rows, target_itl_s=0.1))
        shape = BatchShape(rows, max(map(len, self._prompts)) + CHAT_TOKENS)
        self._native_bytes = controller.estimator.peak_bytes(Plan(), shape)
        self._chats: list[RequestHandle] = []
        self.recording = Recording(llm.facts.num_layers, settings.live_s)

    def read_texts(self) -> None:
        """Read the texts of all chats and of the conversation, before time begins."""
        first = self._ask(1)
        self._chats = list(map(self._chat, range(self._settings.chats)))
        while not all(handle.token_ids for handle in (first, *self._chats)):
            self._engine.step()
        self._conversation.append(_FIRST_ANSWER)

    def serve(self) -> None:
        """Answer one question after the other beside the chats, until time is over."""
        self._engine.observers.append(self._on_step)
        questions = itertools.cycle(self._settings.questions.items())
        self._started_s = time.thread_time()
        answer: Question | None = None
        while (passed_s := self._passed_s()) < self._settings.live_s:
            if answer is None:
                answer = Question(*next(questions), passed_s)
                self._conversation.append(answer.question)
                asked = self._ask(ANSWER_TOKENS)
            for number, handle in enumerate(self._chats):
                if handle.done:
                    self._chats[number] = self._chat(number)
            self._engine.step()
            if asked.token_ids and not answer.first_s:
                answer.first_s = self._passed_s()
            if asked.done:
                self._end(answer, asked)
                answer = None
        self._engine.close()

    def _end(self, answer: Question, asked: RequestHandle) -> None:
        """Add a complete answer to the recording and to the conversation."""
        text = self._llm.tokenizer.decode(asked.token_ids, skip_special_tokens=True)
        answer.answer = text.strip()
        answer.end_s = self._passed_s()
        self._conversation.append(answer.answer)
        self.recording.answers.append(answer)

    def _passed_s(self) -> float:
        return round(time.thread_time() - self._started_s, 3)

    def _limit_bytes(self) -> float:
        """The memory limit of the moment; without an end before the native need is known."""
        passed = max(0.0, time.thread_time() - self._started_s) / self._settings.live_s
        fallen = np.interp(passed, list(LIMIT), list(LIMIT.values()))
        share = 1 - fallen * (1 - self._settings.lowest_share)
        return float(_MOST * self._native_bytes * share)

    def _on_step(self, step: StepRecord) -> None:
        plans = self.recording.plans
        if not plans or plans[-1] != step.plan.levels:
            plans.append(step.plan.levels)
        self.recording.steps.append(
            RecordedStep(
                end_s=self._passed_s(),
                limit_bytes=step.budget_bytes,
                used_bytes=step.peak_bytes,
                kept_bytes=step.held.kept,
                plan=len(plans) - 1,
                requests=max(self._engine.stats().running, 1),
                tokens=step.length,
            )
        )

    def _chat(self, number: int) -> RequestHandle:
        params = SamplingParams(max_new_tokens=CHAT_TOKENS, temperature=1.0, seed=number)
        return self._engine.submit(self._prompts[number], params)

    def _ask(self, tokens: int) -> RequestHandle:
        """Send the conversation; where it is too long it begins anew, after its text."""
        stop = (self._llm.tokenizer.eos_token_id,)
        params = SamplingParams(max_new_tokens=tokens, stop_token_ids=stop)
        ids = chat_ids(self._llm, *self._conversation)
        if len(ids) + tokens > self._engine.max_seq_len_tokens:
            del self._conversation[2:-1]
            ids = chat_ids(self._llm, *self._conversation)
        return self._engine.submit(ids, params)


def recorded(folder: Path) -> Recording | None:
    """The recording in a folder; None if there is none."""
    body = read_json(folder / FILE, made_by="the live run")
    if body is None:
        return None
    answers = [Question(**answer) for answer in body.pop("answers")]
    steps = [RecordedStep(*step) for step in body.pop("steps")]
    return Recording(steps=steps, answers=answers, **body)


def record(folder: Path, llm: ElasticLLM, policy: Policy, settings: DemoConfig) -> Recording:
    """The recording in a folder; without one, serve for some seconds within the moving limit.

    Time is the CPU time of this thread, so that other programs slow nothing down. The model is
    native afterwards.
    """
    if recording := recorded(folder):
        return recording
    llm.set_residency("offload")
    make_levels(llm, policy)
    run = LiveRun(llm, policy, settings)
    run.read_texts()
    run.serve()
    llm.apply(Plan())
    write_text(folder / FILE, json.dumps(asdict(run.recording)))
    return run.recording


def live_figure(recording: Recording, until_s: float | None = None) -> Figure:
    """Draw limit, measured bytes and levels over time, and the last question with its answer.

    Args:
        recording: The run.
        until_s: The moment that it is drawn at; None for the end.
    """
    now_s = recording.seconds if until_s is None else until_s
    past = [step for step in recording.steps if step.end_s <= now_s] or recording.steps[:1]
    asked = [answer for answer in recording.answers if answer.asked_s <= now_s]
    answer = (asked or [Question("", "", 0.0)])[-1]
    text = answer.answer if answer.end_s <= now_s else ""
    with style():
        figure = Figure(figsize=(7.2, 5.6), layout="constrained")
        axes = figure.subplots(7, 1, height_ratios=(3, 0.7, 1.3, 1.3, 1.3, 0.3, 0.9), sharex=True)
        _draw_memory(axes[0], recording, past, now_s)
        _draw_requests(axes[1], past)
        _draw_levels(axes[2:6], recording, past, now_s)
        axes[5].set_xlabel("seconds")
        axes[5].tick_params(labelbottom=True)
        axes[6].axis("off")
        for y, line, colour in ((0.8, f"Q: {answer.question}", FAINT), (0.0, f"A: {text}", INK)):
            short = line if len(line) <= _CHARACTERS else f"{line[:_CHARACTERS]} ..."
            place = {"transform": axes[6].transAxes, "in_layout": False}
            axes[6].text(0, y, short, fontsize=11, color=colour, **place)
        now = past[-1]
        figure.suptitle(
            f"{counted(now.requests, 'request')} of up to {now.tokens:,} tokens within "
            f"{now.limit_bytes / 2**20:.0f} MiB",
            fontsize=10.5,
            fontweight="bold",
        )
        used = {"native"}.union(*(plan.values() for plan in recording.plans))
        shown = {level: colour for level, colour in LEVEL_COLOURS.items() if level in used}
        handles = [Patch(facecolor=c, edgecolor=FAINT, label=name) for name, c in shown.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def save_film(recording: Recording, path: Path) -> None:
    """Write the figure at moments of the run as an animation."""
    images: list[Image.Image] = []
    for now_s in np.linspace(0, recording.seconds, _FRAMES):
        buffer = io.BytesIO()
        with style():
            live_figure(recording, until_s=float(now_s)).savefig(buffer, format="png", dpi=125)
        images.append(Image.open(buffer).convert("RGB"))
    save_gif(images, path)


def _draw_memory(
    axis: Axes, recording: Recording, past: Sequence[RecordedStep], now_s: float
) -> None:
    """Draw limit and measured bytes up to a moment."""
    ends, limit, used, kept = np.array(past).T[:4]
    top = 1.1 * max(step.limit_bytes for step in recording.steps)
    axis.plot(ends, limit / 2**20, color=INK, linewidth=2.0, label="limit")
    running, used = (used - kept) / 2**20, used / 2**20
    axis.fill_between(ends, running, color=_BLUE, alpha=0.5, linewidth=0, label="weights, caches")
    axis.fill_between(ends, running, used, color=_BLUE, alpha=0.2, linewidth=0, label="kept turns")
    axis.plot(ends, used, color=_BLUE, linewidth=1.4, label="measured")
    for right, marker in ((True, "o"), (False, "x")):
        at = [a.end_s for a in recording.answers if a.right == right and a.end_s <= now_s]
        word = f"{'right' if right else 'wrong'} answer" if at else None
        axis.plot(at, [top / 2**20] * len(at), marker, color=INK, markersize=4, label=word)
    axis.set_xlim(0, recording.seconds)
    axis.set_ylim(0, 1.08 * top / 2**20)
    axis.set_ylabel("MiB")
    axis.legend(  # where the limit has fallen
        loc="center",
        bbox_to_anchor=(0.485, 0.68),
        ncols=2,
        fontsize=8,
        columnspacing=1,
        handlelength=1.2,
    )


def _draw_requests(axis: Axes, past: Sequence[RecordedStep]) -> None:
    """Draw how many requests ran in each pass."""
    axis.fill_between([s.end_s for s in past], [s.requests for s in past], step="pre", color=FAINT)
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="y", integer=True)
    axis.set_ylabel("Running", rotation=0, ha="right", va="center")


def _draw_levels(
    axes: Sequence[Axes], recording: Recording, past: Sequence[RecordedStep], now_s: float
) -> None:
    """Draw the levels of the items of each kind up to a moment, the first layer on top."""
    runs = [next(steps) for _, steps in itertools.groupby(past, key=lambda step: step.plan)]
    edges = [0.0, *(step.end_s for step in runs[1:]), now_s]
    plans = [item_levels(recording.plans[step.plan], recording.num_layers) for step in runs]
    for axis, kind in zip(axes, ("KV caches", "Attention", "FFN", "Embeddings"), strict=True):
        columns = [[to_rgb(LEVEL_COLOURS[level]) for level in plan[kind]] for plan in plans]
        rows = len(columns[0])
        colours = np.array(columns).swapaxes(0, 1)
        axis.pcolormesh(edges, np.arange(rows + 1), colours, shading="flat", rasterized=True)
        axis.set_ylim(rows, 0)
        axis.set_yticks([])
        axis.grid(False)
        axis.set_ylabel(kind, rotation=0, ha="right", va="center")


def program(config: Config, folder: Path) -> Path:
    """Record a run with the server's default policy, and draw it."""
    llm = shared_llm(config.model.name, dtype=config.model.dtype, weights=config.model.weights)
    recording = record(folder, llm, load_policy("knapsack", llm), config.demo)
    save_film(recording, folder / "live.gif")
    say(f"{recording.summary}\n{folder / 'live.gif'}")
    return folder


if __name__ == "__main__":
    launch("live", program)

"""Settings of the studies."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from experiments.config.common import TextConfig, parse_shape
from experiments.llama_cpp import FileKind
from rap_env.serving.settings import parse_bytes
from rap_env.specs import setting


@dataclass
class BudgetConfig:
    """Memory that other tenants of a machine leave free."""

    unit: str = setting("fraction", choices=("fraction", "bytes"))
    """What capacity, floor and sizes are: fractions of the native model's peak bytes at
    `replay.reference`, or bytes."""
    capacity: float = setting(1.05, above=0)
    """What is free without tenants."""
    floor: float = setting(0.74, above=0)
    """What is always left; tenants that would leave less are rejected."""
    sizes: list[float] = setting([0.05, 0.1, 0.15], distinct=True, above=0)
    """What a tenant takes is one of them."""
    arrivals_per_minute: float = setting(6.0, above=0)
    mean_stay_s: float = setting(15.0, above=0)
    seed: int = 0


@dataclass
class ReplayConfig:
    """An open-loop replay of the same arrivals on several systems.

    The defaults are one minute of synthetic traffic for each system, on the default model.
    """

    systems: list[str] = setting(["dense", "frontier", "rap-v0"], distinct=True)
    """Systems to run, in this order, with the same arrivals and budget: policies by their
    name or file, or ``uniform_native_LEVEL``, with all caches at one level."""
    trace: str | None = None
    """A CSV file with TIMESTAMP, ContextTokens and GeneratedTokens; null samples arrivals
    with the lengths of Azure's conversations."""
    minutes: float = setting(10.0, above=0)
    """Minutes of the trace to replay."""
    every: int = setting(75, low=1)
    """Keep one request out of this many."""
    time_scale: float = setting(10.0, above=0)
    """Seconds of trace time per second of the replay."""
    token_scale: float = setting(0.1, above=0)
    """Factor by which lengths are scaled."""
    max_prompt_tokens: int = setting(256, low=1)
    max_new_tokens: int = setting(32, low=1)
    text: TextConfig = field(
        default_factory=lambda: TextConfig(source="self", windows=4, window_tokens=64, seed=1)
    )
    """Text that prompts are cut from; the dense model writes this one within half a
    minute."""
    reference: str = setting("8x256", parse=parse_shape)
    """Batch x tokens: budget fractions refer to the dense model's peak bytes at this
    request."""
    max_batch_size: int = setting(8, low=1)
    queue_timeout_s: float = setting(30.0, above=0)
    """Seconds after which a waiting request times out."""
    prefill_chunk_tokens: int = setting(256, low=1)
    timing: str = setting("wall", choices=("wall", "cpu"))
    """Clock: ``wall`` time, or ``cpu`` time of the process, which other processes on the
    machine do not lengthen (CPU devices only)."""
    meter: str = setting("process", choices=("process", "tensors"))
    """What is measured: memory of the ``process``, or of weights and caches (``tensors``)."""
    mask_loss_windows: int = setting(2, low=1)
    """Windows of `text` on which ΔNLL of the used plans is measured."""


@dataclass
class ConversationsConfig:
    """What ``experiments.studies.replay.conversations`` serves, beside the trace of `replay`.

    Numbers of turns and of tokens of a message or an answer are means of Poisson
    distributions that begin at 1, seconds between turns those of an exponential one.
    """

    policy: str = "knapsack"
    """What `rap_env.load_policy` takes."""
    conversations: int = setting(10, low=1)
    turns: int = setting(4, low=1)
    system_tokens: int = setting(128, low=1)
    """Tokens with which all conversations begin."""
    message_tokens: int = setting(112, low=1)
    answer_tokens: int = setting(16, low=1)
    think_s: float = setting(30.0, above=0)
    """Seconds from an answer to the next message."""
    again_share: float = setting(0.15, low=0, high=1)
    """Share of the answers that are generated again."""
    held_share: float = setting(0.25, above=0)
    """The memory limit has room for the native model with the longest request, and for this
    share of all conversations natively."""
    fall_s: float = setting(50.0, low=0)
    """When the limit falls in a further run, to no room but that of the longest request."""
    return_s: float = setting(90.0, low=0)
    """When it returns."""


@dataclass
class CgroupConfig:
    """Settings of ``experiments.studies.replay.cgroup``: a server and a tenant in one cgroup."""

    systems: list[str] = setting(["rap"], choices=("rap", "rap_keep_off", "llama.cpp"))
    """Servers, one after the other."""
    llama_server: str = "llama-server"
    """llama.cpp's program."""
    turns: int = setting(1, low=1)
    """Of a conversation."""
    minutes: float = setting(5, low=0)


@dataclass
class EqualProcessConfig:
    """What ``experiments.studies.equal_process`` serves, on windows of ``evaluate.text``."""

    programs: str = "llama.cpp/build/bin"
    """Folder of llama.cpp's ``llama-server``, ``llama-quantize`` and ``llama-imatrix``."""
    files: list[str] = setting(["shipped f16"], distinct=True, parse=FileKind.of)
    """Files and caches of llama.cpp: ``[once] TYPE[/VOCABULARY] CACHE``."""
    limits: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits of the resident memory of a process, such as ``1.1GiB``."""
    rejected: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits in which ``rap serve`` rejects the request."""
    answer_tokens: int = setting(32, low=2)
    """Tokens that are generated after the rest of a window."""
    falling: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits that follow each other while one answer is generated."""
    step_s: float = setting(30.0, above=0)
    """CPU seconds of the server that each of them holds."""
    prompt_tokens: int = setting(512, low=1)
    """Tokens of the prompt of that answer."""

"""Settings of a server: what it serves, within which memory, and what it allows its clients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ServingSettingsError
from rap_env.request import parse_bytes
from rap_env.runtime.records import EngineSettings
from rap_env.specs import check, setting

MEMORY_SOURCES = ("auto", "cgroup", "cuda")
DEFAULT_MAX_DELTA_NLL = 0.1
"""Default floor of quality, nats per token.

At it, plans of the default model lose at most five points of accuracy on each of arc_easy,
piqa and hellaswag; one with 0.15 loses five on piqa (`docs/results/plan_tasks.md`).
"""
DEFAULT_MOST_DELTA_NLL = 0.3
"""What the default floor rises to while requests wait; see `PlanChooser.follow_queue`."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All settings of a server, with the text that ``rap serve --help`` shows of each.

    Raises:
        ServingSettingsError: A value has the wrong type or is out of range.
        UnknownNameError: A name is not among the known ones.
    """

    model: str = setting(
        "smollm2-135m", "An alias, a hub id, a folder or a GGUF file.", group="Model"
    )
    model_name: str | None = setting(
        None, "Name of the model for clients; none for that of --model, of a file without .gguf."
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16.")
    weights: str = setting(
        "native",
        "Format of the weights: native is that of the model's file, bf16 is unquantised.",
        choices=("native", "bf16"),
    )
    threads: int | None = setting(
        None,
        "Threads of torch, at most the number of CPUs; none for torch's own number.",
        low=1,
        high=os.cpu_count() or 1,
    )
    policy: str = setting(
        "knapsack",
        "Policy that chooses plans: levels (knapsack, rap, rap-recall) or masks (rap-v0, frontier, "
        "dense); another method, such as greedy_per_byte, on the packaged scores; or the path of "
        "an exported policy, of level costs or of a table of plans.",
        group="Quality",
    )
    max_delta_nll: float | str | None = setting(
        "auto",
        "Quality floor: the largest rise in NLL, in nats per token, that the policy may predict "
        "for a plan that serves. Requests that fit no such plan wait, and then get status 503. "
        "auto is 0.1 with policies that predict the rise, and 0.1 more for each request that "
        "waits, at most 0.3; none for no floor.",
        low=0,
        choices=("auto",),
    )
    allow_removal: bool = setting(
        False,
        "Remove blocks whose cost is not known where nothing else fits: knapsack then has no floor "
        "of quality, unless it is a number.",
    )
    prepare: str = setting(
        "on",
        "Whether a model without costs of levels is prepared: before it serves if it does not fit "
        "the limit as it is, else while it serves.",
        choices=("on", "off"),
    )
    memory: str | int = setting(
        "auto",
        "Memory limit: auto (free memory of the device or of the cgroup), cgroup, cuda, or bytes "
        "such as 2.5GiB: most resident memory of the whole process.",
        group="Memory",
    )
    model_memory: str | int | None = setting(
        None,
        "Instead of --memory, bytes for the model alone: weights, caches and working memory, such "
        "as 300MiB.",
    )
    memory_file: str | None = setting(
        None,
        "File with a size such as 300MiB: the new memory or model_memory (whichever is a number of "
        "bytes) whenever it changes.",
    )
    reserve: str | int = setting(
        "128MiB", "Bytes of the system to leave free, if the budget is its free memory."
    )
    residency: str = setting(
        "offload", "Where unused weights are kept.", choices=("offload", "drop")
    )
    keep: str = setting(
        "on",
        "Whether prompts and answers stay in memory that is free, so that requests that begin as "
        "they do are answered sooner.",
        choices=("on", "off"),
    )
    keep_delta_nll: float = setting(
        EngineSettings.keep_delta_nll,
        "Rise in NLL, in nats per token, by which what is kept may be worse than the plan of a "
        "request; 0 for only equal or better.",
        low=0,
    )
    keep_file_bytes: str | int = setting(
        0,
        "Bytes of temporary files, such as 2GiB, to which what is kept goes when it has no room in "
        "memory; 0 for no files.",
    )
    log_level: str = setting(
        "info",
        "Least level of log lines; info has a line per request and per change of the plan.",
        choices=("debug", "info", "warning", "error"),
        group="Log",
    )
    host: str = setting("127.0.0.1", "Address to listen at.", group="Address and access")
    port: int = setting(8000, "Port to listen at; 0 takes a free one.", low=0, high=65535)
    api_key_file: str | None = setting(
        None,
        "File of API keys, one per line, of which requests other than probes must send one as "
        "'Authorization: Bearer KEY'.",
    )
    insecure: bool = setting(False, "Serve without API keys at an address that others can reach.")
    cors_origin: str = setting(
        "localhost",
        "Web pages that may use the server: of localhost at any port, of one origin such as "
        "https://chat.example.org, or * for all.",
    )
    no_docs: bool = setting(
        False, "Answer /docs, which shows the API, and /openapi.json with status 404."
    )
    strict: bool = setting(
        False, "Reject fields that the server does not know, and other names of models."
    )
    max_batch_size: int = setting(8, "Most sequences in a batch.", low=1, group="Scheduling")
    max_queue: int = setting(512, "Most requests that wait; more get status 429.", low=1)
    queue_timeout_s: float | None = setting(
        600.0, "Seconds that a request may wait before it is rejected; none for ever.", above=0
    )
    max_seq_len_tokens: int | None = setting(
        None, "Most tokens of a prompt and its answer; none for the model's maximum.", low=1
    )
    prefill_chunk_tokens: int = setting(
        256, "Prompt tokens per step; smaller chunks delay running answers less.", low=1
    )
    max_new_tokens: int | None = setting(
        None,
        "Most tokens of an answer; none for what the context has left.",
        low=1,
        group="Limits of requests",
    )
    max_body_bytes: int | None = setting(
        None,
        "Most bytes of a request's body; none for 32 a token of the context, at least 256 KiB. "
        "All bodies together have at most 32 MiB.",
        low=1,
        group="Connections",
    )
    max_open_requests: int = setting(
        1024, "Most requests that are open at a time; more get status 503.", low=1
    )
    shutdown_grace_s: float = setting(
        10.0, "Seconds for running requests to finish when the server ends.", above=0
    )

    def __post_init__(self) -> None:
        check(self, ServingSettingsError, none="none")
        # Raise if they are no bytes.
        _ = self.process_bytes, self.model_bytes, self.reserve_bytes, self.most_file_bytes
        if self.model_memory is not None and self.memory != ServerSettings.memory:
            raise ServingSettingsError(
                f"Set either memory, for the whole process (now {self.memory}), or model_memory, "
                f"for the model alone (now {self.model_memory}), not both."
            )
        if self.memory_file is not None and not self.limits_bytes:
            raise ServingSettingsError(
                "memory_file needs memory or model_memory as a number of bytes, which says what "
                f"the size in the file limits and holds until the file exists, not {self.memory}."
            )

    @property
    def served_name(self) -> str:
        """Name of the model for clients; of a path its last part."""
        path = Path(self.model)
        own = path.stem if path.suffix == ".gguf" else path.name if path.exists() else self.model
        return self.model_name or own

    @property
    def may_prepare(self) -> bool:
        """Whether a model without costs of levels is prepared: with native weights, for costs."""
        return (self.prepare, self.policy, self.weights) == ("on", "knapsack", "native")

    @property
    def floor_if_predicted(self) -> float | None:
        """Quality floor with a policy that predicts the rise in NLL; None for none."""
        floor = DEFAULT_MAX_DELTA_NLL if self.max_delta_nll == "auto" else self.max_delta_nll
        return None if floor is None else float(floor)

    @property
    def process_bytes(self) -> int | None:
        """Most resident bytes of the process; None if that is not the limit."""
        return None if self.memory in MEMORY_SOURCES else parse_bytes("memory", self.memory)

    @property
    def model_bytes(self) -> int | None:
        """Bytes of the model alone; None if that is not the limit."""
        given = self.model_memory
        return None if given is None else parse_bytes("model_memory", given)

    @property
    def limits_bytes(self) -> bool:
        """Whether `memory` or `model_memory` is a number of bytes."""
        return (self.process_bytes, self.model_bytes) != (None, None)

    @property
    def reserve_bytes(self) -> int:
        """Bytes to leave free."""
        return parse_bytes("reserve", self.reserve)

    @property
    def most_file_bytes(self) -> int:
        """Most bytes of files with kept sequences."""
        return parse_bytes("keep_file_bytes", self.keep_file_bytes)

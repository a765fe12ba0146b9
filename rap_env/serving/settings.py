"""Settings of a server: what it serves, within which memory, and what it allows its clients."""

from __future__ import annotations

import inspect
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rap_env.errors import ServingSettingsError, check_name
from rap_env.extras import require_extra
from rap_env.specs import check, check_settings, settings_of

MEMORY_SOURCES = ("auto", "cgroup", "cuda")
DEFAULT_MAX_DELTA_NLL = 0.1
"""Default floor of quality, nats per token.

At it, plans of the default model lose at most five points of accuracy on each of arc_easy, piqa and
hellaswag; one with 0.15 loses five on piqa (`docs/results/plan_tasks.md`).
"""
DEFAULT_MOST_DELTA_NLL = 0.3
"""What the default floor rises to while requests wait; see `PlanChooser.follow_queue`."""
CHOICES = {
    "weights": ("native", "bf16", "int8", "int4"),
    "residency": ("resident", "offload", "drop"),
    "restore": ("refill", "next_request"),
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
}
"""Allowed values of settings that are names."""
SETTING_GROUPS = {
    "Model": "model",
    "Quality": "policy",
    "Memory": "memory",
    "Log": "decisions",
    "Address and access": "host",
    "Scheduling": "max_batch_size",
    "Limits of requests": "max_prompt_tokens",
    "Connections": "max_body_bytes",
}
"""Titles of groups of settings, each with the first of its settings in `ServerSettings`."""
_UNITS = {
    "": 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


def parse_bytes(name: str, text: str | int) -> int:
    """Convert ``"2.5GiB"``, ``"800 MB"`` or ``"1048576"`` to a number of bytes.

    Args:
        name: What error messages call the value.
        text: The text, or a number of bytes.

    Raises:
        ServingSettingsError: The text has another form.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or match[2] not in _UNITS:
        raise ServingSettingsError(
            f"{name} must be a number of bytes such as 2.5GiB, 800MB or 1048576, not {text!r}; "
            "instead of 200M, write 200MB or 200MiB."
        )
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All settings of a server.

    Attributes:
        model: Model to serve. An alias such as ``smollm2-135m``, a hub id, a folder or a GGUF file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        weights: Format of the weights. ``native`` (as the model's file has them), ``bf16``
            (unquantised), ``int8`` or ``int4``.
        repair: What stands in a removed block's place. ``none``, ``library`` (stubs that are
            fitted on generated text at the first use) or the path of a stub library.
        threads: Threads of torch. At most the number of CPUs; null for torch's own number.
        policy: Policy that chooses plans. Levels (``knapsack``, ``rap``, ``rap-recall``), levels by
            the text of the prompts (``knapsack-by-text``) or masks (``rap-v0``, ``frontier``,
            ``dense``); another method, such as ``greedy_per_byte``, on the packaged scores; or the
            path of an exported policy, of level costs, of costs by kind of text or of a table of
            plans.
        max_delta_nll: Quality floor, in nats per token. Largest rise in NLL that the policy may
            predict for a plan that serves. Requests that fit no such plan wait, and then get
            status 503. ``auto`` is 0.1 with policies that predict the rise, and 0.1 more for each
            request that waits, at most 0.3; no floor with other policies. null for no floor.
        min_quality_per_request: Strictest floor that a request may ask for. In its field
            ``max_delta_nll``, in nats per token; 0 allows the native plan alone. Null: none may.
        memory: Memory limit. ``auto`` (free memory of the device or of the cgroup), ``cgroup``,
            ``cuda``, or a number of bytes such as ``2.5GiB``: most resident memory of the whole
            process, with interpreter, libraries and server.
        model_memory: Memory limit of the model alone. Bytes for weights, caches and working memory,
            such as ``300MiB``; the rest of the process comes on top. null if `memory` is the limit.
        memory_file: File with a size that replaces the limit. Such as ``300MiB``, the new value of
            `memory` or `model_memory` (whichever is a number of bytes) whenever it changes; null
            for none.
        reserve: Bytes of the system to leave free. If the budget is its free memory; the last of
            it is used only where nothing runs otherwise.
        residency: Where unused weights are kept. ``resident``, ``offload`` or ``drop``.
        restore: How restored attention gets earlier tokens. ``refill`` or ``next_request``: whether
            it computes their KV cache again.
        decisions: File of the plan's changes. Each is appended as a JSON line; null for none.
        log_level: Least level of log lines. ``debug``, ``info`` (a line per request), ``warning``
            or ``error``.
        log_format: ``text``, or ``json`` for a JSON object per line.
        host: Address to listen at.
        port: Port to listen at. 0 takes a free one.
        api_key_file: File of API keys, one per line. Requests other than probes must send one of
            them as ``Authorization: Bearer KEY``. null for none.
        admin_key_file: File of the keys of administrators. In the format of `api_key_file`, for
            ``/admin/budget``; null for no such route. A key of a client is none of them.
        insecure: Whether to serve others without API keys. At an address that they can reach.
        ssl_certfile: File of the TLS certificate (PEM). With its chain; null for HTTP without TLS.
        ssl_keyfile: File of the certificate's private key. null if `ssl_certfile` holds it.
        model_name: Name that clients send as ``model``. null for `model`.
        max_batch_size: Most sequences in a batch.
        max_queue: Most requests that wait. More are rejected with status 429.
        queue_timeout_s: Seconds that a request may wait. Then it is rejected; null for never.
        max_seq_len_tokens: Most tokens of a prompt and its answer. null for the model's maximum.
        prefill_chunk_tokens: Prompt tokens per step. Smaller chunks delay running answers less.
        target_itl_s: Seconds between tokens to aim at. The mean of an answer while others' prompts
            are read: as many decode steps follow each chunk. A prompt waits longer for a lower one;
            while n more requests wait, it is 1 + n times as long. null for one step.
        max_prompt_tokens: Most tokens of a prompt. null for what fits the memory budget alone,
            within the floor of quality.
        max_new_tokens: Most tokens that a request may ask for.
        default_chat_tokens: Most tokens of a chat answer by default. If the request sets no number.
        max_choices: Most answers to one request (prompts x ``n``).
        max_body_bytes: Most bytes of a request body. With `max_connections` it bounds the memory
            that requests take in addition to the model's budget.
        max_connections: Most open connections. More are rejected with status 503.
        header_timeout_s: Seconds until a header must be complete.
        body_timeout_s: Seconds until a body must be complete.
        write_timeout_s: Seconds that an answer may stay unread. Then its connection is closed; it
            holds no memory of the model meanwhile.
        shutdown_grace_s: Seconds to finish when the server ends. For running requests.

    Raises:
        ServingSettingsError: A value has the wrong type or is out of range.
        UnknownNameError: A name is not among the known ones.
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "native"
    repair: str = "none"
    threads: int | None = None
    policy: str = "knapsack"
    max_delta_nll: float | str | None = "auto"
    min_quality_per_request: float | None = None
    memory: str | int = "auto"
    model_memory: str | int | None = None
    memory_file: str | None = None
    reserve: str | int = "128MiB"
    residency: str = "offload"
    restore: str = "refill"
    decisions: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    admin_key_file: str | None = None
    insecure: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    model_name: str | None = None
    max_batch_size: int = 8
    max_queue: int = 64
    queue_timeout_s: float | None = 120.0
    max_seq_len_tokens: int | None = None
    prefill_chunk_tokens: int = 256
    target_itl_s: float | None = 0.1
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 2048
    default_chat_tokens: int = 256
    max_choices: int = 8
    max_body_bytes: int = 256 * 1024
    max_connections: int = 128
    header_timeout_s: float = 20.0
    body_timeout_s: float = 20.0
    write_timeout_s: float = 60.0
    shutdown_grace_s: float = 10.0

    def __post_init__(self) -> None:
        check(self, ServingSettingsError, none="null")
        for name, types in setting_types().items():
            value = getattr(self, name)
            if name in CHOICES:
                check_name(name, value, CHOICES[name])
            if name == "port" and not 0 <= value <= 65535:
                raise ServingSettingsError(f"port must be from 0 to 65535, not {value}.")
            if name.endswith("_s") and value is not None and not value > 0:
                raise ServingSettingsError(f"{name} must be above 0 seconds, not {value}.")
            if types[0] is int and name != "port" and value is not None and value < 1:
                raise ServingSettingsError(f"{name} must be at least 1, not {value}.")
        if isinstance(self.max_delta_nll, str) and self.max_delta_nll != "auto":
            raise ServingSettingsError(
                f"max_delta_nll must be 'auto', null or a number, not {self.max_delta_nll!r}."
            )
        for name in ("max_delta_nll", "min_quality_per_request"):
            rise = getattr(self, name)
            if rise not in (None, "auto") and not 0 <= rise < math.inf:
                raise ServingSettingsError(
                    f"{name} must be at least 0 nats per token and finite, not {rise}."
                )
        floor, strictest = self.floor_if_predicted, self.min_quality_per_request
        if floor is not None and strictest is not None and strictest > floor:
            raise ServingSettingsError(
                f"min_quality_per_request must be at most max_delta_nll ({floor}), so that a "
                f"request can ask for a stricter floor, not {strictest}."
            )
        if self.threads is not None and self.threads > (cpus := os.cpu_count() or 1):
            raise ServingSettingsError(
                f"threads must be at most {cpus}, the number of CPUs, not {self.threads}."
            )
        _ = self.process_bytes, self.model_bytes, self.reserve_bytes  # raise if they are no bytes
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

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ServerSettings:
        """Make settings of names and values, such as a file holds.

        Raises:
            UnknownNameError: A name is not a setting; the message lists the settings.
            ServingSettingsError: A value has the wrong type or is out of range.
        """
        check_settings(values, "the server", setting_types())
        return cls(**values)

    @property
    def served_name(self) -> str:
        """Name that clients send as ``model``."""
        return self.model_name or self.model

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


def setting_types() -> dict[str, tuple[type, ...]]:
    """Types that each setting accepts, by its name."""
    return {name: entry.types for name, entry in settings_of(ServerSettings).items()}


def setting_help() -> dict[str, str]:
    """Description of each setting, by its name, from the docstring of `ServerSettings`."""
    text = inspect.getdoc(ServerSettings) or ""  # without indentation, which Python 3.13 drops
    text = text.partition("Attributes:")[2].partition("Raises:")[0]
    described = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words).replace("`", "") for name, words in described}


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read names and values from a YAML (``.yaml``, ``.yml``) or TOML (``.toml``) file.

    Raises:
        ServingSettingsError: The file does not exist, has another suffix or is not valid.
    """
    require_extra("serve", "A file of settings")
    import yaml

    parsers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
    }
    if path.suffix not in parsers:
        raise ServingSettingsError(
            f"{path} must have the suffix .yaml, .yml or .toml, not {path.suffix!r}."
        )
    try:
        values = parsers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServingSettingsError(f"Cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError may be a TOMLDecodeError or a UnicodeDecodeError.
        reason = " ".join(str(error).split())
        raise ServingSettingsError(f"{path} is not valid {path.suffix[1:]}: {reason}.") from None
    if not isinstance(values, dict | None):
        raise ServingSettingsError(
            f"{path} must hold settings as 'name: value', not a {type(values).__name__}."
        )
    return values or {}

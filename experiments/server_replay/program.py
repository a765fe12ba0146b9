"""``python -m experiments.server_replay``: play the same arrivals against several servers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.config.servers import ServerReplayConfig
from experiments.errors import ExperimentError
from experiments.replay.outcomes import loss_fields, percentile_fields
from experiments.replay.quality import OutputQuality, QualityEvaluator
from experiments.replay.workload import make_workload
from experiments.server_replay.client import Answer, Client
from experiments.server_replay.processes import Sample, ServerProcess
from experiments.server_replay.records import ServerReplayRow
from experiments.server_replay.systems import System, Systems
from experiments.server_replay.tables import server_replay_markdown, server_replay_text
from experiments.study.records import RowFile, row_key, write_records
from experiments.study.run_folder import RunFolder
from experiments.study.run_folder import provenance as run_provenance
from experiments.study.tables import mebibytes, publish_tables
from rap_env.serving.prompts import stop_tokens
from rap_env.serving.settings import parse_bytes

log = logging.getLogger(__name__)

FILE, REFERENCES, REQUESTS = "server_replay.jsonl", "references.jsonl", "requests"

_FREE = ("systems", "budgets", "llama_server")
"""Settings that may change when a replay is resumed."""
_ARRIVALS = (
    "trace", "traffic", "arrivals_per_minute", "minutes", "every", "time_scale", "token_scale",
    "new_token_scale", "max_prompt_tokens", "max_new_tokens", "text", "known_share", "known_task",
)  # fmt: skip
"""Settings of the section ``replay`` that the arrivals depend on."""


def server_replay(config: Config, folder: Path) -> Path:
    """Run every system within every budget; those with a row already are not run again.

    The tables are of all rows in the folder.

    Returns:
        The path of ``server_replay.jsonl``.

    Raises:
        ExperimentError: llama.cpp's server is wanted, and it is not installed.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports each request
    systems = Systems(config, folder)
    run, started = RunFolder(folder), time.monotonic()
    own = [f"server_replay.{f.name}" for f in fields(ServerReplayConfig) if f.name not in _FREE]
    arrivals = [f"replay.{name}" for name in _ARRIVALS]
    run.start(config, frozen=("model", "seed", *own, *arrivals))
    ServerReplay(config, folder, systems).run()
    rows = ServerReplayRow.read(folder / FILE)
    run.finish(started, rows=len(rows))
    publish_tables(folder, server_replay_markdown(rows), server_replay_text(rows))
    return folder / FILE


class ServerReplay:
    """What all runs share: the model that judges answers, and the requests."""

    def __init__(self, config: Config, folder: Path, systems: Systems) -> None:
        from rap_env.models.files.loading import load_llm

        self._config, self._folder, self._systems = config, folder, systems
        model = config.model
        self._llm = load_llm(model.name, device="cpu", dtype=model.dtype, weights=model.weights)
        self.workload = make_workload(config, self._llm)
        systems.open(self._llm, self.workload)
        self._evaluator = QualityEvaluator(
            self._llm, self.workload, folder / REFERENCES, progress=config.progress
        )

    def run(self) -> None:
        """Append a row for each budget and system that has none."""
        file = RowFile(self._folder / FILE, ServerReplayRow)
        settings = self._config.server_replay
        for number, text in enumerate(settings.budgets):
            budget_bytes = parse_bytes("server_replay.budgets", text)
            for name in settings.systems[:: -1 if number % 2 else 1]:
                provenance = self._provenance(name)
                run = partial(self._run, name, budget_bytes, provenance)
                file.get(row_key(name, budget_bytes, provenance), run)

    def _run(self, name: str, budget_bytes: int, provenance: dict[str, Any]) -> ServerReplayRow:
        settings, requests = self._config.server_replay, self.workload.requests
        system, error = System([], [], ""), None
        answers = [Answer(request, "refused", reason="no server") for request in requests]
        samples: Sequence[Sample] = ()
        began_s = ended_s = 0.0
        try:
            system = self._systems.system(name, budget_bytes)
            with ServerProcess(system.command, system.ready) as server:
                client = Client(
                    server.url, settings.timeout_s, stop_tokens(self._llm, self._llm.tokenizer)
                )
                began_s = time.monotonic()
                answers = client.play(requests)
                ended_s = time.monotonic()
            samples = server.sampler.samples
        except ExperimentError as failed:
            error = str(failed)
        qualities = self._judge(answers)
        self._write_requests(f"{name}-{budget_bytes}", answers, qualities)
        row = make_row(
            name, budget_bytes, system, error, answers, qualities, samples,
            (began_s, ended_s), provenance,
        )  # fmt: skip
        log.info(
            "%s within %s: %d of %d requests served, peak %s%s",
            name, mebibytes(budget_bytes), row.served, row.requests, mebibytes(row.peak_bytes),
            f" ({error})" if error else "",
        )  # fmt: skip
        return row

    def _judge(self, answers: Sequence[Answer]) -> dict[int, tuple[OutputQuality, int]]:
        """Return quality and length in tokens of each served answer, by number of its request.

        The text is tokenised again, since not every server gives the ids of its tokens.
        """
        found = {}
        for answer in answers:
            ids = self._llm.tokenizer(answer.text, add_special_tokens=False).input_ids
            if answer.outcome == "served" and ids:
                quality = self._evaluator.evaluate(answer.request, ids)
                found[answer.request.number] = quality, len(ids)
        return found

    def _write_requests(
        self,
        name: str,
        answers: Sequence[Answer],
        qualities: dict[int, tuple[OutputQuality, int]],
    ) -> None:
        records = []
        for answer in answers:
            request = answer.request
            record = {
                "number": request.number, "arrived_s": round(request.time_s, 4),
                "prompt_tokens": len(request.prompt_ids), "new_tokens": request.new_tokens,
                "outcome": answer.outcome, "reason": answer.reason, "tokens": answer.tokens,
                "ttft_s": answer.first_s, "tpot_s": answer.tpot_s,
            }  # fmt: skip
            if request.number in qualities:
                quality, length = qualities[request.number]
                record |= {"loss": round(quality.delta_nll, 4), "same": quality.same,
                           "tokenised": length}  # fmt: skip
            records.append(record)
        write_records(self._folder / REQUESTS / f"{name}.jsonl", records)

    def _provenance(self, name: str) -> dict[str, Any]:
        """Describe what the rows of a system depend on, and what made them."""
        config = self._config
        values = asdict(config.server_replay)
        depends_on = {
            "model": Path(config.model.name).name,
            "model_fingerprint": self._llm.facts.fingerprint,
            "dtype": self._llm.facts.dtype,
            "load_sha256": self.workload.provenance["sha256"],
            "settings": {key: value for key, value in values.items() if key not in _FREE},
            "llama_cpp": None if name == "rap" else self._systems.llama_version,
        }
        made = run_provenance({"server_replay": config.seed})
        return {"depends_on": depends_on, "load": self.workload.provenance, **made}


def make_row(
    name: str,
    budget_bytes: int,
    system: System,
    error: str | None,
    answers: Sequence[Answer],
    qualities: dict[int, tuple[OutputQuality, int]],
    samples: Sequence[Sample],
    span: tuple[float, float],
    provenance: dict[str, Any],
) -> ServerReplayRow:
    """Make the row of one run.

    Args:
        name: The system.
        budget_bytes: Its budget.
        system: Its options.
        error: Why it did not start; None if it did.
        answers: What became of each request.
        qualities: Quality and length in tokens of served answers, by number of the request.
        samples: Samples of the server's process.
        span: Start and end of the arrivals and answers, of `time.monotonic`.
        provenance: What the row depends on.
    """
    done = [answer for answer in answers if answer.outcome == "served"]
    counts = Counter(answer.outcome for answer in answers)
    ttft = [answer.first_s for answer in done if answer.first_s is not None]
    tpot = [answer.tpot_s for answer in done if answer.tpot_s is not None]
    ends = [a.request.time_s + a.last_s for a in done if a.last_s is not None]
    duration = max(ends, default=0.0) - (answers[0].request.time_s if ends else 0.0)
    tokens = sum(answer.tokens for answer in done)
    before = [s for s in samples if s.time_s < span[0]]
    within = [s for s in samples if span[0] <= s.time_s <= span[1]]
    found = list(qualities.values())
    length = sum(count for _, count in found)
    return ServerReplayRow(
        system=name,
        budget_bytes=budget_bytes,
        options=system.options,
        startup_error=error,
        context_tokens=system.context_tokens,
        trial_starts=system.trial_starts,
        model_bytes=system.model_bytes,
        requests=len(answers),
        served=len(done),
        refused=counts["refused"],
        timed_out=counts["timed_out"],
        failed=counts["failed"],
        reasons=dict(Counter(a.reason for a in answers if a.outcome != "served")),
        peak_bytes=max((sample.resident for sample in samples), default=0),
        ready_bytes=before[-1].resident if before else 0,
        samples=len(samples),
        samples_over=sum(sample.resident > budget_bytes for sample in samples),
        **percentile_fields("ttft", ttft),
        **percentile_fields("tpot", tpot),
        tokens=tokens,
        tokens_per_s=tokens / duration if duration else 0.0,
        duration_s=duration,
        cpu_s=within[-1].cpu_s - within[0].cpu_s if within else 0.0,
        **loss_fields([quality for quality, _ in found]),
        same_fraction=sum(quality.same for quality, _ in found) / length if length else None,
        provenance=provenance,
    )

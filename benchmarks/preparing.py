"""What preparing a model takes, and what its plans lose: ``python -m benchmarks.preparing``.

The model is prepared as `rap prepare` does it, unless it was before. Then the knapsack over its
costs chooses a plan for each budget, and the rise in NLL is measured on texts of several kinds,
none of which levels or costs were made with. What preparing takes is recorded where the cache was
empty (`RAP_CACHE_DIR=FOLDER` names another one).
"""

from __future__ import annotations

import resource
import sysconfig
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import ModelSettings, target, write_record
from experiments.study.console import run_with_settings
from rap_env.importance.preparation import prepare
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer

CODE_FILE = "argparse.py"
"""File of Python's standard library that is measured as code."""
_PROCESSES = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
_NOTICED = 0.02  # rise in NLL, nats per token, above which a prediction is judged


@dataclass
class PreparingSettings(ModelSettings):
    """Settings of this benchmark."""

    thorough: bool = False
    """Whether levels are made by GPTQ."""
    memory_mib: float | None = None
    """Most resident memory of preparing, as ``rap prepare --memory``; null for no limit."""
    budgets_mib: list[float] = field(default_factory=lambda: [110.0, 100.0, 90.0, 80.0])
    tokens: int = 1024
    """Tokens of the request, whose batch size is 1."""
    windows: int = 4
    window_tokens: int = 512
    data_root: str | None = None
    """Folder with ``wikitext/validation.jsonl`` and ``gsm8k/test.jsonl``; null: code alone."""


def main(settings: PreparingSettings) -> None:
    """Prepare, measure, and write the record."""
    began, began_cpu_s = time.time(), spent_cpu_s()
    costs, path = prepare(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        thorough=settings.thorough,
        memory_bytes=None if settings.memory_mib is None else round(settings.memory_mib * 2**20),
    )
    taken = None
    if path.stat().st_mtime > began:
        taken = {
            "seconds": costs.seconds,
            "cpu_s": spent_cpu_s() - began_cpu_s,
            "peak_bytes": most_bytes(),
        }
    llm = load_llm(settings.model, device=settings.device, dtype=settings.dtype, quick_levels=True)
    policy = load_policy("knapsack", llm)
    scorers = text_scorers(settings, llm)
    native = {kind: scorer.nll(Plan()) for kind, scorer in scorers.items()}
    levels, rows = "thorough" if settings.thorough else "quick", list[dict[str, Any]]()
    limit = "" if settings.memory_mib is None else f"_within_{settings.memory_mib:.0f}_mib"
    for budget_mib in settings.budgets_mib:
        request = Request(1, settings.tokens, round(budget_mib * 2**20))
        plan = policy.choose(request)
        rises = {kind: scorer.nll(plan) - native[kind] for kind, scorer in scorers.items()}
        rows.append(
            {
                "budget_mib": budget_mib,
                "plan": plan.to_json(),
                "predicted": costs.delta_nll(plan, settings.tokens),
                "delta_nll": rises,
            }
        )
    targets = [
        target(
            f"of the rise on the worst kind of text is predicted, {row['budget_mib']:,.0f} MiB",
            row["predicted"] / max(row["delta_nll"].values()),
            at_least=0.67,
            at_most=1.5,
            against=f"{llm.name}, {levels} levels",
        )
        for row in rows
        if max(row["delta_nll"].values()) >= _NOTICED
    ]
    write_record(
        f"preparing_{levels}_{llm.name}{limit}",
        settings,
        targets,
        device=str(llm.device),
        model=llm.name,
        levels=levels,
        taken=taken,
        native_peak_bytes=MemoryModel(llm.facts).native_peak_bytes(1, settings.tokens),
        native_nll=native,
        plans=rows,
    )


def spent_cpu_s() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in _PROCESSES]
    return sum(each.ru_utime + each.ru_stime for each in used)


def most_bytes() -> int:
    """Most resident bytes of this process, and of the largest that it started, together."""
    return sum(resource.getrusage(who).ru_maxrss * 1024 for who in _PROCESSES)


def text_scorers(settings: PreparingSettings, llm: ElasticLLM) -> dict[str, PlanScorer]:
    """What measures plans on each kind of text."""
    code = Path(sysconfig.get_path("stdlib")) / CODE_FILE
    texts = {"code": CorpusConfig(str(code), role="report")}
    if settings.data_root is not None:
        root = Path(settings.data_root)
        articles, chats = root / "wikitext" / "validation.jsonl", root / "gsm8k" / "test.jsonl"
        texts["articles"] = CorpusConfig(str(articles), field="page", role="report")
        texts["chat"] = CorpusConfig(str(chats), field="question+answer", role="report")
    texts = {
        kind: replace(text, windows=settings.windows, window_tokens=settings.window_tokens)
        for kind, text in texts.items()
    }
    return {kind: PlanScorer(llm, load_corpus(text, llm)) for kind, text in texts.items()}


if __name__ == "__main__":
    run_with_settings(PreparingSettings, main)

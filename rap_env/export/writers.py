"""Write a model under a plan for an engine, with its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.artifacts import atomic_write
from rap_env.blocks import block_name
from rap_env.errors import InvalidRequestError
from rap_env.export.gguf_export import check_stubs, export_gguf
from rap_env.export.gguf_model import GgufModel
from rap_env.export.llama_cpp import cache_flags, cache_type
from rap_env.export.model_card import ModelCard, licence_of
from rap_env.export.wanted import Chosen, Wanted
from rap_env.memory import MemoryModel
from rap_env.model_facts import ModelFacts
from rap_env.models.files.pruned_checkpoint import save_pruned, stubs_in_place
from rap_env.models.files.vllm_config import vllm_entries
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer

_MEASURED_WINDOWS, _MEASURED_TOKENS = 4, 256


@dataclass(frozen=True)
class Export:
    """What a user asks to write.

    Attributes:
        wanted: The plan.
        out: The folder or file to write.
        command: The command, for the card.
        measure: The text to measure the rise in NLL on, or None.
        gguf_file: The GGUF file that the model comes from, or None.
    """

    wanted: Wanted
    out: Path
    command: str
    measure: str | None = None
    gguf_file: Path | None = None


def write_folder(llm: ElasticLLM, export: Export, *, for_vllm: bool = False) -> dict[str, Any]:
    """Write a folder that transformers opens, and return what the command answers.

    Args:
        llm: The model.
        export: What to write.
        for_vllm: Check that vLLM opens it too.

    Raises:
        InvalidRequestError: The plan lowers levels.
        UnsupportedModelError: vLLM cannot serve the model or the plan.
    """
    chosen, facts = export.wanted.choose(MemoryModel(llm)), llm.facts
    plan = chosen.plan
    if not plan.is_mask:
        raise InvalidRequestError(
            "A folder for transformers has unquantised weights and native caches, so each block is "
            f"native or removed, but the plan has other levels ({plan}); name the blocks, or "
            "choose another policy, such as 'frontier'."
        )
    if for_vllm:
        removed = plan.mask.without(*llm.pruned.removed)
        with llm.masked(plan.mask):
            has_stubs = any(True for _ in stubs_in_place(llm))
        vllm_entries(llm.adapter, removed, stubs=has_stubs)
    sizes, stubs = facts.block_param_bytes, facts.stub_bytes or (0,) * facts.num_blocks
    before = facts.base_bytes + sum(sizes)
    after = before - sum(sizes[i] - stubs[i] for i in plan.removed)
    card = _card(
        export, facts, chosen, "vLLM" if for_vllm else "transformers", (before, after), llm,
        use=(f"`vllm serve {export.out.name} --trust-remote-code`, " if for_vllm else "")
        + "`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or "
        "`rap_env.load_llm(FOLDER)`.",
    )  # fmt: skip
    save_pruned(llm, plan.mask, export.out, readme=card.text)
    return _answer(export, facts, card)


def write_gguf(facts: ModelFacts, export: Export, llm: ElasticLLM | None) -> dict[str, Any]:
    """Write a GGUF file for llama.cpp with its card beside it, and return the command's answer.

    Args:
        facts: Facts of the model.
        export: What to write; with `gguf_file` its tensors are copied.
        llm: The live model; it may be left out if there is a GGUF file and neither a text to
            measure on nor stubs.

    Raises:
        UnsupportedModelError: llama.cpp cannot compute the model, the layout or the levels.
    """
    deployment = export.wanted.deployment(MemoryModel(facts))
    if deployment is None:
        chosen = export.wanted.choose(MemoryModel(facts))
    else:
        kept = deployment.mask
        chosen = Chosen(kept, deployment.delta_nll, deployment.source)
    plan = chosen.plan if llm is None else chosen.plan.without(*llm.pruned.removed)
    if export.gguf_file is not None:
        model = GgufModel.of_file(export.gguf_file)
    else:
        assert llm is not None
        model = GgufModel.of_llm(llm)
    means = {} if llm is None else _means(llm, plan)
    before = sum(tensor.nbytes for tensor in model.tensors.values())
    after = export_gguf(model, plan, export.out, means)
    if deployment is None:
        caches = cache_type(plan, model.num_layers)
        flags = cache_flags(caches)
    else:
        caches, flags = deployment.cache.name, deployment.flags
    card = _card(
        export, facts, chosen, "llama.cpp", (before, after), llm,
        use=f"`llama-server -m {export.out.name} {flags}`",
    )  # fmt: skip
    with atomic_write(export.out.with_suffix(".md")) as file:
        file.write(card.text.encode())
    return _answer(export, facts, card) | {"cache_type": caches}


def measured_rise(llm: ElasticLLM, plan: Plan, source: str) -> tuple[float, str]:
    """The rise in NLL under a plan on a text, in nats per token, and the text in words.

    Args:
        llm: The model.
        plan: The plan.
        source: The text; see `rap_env.scoring.corpus.CorpusConfig`.

    Raises:
        CorpusError: There is no such text, or it is too short.
    """
    tokens = min(_MEASURED_TOKENS, llm.adapter.max_positions)
    config = CorpusConfig(source, _MEASURED_WINDOWS, tokens, role="report")
    scorer = MaskScorer(llm, load_corpus(config, llm))
    rise = scorer.nll(plan) - scorer.nll(Plan())
    return rise, f"{_MEASURED_WINDOWS} x {tokens} tokens of {Path(source).name}"


def _means(llm: ElasticLLM, removed: Plan) -> dict[int, Any]:
    """The means in the place of removed blocks, (H,), by index."""
    with llm.masked(removed):
        stubs = {index: stub for index, _, stub in stubs_in_place(llm)}
    check_stubs({block_name(index): stub.rank for index, stub in stubs.items()})
    return {i: np.asarray(stub.mean.detach().float().cpu()) for i, stub in stubs.items()}


def _card(
    export: Export,
    facts: ModelFacts,
    chosen: Chosen,
    target: str,
    sizes: tuple[int, int],
    llm: ElasticLLM | None,
    use: str,
) -> ModelCard:
    measured = None
    if export.measure is not None:
        assert llm is not None
        measured = measured_rise(llm, chosen.plan, export.measure)
    return ModelCard(
        model=facts.name,
        fingerprint=facts.fingerprint,
        target=target,
        plan=chosen.plan,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        predicted=(chosen.rise, chosen.source),
        measured=measured,
        licence=licence_of(None if llm is None else llm.folder, export.gguf_file),
        command=export.command,
        use=use,
    )


def _answer(export: Export, facts: ModelFacts, card: ModelCard) -> dict[str, Any]:
    rise, source = card.predicted
    return {
        "model": facts.name,
        "dtype": facts.dtype,
        "out": str(export.out),
        "removed": list(card.plan.removed_names),
        "levels": card.plan.levels,
        "weight_bytes_before": card.bytes_before,
        "weight_bytes_after": card.bytes_after,
        "delta_nll": rise,
        "delta_nll_source": source,
        "measured_delta_nll": None if card.measured is None else card.measured[0],
    }

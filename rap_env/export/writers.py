"""Write a model under a plan for an engine, with its model card."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rap_env.artifacts import atomic_write
from rap_env.errors import InvalidRequestError, UnsupportedModelError
from rap_env.export.gguf_export import (
    GgufModel,
    cache_type,
    export_gguf,
    low_bit_tensors,
    server_flags,
)
from rap_env.export.plan_options import ChosenPlan, PlanOptions
from rap_env.extras import package_versions
from rap_env.levels import WeightLevel
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.models.files.gguf_conversion import GgufFile
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned, vllm_entries
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.plan import Plan
from rap_env.policies.loading import uniform_policy
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from rap_env.version import __version__

UNKNOWN_LICENCE = "unknown"
"""Licence of a base model whose files name none."""

_PACKAGES = ("torch", "transformers", "gguf")
_MEASURED_WINDOWS, _MEASURED_TOKENS = 4, 256


_CARD = """---
license: {licence}
---
# {model} under a plan, for {target}

| | |
|---|---|
| Base model | {model} |
| Its fingerprint | {fingerprint} |
| Its licence | {licence} |
| Weights | {weights} |
| Rise in NLL, predicted | {predicted} ({delta_nll_source}) |
| Rise in NLL, measured | {measured} |
| Command | `{command}` |
| Versions | {versions} |

## Use

{use}

## Plan

Each item of the base model that is not native, and its level:

```json
{plan}
```
"""
"""The card of an exported model; model hubs read its head."""


@dataclass(frozen=True)
class Export:
    """What a user asks to write.

    Attributes:
        options: The plan, or how it is chosen.
        out: The folder or file to write.
        command: The command, for the card.
        measure: The text to measure the rise in NLL on, or None.
        gguf_file: The GGUF file that the model comes from, or None.
    """

    options: PlanOptions
    out: Path
    command: str
    measure: str | None = None
    gguf_file: Path | None = None


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the answer of the command, and the card beside the model.

    Attributes:
        export: What the user asked for.
        facts: Facts of the base model.
        chosen: The plan, in the items of the base model.
        target: The engine that the export is for.
        before: Bytes of the base model's weights.
        after: Bytes of the exported ones.
        measured: The measured rise in NLL and its text, or None.
    """

    export: Export
    facts: ModelFacts
    chosen: ChosenPlan
    target: str
    before: int
    after: int
    measured: tuple[float, str] | None

    @property
    def answer(self) -> dict[str, Any]:
        """What the command answers."""
        after, file = self.after, self.export.gguf_file
        weights = f"{after:,} bytes, {100 * after / self.before:.1f} % of {self.before:,}"
        if file is not None and self.target != "llama.cpp":
            file_mb = file.stat().st_size / 1e6
            weights += f"; unquantised: {after / 1e6:.0f} MB from a file of {file_mb:.0f} MB"
        return {
            "model": self.facts.name,
            "dtype": self.facts.dtype,
            "out": str(self.export.out),
            "removed": list(self.chosen.plan.removed_names),
            "levels": self.chosen.plan.levels,
            "weight_bytes_before": self.before,
            "weight_bytes_after": after,
            "weights": weights,
            "delta_nll": self.chosen.rise,
            "delta_nll_source": self.chosen.source,
            "measured_delta_nll": None if self.measured is None else self.measured[0],
        }

    def card(self, licence: str, use: str) -> str:
        """The model's card.

        Args:
            licence: The base model's.
            use: Markdown on how to use it.
        """
        rise, measured = self.chosen.rise, "not measured; `rap export --measure TEXT` does"
        if self.measured is not None:
            measured = "{:+.4f} nats/token on {}".format(*self.measured)
        versions = {"rap-env": __version__, "python": platform.python_version()}
        versions |= package_versions(_PACKAGES)
        return _CARD.format(
            **self.answer,
            target=self.target,
            licence=licence,
            fingerprint=self.facts.fingerprint or "not computed",
            predicted="unknown" if rise is None else f"{rise:+.4f} nats/token",
            measured=measured,
            command=self.export.command,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            use=use,
            plan=self.chosen.plan.to_json(),
        )


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
    chosen, facts = export.options.choose(MemoryModel(llm)), llm.facts
    plan = chosen.plan
    if not plan.is_mask:
        raise InvalidRequestError(
            "A folder for transformers has unquantised weights and native caches, so each block is "
            f"native or removed, but the plan has other levels ({plan}); name the blocks, or "
            "choose another policy, such as 'frontier'."
        )
    if for_vllm:
        vllm_entries(llm.adapter, plan.without(*llm.pruned.removed))
    sizes = facts.block_param_bytes
    before = facts.base_bytes + sum(sizes)
    after = before - sum(sizes[index] for index in plan.removed)
    target, measured = "vLLM" if for_vllm else "transformers", measured_rise(llm, plan, export)
    result = ExportResult(export, facts, chosen, target, before, after, measured)
    use = (
        "`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or "
        "`rap_env.load_llm(FOLDER)`."
    )
    if for_vllm:
        use = f"`vllm serve {export.out.name} --trust-remote-code`, {use}"
    licence = licence_of(llm.folder, export.gguf_file)
    save_pruned(llm, plan, export.out, readme=result.card(licence, use))
    return result.answer


def exportable(name: str, gguf_file: Path | None) -> GgufModel:
    """The model to write a GGUF file of; call it before the model is loaded.

    Args:
        name: The model's name.
        gguf_file: The GGUF file that it comes from, or None.

    Raises:
        UnsupportedModelError: It comes from no GGUF file, or llama.cpp cannot compute it.
    """
    if gguf_file is None:
        raise UnsupportedModelError(
            f"A file for llama.cpp is made from a GGUF file, and {name} is no model from one: "
            "convert it with llama.cpp's convert_hf_to_gguf.py first, and give that file as the "
            "model (the default model, smollm2-135m, is one)."
        )
    return GgufModel.of_file(gguf_file)


def write_gguf(
    model: GgufModel, facts: ModelFacts, export: Export, llm: ElasticLLM | None
) -> dict[str, Any]:
    """Write a GGUF file for llama.cpp with its card beside it, and return the command's answer.

    Args:
        model: The model, from `exportable`.
        facts: Facts of the model.
        export: What to write; the tensors of its `gguf_file` are copied.
        llm: The live model; it may be left out without a text to measure on.

    Raises:
        UnsupportedModelError: llama.cpp cannot compute the layout or the levels.
    """
    options, memory = export.options, MemoryModel(facts)
    # llama.cpp has one level for all caches, as this policy does.
    chosen = options.choose(memory, uniform_policy(memory))
    caches = cache_type(chosen.plan, facts.num_layers)
    flags = server_flags(caches, options.request)
    lowered = not chosen.plan.weight_levels.isdisjoint(LOW_BIT_FORMATS)
    if llm is None and lowered:
        assert export.gguf_file is not None
        llm = load_llm(
            export.gguf_file, weights="native", quick_levels=True
        )  # it makes these levels
        facts = replace(llm.facts, name=facts.name)
    plan = chosen.plan if llm is None else chosen.plan.without(*llm.pruned.removed)
    if llm is not None and lowered:
        model = replace(model, low_bits=low_bit_tensors(llm, plan))
    before = sum(tensor.nbytes for tensor in model.tensors.values())
    written = export_gguf(model, plan, export.out)
    after = sum(tensor.nbytes for tensors in written.values() for tensor in tensors)
    measured = None if llm is None else measured_rise(llm, chosen.plan, export)
    result = ExportResult(export, facts, chosen, "llama.cpp", before, after, measured)
    licence = str(model.entries.get("general.license", (UNKNOWN_LICENCE,))[0])
    card = result.card(licence, f"`llama-server -m {export.out.name} {flags}`")
    types: dict[str, dict[str, Any]] = {
        level: {
            "types": sorted({tensor.kind.name for tensor in tensors if tensor.data.ndim > 1}),
            "bytes": sum(tensor.nbytes for tensor in tensors),
            "plan_bytes": _plan_bytes(facts, plan, level),
        }
        for level, tensors in written.items()
        if level in plan.weight_levels
    }
    card += "".join(f"\n{line}\n" for line in type_lines(types))
    with atomic_write(export.out.with_suffix(".md")) as file:
        file.write(card.encode())
    return result.answer | {"cache_type": caches, "written": types}


def type_lines(written: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each level that a file has in a type of llama.cpp, with the bytes of both."""
    for level, sizes in written.items():
        more = sizes["bytes"] - sizes["plan_bytes"]
        yield (
            f"{level} is written as {' and '.join(sizes['types'])}: {sizes['bytes']:,} bytes, "
            f"{abs(more):,} {'more' if more >= 0 else 'fewer'} than in the plan."
        )


def _plan_bytes(facts: ModelFacts, plan: Plan, level: WeightLevel) -> int:
    """Bytes that a plan's items at a level have in memory here, the native ones if they have it."""
    sizes = [
        facts.weight_levels(index).get(own, facts.block_param_bytes[index])
        for index, own in plan.weights
        if own == level
    ]
    if plan.embeddings == level:
        sizes.append(facts.embedding_levels.get(level, facts.base_bytes))
    return sum(sizes)


def measured_rise(llm: ElasticLLM, plan: Plan, export: Export) -> tuple[float, str] | None:
    """The rise in NLL on the text that an export names, in nats per token, and the text in words.

    Returns:
        None if it names none.

    Raises:
        CorpusError: There is no such text, or it is too short.
    """
    if export.measure is None:
        return None
    tokens = min(_MEASURED_TOKENS, llm.adapter.max_positions)
    config = CorpusConfig(export.measure, _MEASURED_WINDOWS, tokens, role="report")
    scorer = PlanScorer(llm, load_corpus(config, llm))
    rise = scorer.nll(plan) - scorer.nll(Plan())
    return rise, f"{_MEASURED_WINDOWS} x {tokens} tokens of {Path(export.measure).name}"


def licence_of(folder: Path | None, gguf_file: Path | None = None) -> str:
    """The licence that a model's files state, or `UNKNOWN_LICENCE`.

    Args:
        folder: The model's folder; the head of its card may state a licence.
        gguf_file: The GGUF file that it comes from, whose header may state it.
    """
    if gguf_file is not None and (stated := GgufFile(gguf_file).value("general.license")):
        return str(stated)
    readme = None if folder is None else folder / "README.md"
    if readme is not None and readme.is_file():
        head = readme.read_text(encoding="utf-8", errors="replace").split("---")[1:2]
        for line in head[0].splitlines() if head else ():
            name, _, value = line.partition(":")
            if name.strip() == "license" and value.strip():
                return value.strip().strip("\"'")
    return UNKNOWN_LICENCE

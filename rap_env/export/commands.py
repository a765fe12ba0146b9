"""Commands that write a plan for other engines: ``rap export`` and ``rap prune``.

Modules that load torch are imported once they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rap_env.blocks import BlockMask
from rap_env.command_options import check_fits, json_option, request_options, show
from rap_env.errors import InvalidRequestError
from rap_env.export.plan_file import read_plan
from rap_env.memory import MemoryModel
from rap_env.plan import CompressionPlan, as_plan
from rap_env.policy import PlanPolicy
from rap_env.request import Request
from rap_env.serving.settings import parse_bytes

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_MEASURED_WINDOWS, _MEASURED_TOKENS = 4, 256

_remove_option = click.option(
    "--remove", multiple=True, metavar="BLOCKS", help="Such as layer03.ffn,layer07.attn."
)


@dataclass(frozen=True)
class Chosen:
    """A plan to export, and what is known of it.

    Attributes:
        plan: The plan.
        rise: Its predicted rise in NLL, nats per token, or None.
        source: Where that is from, or why it is not known.
    """

    plan: CompressionPlan
    rise: float | None
    source: str


@dataclass(frozen=True)
class Wanted:
    """How a user gave the plan: itself, or a request for which a policy chooses.

    Exactly one of `plan` and `request` is given.
    """

    plan: CompressionPlan | None
    request: Request | None
    policy: str

    @classmethod
    def of(
        cls,
        remove: Sequence[str],
        plan_file: Path | None,
        shape: tuple[int | None, int | None, str | None],
        policy: str,
    ) -> Wanted:
        """What the options say.

        Args:
            remove: Values of ``--remove``.
            plan_file: Value of ``--plan``.
            shape: Values of ``--batch``, ``--seq`` and ``--budget``.
            policy: Value of ``--policy``.

        Raises:
            InvalidRequestError: There is no plan, or several.
        """
        names = [name.strip() for text in remove for name in text.split(",") if name.strip()]
        batch, seq, budget = shape
        request = None
        if batch is not None and seq is not None and budget is not None:
            request = Request(batch, seq, parse_bytes("--budget", budget))
        given = [bool(names), plan_file is not None, shape != (None, None, None)]
        if sum(given) != 1 or (given[-1] and request is None):
            raise InvalidRequestError(
                "Give either --remove, or --plan, or all of --batch, --seq and --budget."
            )
        if request is not None:
            return cls(None, request, policy)
        plan = read_plan(plan_file) if plan_file else CompressionPlan(BlockMask.of(*names))
        return cls(plan, None, policy)

    def choose(self, memory: MemoryModel) -> Chosen:
        """The plan for a model.

        Raises:
            InfeasibleBudgetError: It does not fit the request.
            UnknownNameError: The model does not have an item, or there is no such policy.
        """
        from rap_env.runtime.delta_nll import find_delta_nll
        from rap_env.runtime.policies import StaticPolicy, load_policy

        if self.request is None:
            assert self.plan is not None
            plan, seq = self.plan.check(memory.facts.num_blocks), None
            policy: PlanPolicy = StaticPolicy(plan)
        else:
            policy = load_policy(self.policy, memory)
            plan, seq = as_plan(policy.choose(self.request)), self.request.seq_len_tokens
            check_fits(memory, plan, self.request)
        if memory.facts.repair and plan.removed:
            return Chosen(plan, None, "no prediction knows stubs")
        return Chosen(plan, *find_delta_nll(memory, policy, plan, seq))


@click.command()
@click.argument("out", type=Path)
@click.option(
    "--to", "target", type=click.Choice(["hf"]), required=True, help="hf: a transformers folder."
)
@click.option("--plan", "plan_file", type=Path, metavar="FILE", help="As rap choose --json writes.")
@_remove_option
@request_options(required=False, policy="rap-v0", weights=None, dtype="bfloat16")
@click.option("--repair", default="none", show_default=True, help="Stubs: library, or a file.")
@click.option(
    "--measure", metavar="TEXT", help="Measure the rise in NLL on a text file, or on text of self."
)
@json_option
@click.pass_obj
def export(
    command: str | None, out: Path, target: str, plan_file: Path | None, remove: Sequence[str],
    batch: int | None, seq: int | None, budget: str | None, policy: str, model: str, device: str,
    dtype: str, repair: str, measure: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Write a model under a plan to OUT, for another engine, with a model card.

    Give the plan in a file (--plan), or the blocks to remove (--remove), or a request (--batch,
    --seq, --budget) for which a policy chooses.
    """
    wanted = Wanted.of(remove, plan_file, (batch, seq, budget), policy)
    from rap_env.llm.loading import load_llm
    from rap_env.llm.sources import gguf_source
    from rap_env.repair.cached_library import open_library

    llm = load_llm(model, device=device, dtype=dtype, weights="bf16")
    if repair != "none":
        llm = open_library(repair, llm).attach(llm)
    answer = write_folder(
        llm, wanted, out, command or "rap export", measure=measure, gguf_file=gguf_source(model)
    )
    _show_written(answer, as_json)


@click.command()
@click.argument("folder", type=Path)
@_remove_option
@request_options(required=False, policy="rap-v0", weights=None)
@json_option
@click.pass_obj
def prune(
    command: str | None, folder: Path, remove: Sequence[str], batch: int | None, seq: int | None,
    budget: str | None, policy: str, model: str, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Save a smaller checkpoint to FOLDER: `rap export --to hf` without its further options.

    Name the blocks (--remove), or a request (--batch, --seq, --budget) for which a policy chooses
    them. Load the checkpoint with rap_env.load_llm, or give its folder as --model.
    """
    wanted = Wanted.of(remove, None, (batch, seq, budget), policy)
    from rap_env.llm.loading import load_llm
    from rap_env.llm.sources import gguf_source

    llm = load_llm(model, device=device, dtype=dtype, weights="bf16")
    answer = write_folder(llm, wanted, folder, command or "rap prune", gguf_file=gguf_source(model))
    _show_written(answer, as_json)


def write_folder(
    llm: ElasticLLM,
    wanted: Wanted,
    folder: Path,
    command: str,
    *,
    measure: str | None = None,
    gguf_file: Path | None = None,
) -> dict[str, Any]:
    """Write a folder that transformers opens, and return what the command answers.

    Args:
        llm: The model.
        wanted: The plan.
        folder: The folder to write.
        command: The command, for the card.
        measure: The text to measure the rise in NLL on, if any.
        gguf_file: The file that the model comes from, if any.

    Raises:
        InvalidRequestError: The plan lowers levels.
    """
    from rap_env.export.model_card import ModelCard, licence_of
    from rap_env.llm.pruned_checkpoint import save_pruned

    chosen, facts = wanted.choose(MemoryModel(llm)), llm.facts
    plan = chosen.plan
    if not plan.is_mask:
        raise InvalidRequestError(
            "A folder for transformers has unquantised weights and native caches, so each block is "
            f"native or removed, but the plan has other levels ({plan}); name the blocks, or "
            "choose another policy, such as 'frontier'."
        )
    sizes, stubs = facts.block_param_bytes, facts.stub_bytes or (0,) * facts.num_blocks
    before = facts.base_bytes + sum(sizes)
    after = before - sum(sizes[i] - stubs[i] for i in plan.removed.indices)
    card = ModelCard(
        model=facts.name,
        fingerprint=facts.fingerprint,
        target="transformers",
        plan=plan,
        bytes_before=before,
        bytes_after=after,
        predicted=(chosen.rise, chosen.source),
        measured=measured_rise(llm, plan, measure) if measure else None,
        licence=licence_of(llm.folder, gguf_file),
        command=command,
        use="`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, or "
        "`rap_env.load_llm(FOLDER)`.",
    )
    save_pruned(llm, plan.removed, folder, readme=card.text)
    return {
        "model": facts.name,
        "dtype": facts.dtype,
        "folder": str(folder),
        "removed": list(plan.removed.names),
        "levels": plan.levels,
        "weight_bytes_before": before,
        "weight_bytes_after": after,
        "delta_nll": chosen.rise,
        "delta_nll_source": chosen.source,
        "measured_delta_nll": None if card.measured is None else card.measured[0],
    }


def measured_rise(llm: ElasticLLM, plan: CompressionPlan, source: str) -> tuple[float, str]:
    """The rise in NLL under a plan on a text, in nats per token, and the text in words.

    Args:
        llm: The model.
        plan: The plan.
        source: The text; see `rap_env.scoring.corpus.CorpusConfig`.

    Raises:
        CorpusError: There is no such text, or it is too short.
    """
    from rap_env.scoring.corpus import CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus
    from rap_env.scoring.scorer import MaskScorer

    tokens = min(_MEASURED_TOKENS, llm.adapter.max_positions)
    config = CorpusConfig(source, _MEASURED_WINDOWS, tokens, role="report")
    scorer = MaskScorer(llm, load_corpus(config, llm))
    rise = scorer.nll(plan) - scorer.nll(BlockMask())
    return rise, f"{_MEASURED_WINDOWS} x {tokens} tokens of {Path(source).name}"


def _show_written(answer: dict[str, Any], as_json: bool) -> None:
    before, after = answer["weight_bytes_before"], answer["weight_bytes_after"]
    removed, rise = answer["removed"], answer["delta_nll"]
    known = "unknown" if rise is None else f"{rise:+.4f} nats/token"
    lines = [
        f"Removed ({len(removed)}): {' '.join(removed) or 'nothing'}",
        f"Weights of {answer['model']} ({answer['dtype']}): {before:,} bytes before, {after:,} "
        f"after ({100 * after / before:.1f} %), saved in {answer['folder']}",
        f"ΔNLL: {known} ({answer['delta_nll_source']})",
    ]
    if answer["measured_delta_nll"] is not None:
        lines.append(f"ΔNLL, measured: {answer['measured_delta_nll']:+.4f} nats/token")
    show(answer, "\n".join(lines), as_json)

"""The results in README.md, with every number taken from the committed records."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from generate import LONG_CONTEXT, PROMPTS, RESULTS, STUDIES, read_ladder, study_text, write
from tables import PLANS, comparison_text, stubs_text

from experiments.ladder.tables import ladder_findings
from experiments.long_context.results import long_context_findings
from experiments.studies.prompts import BLIND
from experiments.study.tables import percent, relative_words

README_BEGIN, README_END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
"""Between these lines, README.md holds what `readme_results` gives."""

RECALL_BUDGET, RECALL_TOKENS = "30 %", 2048
"""The budget and length at which the README compares policies by their recall."""


def tables_of(text: str) -> list[dict[str, list[str]]]:
    """The tables of a Markdown text: the cells of each row by its first cell."""
    tables: list[dict[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("| :--"):
            tables.append({})
            inside = True
        elif inside and line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            tables[-1].setdefault(first, cells)
        else:
            inside = False
    return tables


def benchmark(name: str) -> list[float]:
    """What a benchmark reached, one number for each of its targets."""
    path = RESULTS / "benchmarks" / f"{name}-cpu.json"
    targets = json.loads(path.read_text(encoding="utf-8"))["targets"]
    return [target["reached"] for target in targets]


def readme_results() -> str:
    """The README's results, with every number taken from the records."""
    summary, verdicts, *_ = tables_of(comparison_text("learning"))
    unequal, unequal_verdicts, *_ = tables_of(comparison_text("small_unequal"))
    served, _, quality, *_ = tables_of(study_text("replay"))
    repair = tables_of(study_text("repair"))[0]
    policy, greedy = summary["RAP policy (5)"], summary["Greedy per byte"]
    (precision,) = ladder_findings(read_ladder(RESULTS / "ladder"))
    (decision_ms,), (_, lazy, _), (_, steps) = map(benchmark, ("decide", "gsi", "step"))
    results = (
        f"**Precision before removal**: {precision[0].lower()}{precision[1:]}",
        plan_result(),
        prompt_result(),
        recall_result(),
        "**Removing blocks alone, a policy loses less than a search for each request**: ΔNLL "
        f"{policy[0]}, greedy search per byte {greedy[0]} "
        f"({verdicts['Greedy per byte'][1]}). The search runs the model {greedy[2]} times per "
        "request, the policy not at all.",
        "**A lookup table does as well in a uniform model**: the frontier has "
        f"{summary['Frontier table'][0]}. Where the bytes of blocks differ, the policy has "
        f"{unequal['RAP policy (3)'][0]} and the frontier {unequal['Frontier table'][0]} "
        f"({unequal_verdicts['Frontier table'][1]}).",
        "**Serving within memory that moves**: policy and frontier serve "
        f"{served['RAP policy'][0]} of a replayed trace and exceed the budget in "
        f"{served['RAP policy'][6]} steps, with ΔNLL {quality['RAP policy'][0]} and "
        f"{quality['Frontier table'][0]}. The dense model serves {served['Dense'][0]} and exceeds "
        f"it in {served['Dense'][6]} steps; the largest static mask that always fits one row has "
        f"ΔNLL {quality['Static, lean'][0]}.",
        "**Stubs recover much of the ΔNLL**: on text of other kinds, a library fitted once leaves "
        f"{repair['Library'][3]} of ΔNLL, a distilled one {repair['Distilled library'][3]}. "
        "Accuracies on five small tasks hardly move.",
        f"**It is fast**: a decision takes {decision_ms:.1f} ms (99th percentile, without torch), "
        f"64 sub-environments take {steps:,.0f} steps a second on known scores, and lazy GSI is "
        f"{lazy:.1f} times as fast as the naive loop.",
    )
    lines = [
        textwrap.fill(text, 104, initial_indent=f"{number}. ", subsequent_indent="   ")
        for number, text in enumerate(results, start=1)
    ]
    return "\n".join(lines) + "\n"


def plan_result() -> str:
    """What the README says of plans at tight budgets."""
    summary, verdicts, *_ = tables_of(comparison_text(PLANS))
    policy = next(name for name in summary if name.startswith("RAP policy"))
    stubs = tables_of(stubs_text())[0]
    repaired = next(name for name in stubs if name.startswith("RAP policy ("))
    return (
        "**At budgets where no choice is free, a policy over levels loses less than what one would "
        f"do instead**: ΔNLL {summary[policy][0]} ({policy.partition('(')[2].rstrip(')')} training "
        f"seeds), the best uniform setting that fits {summary['Uniform settings'][0]} "
        f"({verdicts['Uniform settings'][1]}), the knapsack over levels {summary['Knapsack'][0]} "
        f"({verdicts['Knapsack'][1]}). A lookup in the table of measured plans, from which the "
        f"policy learned, has {summary['Frontier table'][0]}. With a stub in "
        "the place of each removed block (fitted to seven kinds of text, one of them other "
        "WikiText articles), stubs counted in the same budgets, the policy's ΔNLL is "
        f"{stubs[repaired][0]} and that of uniform settings {stubs['Uniform settings'][0]}."
    )


def prompt_result() -> str:
    """What the README says of policies that see the prompt."""
    study = PROMPTS.read(STUDIES["prompts"][1])
    seen = "knapsack-by-text"
    uniform, default, blind = (
        relative_words(study.relative(seen, rival, study.texts))
        for rival in ("uniform", "knapsack", f"{seen}{BLIND}")
    )
    return (
        f"**What is asked matters**: on {len(study.texts)} kinds of held-out text, plans by the "
        f"prompt's kind have a ΔNLL of {uniform} relative to uniform settings, {default} to costs "
        f"on what the model writes, and {blind} to the same costs without a look at the prompt."
    )


def recall_result() -> str:
    """What the README says of recall over the context."""
    (caches,) = long_context_findings(LONG_CONTEXT.read(STUDIES["long_context"][1]))
    recall, shares = LONG_CONTEXT.read(STUDIES["tight_recall"][1]), {}
    for policy in ("rap", "rap-recall"):
        rows = recall.facts(f"{policy} {RECALL_BUDGET}", RECALL_TOKENS)
        right = [value for row in rows for value in row.right]
        shares[policy] = percent(sum(right) / len(right), 0)
    return (
        f"**A lower loss is not better recall**: {caches[0].lower()}{caches[1:]} At "
        f"{RECALL_BUDGET} of the native peak, a policy trained on text with questions answers "
        f"{shares['rap-recall']} of those on {RECALL_TOKENS:,} tokens, one trained on the loss "
        f"alone {shares['rap']}."
    )


def update_readme(path: Path) -> None:
    """Write `readme_results` into the README."""
    before, _, rest = path.read_text(encoding="utf-8").partition(README_BEGIN)
    after = rest.partition(README_END)[2]
    write(path, f"{before}{README_BEGIN}{readme_results()}{README_END}{after}")

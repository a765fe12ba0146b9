"""Sections of the report, made from `ReportData`; a section without data has no parts."""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.comparison import figures, tables
from experiments.comparison.level_figures import levels_picture, short_and_long
from experiments.comparison.loading import ReportData
from experiments.comparison.summaries import Comparison
from experiments.study.looks import look
from experiments.study.page import Gallery, Section
from experiments.study.tables import TIMES, counted, seconds, shape_words, text_words

INTERVAL_WORDS = (
    "Intervals are 95 % percentile bootstrap over held-out windows, resampled jointly for all "
    "methods, and over seeds if a method has several."
)
DENSE_ACCURACY = " The dotted line is the dense model's accuracy."


def comparison_section(data: ReportData, gallery: Gallery) -> Section:
    """Show means over the grid, then ΔNLL against budget for each request."""
    section = Section("comparison", "Comparison")
    comparison = data.comparison
    if not comparison or not comparison.summaries:
        return section
    named = tables.method_names(comparison)
    shapes = ", ".join(map(shape_words, comparison.shapes))
    budgets, model = tables.budget_words(comparison), f"the {comparison.reference_word} model"
    accuracies = any(row.accuracies for row in comparison.rows)
    section.text(
        f"Requests (batch {TIMES} tokens of prompt and answer): {shapes}. Budgets: {budgets} of "
        f"{model}'s peak memory for the request. ΔNLL is the increase of the negative "
        f"log-likelihood over {model}, in nats per token, on text that no method has "
        f"used; {model} has 0. The next column has ΔNLL on the calibration text, on which "
        "methods search and train: a method for which it is much lower than on held-out text "
        "overfits the calibration text."
    )
    if comparison.incomplete:
        section.text(
            "Some methods lack results for some pairs of request and budget; means are over the "
            f"{counted(len(comparison.cells), 'pair')} that all methods have."
        )
    first, *others = tables.comparison_document(comparison)
    section.document([first], named)
    gallery.add(
        section, "overview", "Every method over the whole grid",
        f"Mean over {counted(len(comparison.cells), 'pair')} of request and budget; "
        f"hollow marks miss some budgets, so their ΔNLL is not comparable. {INTERVAL_WORDS}"
        f"{DENSE_ACCURACY if accuracies else ''}",
        partial(figures.overview, comparison),
    )  # fmt: skip
    gallery.add(
        section, "loss_against_budget", "ΔNLL against budget for each request",
        "Budgets decrease to the right. Solid lines are trained policies, dashed lines "
        "baselines; marks are shifted slightly sideways to separate the intervals, and hollow "
        f"where the {comparison.choice_word} does not fit. {INTERVAL_WORDS}",
        partial(figures.delta_nll_against_budget, comparison),
    )  # fmt: skip
    section.document(others, named)
    return section


def policy_section(data: ReportData, gallery: Gallery) -> Section:
    """Show what the trained methods and the greedy search remove or lower."""
    section = Section("policy", "What the policy removes")
    comparison = data.comparison
    if not comparison:
        return section
    shown = comparison.learned + [m for m in comparison.methods if m == "greedy_per_byte"]
    if comparison.lowers:
        section.title = "What the policy lowers"
        for method in shown or comparison.compared[:1]:
            _add_levels(section, comparison, method, _num_layers(data), gallery)
        return section
    for method in shown:
        rows = [row for row in comparison.rows if row.method == method]
        seeds = len({row.seed for row in rows})
        shade = (
            f"Darker: removed by more of the {seeds} seeds." if seeds > 1 else "Coloured: removed."
        )
        gallery.add(
            section, f"removed_{method}", f"{look(method).label}: blocks removed",
            f"Each line is a request (batch {TIMES} tokens) at a budget (% of the dense peak), "
            f"each column a layer. {shade} Most bytes of short requests are FFN "
            "weights; most of long ones are KV cache, which only removed attention blocks free.",
            partial(
                figures.removal_picture, [(row.cell, row.mask) for row in rows],
                _num_layers(data),
            ),
        )  # fmt: skip
    return section


def _add_levels(
    section: Section, comparison: Comparison, method: str, num_layers: int, gallery: Gallery
) -> None:
    """Add the figure of the levels that a method chooses for one short and one long request."""
    shapes = short_and_long(comparison.shapes)
    rows = [row for row in comparison.rows if row.method == method and row.shape in shapes]
    if not rows:  # the evaluation is not complete
        return
    seed = rows[0].seed
    which = "" if seed is None else f" (seed {seed})"
    gallery.add(
        section, f"levels_{method}", f"{look(method).label}: levels of all items{which}",
        f"Each line is a request (batch {TIMES} tokens) at a budget (share of the native peak; ~: "
        "ΔNLL that the budget stands for), each column a layer. A removed attention block takes "
        "its cache with it.",
        partial(levels_picture, [row for row in rows if row.seed == seed], num_layers),
    )  # fmt: skip


def memory_section(data: ReportData, gallery: Gallery) -> Section:
    """Show what uses the memory of the dense model."""
    section = Section("memory", "What fills the memory")
    if data.profile:
        gallery.add(
            section, "memory", "Shares of the dense model's peak memory",
            "Computed from the sizes of the weights and of the KV cache, both exact; the workspace "
            f"(activations and logits) is an estimate. As batch {TIMES} length grows, the KV "
            "cache takes over, so the best blocks to remove change.",
            partial(figures.memory_picture, data.profile),
        )  # fmt: skip
    return section


def importance_section(data: ReportData, gallery: Gallery) -> Section:
    """Show one-shot importance and GSI."""
    section = Section("importance", "Which blocks matter")
    profile = data.profile
    if not profile:
        return section
    text = profile["calibration"]
    gsi = profile.get("gsi")
    caption = (
        f"ΔNLL on the calibration text ({text['windows']} windows of {text['window_tokens']} "
        "tokens) without each block alone (linear near zero)."
    )
    if gsi:
        caption += (
            " Second panel: greedy sequential importance (GSI) removes the least important block, "
            "measures all others again, and repeats; bars show the resulting ΔNLL and the kind of "
            "the removed block."
        )
    gallery.add(
        section, "importance", "Importance of blocks, by kind", caption,
        partial(figures.importance_bars, profile),
    )  # fmt: skip
    if gsi:
        section.text(_gsi_cost(gsi))
    return section


def _gsi_cost(gsi: dict[str, Any]) -> str:
    """Describe the cost of GSI; in seconds only if no score came from the store."""
    text = f"GSI needs {gsi['evaluations']:,} model evaluations for {len(gsi['order'])} removals"
    ran = gsi.get("evaluations_run", gsi["evaluations"])
    if ran < gsi["evaluations"]:
        return f"{text}; {gsi['evaluations'] - ran:,} of them were in the score store."
    return f"{text}, here in {gsi['seconds']:,.0f} s."


def learning_section(data: ReportData, gallery: Gallery) -> Section:
    """Show learning curves and the cost of training."""
    section = Section("learning", "Learning")
    if not data.runs:
        return section
    if figures.logged_curves(data.runs):
        gallery.add(
            section, "learning_curves", "Learning curves",
            "Training episodes draw new requests and sample their actions, so their ΔNLL is above "
            "that of the finished policy. Each point is the "
            f"mean of up to {figures.SMOOTHED_EPISODES} episodes. Left: ΔNLL of the mask "
            "at the end of the episode. Right: return of the episode, penalties included. For a "
            "method with several seeds, thin lines are seeds and the thick line is their mean.",
            partial(figures.learning_curves, data.runs),
        )  # fmt: skip
    header = ["Run", "Steps", "Seed", "Training time", "Model evaluations"]
    rows = [
        [
            run.label, f"{run.facts.get('timesteps', 0):,}", str(run.seed),
            seconds(run.facts.get("training_s", 0.0)),
            f"{run.facts.get('evaluations', 0):,}",
        ]
        for run in data.runs
    ]  # fmt: skip
    section.table((header, rows), {run.label: run.method for run in data.runs})
    return section


def costs_section(data: ReportData) -> Section:
    """Show the cost of decisions."""
    section = Section("costs", "What a decision costs")
    if data.comparison and data.comparison.summaries:
        what = data.comparison.choice_word
        section.text(
            f"Evaluations are {what}s scored by the model on the calibration text. Evaluations per "
            "request are counted as if no score were stored; evaluations once serve all requests. "
            "In decision times, a stored score counts as one full pass, which is slightly more "
            f"than a pass takes if {what}s share their first layers."
        )
        section.table(
            tables.costs_table(data.comparison), tables.method_names(data.comparison), words=True
        )
    return section


def method_section(data: ReportData) -> Section:
    """Describe how the comparison was measured."""
    section = Section("method", "How this was measured")
    if not data.comparison:
        return section
    depends = data.comparison.rows[0].provenance.get("depends_on", {})
    text, calibration = depends.get("report_text", {}), depends.get("calibration", {})
    section.text(
        f"Methods use only the calibration text ({text_words(calibration)}); ΔNLL is measured on "
        f"other text ({text_words(text)}), which shares no sequence of tokens with it. Each window "
        "is independent: it has no prefix, and every token except the first is predicted. Budgets "
        "count kept weights, embeddings and head, the KV cache of kept attention blocks, and a "
        "workspace."
    )
    tasks = depends.get("tasks", {})
    if tasks.get("names"):
        limit = f"{tasks['limit']} documents of each" if tasks.get("limit") else "all documents"
        section.text(f"Tasks (lm-eval): {', '.join(tasks['names'])}; {limit}.")
    return section


def provenance_section(data: ReportData) -> Section:
    """List versions, machine, commit, hashes and seeds."""
    section = Section("provenance", "Provenance")
    for note in data.evaluations[-1:]:
        section.facts(_run_facts(note, "Evaluation"))
    for note in data.repair_notes:
        section.facts(_run_facts(note, "Repair"), "Repair" if data.evaluations else "")
    if data.comparison:
        depends = data.comparison.rows[0].provenance.get("depends_on", {})
        keys = ("model_fingerprint", "calibration_sha256", "report_sha256")
        section.facts([(k.replace("_", " "), str(depends[k])) for k in keys if k in depends])
    files = "repair/repair.jsonl (one line per repair, request, budget and text)"
    if data.comparison or data.profile or data.runs:
        others = f", {files}" if data.repair else ""
        files = (
            "evaluate/results.jsonl (one line per method, seed, request and budget), "
            f"train/*/metrics.jsonl, and profile/profile.json{others}"
        )
    section.text(f"All numbers are from the JSON lines in this comparison's folder: {files}.")
    return section


def _run_facts(note: dict[str, Any], stage: str) -> list[tuple[str, str]]:
    """Return machine, commit, versions, seeds and time of a run."""
    found = note["provenance"]
    git = found.get("git") or {}
    commit = f"{git.get('commit', 'unknown')}{' (with local changes)' if git.get('dirty') else ''}"
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return [
        ("Machine", ", ".join(f"{k} {v}" for k, v in found["machine"].items())),
        ("Commit", commit),
        ("Python", found["python"]),
        ("Packages", packages),
        ("Seeds", ", ".join(f"{k} {v}" for k, v in found["seeds"].items())),
        (stage, f"{seconds(note.get('seconds', 0))}, finished {note.get('finished', '-')}"),
    ]


def _num_layers(data: ReportData) -> int:
    if data.profile:
        return int(data.profile["facts"]["num_layers"])
    return data.comparison.num_layers if data.comparison else 0

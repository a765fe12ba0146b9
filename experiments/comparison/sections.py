"""The report's sections. Each reads `ReportData`; a section without data stays empty."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from experiments.comparison import figures, tables
from experiments.comparison.formatting import (
    TIMES,
    counted,
    look,
    percent,
    rank,
    seconds,
    text_words,
)
from experiments.comparison.html import Gallery, Section
from experiments.comparison.loading import ReportData
from experiments.comparison.pairwise import targets_table
from experiments.comparison.records import ResultRow
from experiments.comparison.summaries import Comparison
from experiments.comparison.tables import (
    COUNTS_CAPTION,
    HOLM_CAPTION,
    PART_CAPTIONS,
    PART_TITLES,
    difference_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_words(comparison: Comparison) -> str:
    """The grid in a sentence."""
    shapes = ", ".join(f"{batch} {TIMES} {tokens:,}" for batch, tokens in comparison.shapes)
    budgets = ", ".join(percent(budget, 0) for budget in comparison.budgets)
    return (
        f"Requests (batch {TIMES} tokens of prompt and answer): {shapes}. Budgets: {budgets} of "
        "what the dense model needs for the request."
    )


def comparison_section(data: ReportData, gallery: Gallery) -> Section:
    """Means over the grid, then loss against budget for each request."""
    section = Section("comparison", "Comparison")
    comparison = data.comparison
    if not comparison or not comparison.summaries:
        return section
    named = method_names(comparison)
    section.text(
        f"{grid_words(comparison)} Loss is the rise of the negative log-likelihood over the dense "
        "model's, in nats per token, on text that no method has seen; 0 is the dense model. Beside "
        "it stands the loss on the calibration text, on which methods search and train: where "
        "that is the smaller one by more than it is for others, a method overfits its text."
    )
    if comparison.incomplete:
        section.text(
            "Some methods lack results for some pairs of request and budget; means are over the "
            f"{counted(len(comparison.cells), 'pair')} that all methods have."
        )
    section.table(tables.summary_table(comparison), named)
    gallery.add(
        section, "overview", "Every method over the whole grid",
        f"Mean over {counted(len(comparison.cells), 'pair')} of request and budget; "
        f"hollow marks miss some budgets, so their losses do not compare. {INTERVAL_WORDS} The "
        "dotted line is the dense model's accuracy.",
        partial(figures.overview, comparison),
    )  # fmt: skip
    gallery.add(
        section, "loss_against_budget", "Loss against budget for each request",
        "Budgets get tighter to the right. Solid lines are trained policies, dashed ones "
        "baselines; marks are moved a little sideways so that intervals can be seen, and hollow "
        f"where the mask does not fit. {INTERVAL_WORDS}",
        partial(figures.loss_against_budget, comparison),
    )  # fmt: skip
    goals = targets_table(comparison)
    if goals:
        section.table(goals, title="Goals", words=True)
    add_pairwise_tables(section, comparison)
    add_cells(section, comparison)
    for part in PART_TITLES:
        add_part(section, comparison, part)
    accuracy = tables.accuracy_table(comparison)
    if accuracy:
        section.table(accuracy, named, title="Accuracy of each task, mean over the grid")
    return section


def policy_section(data: ReportData, gallery: Gallery) -> Section:
    """What the learned methods remove, beside the greedy one."""
    section = Section("policy", "What the policy removes")
    comparison = data.comparison
    if not comparison:
        return section
    shown = comparison.learned + [m for m in comparison.methods if m == "greedy_per_byte"]
    for method in shown:
        rows = [row for row in comparison.rows if row.method == method]
        seeds = len({row.seed for row in rows})
        shade = (
            f"Darker: removed by more of the {seeds} seeds." if seeds > 1 else "Coloured: removed."
        )
        gallery.add(
            section, f"removed_{method}", f"{look(method).label}: blocks removed",
            f"Each line is a request (batch {TIMES} tokens) at a budget (% of the dense peak), "
            f"each column a layer. {shade} Short requests are heavy with FFN weights, long "
            "ones with KV cache, which only attention blocks free.",
            partial(figures.removal_picture, rows, _num_layers(data, rows)),
        )  # fmt: skip
    return section


def memory_section(data: ReportData, gallery: Gallery) -> Section:
    """The picture that the idea rests on."""
    section = Section("memory", "What fills the memory")
    if data.profile:
        gallery.add(
            section, "memory", "Shares of the dense model's peak memory",
            "Computed from the sizes of the weights and of the KV cache, both exact; the workspace "
            f"(activations and logits) is an estimate. As batch {TIMES} length grows, the KV "
            "cache takes over, so what is worth removing changes.",
            partial(figures.memory_picture, data.profile),
        )  # fmt: skip
    return section


def importance_section(data: ReportData, gallery: Gallery) -> Section:
    """One-shot importance and GSI."""
    section = Section("importance", "Which blocks matter")
    profile = data.profile
    if not profile:
        return section
    text = profile["calibration"]
    gsi = profile.get("gsi")
    caption = (
        f"Loss on the calibration text ({text['windows']} windows of {text['window_tokens']} "
        "tokens) without each block alone (linear near zero)."
    )
    if gsi:
        caption += (
            " Second panel: greedy sequential importance (GSI) removes the least important block, "
            "measures all others again, and repeats; bars show the loss reached and the kind of "
            "block removed."
        )
    gallery.add(
        section, "importance", "Importance of blocks, by kind", caption,
        partial(figures.importance_bars, profile),
    )  # fmt: skip
    if gsi:
        section.text(_gsi_cost(gsi))
    return section


def _gsi_cost(gsi: dict[str, Any]) -> str:
    """What GSI costs; seconds only where no score came from a store."""
    text = f"GSI needs {gsi['evaluations']:,} model evaluations for {len(gsi['order'])} removals"
    ran = gsi.get("evaluations_run", gsi["evaluations"])
    if ran < gsi["evaluations"]:
        return f"{text}; {gsi['evaluations'] - ran:,} of them were in the score store."
    return f"{text}, here in {gsi['seconds']:,.0f} s."


def learning_section(data: ReportData, gallery: Gallery) -> Section:
    """Learning curves and what training cost."""
    section = Section("learning", "Learning")
    if not data.runs:
        return section
    if figures.learning_curves(data.runs, narrow=False):
        gallery.add(
            section, "learning_curves", "Learning curves",
            "Training episodes, whose requests are drawn anew each time and whose actions are "
            "sampled, so their losses are above those of the finished policy. Each point is the "
            f"mean of up to {figures.SMOOTHED_EPISODES} episodes. Left: loss of the mask "
            "that the episode ended with. Right: what the agent is paid, penalties included. "
            "Where a method has several seeds, thin lines are seeds and the thick one their mean.",
            lambda narrow: _curves(data, narrow),
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
    """What deciding costs."""
    section = Section("costs", "What a decision costs")
    if data.comparison and data.comparison.summaries:
        section.text(
            "Evaluations are masks run through the model on the calibration text; those for a "
            "request are counted as if nothing had been stored, those made once serve all "
            "requests. In decision times a stored score counts with the time of a whole pass, "
            "somewhat more than it takes where masks share their first layers."
        )
        section.table(
            tables.costs_table(data.comparison), method_names(data.comparison), words=True
        )
    return section


def method_section(data: ReportData) -> Section:
    """How it was measured."""
    section = Section("method", "How this was measured")
    if not data.comparison:
        return section
    depends = data.comparison.rows[0].provenance.get("depends_on", {})
    text, calibration = depends.get("report_text", {}), depends.get("calibration", {})
    section.text(
        f"Methods choose on the calibration text alone ({text_words(calibration)}); losses and "
        f"accuracies are measured on other text ({text_words(text)}), checked to share no run of "
        "tokens with it. Each window stands alone: nothing is put before it, and every token but "
        "the first is predicted. Budgets count kept weights, embeddings and head, the KV cache of "
        "kept attention blocks, and a workspace."
    )
    tasks = depends.get("tasks", {})
    if tasks.get("names"):
        limit = f"{tasks['limit']} documents of each" if tasks.get("limit") else "all documents"
        section.text(f"Tasks (lm-eval): {', '.join(tasks['names'])}; {limit}.")
    return section


def provenance_section(data: ReportData) -> Section:
    """Versions, machine, commit, hashes, seeds."""
    section = Section("provenance", "Provenance")
    for note in data.evaluations[-1:]:
        section.facts(_run_facts(note, "Evaluation"))
    for note in data.repair_notes:
        section.facts(_run_facts(note, "Repair"), "Repair" if data.evaluations else "")
    if data.comparison:
        depends = data.comparison.rows[0].provenance.get("depends_on", {})
        keys = ("model_fingerprint", "calibration_sha256", "report_sha256")
        section.facts([(k.replace("_", " "), str(depends[k])) for k in keys if k in depends])
    files = "repair/repair.jsonl (one line a repair, request, budget and text)"
    if data.comparison or data.profile or data.runs:
        others = f", {files}" if data.repair else ""
        files = (
            "evaluate/results.jsonl (one line a method, seed, request and budget), "
            f"train/*/metrics.jsonl, and profile/profile.json{others}"
        )
    section.text(
        f"Every number here comes from the JSON lines in this comparison's folder: {files}."
    )
    return section


def _run_facts(note: dict[str, Any], stage: str) -> list[tuple[str, str]]:
    """Machine, commit, versions, seeds and time of a run."""
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
        (stage, f"{seconds(note.get('seconds', 0))}, ended {note.get('finished', '-')}"),
    ]


def _curves(data: ReportData, narrow: bool) -> Figure:
    found = figures.learning_curves(data.runs, narrow)
    assert found is not None  # asked before
    return found


def _num_layers(data: ReportData, rows: list[ResultRow]) -> int:
    if data.profile:
        return int(data.profile["facts"]["num_layers"])
    names = [name for row in rows for name in row.mask]
    return 1 + max((int(name[5:].partition(".")[0]) for name in names), default=0)


INTERVAL_WORDS = (
    "Intervals are 95 % percentile bootstrap over held-out windows, drawn jointly for all methods, "
    "and over seeds where a method has several."
)


def add_pairwise_tables(section: Section, comparison: Comparison, where: str = "") -> None:
    """A table of each learned method against all others."""
    shown = [s.method for s in comparison.summaries if s.method in comparison.learned]
    for method in shown:
        section.table(
            difference_table(comparison, method), method_names(comparison),
            title=f"{look(method).label} minus each other method{where}, paired over windows",
        )  # fmt: skip
    if shown:
        section.text(f"{COUNTS_CAPTION} {HOLM_CAPTION}")


def add_cells(section: Section, comparison: Comparison, folded: bool = True) -> None:
    """Losses and removed blocks at each budget, request by request."""
    named = method_names(comparison)
    for shape in comparison.shapes:
        title = f"{shape[0]} {TIMES} {shape[1]:,} tokens"
        section.table(tables.loss_table(comparison, shape), named,
                      title=f"Loss at each budget, {title}", folded=folded)  # fmt: skip
        section.table(tables.removed_table(comparison, shape), named, folded=True,
                      title=f"Blocks removed (attn + ffn) and peak memory, {title}")  # fmt: skip


def add_part(section: Section, comparison: Comparison, part: str) -> None:
    """Summary, pairwise_comparisons and losses of cells beside the grid, if there are any."""
    other = comparison.other_part(part)
    if not other or not other.summaries:
        return
    section.table(tables.summary_table(other), method_names(other), title=PART_TITLES[part])
    section.text(PART_CAPTIONS[part])
    add_pairwise_tables(section, other, f" ({PART_TITLES[part].lower()})")
    add_cells(section, other, folded=False)


def method_names(comparison: Comparison) -> dict[str, str]:
    """First cells of tables -> methods; a seed count may follow the label."""
    named = {look(method).label: method for method in sorted(comparison.methods, key=rank)}
    for summary in comparison.summaries:
        named[f"{look(summary.method).label} ({summary.loss.seeds})"] = summary.method
    return named

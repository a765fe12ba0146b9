"""Draws the packages of ``rap_env`` by layer, with arrows for the imports between them."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rap_env"

LAYERS = (
    ("values and bytes",),
    ("workload", "models"),
    ("scoring",),
    ("importance",),
    ("policies", "repair", "reward"),
    ("context",),
    ("envs", "leaderboard", "runtime"),
    ("serving",),
    ("export",),
    ("cli",),
)
"""Packages from the ground up; single modules of ``rap_env`` belong to "values and bytes"."""

# Single modules that belong to another layer.
_ABOVE = {"render": "envs", "command_options": "export", "installation": "cli", "cli": "cli"}


def package(module: str) -> str | None:
    """The package that a module ``rap_env.a.b`` belongs to; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    named = {name for layer in LAYERS for name in layer}
    return parts[1] if parts[1] in named else _ABOVE.get(parts[1], "values and bytes")


def arrows() -> set[tuple[str, str]]:
    """Which package imports which, function-local and type-checking imports included."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        own = package(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        if own is None or path == PACKAGE / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                other = package(module) if module.startswith("rap_env.") else None
                if other and other != own:
                    found.add((own, other))
    return found


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that a longer way implies (the transitive reduction)."""
    below: dict[str, set[str]] = {}
    for start, end in edges:
        below.setdefault(start, set()).add(end)

    def reaches(start: str, end: str) -> bool:
        return any(end == next_ or reaches(next_, end) for next_ in below.get(start, ()))

    return {
        (start, end)
        for start, end in edges
        if not any(reaches(other, end) for other in below[start] - {end})
    }


def draw_architecture(path: Path) -> None:
    """Write the picture as SVG: direct imports, without those that a longer way implies."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rap"
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = plt.subplots(figsize=(7.2, 7.6))
    centre: dict[str, tuple[float, float]] = {}
    for height, layer in enumerate(LAYERS):
        for place, name in enumerate(layer):
            x = (place + 1) / (len(layer) + 1)
            centre[name] = (x, height)
            axes.add_patch(
                FancyBboxPatch(
                    (x - 0.12, height - 0.22), 0.24, 0.44, boxstyle="round,pad=0.01",
                    facecolor="#e8eef7", edgecolor="#34558b",
                )
            )  # fmt: skip
            axes.text(x, height, name, ha="center", va="center", fontsize=10, zorder=3)
    for start, end in sorted(reduced(arrows())):
        (x0, y0), (x1, y1) = centre[start], centre[end]
        bend = 0.0 if abs(y0 - y1) <= 1 or x0 != x1 else 0.4
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0), (x1, y1), shrinkA=16, shrinkB=16, arrowstyle="-|>", mutation_scale=10,
                linewidth=1.0, color="#5b6f92",
                connectionstyle=f"arc3,rad={bend}", zorder=0,
            )
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(LAYERS) - 0.5)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)

"""Draws the packages of ``rap_env`` by layer, with an arrow for each import between them."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rap_env"

LAYERS = (
    ("values and bytes",),
    ("workload", "llm"),
    ("scoring",),
    ("importance",),
    ("repair", "reward"),
    ("context",),
    ("envs", "runtime"),
    ("serving",),
    ("cli",),
)
"""Packages from the ground up; single modules of ``rap_env`` belong to "values and bytes"."""

_ABOVE = {"render": "envs", "cli": "cli"}  # single modules that belong to another layer


def room(module: str) -> str | None:
    """The package that a module ``rap_env.a.b`` belongs to; None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    named = {name for layer in LAYERS for name in layer}
    return parts[1] if parts[1] in named else _ABOVE.get(parts[1], "values and bytes")


def arrows() -> dict[tuple[str, str], int]:
    """How many import statements lead from each package to each other one."""
    found: dict[tuple[str, str], int] = {}
    for path in PACKAGE.rglob("*.py"):
        own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        if own is None or path == PACKAGE / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                other = room(module) if module.startswith("rap_env.") else None
                if other and other != own:
                    found[own, other] = found.get((own, other), 0) + 1
    return found


def draw_architecture(path: Path) -> None:
    """Write the picture as SVG."""
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
    for (start, end), count in sorted(arrows().items()):
        (x0, y0), (x1, y1) = centre[start], centre[end]
        bend = 0.0 if abs(y0 - y1) <= 1 else 0.25
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0), (x1, y1), shrinkA=16, shrinkB=16, arrowstyle="-|>", mutation_scale=9,
                linewidth=0.5 + 0.1 * min(count, 15), color="#8795ab",
                connectionstyle=f"arc3,rad={bend}", zorder=0,
            )
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(LAYERS) - 0.5)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)

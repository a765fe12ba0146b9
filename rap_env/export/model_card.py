"""The model card beside an exported model: what it is made from, and what is known of it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rap_env.models.files.gguf_reader import GgufFile
from rap_env.plan import Plan
from rap_env.version import __version__

UNKNOWN_LICENCE = "unknown"
"""Licence of a base model whose files name none."""

_PACKAGES = ("torch", "transformers", "gguf")


@dataclass(frozen=True)
class ModelCard:
    """What a card states.

    Attributes:
        model: Name of the base model.
        fingerprint: SHA-256 of its weights and config, in hex; empty if it was not computed.
        target: The engine that the export is for.
        plan: The plan, in the items of the base model.
        bytes_before: Bytes of the base model's weights.
        bytes_after: Bytes of the exported weights, stubs included.
        predicted: The predicted rise in NLL and its source, or None and the reason.
        measured: The measured one and the text that it was measured on, if it was.
        licence: Licence of the base model.
        command: The command that made the export.
        use: Lines of Markdown on how to use it.
        notes: Further facts, a sentence each.
    """

    model: str
    fingerprint: str
    target: str
    plan: Plan
    bytes_before: int
    bytes_after: int
    predicted: tuple[float | None, str]
    measured: tuple[float, str] | None
    licence: str
    command: str
    use: str
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: installed_versions())

    @property
    def text(self) -> str:
        """The card in Markdown; its head is what model hubs read."""
        rise, source = self.predicted
        predicted = "unknown" if rise is None else f"{rise:+.4f} nats/token"
        measured = "not measured; `rap export --measure TEXT` does"
        if self.measured is not None:
            measured = f"{self.measured[0]:+.4f} nats/token on {self.measured[1]}"
        share = 100 * self.bytes_after / self.bytes_before
        rows = {
            "Base model": self.model,
            "Its fingerprint": self.fingerprint or "not computed",
            "Its licence": self.licence,
            "Weights": f"{self.bytes_after:,} bytes, {share:.1f} % of {self.bytes_before:,}",
            "Rise in NLL, predicted": f"{predicted} ({source})",
            "Rise in NLL, measured": measured,
            "Command": f"`{self.command}`",
            "Versions": ", ".join(f"{name} {found}" for name, found in self.versions.items()),
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        return "\n".join(
            [
                "---",
                f"license: {self.licence}",
                "---",
                f"# {self.model} under a plan, for {self.target}",
                "",
                "| | |",
                "|---|---|",
                *lines,
                "",
                *(f"{note}\n" for note in self.notes),
                "## Use",
                "",
                self.use,
                "",
                "## Plan",
                "",
                "Each item of the base model that is not native, and its level:",
                "",
                "```json",
                self.plan.to_json(),
                "```",
                "",
            ]
        )


def installed_versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that write exports."""
    found = {"rap-env": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


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

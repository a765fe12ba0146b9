"""The errors of the project: one class per mistake that a user can make.

All of them derive from `RapError`, so ``except RapError`` catches what the project raises
deliberately and nothing else. Each message states what is wrong and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


def counted(count: int, noun: str) -> str:
    """Format a number with its noun, such as "1 pair" or "4 pairs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class RapError(Exception):
    """Base class of all errors that the project raises deliberately."""


class UnknownNameError(RapError, ValueError):
    """A name that is not among the known ones.

    Args:
        kind: What the name refers to, in the user's words (``"sampler"``).
        name: The unknown name.
        known: The known names.
        hint: A sentence for the end of the message, if any.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = "") -> None:
        self._made_from = (kind, name, tuple(known), hint)
        known = sorted(self._made_from[2])
        near = difflib.get_close_matches(str(name), known, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        text = f"Unknown {kind} {name!r}; known are {', '.join(map(repr, known))}.{guess}"
        super().__init__(f"{text} {hint}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_from  # worker processes send errors as pickles


def check_name(kind: str, name: object, known: Collection[str], hint: str = "") -> None:
    """Raise an `UnknownNameError` unless a name is among the known ones."""
    if name not in known:
        raise UnknownNameError(kind, name, known, hint)


class InvalidRequestError(RapError, ValueError):
    """A request has a batch size, length or budget that the model cannot serve."""


class InvalidGrammarError(RapError, ValueError):
    """A schema, expression or grammar of an answer cannot be compiled, or is too complex."""


class InfeasibleBudgetError(RapError, ValueError):
    """A budget is below what the mask that removes every block needs."""


class QualityFloorError(InfeasibleBudgetError):
    """Plans fit the budget, but all of them are below the floor of quality."""


class UnsupportedModelError(RapError, ValueError):
    """The model's family is unknown, or its layout cannot be masked."""


class UnsupportedCacheError(RapError, ValueError):
    """A KV cache or decoding method does not support changing the mask during generation."""


class ModelNotAvailableError(RapError, OSError):
    """The model is neither in the cache nor on the network."""


class ChecksumError(RapError, OSError):
    """The content of a file does not match its checksum."""


class ArtifactError(RapError, ValueError):
    """A saved artifact is truncated, altered, of another format, or of another model."""


class StoreError(RapError, OSError):
    """A score store is damaged or cannot be used."""


class StorageFullError(RapError, OSError):
    """The disk is full; what was saved before is intact."""


class CorpusError(RapError, ValueError):
    """A text is too short, empty, or overlaps with text of another role."""


class NonFiniteScoreError(RapError, ArithmeticError):
    """The model returned NaN or infinity instead of a score."""


class MissingDependencyError(RapError, ImportError):
    """A feature needs an optional package that is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        self._made_from = (package, feature, extra)
        super().__init__(
            f"{feature} needs the package {package!r}; install it with "
            f'`pip install "rap-env[{extra}]"`.'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_from


class ServingSettingsError(RapError, ValueError):
    """A limit or an address of a server is invalid."""


class MemorySourceError(RapError, OSError):
    """The amount of available memory cannot be determined."""


class QueueFullError(RapError, RuntimeError):
    """The request queue is full; try again later."""


class EngineClosedError(RapError, RuntimeError):
    """The engine is closed and accepts no more requests."""

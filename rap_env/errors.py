"""Every mistake a user can make has one class here and one sentence that says what to do.

All of them derive from `RapError`, so ``except RapError`` catches what the project
raises on purpose and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RapError(Exception):
    """Base class of all errors that the project raises on purpose."""


class UnknownNameError(RapError, ValueError):
    """A name that is not among the known ones.

    Args:
        kind: What the name should have named, in the user's words (``"sampler"``).
        name: The name that was seen.
        known: The names that exist.
        hint: One more sentence for the end of the message, if any.
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


class InvalidRequestError(RapError, ValueError):
    """A request whose batch size, length or budget makes no sense for the model."""


class InfeasibleBudgetError(RapError, ValueError):
    """A budget below what even the mask that removes every block needs."""


class UnsupportedModelError(RapError, ValueError):
    """A model family whose blocks the project does not know, or a layout it cannot mask."""


class UnsupportedCacheError(RapError, ValueError):
    """A KV cache, or a way of decoding, that cannot follow a mask that changes in between."""


class ModelNotAvailableError(RapError, OSError):
    """Neither the cache nor the network has the model."""


class ChecksumError(RapError, OSError):
    """A file whose content is not what it should be."""


class ArtifactError(RapError, ValueError):
    """A saved artifact that is truncated, altered, too new, or of another model."""


class SearchTooLargeError(RapError, ValueError):
    """A search of all masks on a model with too many of them."""


class StoreError(RapError, OSError):
    """A score store that is damaged or cannot be used."""


class StorageFullError(RapError, OSError):
    """No space left on the disk; what was saved before is intact."""


class CorpusError(RapError, ValueError):
    """Text that cannot serve: too short, empty, or overlapping with text of another role."""


class NonFiniteScoreError(RapError, ArithmeticError):
    """The model gave NaN or infinity where a score was expected."""


class MissingDependencyError(RapError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        self._made_from = (package, feature, extra)
        super().__init__(
            f"{feature} needs the package {package!r}; install it with "
            f"`pip install 'rap-env[{extra}]'`."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_from


class ServingSettingsError(RapError, ValueError):
    """A limit or address that a server cannot work with."""


class MemorySourceError(RapError, OSError):
    """How much memory there is cannot be found out."""


class QueueFullError(RapError, RuntimeError):
    """Too many requests wait already; come back later."""


class EngineClosedError(RapError, RuntimeError):
    """An engine that was closed takes no more requests."""

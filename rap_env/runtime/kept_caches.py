"""Caches of preempted requests: in a file where a disk is allowed, else in memory at int4."""

from __future__ import annotations

import logging
from pathlib import Path

from rap_env.models.live.live_batch import LiveBatch
from rap_env.runtime.sequence import TokenSequence

log = logging.getLogger(__name__)


class KeptCaches:
    """Keeps what preempted sequences have cached, so that they need not be computed again.

    Args:
        folder: Where to write files; None if no disk may be used. Files have no name, so that they
            go with the process.

    Attributes:
        folder: The folder; None if no disk may be used, or none any more.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._batches: dict[TokenSequence, LiveBatch] = {}

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return sum(batch.kv_bytes for batch in self._batches.values())

    def bytes_beside(self, sequence: TokenSequence) -> int:
        """Bytes in memory of all but one sequence."""
        own = self._batches.get(sequence)
        return self.bytes - (0 if own is None else own.kv_bytes)

    def tokens(self, sequence: TokenSequence) -> int:
        """Tokens of a sequence that are kept."""
        batch = self._batches.get(sequence)
        return 0 if batch is None else batch.length

    def keep(self, sequence: TokenSequence, batch: LiveBatch) -> None:
        """Keep the cache of a batch of one row, whose memory is free afterwards, or smaller."""
        if not batch.kv_bytes or not sequence.resumable:
            batch.close()
            return
        self._batches[sequence] = batch
        if self.folder is not None:
            try:
                batch.offload(self.folder)
            except OSError as error:
                log.warning(
                    "The caches of preempted requests stay in memory from now on: %s cannot be "
                    "written to: %s.", self.folder, error,
                )  # fmt: skip
                self.folder = None
        if self.folder is None:
            batch.lower(4)

    def take(self, sequence: TokenSequence) -> LiveBatch | None:
        """What is kept of a sequence, in memory again, or None."""
        batch = self._batches.pop(sequence, None)
        try:
            if batch is not None:
                batch.load()
        except OSError as error:
            log.warning("A kept cache cannot be read, and is computed again: %s.", error)
            return None
        return batch

    def drop_newest(self) -> bool:
        """Free the last one that is in memory; whether there was one."""
        for sequence, batch in reversed(self._batches.items()):
            if batch.kv_bytes:
                batch.close()
                del self._batches[sequence]
                return True
        return False

    def drop_ended(self) -> None:
        """Free those of sequences that have ended."""
        for sequence in [each for each in self._batches if each.handle.done]:
            self._batches.pop(sequence).close()

    def close(self) -> None:
        """Free all."""
        for batch in self._batches.values():
            batch.close()
        self._batches.clear()

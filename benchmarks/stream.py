"""One GSI round under a memory cap, against the model in memory: ``python -m benchmarks.stream``.

All candidates of the first round are scored on a short text, by a model whose layers are read from
their files one at a time, and by the whole model. New processes measure how much memory each side
adds, including opening the model.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.record import write_record
from rap_env.blocks import BlockMask
from rap_env.errors import InvalidRequestError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.corpus import Corpus

_PROCESS = """
import json, sys
from benchmarks.stream import StreamSettings, growth
print(growth(StreamSettings(**json.loads(sys.argv[1])), *map(int, sys.argv[2:])))
"""


@dataclass
class StreamSettings(harness.ModelSettings):
    """Settings of this benchmark."""

    dtype: str = "bfloat16"
    max_memory_bytes: int = 160_000_000
    windows: int = 2
    """Windows of the calibration text, which the model generates."""
    window_tokens: int = 128


def main(settings: StreamSettings) -> None:
    """Measure, check that the scores are equal, and write the record."""
    import torch

    from rap_env.models.files.streamed import stream_llm
    from rap_env.scoring.corpus import CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus

    whole = harness.open_model(settings)
    streamed = stream_llm(
        settings.model,
        max_memory_bytes=settings.max_memory_bytes,
        device=settings.device,
        dtype=settings.dtype,
    )
    text = CorpusConfig(windows=settings.windows, window_tokens=settings.window_tokens)
    corpus = load_corpus(text, whole)
    measured: dict[str, Any] = {
        "weights_bytes": whole.facts.base_bytes + sum(whole.facts.block_param_bytes),
        "weights_held_bytes": settings.max_memory_bytes - streamed.spare_bytes,
        "candidates": whole.num_blocks,
    }
    expected = _scan(whole, corpus, masks_together=1)  # as the streamed model has them
    reads = streamed.layer_reads
    allocated, same = _peak(streamed, corpus, expected)
    measured |= {"allocated_peak_bytes": allocated, "layer_reads": streamed.layer_reads - reads}
    if not same:
        raise SystemExit("The streamed model gave other scores; nothing was recorded.")
    sides = {
        "streamed": partial(_scan, streamed, corpus),
        "in_memory": partial(_scan, whole, corpus),
    }
    seconds = harness.alternate(sides, settings.repeats, warm_up=0)  # both have just run
    measured |= {f"{side}_s": harness.spread(values) for side, values in seconds.items()}
    measured["streamed_over_in_memory"] = harness.ratios(seconds["streamed"], seconds["in_memory"])
    measured["same_scores"] = same
    device = str(whole.device)
    threads = torch.get_num_threads()
    grown = {
        "streamed": _in_a_process(settings, threads, settings.max_memory_bytes),
        "in_memory": _in_a_process(settings, threads, 0),
    }
    measured["process_growth_bytes"] = grown
    _write(settings, device, measured)


def _write(settings: StreamSettings, device: str, measured: dict[str, Any]) -> None:
    cap = settings.max_memory_bytes
    grown = measured["process_growth_bytes"]
    targets = [
        harness.Target(
            "tensors under the cap, share of it that is used", None, 1.0,
            measured["allocated_peak_bytes"] / cap, f"a cap of {cap / 1e6:.0f} MB",
        ),
        harness.Target(
            "growth of a process under the cap, share of it", None, 1.0,
            grown["streamed"] / cap, f"{grown['in_memory'] / 1e6:.0f} MB with the whole model",
        ),
    ]  # fmt: skip
    if device != "cpu":
        targets.pop()  # a process's own memory says nothing of a GPU's
    notes = [
        "allocated_peak_bytes: resident weights, and all that torch's allocator reports in a scan.",
        "process_growth_bytes: most resident memory (VmHWM) of a fresh process over what it had "
        "before the model was opened, libraries and a tokenizer loaded; it also counts what the "
        "C library keeps of freed memory, and the libraries' own buffers.",
    ]
    write_record(
        "stream", device=device, settings=settings, targets=targets, measured=measured, notes=notes
    )


def _scan(llm: ElasticLLM, corpus: Corpus, masks_together: int | None = None) -> dict[str, float]:
    """Score one round with a new scorer."""
    from rap_env.scoring.scorer import MaskScorer

    scorer = MaskScorer(llm, corpus, masks_together=masks_together)
    return {block.name: nll for block, nll in scorer.scan(BlockMask()).items()}


def _peak(llm: ElasticLLM, corpus: Corpus, expected: dict[str, float]) -> tuple[int, bool]:
    """Peak bytes of a scan, with resident weights, and whether its scores are as expected."""
    resident = llm.facts.base_bytes  # facts first: they read every weight
    gc.collect()
    with harness.measured_peak(llm.device) as measured:
        same = _scan(llm, corpus) == expected
    return resident + measured.peak_bytes, same


def _in_a_process(settings: StreamSettings, threads: int, cap_bytes: int) -> int:
    given = json.dumps(asdict(settings))
    command = [sys.executable, "-c", _PROCESS, given, str(threads), str(cap_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"A process that measures memory failed: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def growth(settings: StreamSettings, threads: int, cap_bytes: int) -> int:
    """Bytes by which this process grows at its peak while it opens a model and scores a round.

    Args:
        settings: The model, and the size of a text that was generated before.
        threads: Threads of torch.
        cap_bytes: Memory cap; 0 loads the model as a whole.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rap_env.scoring.scorer  # noqa: F401
    from rap_env.models.families.adapter import read_config
    from rap_env.models.files.loading import shared_llm
    from rap_env.models.files.sources import locate
    from rap_env.scoring.corpus import CorpusConfig
    from rap_env.scoring.corpus_loading import load_corpus

    torch.set_num_threads(threads)
    auto: Any = AutoModelForCausalLM
    folder = locate(settings.model).folder
    with torch.device("meta"):  # loads the family's code
        auto.from_config(read_config(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    gc.collect()
    before = _status_bytes("VmRSS")
    llm = shared_llm(
        settings.model,
        device="cpu",
        dtype=settings.dtype,
        weights="bf16",
        max_memory_bytes=cap_bytes or None,
    )
    text = CorpusConfig(windows=settings.windows, window_tokens=settings.window_tokens)
    _scan(llm, load_corpus(text, llm))
    del tokenizer
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        raise InvalidRequestError(
            "This benchmark needs /proc/self/status to measure a process; run it on Linux."
        ) from None


if __name__ == "__main__":
    harness.launch(StreamSettings, main)

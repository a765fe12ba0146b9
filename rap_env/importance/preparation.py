"""Prepare a model of one's own: weights of few bits, and costs of levels, made once with a text.

*Quick* levels take minutes and *thorough* ones, by GPTQ, several times as long; see
`models.live.calibration`. Costs of quick levels are of less text, and not of removals.

The work is a list of tasks, which processes share (`models.shared_tasks`):

1. *Levels*, a task for each layer (`models.live.calibration`): its native outputs are passed on
   to the next layer, and its weights are rounded while another process goes on.
2. *Costs*, a task for each window of text (`gradient_costs.all_window_costs`).
3. *Plans* whose rise in NLL is measured, a task for each (`gradient_costs.all_plan_nlls`).

Each process reads a layer of the model from its files when it needs it. A run that was ended
continues where it was, and a model counts as prepared only when the last task is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from rap_env.artifacts import digest, load_artifact, save_artifact
from rap_env.errors import ArtifactError, InvalidRequestError, ModelNotAvailableError
from rap_env.importance.gradient_costs import (
    all_plan_nlls,
    all_window_costs,
    fitted_costs,
    item_levels,
)
from rap_env.importance.level_costs import CACHE_LEVELS, LevelCosts
from rap_env.models.device import free_memory_early, resident_bytes, uses_float32
from rap_env.models.files.loading import load_again, load_llm
from rap_env.models.files.model_folder import locked
from rap_env.models.live.calibration import (
    make_levels,
    save_prepared_levels,
    use_prepared_levels,
    use_text,
)
from rap_env.models.live.calibration_text import (
    COST_KINDS,
    calibration_windows,
    level_windows,
    mixed_windows,
    user_windows,
)
from rap_env.models.live.elastic import ElasticLLM, LevelFiles
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.progress import progress_bar
from rap_env.models.shared_tasks import FORMAT, KIND, Check, Note, Tasks, helpers, keep_usable
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.models.weights.packing import PackedLevel
from rap_env.paths import COSTS_FILE, prepared_dir
from rap_env.plan import Plan, is_cache
from rap_env.request import human_bytes
from rap_env.scoring.corpus import Corpus

log = logging.getLogger(__name__)

COST_WINDOWS, COST_TOKENS = 3, 1024
"""Windows of text for costs, a kind of text each, and the tokens of each."""
QUICK_COST_WINDOWS, QUICK_COST_TOKENS = 2, 512
QUICK_CHAT_WINDOWS = 2
"""Windows of chats, on which alone quick costs of windows of caches are measured: in a chat what
was said before counts most. With 128 tokens in the caches of the default model the windows of
prose and code lose 0.02 nats per token, those of chats 0.04 and 0.14, and WikiText 0.10."""
QUICK_LEVEL_WINDOWS = 10
_FEWEST_LEVEL_WINDOWS = 16  # that a user's text must have
_VERSION = 5
"""Part of a run's key: increase it when results change."""

_SHARES = {"levels": 0.5, "costs": 0.3, "plans": 0.2}  # of the time, about
_TEXT = "text.json"


@dataclass(frozen=True)
class _Run:
    """What each process of a run needs to know.

    Attributes:
        folder: Folder of the results.
        model: As for `load_llm`.
        dtype: In which the levels are made.
        device: Where all is computed.
        bits: Fewest bits of weights, 2, 3 or 4.
        text: Source of the text.
        kinds: The kind of text of each window that plans are measured on; empty for a user's.
        thorough: Whether levels are made by GPTQ.
        threads: Threads of each process; None for torch's own number.
        bounded: Whether freed memory returns to the system at once, with which preparing takes
            half as much time again.
    """

    folder: Path
    model: str
    dtype: str
    device: str
    bits: int
    text: str
    kinds: tuple[str, ...]
    thorough: bool
    threads: int | None
    bounded: bool

    def open(self, dtype: str, files: LevelFiles = ()) -> ElasticLLM:
        """The model in a dtype, with its blocks in its files, and levels in those given."""
        llm = load_again(self.model, self.device, dtype, files)
        if self.bounded:
            free_memory_early()
        return llm


def prepare(
    model: str | os.PathLike[str],
    *,
    text: str | Path | None = None,
    bits: int = 2,
    memory_bytes: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    thorough: bool = False,
    progress: bool = True,
) -> tuple[LevelCosts, Path]:
    """Make the levels of a model and measure what they cost, unless both exist.

    They are used wherever the model is served in this dtype from then on; in environments and
    studies only thorough ones are. Thorough levels replace quick ones, but not the reverse.

    Args:
        model: As for `rap_env.load_llm`.
        text: File of prompts to make them with (`user_windows`); None is text of the package
            and of the Python that runs (`mixed_windows`).
        bits: Fewest bits of weights: 2, 3, or 4 for levels that no text makes.
        memory_bytes: Most bytes of resident memory of all processes together; None for two
            processes on a CPU with two cores.
        device: As for `load_llm`.
        dtype: As for `load_llm`: the dtype in which the model will be used.
        thorough: Whether levels are made by GPTQ.
        progress: Whether to show a progress bar.

    Returns:
        The costs, and the file of the cache that has them.

    Raises:
        InvalidRequestError: The bits are not 2, 3 or 4, or the memory is not enough.
        RapError: As for `load_llm`, `user_windows`, and where the disk is full.
    """
    if bits not in (2, 3, 4):
        raise InvalidRequestError(f"bits must be 2, 3 or 4, not {bits!r}.")
    started = time.monotonic()
    llm = load_llm(model, device=device, dtype=dtype, on_demand=True, quick_levels=True)
    if llm.tokenizer is None:
        raise ModelNotAvailableError(
            f"{llm.name} has no tokenizer, and so no text to prepare it with; add its files to the "
            "model's folder."
        )
    path = prepared_dir(llm.fingerprint) / COSTS_FILE
    texts = _texts(llm, text, bits, thorough)
    key = _key(llm, texts, bits, thorough)
    quick_key = _key(llm, _texts(llm, text, bits, False), bits, False) if thorough else key
    folder = path.parent / f"{key[:16]}.part"
    with locked(folder):
        if (made := _made_before(llm, path, key, bits)) is not None:
            return made, path
        folder.mkdir(parents=True, exist_ok=True)
        body = {name: tokens.tolist() for name, tokens in texts.items()}
        save_artifact(folder / _TEXT, KIND, FORMAT, body)
        kinds = *COST_KINDS[: len(texts["costs"])], *["chat"] * len(texts.get("chats", ()))
        workers = _workers(llm, memory_bytes, thorough)
        run = _Run(
            folder,
            os.fspath(model),
            str(llm.dtype).removeprefix("torch."),
            str(llm.device),
            bits,
            text="mixture" if text is None else os.fspath(text),
            kinds=() if text is not None else kinds,
            thorough=thorough,
            threads=1 if workers > 1 else None,
            bounded=memory_bytes is not None,
        )
        del llm
        keep_usable(folder)
        work = partial(_work, run)
        with _progress(progress, bits) as note, helpers(folder, work, workers) as check:
            costs = work(check, note)
        # Thorough levels serve as quick ones.
        scoring = {**costs.provenance["scoring"], "preparations": [key, quick_key]}
        costs = replace(
            costs,
            seconds=time.monotonic() - started,
            provenance={**costs.provenance, "scoring": scoring},
        )
        costs.save(path)
        shutil.rmtree(folder, ignore_errors=True)
    return costs, path


def _key(llm: ElasticLLM, texts: Mapping[str, torch.Tensor], bits: int, thorough: bool) -> str:
    """What tells a run and its results apart from others."""
    hashes = {name: Corpus.of_tokens(tokens).sha256 for name, tokens in texts.items()}
    return digest([llm.fingerprint, hashes, bits, thorough, _VERSION])


def _made_before(llm: ElasticLLM, path: Path, key: str, bits: int) -> LevelCosts | None:
    """The costs of an earlier run of this key, if they and its levels exist."""
    with contextlib.suppress(FileNotFoundError, ArtifactError):
        costs = LevelCosts.load(path, llm)
        use_prepared_levels(llm, quick=True)  # another process may have made them meanwhile
        same = key in costs.provenance["scoring"].get("preparations", ())
        return costs if same and not llm.absent_levels(_made_levels(bits)) else None
    return None


def _texts(
    llm: ElasticLLM, text: str | Path | None, bits: int, thorough: bool
) -> dict[str, torch.Tensor]:
    """Windows of token ids by what they are for, (windows, tokens) each."""
    costs, levels = (COST_WINDOWS, COST_TOKENS), level_windows(llm)
    if not thorough:
        costs, levels = (QUICK_COST_WINDOWS, QUICK_COST_TOKENS), (QUICK_LEVEL_WINDOWS, levels[1])
    costs = costs[0], min(costs[1], llm.adapter.max_positions)
    if text is None:
        own = calibration_windows(llm) if thorough else mixed_windows(llm, *levels)
        texts = {"costs": mixed_windows(llm, *costs, COST_KINDS), "levels": own}
        if not thorough:
            texts["chats"] = mixed_windows(llm, QUICK_CHAT_WINDOWS, costs[1], ["chat"])
    else:
        fewest = _FEWEST_LEVEL_WINDOWS if _made_levels(bits) else 1  # which none is made with
        texts = {
            "costs": user_windows(llm, text, *costs, fewest=1),
            "levels": user_windows(llm, text, *levels, fewest=min(fewest, levels[0])),
        }
    greatest = max(int(tokens.max()) for tokens in texts.values())
    if greatest >= llm.facts.vocab_size:
        raise ModelNotAvailableError(
            f"The tokenizer of {llm.name} writes the token id {greatest}, but the model has "
            f"embeddings of ids below {llm.facts.vocab_size}; it is the tokenizer of another "
            "model: replace its files in the model's folder."
        )
    return texts


def _workers(llm: ElasticLLM, memory_bytes: int | None, thorough: bool) -> int:
    """Processes that share the work: two on a CPU with two cores and enough memory."""
    most = 2 if llm.device.type == "cpu" and (os.cpu_count() or 1) > 1 else 1
    if memory_bytes is None:
        return most
    need = resident_bytes()[1] + process_bytes(llm, thorough=thorough)
    if need > memory_bytes:
        raise InvalidRequestError(
            f"memory is {human_bytes(memory_bytes)}, but preparing {llm.name} takes about "
            f"{human_bytes(need)}, with a layer at a time in memory; set memory to at least that."
        )
    return min(most, memory_bytes // need)


def process_bytes(llm: ElasticLLM, *, thorough: bool) -> int:
    """About what preparing a model takes at most in each process, beside Python and libraries.

    For thorough levels it is mostly five float32 matrices (n, n), for a matrix with n inputs;
    for costs the states of a window in all layers, what the gradient of one layer needs, and its
    widened weights. On a GPU these are in its own memory.
    """
    facts, blocks = llm.facts, llm.weight_items[:-1]
    shapes = [[shape for place in block.places for shape in place.shapes] for block in blocks]
    most_inputs = max((inputs for block in shapes for _, inputs in block), default=0)
    layer = max(sum(outputs * inputs for outputs, inputs in block) for block in shapes)
    states = facts.num_layers * facts.hidden_size + 12 * facts.ffn_width
    cost_tokens = COST_TOKENS if thorough else QUICK_COST_TOKENS
    widened = layer / 2 if _multiplies_short(llm.device, llm.dtype, thorough) else layer
    values = max(5 * most_inputs**2 * thorough + layer, cost_tokens * states + widened)
    return round(4 * (values if llm.device.type == "cpu" else layer))


@contextlib.contextmanager
def _progress(shown: bool, bits: int) -> Iterator[Note]:
    """Yields what shows the share of a group of tasks that is done.

    What is done when a group begins is of an earlier run, and not of the time of this one.
    """
    earlier, done = dict[str, float](), dict[str, float]()
    shares = {name: share for name, share in _SHARES.items() if bits < 4 or name != "levels"}
    with progress_bar(shown, total=100, desc="prepare", unit="%", smoothing=0) as bar:

        def percent(parts: Mapping[str, float]) -> int:
            weighted = sum(shares[name] * part for name, part in parts.items())
            return round(100 * weighted / sum(shares.values()))

        def note(group: str, share: float) -> None:
            earlier.setdefault(group, share)
            done[group] = share
            if percent(done) > bar.n:
                bar.initial = percent(earlier)
                bar.update(percent(done) - bar.n)

        yield note


def _work(run: _Run, check: Check, note: Note) -> LevelCosts:
    """Do all tasks that no other process does, and return what follows from all results."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    tasks = Tasks(run.folder, check, note)
    texts = load_artifact(run.folder / _TEXT, KIND, FORMAT)
    windows = torch.tensor(texts["costs"])
    chats = torch.tensor(texts["chats"]) if "chats" in texts else None
    llm, made = run.open(run.dtype), _made_levels(run.bits)
    short = _multiplies_short(llm.device, llm.dtype, run.thorough)
    if made:
        text = torch.tensor(texts["levels"])
        use_text(llm, text, made, quick=not run.thorough)
        make_levels(llm, text, tasks, made)
        save_prepared_levels(llm, made)
    levels = {
        item: names if is_cache(item) else _offered(names, run.bits, run.thorough)
        for item, names in item_levels(llm.facts, CACHE_LEVELS, windows.shape[1]).items()
    }
    facts, files = llm.facts, llm.level_files
    del llm
    # States are float32, in which small changes are not lost to rounding.
    wide = PartialForward(run.open("float32", files), widen=True, gradients=True, short=short)
    parts = all_window_costs(wide, windows, levels, tasks.run)
    del wide

    def measure(plans: Sequence[Plan]) -> list[list[float | None]]:
        forward = PartialForward(run.open(run.dtype, files), widen=True)
        return all_plan_nlls(forward, windows, plans, tasks.run, chats)

    text_of_costs = Corpus.of_tokens(windows, source=run.text)
    return fitted_costs(facts, parts, levels, text_of_costs, measure, run.kinds, 4)


def _multiplies_short(device: torch.device, dtype: torch.dtype, thorough: bool) -> bool:
    """Whether costs are of products in bfloat16; quick ones are, where those are faster.

    What rounding adds matters for levels that change little: in all blocks of the default model
    costs of four bits beside those of its file are 1.4 times as high, before they are scaled to
    what all of them lose together; those of three and two bits differ by 0.1 %.
    """
    return not thorough and dtype == torch.bfloat16 and not uses_float32(device, dtype)


def _made_levels(bits: int) -> list[PackedLevel]:
    """The levels that a text makes; with four bits none."""
    return [name for name, form in LOW_BIT_FORMATS.items() if 4 > bits <= form.bits]


def _offered(names: Sequence[str], bits: int, thorough: bool) -> list[str]:
    """The levels that weights are offered: int4 only where no text makes a smaller one."""
    made = set(names).intersection(_made_levels(bits))
    without_text = {"int8"} if made else {"int8", "int4"}
    if thorough:
        without_text |= {"removed"}
    return [name for name in names if name in made | without_text]

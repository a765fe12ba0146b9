"""A mask made permanent: a smaller checkpoint without the removed tensors.

The folder holds safetensors, config, generation config and tokenizer as transformers writes
them, and ``rap_pruned.json``, which names the removed blocks, states the ranks of the stubs in
their places, if there are any, and carries checksums. Plain transformers would fill the removed
blocks with random weights, leave the stubs out, and only warn of it; so ``config.json`` states
the model type ``rap_pruned``, which its Auto classes refuse, and `load_pruned` is the way to load
the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from rap_env.artifacts import disk_errors, load_artifact, save_artifact
from rap_env.blocks import BlockMask, block_index, block_name
from rap_env.errors import ArtifactError, StorageFullError
from rap_env.llm.adapter import FamilyAdapter, adapter_for
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.progress import transformers_bars
from rap_env.llm.removed import Removed
from rap_env.llm.single import attention_name, take_short_ways
from rap_env.llm.stub import Stub

PRUNED_FILE = "rap_pruned.json"
"""Name of the file that makes a folder a pruned checkpoint."""

_KIND, _VERSION = "pruned-checkpoint", 1
_MODEL_TYPE = "rap_pruned"
_PORTABLE_ATTENTION = ("eager", "sdpa")  # others may be missing where the folder is loaded


def save_pruned(llm: ElasticLLM, mask: BlockMask, folder: str | os.PathLike[str]) -> Path:
    """Save what `mask` leaves of a model, so that the removed tensors are in no file.

    The folder appears only when it is complete. An older pruned checkpoint there is replaced.
    Of a repaired model, the stubs of the removed blocks are saved along.

    Args:
        llm: The model; its current mask plays no part and is applied again afterwards.
        mask: The blocks to leave out (beside those that the model was built without).
        folder: Where to save.

    Returns:
        The folder.

    Raises:
        UnknownNameError: The mask names a block that the model does not have.
        ArtifactError: The folder exists and is no pruned checkpoint.
        StorageFullError: The disk is full; what was in the folder before is still there.
    """
    folder = Path(folder)
    mask.check(llm.num_blocks)
    if folder.exists() and not (folder / PRUNED_FILE).exists() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} holds something that is no pruned checkpoint; choose another folder."
        )
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _write(llm, mask, work)
            _replace(folder, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def load_pruned(folder: str | os.PathLike[str], *, device: str = "cpu") -> ElasticLLM:
    """Load what `save_pruned` saved; the removed blocks take no memory, not even while loading.

    Its logits equal those of the masked model bit for bit. Its blocks keep their names and
    indices; the removed ones are in `ElasticLLM.pruned`, and no mask brings them back. A removed
    block has the bytes of the stub that was saved in its place, which a mask of that block takes
    away, and 0 bytes without one.

    Args:
        folder: Where `save_pruned` saved.
        device: Where the weights go.

    Raises:
        FileNotFoundError: There is no pruned checkpoint in the folder.
        ArtifactError: It was truncated or altered, or a tensor is missing or not expected.
    """
    folder = Path(folder)
    body = load_artifact(folder / PRUNED_FILE, _KIND, _VERSION)
    if _checksums(folder) != body["files"]:
        raise ArtifactError(
            f"A file in {folder} was altered, cut or lost after it was saved (checksum differs "
            f"from {PRUNED_FILE}); save the pruned checkpoint again."
        )
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries["model_type"] = body["model_type"]
    config = AutoConfig.for_model(**entries)
    ranks = dict.fromkeys(body["removed"]) | body.get("stub_ranks", {})
    model = _load_model(folder, config, ranks, body["attention"])
    tokenizer = None
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    model = model.to(device)
    take_short_ways(model)
    llm = ElasticLLM(model, tokenizer, name=body["name"], folder=folder)
    for _, place, stub in _stubs(llm):
        # Mapped from a file they are aligned in another way than in memory, and so a product
        # with a single row is summed in another order.
        place.stub = stub.on(llm.device)
    return llm


def _write(llm: ElasticLLM, mask: BlockMask, folder: Path) -> None:
    with llm.masked(mask), transformers_bars(shown=False):
        llm.model.save_pretrained(folder)
        stub_ranks = {block_name(index): stub.rank for index, _, stub in _stubs(llm)}
    if llm.tokenizer is not None:
        llm.tokenizer.save_pretrained(folder)
    config_file = folder / "config.json"
    entries = json.loads(config_file.read_text(encoding="utf-8"))
    entries["model_type"] = _MODEL_TYPE
    config_file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    attention = attention_name(llm.model)
    body = {
        "name": llm.name,
        "removed": list((mask | llm.pruned).names),
        "stub_ranks": stub_ranks,
        "num_blocks": llm.num_blocks,
        "model_type": llm.model.config.model_type,
        "source_fingerprint": llm.fingerprint,
        "attention": attention if attention in _PORTABLE_ATTENTION else None,
        "files": _checksums(folder),
    }
    save_artifact(folder / PRUNED_FILE, _KIND, _VERSION, body)


def _stubs(llm: ElasticLLM) -> Iterator[tuple[int, Removed, Stub]]:
    """The stubs that stand in the model now: block, place and stub."""
    for site in llm.adapter.sites(llm.model):
        place = site.modules[0]
        if isinstance(place, Removed) and isinstance(place.stub, Stub):
            yield site.index, place, place.stub


def _replace(folder: Path, work: Path) -> None:
    """Move `work` to `folder`; an older checkpoint there steps aside first."""
    aside = work.with_name(f"{work.name}.old")
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, aside)
    os.replace(work, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that says what the model computes."""
    sums = {}
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors*")]):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _load_model(
    folder: Path, config: Any, removed: Mapping[str, int | None], attention: str | None
) -> Any:
    """The model without the blocks of `removed`, which gives the rank of a stub or None each."""
    adapter = adapter_for(config)
    BlockMask.of(*removed).check(adapter.num_blocks)
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with transformers_bars(shown=False):
            model, report = _without(base, adapter, removed).from_pretrained(
                folder,
                config=config,
                dtype=config.dtype,
                attn_implementation=attention,
                local_files_only=True,
                output_loading_info=True,
            )
    except (RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"The tensors in {folder} do not suit its config; save the pruned checkpoint again."
        ) from error
    for problem, text in (("missing_keys", "lacks"), ("unexpected_keys", "has not expected")):
        if report[problem]:
            raise ArtifactError(
                f"{folder} {text} the tensors {', '.join(sorted(report[problem]))}; save the "
                "pruned checkpoint again."
            )
    model.__class__ = base
    return model


def _without(base: Any, adapter: FamilyAdapter, removed: Mapping[str, int | None]) -> Any:
    """`base`, built without some blocks, so that loading neither expects nor makes them.

    Their stubs are built, for loading to fill.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        sites = adapter.sites(self)
        for name, rank in removed.items():
            wide = adapter.hidden_size
            stub = None if rank is None else Stub.zeros(rank, wide, self.dtype)
            sites[block_index(name)].remove(stub)

    # The same name: transformers finds a class's renamed checkpoint keys by it.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """As `disk_errors`, for safetensors too, which hides the number of an OS error in a text."""
    with disk_errors(folder):
        try:
            yield
        except SafetensorError as error:
            if "os error 28" not in str(error) and "os error 122" not in str(error):
                raise
            raise StorageFullError(
                f"No space left while writing {folder}; free some and save again: what was there "
                "before is intact."
            ) from error

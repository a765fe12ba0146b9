"""Save a pruned model as a smaller checkpoint without the removed tensors, and load it.

The folder holds safetensors, config, generation config and tokenizer as transformers writes
them, and ``rap_pruned.json`` with the names of the removed blocks and checksums. The family's
own class would fill the removed blocks with random weights and only warn. So ``config.json``
states the model type ``rap_pruned``, and the folder has the code that transformers opens it
with: without ``trust_remote_code=True`` its Auto classes
reject the folder. `load_pruned` runs no such code.

`code_files` derives a model class from that of the family; its constructor leaves the removed
blocks out. Their placeholders are a copy of `families.placeholders`. vLLM's
``DeciLMForCausalLM`` reads from the config's ``block_configs`` which blocks of each layer are
left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ArtifactError, UnsupportedModelError
from rap_env.models.caches.attention import attention_name, speed_up_decoding
from rap_env.models.families import placeholders
from rap_env.models.families.families import FamilyAdapter, adapter_for
from rap_env.models.families.placeholders import remove_blocks
from rap_env.models.files.model_folder import file_sha256, scratch
from rap_env.models.files.weight_files import load_complete
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.progress import transformers_bars
from rap_env.plan import Plan, block_index
from rap_env.version import __version__

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Model types whose blocks are those of Llama, some with biases: what other engines can
prune."""

VLLM_ENTRIES = ("block_configs", "qkv_bias")
"""Entries that `vllm_entries` adds to those of the family, beside ``architectures``."""

_ARCHITECTURE = "DeciLMForCausalLM"


def vllm_entries(adapter: FamilyAdapter, removed: Plan) -> dict[str, Any]:
    """The entries for a model without some blocks.

    Args:
        adapter: Of the model.
        removed: The removed blocks.
    """
    config = adapter.config
    if adapter.model_type not in LLAMA_LIKE:
        raise UnsupportedModelError(
            f"vLLM can only leave blocks out of models like Llama, and {adapter.model_type} is "
            f"none; known are {', '.join(LLAMA_LIKE)}."
        )
    if any(window is not None for window in adapter.kv_window_tokens):
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} has no sliding window, and this {adapter.model_type} has one."
        )
    first = next((i for i in range(adapter.num_blocks) if i not in removed.removed), None)
    if first is None or first % 2:
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} cannot start with a feed-forward block: its norm expects the "
            "residual stream of an attention block before it. Keep the first attention block."
        )
    group = config.num_attention_heads // adapter.kv_heads
    is_removed = [index in removed.removed for index in range(adapter.num_blocks)]
    blocks = [
        {
            "attention": {"no_op": attn, "n_heads_in_group": None if attn else group},
            "ffn": {"no_op": ffn, "intermediate_size": None if ffn else adapter.ffn_width},
        }
        for attn, ffn in zip(is_removed[::2], is_removed[1::2], strict=True)
    ]
    entries: dict[str, Any] = {"architectures": [_ARCHITECTURE], "block_configs": blocks}
    # Biases of queries, keys and values, but not of the output.
    if adapter.model_type == "qwen2":
        entries["qkv_bias"] = True
    return entries


MODEL_TYPE = "rap_pruned"
"""Model type in the config of pruned checkpoints, which transformers alone does not know."""

REMOVED_ENTRY = "removed_blocks"
"""Entry of the config with the removed blocks; see
`models.families.placeholders.remove_blocks`."""

_CODE, _PLACEHOLDERS = "modeling_rap_pruned", "rap_placeholders"
_CONFIG_CLASS, _MODEL_CLASS = "RapPrunedConfig", "RapPrunedForCausalLM"

_TEMPLATE = Path(__file__).with_name(f"{_CODE}.txt")
"""The module's code, with the names of the family's classes left open."""


def code_files(model: Any) -> dict[str, str]:
    """The content of the Python files for a model of transformers, by name."""
    code = _TEMPLATE.read_text(encoding="utf-8").format(
        config=type(model.config).__name__,
        model=type(model).__name__,
        version=__version__,
        placeholders=_PLACEHOLDERS,
        config_class=_CONFIG_CLASS,
        model_class=_MODEL_CLASS,
        model_type=MODEL_TYPE,
        entry=REMOVED_ENTRY,
    )
    source = Path(placeholders.__file__).read_text(encoding="utf-8")
    return {f"{_CODE}.py": code, f"{_PLACEHOLDERS}.py": source}


def with_code(
    entries: Mapping[str, Any], removed: Mapping[str, Any], adapter: FamilyAdapter
) -> dict[str, Any]:
    """Entries of a config that lead transformers to the code, and vLLM to its own.

    Args:
        entries: The entries of the family's config.
        removed: What `removed_entries` returned.
        adapter: Of the model.
    """
    more: dict[str, Any] = {"architectures": [_MODEL_CLASS]}
    with contextlib.suppress(UnsupportedModelError):
        more = vllm_entries(adapter, Plan.removing(*removed))
    auto_map = {
        "AutoConfig": f"{_CODE}.{_CONFIG_CLASS}",
        "AutoModelForCausalLM": f"{_CODE}.{_MODEL_CLASS}",
    }
    return {
        **entries,
        **more,
        "model_type": MODEL_TYPE,
        "auto_map": auto_map,
        REMOVED_ENTRY: dict(removed),
    }


def without_code(entries: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The entries of the family's config again, from those that `with_code` returned."""
    own = {"architectures", "auto_map", REMOVED_ENTRY, *VLLM_ENTRIES}
    return {k: v for k, v in entries.items() if k not in own} | {"model_type": model_type}


def removed_entries(adapter: FamilyAdapter, removed: Iterable[str]) -> dict[str, list[str]]:
    """What `remove_blocks` takes, for the names of blocks."""
    return {name: list(adapter.module_paths(block_index(name))) for name in removed}


PRUNED_FILE = "rap_pruned.json"
"""Name of the file that marks a folder as a pruned checkpoint."""

_KIND, _VERSION = "pruned-checkpoint", 1
_PORTABLE_ATTENTION = ("eager", "sdpa")  # others may be missing on the machine that loads it


def save_pruned(
    llm: ElasticLLM,
    mask: Plan,
    folder: str | os.PathLike[str],
    *,
    readme: str = "",
) -> Path:
    """Save a model without the tensors of the blocks of `mask`.

    The folder appears only when it is complete. An older pruned checkpoint there is replaced.
    Besides `load_pruned`, ``AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)`` opens the folder.

    Args:
        llm: The model; its current mask has no effect and is applied again afterwards.
        mask: The blocks to leave out, in addition to those that the model was built without.
        folder: The folder to write.
        readme: Text of the folder's README.md; without it there is none.

    Returns:
        The folder.

    Raises:
        UnknownNameError: The mask names a block that the model does not have.
        UnsupportedModelError: The model's own weights are packed.
        ArtifactError: The folder has content and is no pruned checkpoint, or it is a file.
        StorageFullError: The disk is full; the folder is unchanged.
    """
    folder = Path(folder)
    mask.check(llm.num_blocks)
    if llm.facts.packed:
        raise UnsupportedModelError(
            f"The weights of {llm.name} are packed, and a pruned checkpoint has unquantised ones: "
            "load the model with weights='bf16' and save that."
        )
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, not a folder; choose another folder.")
    if folder.exists() and not (folder / PRUNED_FILE).exists() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} has content that is no pruned checkpoint; choose another folder."
        )
    with scratch(folder) as work:
        _write(llm, mask, work)
        if readme:
            (work / "README.md").write_text(readme, encoding="utf-8")
        # Only their owner can read safetensors' files.
        mode = (work / PRUNED_FILE).stat().st_mode
        for path in work.iterdir():
            path.chmod(mode)
        _replace(folder, work)
    return folder


def load_pruned(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype | None = None
) -> ElasticLLM:
    """Load a pruned checkpoint; the removed blocks take no memory, not even while loading.

    Its logits equal those of the masked model bit for bit. Its blocks keep their names and
    indices; the removed ones are in `ElasticLLM.pruned`, have 0 bytes, and no mask restores
    them.

    Args:
        folder: A folder that `save_pruned` wrote.
        device: Device of the weights.
        dtype: The dtype that the checkpoint must have; None for any.

    Raises:
        FileNotFoundError: There is no pruned checkpoint in the folder.
        ArtifactError: It was truncated or altered, or has an unexpected tensor.
        UnsupportedModelError: It has another dtype, or tensors that do not fit its config.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(folder)
    if not (folder / PRUNED_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no pruned checkpoint (there is no {PRUNED_FILE}); give a folder that "
            "save_pruned or `rap prune` wrote."
        )
    body = load_artifact(folder / PRUNED_FILE, _KIND, _VERSION)
    if _checksums(folder) != body["files"]:
        raise ArtifactError(
            f"A file in {folder} was altered, truncated or removed after it was saved (its "
            f"checksum differs from {PRUNED_FILE}); save the pruned checkpoint again."
        )
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**without_code(entries, body["model_type"]))
    if dtype not in (None, config.dtype):
        raise UnsupportedModelError(
            f"The pruned checkpoint {folder} has dtype {config.dtype}, not {dtype}; leave dtype at "
            "'auto', or load the whole model in that dtype and save the pruned checkpoint again."
        )
    model = _load_model(folder, config, body["removed"], body["attention"])
    tokenizer = None
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    model = model.to(device).requires_grad_(False)
    speed_up_decoding(model)
    return ElasticLLM(model, tokenizer, name=body["name"], folder=folder)


def _write(llm: ElasticLLM, mask: Plan, folder: Path) -> None:
    with llm.applied(mask), transformers_bars(shown=False):
        # With the names that the model has, so that transformers need not know its model
        # type.
        llm.model.save_pretrained(folder, save_original_format=False)
    if llm.tokenizer is not None:
        llm.tokenizer.save_pretrained(folder)
    removed = mask.without(*llm.pruned.removed).removed_names
    config_file = folder / "config.json"
    entries = with_code(
        json.loads(config_file.read_text(encoding="utf-8")),
        removed_entries(llm.adapter, removed),
        llm.adapter,
    )
    config_file.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for name, code in code_files(llm.model).items():
        (folder / name).write_text(code, encoding="utf-8")
    attention = attention_name(llm.model)
    body = {
        "name": llm.name,
        "removed": list(removed),
        "num_blocks": llm.num_blocks,
        "model_type": llm.model.config.model_type,
        "source_fingerprint": llm.fingerprint,
        "attention": attention if attention in _PORTABLE_ATTENTION else None,
        "files": _checksums(folder),
    }
    save_artifact(folder / PRUNED_FILE, _KIND, _VERSION, body)


def _replace(folder: Path, work: Path) -> None:
    aside = work.with_name(f"{work.name}.old")
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, aside)
    os.replace(work, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors*")]):
        with contextlib.suppress(FileNotFoundError):
            sums[path.name] = file_sha256(path)
    return sums


def _load_model(folder: Path, config: Any, removed: Iterable[str], attention: str | None) -> Any:
    """The model without some blocks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    adapter = adapter_for(config)
    Plan.removing(*removed).check(adapter.num_blocks)
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = load_complete(
        folder,
        config.dtype,
        _without(base, adapter, removed),
        config=config,
        attn_implementation=attention,
    )
    if unexpected := sorted(report["unexpected_keys"]):
        raise ArtifactError(
            f"{folder} has unexpected tensors {', '.join(unexpected)}; save the pruned checkpoint "
            "again."
        )
    model.__class__ = base
    return model


def _without(base: Any, adapter: FamilyAdapter, removed: Iterable[str]) -> Any:
    """A subclass of `base` without some blocks: loading neither expects nor creates them."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        remove_blocks(self, removed_entries(adapter, removed))

    # The same name, by which transformers finds a class's renamed checkpoint keys.
    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})

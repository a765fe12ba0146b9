"""llama.cpp: logits through its bindings, and files that its programs make.

It needs the package `PACKAGE`, which is no dependency of the project, and neither torch nor
transformers.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from experiments.study.console import ExperimentError
from rap_env.artifacts import atomic_write

PACKAGE = "llama-cpp-py-sync"
VERSION = "0.11739"
"""Version that the committed records were made with."""

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""``ggml_type`` of each format of a cache."""

SHIPPED = "shipped"
"""The type of the model's own file in a `FileKind`."""

_BATCH_TOKENS = 256
_MAPPED = 1


def need_llama_cpp() -> str:
    """Check that llama.cpp's bindings are installed, and return their version.

    Raises:
        ExperimentError: They are not.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise ExperimentError(
            f"llama.cpp is needed, by the package {PACKAGE}; install it with "
            f"`pip install {PACKAGE}=={VERSION}`. It is no dependency of the project."
        ) from None


def gguf_file(model: str) -> Path:
    """The GGUF file that a model comes from.

    Args:
        model: The path of a GGUF file, or the name of a model that was converted from one in
            the cache, such as ``smollm2-135m``.

    Raises:
        ExperimentError: It comes from no GGUF file, or the file is gone.
    """
    from rap_env.models.files.sources import gguf_source

    path = gguf_source(model)
    if path is None:
        raise ExperimentError(
            f"llama.cpp reads a GGUF file, and {model} comes from none that is on this machine; "
            "set model.name to a .gguf file, or to smollm2-135m."
        )
    return path


class LlamaCpp:
    """A model of llama.cpp with a context for some sequences of equal length.

    Args:
        path: The GGUF file.
        cache: One of `CACHE_TYPES`, for keys and values.
        rows: Number of sequences.
        tokens: Tokens of each.
        threads: Threads of llama.cpp.

    Raises:
        ExperimentError: The file cannot be loaded, or the context cannot be made.
    """

    def __init__(self, path: str, cache: str, rows: int, tokens: int, threads: int) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = get_ffi(), get_lib()
        self._log = self._ffi.callback("ggml_log_callback", lambda _level, _text, _data: None)
        self._lib.llama_log_set(self._log, self._ffi.NULL)
        self._lib.llama_backend_init()
        model = self._lib.llama_model_default_params()
        model.n_gpu_layers, model.load_mode = 0, _MAPPED
        self._model = self._lib.llama_model_load_from_file(path.encode(), model)
        if self._model == self._ffi.NULL:
            raise ExperimentError(f"llama.cpp cannot load {path}.")
        context = self._lib.llama_context_default_params()
        context.n_ctx, context.n_seq_max = rows * tokens, rows
        context.n_batch = context.n_ubatch = _BATCH_TOKENS
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = CACHE_TYPES[cache]
        context.flash_attn_type = int(cache != "f32")
        self._context = self._lib.llama_init_from_model(self._model, context)
        if self._context == self._ffi.NULL:
            raise ExperimentError(
                f"llama.cpp cannot make a context of {rows} x {tokens} tokens with a cache in "
                f"{cache} for {path}."
            )
        self._vocab_size = self._lib.llama_vocab_n_tokens(
            self._lib.llama_model_get_vocab(self._model)
        )

    def logits(self, window: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Logits of a window's positions but the last, without context before it.

        Args:
            window: Token ids, (T,).

        Returns:
            Logits, (T - 1, V).
        """
        self.clear()
        parts = [
            self.decode(window[start : start + _BATCH_TOKENS], start, all_logits=True).copy()
            for start in range(0, len(window), _BATCH_TOKENS)
        ]  # copies, since the engine uses its buffer again
        return np.concatenate(parts)[:-1]

    def close(self) -> None:
        """Free the context and the model."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._lib.llama_log_set(self._ffi.NULL, self._ffi.NULL)

    def clear(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def fill(self, tokens: int, row: int = 0) -> None:
        """Run `tokens` tokens of a sequence; the cache of all sequences is allocated already."""
        ids = (np.arange(tokens, dtype=np.int32) % 1000 + 1000) % self._vocab_size
        for start in range(0, tokens, _BATCH_TOKENS):
            self.decode(ids[start : start + _BATCH_TOKENS], start, all_logits=False, row=row)

    def decode(
        self, ids: npt.NDArray[np.int32], start: int, all_logits: bool, row: int | None = 0
    ) -> npt.NDArray[np.float32]:
        """Run tokens of one sequence, or one token of each sequence.

        Args:
            ids: Token ids, (N,).
            start: Position of the first one.
            all_logits: Whether all tokens give logits, or only the last one.
            row: Number of the sequence, from 0; None for a token of each, all at one
                position.

        Returns:
            Logits, (N, V) or (1, V).
        """
        count = len(ids)
        with self._batch(count) as batch:
            batch.n_tokens = count
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = int(token), start if row is None else start + at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, at if row is None else row
                batch.logits[at] = all_logits or at == count - 1
            if (code := self._lib.llama_decode(self._context, batch)) != 0:
                raise ExperimentError(f"llama.cpp failed to decode (code {code}).")
        rows = count if all_logits else 1
        logits = self._lib.llama_get_logits(self._context)
        data = self._ffi.buffer(logits, rows * self._vocab_size * 4)
        return np.frombuffer(data, dtype=np.float32).reshape(rows, self._vocab_size)

    @contextmanager
    def _batch(self, tokens: int) -> Iterator[Any]:
        batch = self._lib.llama_batch_init(tokens, 0, 1)
        try:
            yield batch
        finally:
            self._lib.llama_batch_free(batch)


class FileKind(NamedTuple):
    """A file that llama.cpp's own programs make, and the format of its cache.

    Attributes:
        once: Whether a vocabulary that the source holds twice is made one, as llama.cpp's
            converter writes it for models that tie it.
        type: The file's type, such as ``Q3_K_M``, or `SHIPPED`.
        vocabulary: Type of the vocabulary, where the file's type has another; if there are
            two, that of the embeddings alone.
        cache: One of `CACHE_TYPES`.
    """

    once: bool
    type: str
    vocabulary: str
    cache: str

    @classmethod
    def of(cls, name: str) -> FileKind:
        """The kind of ``[once] TYPE[/VOCABULARY] CACHE``, such as ``once Q3_K_M/q4_K q8_0``."""
        *once, file_type, cache = name.split()
        kind, _, vocabulary = file_type.partition("/")
        if once not in ([], ["once"]) or cache not in CACHE_TYPES:
            raise ExperimentError(
                "A file of llama.cpp is named [once] TYPE[/VOCABULARY] CACHE, such as 'once "
                f"Q3_K_M/q4_K q8_0', with a cache of {', '.join(CACHE_TYPES)}; {name!r} is not."
            )
        return cls(bool(once), kind, vocabulary, cache)


def make_file(programs: Path, source: Path, kind: FileKind, text: str, folder: Path) -> Path:
    """Return a file for llama.cpp; its programs make it unless the folder has it.

    Args:
        programs: Folder of ``llama-quantize`` and ``llama-imatrix``.
        source: The GGUF file to quantise again.
        kind: The file; its cache has no effect.
        text: Text that the importance matrix is made with.
        folder: Where files are kept.

    Raises:
        ExperimentError: A program is missing or fails.
    """

    def run(program: str, *words: object) -> None:
        try:
            subprocess.run([programs / program, *map(str, words)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ExperimentError(f"llama.cpp's program {program} failed: {error}.") from None

    importance, own = folder / "importance.gguf", source
    if kind.once:
        source = folder / "once.gguf"
        if not source.exists():
            write_with_one_vocabulary(own, source)
    out = folder / f"{source.stem}.{kind.type}.{kind.vocabulary}.gguf"
    if kind.type == SHIPPED or out.exists():
        return source if kind.type == SHIPPED else out
    if not importance.exists():
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            with atomic_write(importance) as new:
                files = ("-m", own, "-f", file.name, "-o", new.name, "--output-format", "gguf")
                run("llama-imatrix", *files, "--no-ppl", "-t", 1, "-c", _BATCH_TOKENS)
    types = ["--token-embedding-type", kind.vocabulary] if kind.vocabulary else []
    if kind.once and kind.vocabulary:  # the head decides
        types += ["--output-tensor-type", kind.vocabulary]
    with atomic_write(out) as new:
        options = ("--allow-requantize", "--imatrix", importance, *types)
        run("llama-quantize", *options, source, new.name, kind.type, 1)
    return out


def write_with_one_vocabulary(source: Path, out: Path) -> None:
    """Write a GGUF file without its embeddings: the head takes their place, too."""
    reader = gguf.GGUFReader(source)
    kept = {t.name: t for t in reader.tensors if t.name != "token_embd.weight"}
    with atomic_write(out) as file:
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(file.name, architecture)
        for name, entry in reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
        for name, tensor in kept.items():
            new_name = "token_embd.weight" if name == "output.weight" else name
            writer.add_tensor(new_name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

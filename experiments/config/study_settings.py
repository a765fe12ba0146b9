"""Settings of the studies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from experiments.llama_cpp import FileKind
from rap_env.serving.settings import parse_bytes
from rap_env.specs import setting


@dataclass
class CgroupConfig:
    """Settings of ``experiments.studies.cgroup``: a server and a tenant in one cgroup."""

    systems: list[str] = setting(["rap"], choices=("rap", "rap_keep_off", "llama.cpp"))
    """Servers, one after the other."""
    llama_server: str = "llama-server"
    """llama.cpp's program."""
    turns: int = setting(1, low=1)
    """Of a conversation."""
    minutes: float = setting(5, low=0)


@dataclass
class EqualProcessConfig:
    """What ``experiments.studies.equal_process`` serves, on windows of ``evaluate.text``."""

    programs: str = "llama.cpp/build/bin"
    """Folder of llama.cpp's ``llama-server``, ``llama-quantize`` and ``llama-imatrix``."""
    files: list[str] = setting(["shipped f16"], distinct=True, parse=FileKind.of)
    """Files and caches of llama.cpp: ``[once] TYPE[/VOCABULARY] CACHE``."""
    limits: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits of the resident memory of a process, such as ``1.1GiB``."""
    rejected: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits in which ``rap serve`` rejects the request."""
    answer_tokens: int = setting(32, low=2)
    """Tokens that are generated after the rest of a window."""
    falling: list[str] = setting([], parse=partial(parse_bytes, "A limit"))
    """Limits that follow each other while one answer is generated."""
    step_s: float = setting(30.0, above=0)
    """CPU seconds of the server that each of them holds."""
    prompt_tokens: int = setting(512, low=1)
    """Tokens of the prompt of that answer."""

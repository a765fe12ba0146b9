"""Names of run folders: what tells a run from others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

_NAMING_SECTIONS = {
    "train": ("agent", "workload", "reward", "env", "warm_start", "score_model"),
    "evaluate": ("evaluate",),
}
"""Sections in which runs of one comparison may differ, by stage; they name the run folder."""

_NOT_NAMED = ("agent", "agent.name", "agent.label", "agent.total_timesteps")

_LONGEST_NAME = 200  # bytes; file systems allow 255, of which agent and seed need some
_HASH_DIGITS = 8


def run_label(
    stage: str, agent: str, seed: int | str, overrides: str = "", *, sweep: bool = False
) -> str:
    """Return the name of a run folder: agent, settings that tell the run from others, seed.

    >>> run_label("train", "dqn", 1, "agent=dqn,agent.hyperparameters.gamma=0.9")
    'dqn-gamma=0.9-s1'
    >>> run_label("train", "dqn", 1, "calibration.windows=4,seed=1", sweep=True)
    'dqn-windows=4-s1'
    >>> run_label("train", "rap", 0, "agent.policy_settings.without=[]")
    'rap-without=none-s0'

    A setting is named by as much of its key as no other one shares. Values are whole; settings for
    which a folder's name has no room are replaced by a hash of all.

    Args:
        stage: The program.
        agent: Name or label of the agent; only used for ``train``. Characters that do not suit a
            folder's name become ``_``.
        seed: Seed of the run; only used for ``train``.
        overrides: Hydra's ``override_dirname``.
        sweep: Whether these are the settings that vary in a sweep, all of which are named.
            Otherwise, settings are named of those sections in which runs of one comparison differ.
    """
    given = {}
    for item in re.split(r",(?=[\w./@+~-]+=)", overrides) if overrides else []:
        key, _, value = item.partition("=")
        key = key.lstrip("+~")
        if _names_swept(stage, agent, key, value) if sweep else _names_single(stage, key):
            given[key] = value
    short = short_keys(given)
    named = [f"{short[key]}={'none' if value == '[]' else value}" for key, value in given.items()]
    named = [_as_name(text) for text in named]
    text = _fitting(named).strip("_")
    if stage == "train":
        return "-".join(part for part in (_as_name(agent), text, f"s{seed}") if part)
    return text or stage


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the end of each dotted key that no other one has.

    >>> short_keys(["agent.hyperparameters.gamma", "calibration.windows", "evaluate.text.windows"])
    {'agent.hyperparameters.gamma': 'gamma', 'calibration.windows': 'calibration.windows', \
'evaluate.text.windows': 'text.windows'}
    """
    short = {}
    keys = list(keys)
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        short[key] = next(
            (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)),
            key,
        )
    return short


def _names_single(stage: str, key: str) -> bool:
    """Whether a setting of a run outside a sweep is a part of the folder's name."""
    section = key.split(".")[0].split("/")[0]
    return section in _NAMING_SECTIONS.get(stage, ()) and key not in _NOT_NAMED


def _names_swept(stage: str, agent: str, key: str, value: str) -> bool:
    """Whether a setting that varies in a sweep is a part of the folder's name."""
    if key in ("name", "runs_dir", "stage"):  # parts of the path already
        return False
    if stage != "train":
        return True
    return key not in ("seed", "agent.label") and (
        key not in ("agent", "agent.name") or value != agent
    )


def _fitting(named: Sequence[str]) -> str:
    """Join settings; of more than a folder's name can hold, the first ones and a hash of all."""
    text = "-".join(named)
    if len(text.encode()) <= _LONGEST_NAME:
        return text
    kept, room = [], _LONGEST_NAME - _HASH_DIGITS
    for part in named:
        room -= len(part.encode()) + 1
        if room < 0:
            break
        kept.append(part)
    return "-".join([*kept, hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]])

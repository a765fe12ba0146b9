"""Settings of the programs that train, evaluate, compare, export and serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from experiments.config.common import Pinned, TasksConfig, TextConfig, parse_pinned, parse_shape
from experiments.llama_cpp import FileKind
from experiments.study.console import ExperimentError
from rap_env.envs.config import ENVIRONMENTS, EnvConfig
from rap_env.request import parse_bytes
from rap_env.specs import check, setting

TEACHERS = ("none", "frontier", "greedy", "knapsack", "gsi", "one_shot", "score_model")
CALIBRATION = "calibration"
"""Value of a text setting that selects the calibration text."""
POLICY_SUFFIX = ".safetensors"


@dataclass
class EnvSettings:
    """Settings of the environment other than workload and reward."""

    id: str = setting("RAPPrune-v0", choices=ENVIRONMENTS)
    """``RAPPrune-v0`` removes blocks; ``RAPLadder-v0`` lowers items by one level."""
    levels: Any = "all"
    """Levels of ``RAPLadder-v0``: a name of `rap_env.levels.LADDERS`, or lists by kind."""
    together: list[str] = setting(["int8", "int4"])
    """Levels of ``RAPLadder-v0`` that all caches take together."""
    invalid_action_penalty: float = setting(0.1, low=0)
    """What an invalid action costs."""
    max_invalid_actions: int = setting(10, low=1)
    """Invalid actions after which an episode is truncated."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; without names, the environment's default tasks."""

    @property
    def task(self) -> type[EnvConfig]:
        """What distinguishes the environment: its layout of observations, how its model loads."""
        return ENVIRONMENTS[self.id]

    @property
    def arguments(self) -> dict[str, Any]:
        """What defines the levels, as arguments of the environment."""
        names = [name for name in EnvConfig.unused if name not in self.task.unused]
        return {name: getattr(self, name) for name in names}

    @property
    def ladder(self) -> dict[str, Any]:
        """What defines the ladder of a model, as `rap_env.ladder.items.Ladder.of` takes it."""
        return self.task(**self.arguments).ladder


@dataclass
class AgentConfig:
    """An algorithm and the length of its training."""

    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn``, ``masked_dqn``, or an agent of another package."""
    label: str | None = None
    """Name of its runs in folders and tables; null for the agent's name."""
    total_timesteps: int = setting(20_000, low=1)
    """Steps of the environment until the training ends."""
    n_envs: int = setting(8, low=1)
    """Number of sub-environments; they share one model."""
    policy_settings: dict[str, Any] = setting({})
    """Settings of the block-wise network: ``hidden``, ``block_vectors``, ``without``."""
    hyperparameters: dict[str, Any] = setting({})
    """Hyperparameters of the algorithm. Here and in `policy_settings`, null or a missing
    entry is replaced by the value in the agent's file in ``conf/agent``."""


@dataclass
class WarmStartConfig:
    """Imitation learning before reinforcement learning."""

    teacher: str | None = setting("none", choices=TEACHERS)
    """``frontier``: the table of the best known plans; ``greedy``: greedy searches per byte;
    ``none`` or null: no teacher; the others: the methods of these names."""
    requests: int = setting(512, low=1)
    """Workload requests that the teacher answers."""
    updates: int = setting(600, low=1)
    """Updates of the network on the teacher's plans."""
    batch_size: int = setting(256, low=1)
    """States in each update."""


@dataclass
class ScoreModelConfig:
    """Training on predicted scores that are corrected with measured ones after each round."""

    rounds: int = setting(0, low=0)
    """Rounds, each of which fits the score model again; the training steps are divided among
    them. 0 trains on measured scores only."""
    verify_requests: int = setting(128, low=1)
    """Requests on which the policy's plans are measured after each round: for each request
    the most probable plan, and the best of several sampled ones."""
    members: int = setting(5, low=1)
    """Predictors of the ensemble."""
    pessimism: float = setting(1.0, low=0)
    """Standard deviations of the ensemble that are added to a predicted ΔNLL."""


@dataclass
class FrontierConfig:
    """The frontier table that ``experiments.profile`` builds."""

    evaluations: int = setting(0, low=0)
    """Plans to score at most; 0 builds no table."""
    requests: int = setting(512, low=1)
    """Workload requests that decide which pairs of counts, or which plans, are useful."""
    start: str | None = None
    """A table of plans of the same model, whose best plans are measured first."""


@dataclass
class LoggerConfig:
    """Where metrics go besides ``metrics.jsonl`` in the run folder, which is always written."""

    wandb: bool = False
    """Whether to log to Weights & Biases: as WANDB_MODE says, else online if a login is
    found."""
    project: str = "rap"
    """Project of wandb."""


@dataclass
class EvaluateConfig:
    """Requests and budgets of an evaluation, the methods, and the text to measure on."""

    requests: list[str] = setting(["1x128"], parse=parse_shape)
    """Batch size x sequence length in tokens."""
    budgets: list[float] = setting([0.9, 0.8], above=0, high=1)
    """Fractions of the native model's peak bytes."""
    pinned: list[str] = setting([], parse=parse_pinned)
    """Requests with budgets in bytes, such as 8x2048@101234567, beside `requests` x
    `budgets`; 8x2048@101234567~0.5 also names the ΔNLL that the budget stands for."""
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this comparison, [] for none."""
    best_of: list[int] = setting([1], distinct=True, low=1)
    """Number of masks that an agent samples before it takes the best by its scores; 1 uses no
    scores. The first entry is the agent's method; each other entry is a separate method."""
    baselines: list[str] = setting([])
    random_seeds: list[int] = setting([0, 1, 2])
    text: TextConfig = field(default_factory=lambda: TextConfig(source="self"))
    selection: TextConfig | None = field(
        # Hydra merges no dict into a null.
        default_factory=lambda: TextConfig(source=CALIBRATION)
    )
    """Text on which a sweep's objective is measured; ``calibration`` or null for that
    text."""
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        for name in ("requests", "budgets"):
            if not self.pinned and not getattr(self, name):
                raise ExperimentError(f"evaluate.{name} needs at least one entry.")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The `requests` as (batch size, sequence length in tokens)."""
        return list(map(parse_shape, self.requests))

    @property
    def selection_text(self) -> TextConfig | None:
        """The text that a sweep's objective is measured on; None for the calibration text."""
        named = self.selection is None or self.selection.source == CALIBRATION
        return None if named else self.selection

    @property
    def pinned_cells(self) -> list[Pinned]:
        """The pinned cells, parsed."""
        return [parse_pinned(text) for text in self.pinned]


@dataclass
class TightGridConfig:
    """Budgets in bytes at which uniform settings lose given amounts."""

    requests: list[str] = setting(
        ["1x128", "4x512", "4x2048", "8x2048", "16x4096"], parse=parse_shape, distinct=True
    )
    """Batch size x sequence length in tokens."""
    losses: list[float] = setting([0.05, 0.1, 0.2, 0.5, 1.0, 2.0], above=0, distinct=True)
    """ΔNLL of the best uniform setting on the calibration text, nats per token."""
    out: str = "conf/grid/tight.yaml"
    """File to write."""


@dataclass
class ExportConfig:
    """The score table that ``experiments.export_scores`` writes."""

    levels: bool = False
    """Whether it has the costs of levels and measured plans, as RAPLadder-v0 needs."""
    records: list[str] = setting([])
    """Folders of comparisons on the same model and text, whose measured scores are added."""
    path: str | None = None
    """The table's file; null for one in the run folder."""


@dataclass
class DemoConfig:
    """Settings of ``experiments.demo``."""

    table: str = "score_table:smollm2-135m"
    """What the policy is trained on."""
    live_s: float = setting(60, low=1)
    """Seconds of service with moving memory."""
    lowest_share: float = setting(0.5, above=0, high=1)
    """The memory limit at its lowest, as a share of what it is before it falls."""
    chats: int = setting(3, low=1)
    """Chats beside the conversation."""
    questions: dict[str, str] = setting({"What is the capital of France?": "Paris"})
    """What a conversation asks in turn, with what a right answer contains."""


@dataclass
class CompareConfig:
    """All settings of ``experiments.compare``."""

    runs: Any = "runs"
    """A folder or a list of folders; records are found at any depth."""
    format: str = setting("text", choices=("text", "markdown"))
    figures: str | None = None
    """Folder to draw figures in; null draws none."""

    def __post_init__(self) -> None:
        check(self, ExperimentError)
        names = list(self.runs) if isinstance(self.runs, (list, tuple)) else [self.runs]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ExperimentError(
                f"runs is a folder or a list of folders, such as runs=[runs/main,runs/seeds], not "
                f"{self.runs!r}."
            )
        self.folders = [Path(name) for name in names]


@dataclass
class ExportPolicyConfig:
    """All settings of ``experiments.export_policy``."""

    run: str = MISSING
    """Folder of a training run, such as runs/learning/train/rap-s0."""
    out: str = MISSING
    """File to write; its name ends in .safetensors."""

    def __post_init__(self) -> None:
        # `load_policy` goes by the suffix.
        if not self.out.endswith((POLICY_SUFFIX, MISSING)):
            raise ExperimentError(
                f"out must end in {POLICY_SUFFIX}, such as rap{POLICY_SUFFIX}, not {self.out}."
            )


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

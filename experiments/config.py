"""The settings of all experiments: dataclasses give types and bounds, ``conf/`` gives values.

Hydra merges the YAML files and the command line into `Config`, so a misspelt key or a wrong
type is refused by name; `__post_init__` refuses values that cannot be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from experiments.errors import ExperimentError
from rap_env.errors import UnknownNameError

REPAIRS = ("none", "library", "distilled", "per_mask")
WANDB_MODES = ("auto", "online", "offline")
_SHAPE = re.compile(r"(\d+)x(\d+)")
_CELL = re.compile(r"(\d+x\d+)@(0?\.\d+|1|1\.0)")


def _at_least(section: str, least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ExperimentError(f"{section}.{name} must be at least {least}, not {value}.")


@dataclass
class ModelConfig:
    """Which language model is pruned."""

    name: str = MISSING
    """An alias such as ``smollm2-135m``, a hub id, a folder, a GGUF file, or
    ``score_table:PATH`` (for training alone)."""
    device: str = "auto"
    dtype: str = "auto"
    max_memory_bytes: int | None = None
    """Memory cap under which layers are read from files one at a time; null loads the model."""


@dataclass
class TextConfig:
    """Text cut into windows."""

    source: str = MISSING
    """``self`` (the dense model writes it), a text or JSONL file, or a hub data set."""
    windows: int = 4
    window_tokens: int = 128
    seed: int = 0
    field: str = "text"
    """Field of a JSONL file or data set that holds the text."""

    def __post_init__(self) -> None:
        """Refuse windows that cannot be."""
        _at_least("text", 1, windows=self.windows)
        _at_least("text", 2, window_tokens=self.window_tokens)


def _self_written() -> TextConfig:
    return TextConfig(source="self")


@dataclass
class ImportanceConfig:
    """Which importance the agent observes, and how far GSI goes."""

    method: str = "gsi"
    """``gsi``, ``one_shot`` or ``none``."""
    gsi_removals: int | None = None
    """Blocks that GSI removes before it stops; null for all."""
    gsi_method: str = "exact"
    """``exact``, or ``lazy`` or ``halving``, which are several times quicker."""

    def __post_init__(self) -> None:
        """Refuse unknown methods."""
        if self.method not in ("gsi", "one_shot", "none"):
            raise UnknownNameError("importance", self.method, ["gsi", "one_shot", "none"])
        if self.gsi_method not in ("exact", "lazy", "halving"):
            raise UnknownNameError("GSI method", self.gsi_method, ["exact", "lazy", "halving"])
        _at_least("importance", 1, gsi_removals=self.gsi_removals)


@dataclass
class TasksConfig:
    """lm-eval tasks; no names means none."""

    names: list[str] = field(default_factory=list)
    limit: int | None = None
    """Documents of each task; null for all."""
    data_root: str | None = None
    """Folder with local files of hub tasks, or null."""
    num_fewshot: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible limits."""
        _at_least("tasks", 1, limit=self.limit)
        _at_least("tasks", 0, num_fewshot=self.num_fewshot)


@dataclass
class EnvConfig:
    """Settings of ``RAPPrune-v0`` that are neither workload nor reward."""

    infeasible: str = "clip"
    invalid_action_penalty: float = 0.1
    max_invalid_actions: int = 10
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Tasks of the accuracy reward; no names leaves the environment's own."""


@dataclass
class AgentConfig:
    """An algorithm and how long it trains."""

    name: str = MISSING
    """``ppo``, ``maskable_ppo``, ``dqn`` or ``masked_dqn``."""
    policy: str = "blockwise"
    """``blockwise`` (one network for all blocks) or ``mlp``."""
    total_timesteps: int = 20_000
    n_envs: int = 8
    """Environments stepped together; they share one model."""
    normalize_reward: bool = True
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """Settings of the algorithm; null stands for the agent's own default."""

    def __post_init__(self) -> None:
        """Refuse lengths below one."""
        _at_least("agent", 1, total_timesteps=self.total_timesteps, n_envs=self.n_envs)


@dataclass
class LoggerConfig:
    """Where metrics go beside the run folder's ``metrics.jsonl``, which is always written."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "rap"
    wandb_mode: str = "auto"
    """``auto``: online if a login is found, else offline."""
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse unknown modes."""
        if self.wandb_mode not in WANDB_MODES:
            raise UnknownNameError("logger.wandb_mode", self.wandb_mode, WANDB_MODES)


@dataclass
class EvaluateConfig:
    """The grid, who is compared on it, and on what."""

    requests: list[str] = field(default_factory=lambda: ["1x128"])
    """Batch size x sequence length in tokens."""
    budgets: list[float] = field(default_factory=lambda: [0.9, 0.8])
    """Fractions of the dense model's peak bytes."""
    agents: list[str] | None = None
    """Run folders of trained agents; null for all of this experiment, [] for none."""
    baselines: list[str] = field(default_factory=list)
    random_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    text: TextConfig = field(default_factory=_self_written)
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        """Refuse an empty grid and budgets that are no fraction."""
        if not self.requests or not self.budgets:
            raise ExperimentError("evaluate.requests and evaluate.budgets need an entry each.")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ExperimentError(
                    f"evaluate.budgets are fractions of the dense peak, above 0 and at most 1; "
                    f"{budget} is not."
                )
        _ = self.shapes

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The requests as (batch size, sequence length in tokens)."""
        return [parse_shape(text) for text in self.requests]


@dataclass
class RepairConfig:
    """What stands in the place of removed blocks."""

    name: str = "none"
    """``none``; ``library``: stubs fitted on self-written text, once; or the path of a library."""


@dataclass
class StubsConfig:
    """What ``experiments.repair`` fits, distils and compares."""

    fit_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to fit on, by name; all of them together make the library."""
    report_texts: dict[str, TextConfig] = field(default_factory=dict)
    """Text to report on, by name; none of it is fitted on."""
    held_back_share: float = 0.25
    """Windows held back to choose ranks and penalties, as a share of those fitted on."""
    rank: int = 64
    """Mean rank of the stubs."""
    distill_steps: int = 1200
    """Updates of the distillation; 0 for none."""
    distill_windows: int = 8
    """Windows of each update."""
    learning_rate: float = 1e-3
    repairs: list[str] = field(default_factory=lambda: ["none", "library", "distilled", "per_mask"])
    """What is compared; empty to make the libraries alone."""
    cells: list[str] = field(default_factory=lambda: ["1x128@0.9", "1x128@0.8"])
    """Requests and budgets: batch size x tokens @ share of the dense peak."""
    study_cells: list[str] = field(default_factory=list)
    """Those of the cells that the studies below use; empty for all."""
    token_study: list[int] = field(default_factory=list)
    """Numbers of tokens to fit on, to show what they are worth; empty for no such study."""
    domain_study: list[str] = field(default_factory=list)
    """Texts of `fit_texts` to fit on alone, as much of each; empty for no such study."""
    alone: list[str] = field(default_factory=list)
    """Texts of `fit_texts` to fit on alone, all of it, and to search masks with."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers, cells and names."""
        _at_least("stubs", 0, rank=self.rank, distill_steps=self.distill_steps)
        _at_least("stubs", 1, distill_windows=self.distill_windows)
        if not 0 < self.held_back_share <= 1:
            raise ExperimentError(
                f"stubs.held_back_share must be above 0 and at most 1, not {self.held_back_share}."
            )
        for name in self.repairs:
            if name not in REPAIRS:
                raise UnknownNameError("repair", name, REPAIRS)
        for study, names in (("domain_study", self.domain_study), ("alone", self.alone)):
            for name in names:
                if name not in self.fit_texts:
                    raise UnknownNameError(f"text of stubs.{study}", name, self.fit_texts)
        for name in self.study_cells:
            if name not in self.cells:
                raise UnknownNameError("cell of stubs.study_cells", name, self.cells)
        _ = self.parsed_cells

    def cells_of(self, study: str) -> list[tuple[int, int, float]]:
        """The cells that a study of `experiments.repair_rows.STUDIES` uses."""
        few = study != "grid" and self.study_cells
        return [parse_cell(text) for text in self.study_cells] if few else self.parsed_cells

    @property
    def parsed_cells(self) -> list[tuple[int, int, float]]:
        """The cells as (batch size, sequence length in tokens, budget fraction)."""
        return [parse_cell(text) for text in self.cells]


@dataclass
class DemoConfig:
    """What ``experiments.demo`` runs."""

    agents: list[str] = field(default_factory=list)
    """Agents to train, each a file of ``conf/agent``; empty for the configured one."""
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class ReportConfig:
    """Words on the report."""

    title: str = "Runtime-adaptive pruning: report"


@dataclass
class ExportConfig:
    """What ``experiments.export_scores`` makes a score table of."""

    masks: int | None = None
    """Masks to measure first, those that the store already has counted; null for none."""
    path: str | None = None
    """The table's file; null for one in the run folder."""

    def __post_init__(self) -> None:
        """Refuse a table of nothing."""
        _at_least("export", 1, masks=self.masks)


@dataclass
class Config:
    """All settings. Every experiment reads the sections that it needs."""

    stage: str = MISSING
    """The experiment's name; set by the program."""
    name: str = "default"
    """Results lie in ``<runs_dir>/<name>``; one name holds one comparison."""
    runs_dir: str = "runs"
    seed: int = 0
    store: str | None = "default"
    """Score store: ``default`` (in the user's cache), a file, or null."""
    progress: bool = True
    threads: int | None = None
    """Threads of torch; null measures which number is fastest, and keeps to it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibration: TextConfig = field(default_factory=TextConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    stubs: StubsConfig = field(default_factory=StubsConfig)
    workload: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        """Refuse names that are no folder name, and thread counts below one."""
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise ExperimentError(
                f"name must be one folder name of letters, digits and . _ + -, not {self.name!r}."
            )
        _at_least("config", 1, threads=self.threads)

    @property
    def root(self) -> Path:
        """The folder of this comparison."""
        return Path(self.runs_dir) / self.name

    def stage_dir(self, stage: str) -> Path:
        """The folder of one stage of this comparison."""
        return self.root / stage


def parse_shape(text: str) -> tuple[int, int]:
    """``"8x2048"`` as (8, 2048).

    Raises:
        ExperimentError: The text has another form.
    """
    match = _SHAPE.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(f"A request is BATCHxTOKENS, such as 8x2048; {text!r} is not.")
    return int(match[1]), int(match[2])


def parse_cell(text: str) -> tuple[int, int, float]:
    """``"8x2048@0.85"`` as (8, 2048, 0.85).

    Raises:
        ExperimentError: The text has another form, or the budget is no share of the dense peak.
    """
    match = _CELL.fullmatch(str(text).replace(" ", ""))
    if not match:
        raise ExperimentError(
            f"A cell is BATCHxTOKENS@BUDGET, such as 8x2048@0.85; {text!r} is not."
        )
    return (*parse_shape(match[1]), float(match[2]))


def as_config(node: Any) -> Config:
    """A typed, checked `Config` from what Hydra composed.

    Raises:
        RapError: A value cannot be.
    """
    config = OmegaConf.to_object(node)
    if not isinstance(config, Config):
        raise ExperimentError("The settings were not composed over the schema 'rap_schema'.")
    return config


def register() -> None:
    """Give Hydra the schema and the resolver that names run folders."""
    from experiments.runs import run_label

    ConfigStore.instance().store(name="rap_schema", node=Config)
    if not OmegaConf.has_resolver("rap_label"):
        OmegaConf.register_new_resolver("rap_label", run_label)

"""The configurations of environments: names, numbers and plain dicts, checked when made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rap_env.context.base import ContextConfig
from rap_env.errors import check_name
from rap_env.importance.profiles import GSI_METHODS
from rap_env.levels import parse_levels, parse_together
from rap_env.reward import parse_reward
from rap_env.scoring.corpus import TINY_HELD_OUT, CorpusConfig
from rap_env.scoring.score_table import table_path
from rap_env.specs import check, check_settings, setting, settings_of
from rap_env.workload.traffic import parse_sampler

if TYPE_CHECKING:
    from rap_env.scoring.lm_eval_tasks import TaskConfig

INFEASIBLE = ("error", "clip")
"""What to do with a budget that no plan can meet: reject the request (one that was drawn is
drawn again), or raise the budget to the least one."""

OVER_BUDGET = ("measured", "worst")
"""What an episode that is truncated over its budget pays: the value of the plan that it
reached, or less than any plan that fits."""

INFO_FORMS = ("names", "arrays")
"""How `info` says what was done: lists of names, or arrays of fixed shape."""

RENDER_MODES = ("ansi", "rgb_array")

TASK_DOCUMENTS = 20
"""Documents of each task in an accuracy reward: 3 tasks of 20 take seconds per plan on a
CPU."""

_OF_CONTEXT = (
    "model", "device", "dtype", "importance", "gsi_removals", "gsi_method", "frontier",
    "store",
)  # fmt: skip


@dataclass(frozen=True)
class EnvConfig:
    """The arguments of `RAPPrune-v0`, one by one or as vector environment.

    The table in the section "Arguments" of `rap_env.RAPPruneEnv` describes each attribute.

    Raises:
        UnknownNameError: There is no such workload, reward, calibration setting or value of
            `infeasible`, `over_budget` or `info`.
        InvalidRequestError: An argument has the wrong type, or a number of the reward, the
            penalty or the number of invalid actions or steps is out of its range.
        CorpusError: A number of the calibration text is out of its range.
    """

    weights: ClassVar[str] = "bf16"
    """How the model is loaded, see `rap_env.load_llm`."""
    text: ClassVar[Mapping[str, Any]] = {}
    """Settings of the calibration text whose defaults are not those of `CorpusConfig`."""
    unused: ClassVar[tuple[str, ...]] = ("levels", "together")
    """Fields that are no arguments of the environment."""
    layout: ClassVar[str] = "blocks"
    """The layout of observations, see `rap_env.context.base.make_encoder`."""
    info_key: ClassVar[str] = "removed"
    """The entry of infos with the plan: names of removed blocks, or of the level of each
    item."""
    delta_key: ClassVar[str] = "loss"
    """The entry of infos with the ΔNLL."""
    unchanged: ClassVar[str] = "dense"
    """What messages call the native model."""
    verb: ClassVar[str] = "remove"
    """What messages call an action."""

    model: str = "smollm2-135m"
    workload: str | Mapping[str, Any] = "azure-conv"
    reward: str | Mapping[str, Any] = "perplexity"
    calibration: str | Mapping[str, Any] | None = None
    importance: str = "gsi"
    gsi_removals: int | None = 16
    gsi_method: str = "exact"
    frontier: str | None = None
    tasks: Sequence[str] | Mapping[str, Any] | None = None
    infeasible: str = setting("error", choices=INFEASIBLE, kind="setting of infeasible:")
    over_budget: str = setting("measured", choices=OVER_BUDGET, kind="setting of over_budget:")
    invalid_action_penalty: float = setting(0.1, low=0)
    max_invalid_actions: int = setting(10, low=1)
    max_steps: int | None = setting(None, low=1)
    info: str = setting("names", choices=INFO_FORMS, kind="form of info")
    device: str = "auto"
    dtype: str = "auto"
    store: str | None = "default"
    levels: str | Mapping[str, Any] = "masks"
    together: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self)
        parse_sampler(self.workload)
        parse_reward(self.reward)
        self.corpus_config()
        if self.tasks is not None:
            parse_tasks(self.tasks)

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """The configuration of an environment's keyword arguments."""
        check_settings(arguments, "the environment", [*cls.names(), "context", "render_mode"])
        return cls(**arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that `of` makes this configuration from."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        """The names of the environment's arguments."""
        return [entry.name for entry in fields(cls) if entry.name not in cls.unused]

    @property
    def ladder(self) -> dict[str, Any]:
        """What defines the ladder of a model, as `Ladder.of` takes it."""
        return {name: getattr(self, name) for name in EnvConfig.unused}

    @property
    def observed(self) -> dict[str, Any]:
        """What defines the observations of a model, as `make_encoder` takes it."""
        return {"layout": self.layout, **self.ladder}

    def of_context(self) -> dict[str, Any]:
        """Settings of the pruning context that have another name there."""
        return {}

    def corpus_config(self) -> CorpusConfig:
        """The calibration text."""
        given = self.calibration
        settings = {"source": given} if isinstance(given, str) else dict(given or {})
        check_settings(settings, "the calibration", settings_of(CorpusConfig))
        # A score table has a text of its own.
        text = {} if table_path(self.model) else self.text
        if not table_path(self.model):
            from rap_env.models.files.sources import TINY_MODELS  # needs torch

            if self.model in TINY_MODELS:  # of few positions; they cannot write a text
                text = {"source": TINY_HELD_OUT, "windows": 4, "window_tokens": 64}
        return CorpusConfig(**{**text, **settings})

    def context_config(self) -> ContextConfig:
        """The part that describes the pruning context."""
        shared = {name: getattr(self, name) for name in _OF_CONTEXT} | self.of_context()
        return ContextConfig(calibration=self.corpus_config(), weights=self.weights, **shared)


def _wide_workload() -> dict[str, Any]:
    return {"name": "azure-conv", "budget_fraction_range": [0.25, 0.95]}


@dataclass(frozen=True)
class LadderEnvConfig(EnvConfig):
    """The arguments of `RAPLadder-v0`, one by one or as vector environment.

    The table in the section "Arguments" of `rap_env.RAPLadderEnv` describes each attribute.

    Raises:
        UnknownNameError: As for `EnvConfig`, or there is no such ladder, kind of item or
            level.
        InvalidRequestError: As for `EnvConfig`, or levels are not in order.
        CorpusError: As for `EnvConfig`.
    """

    weights = "native"
    unused = ("gsi_removals",)
    layout, info_key, delta_key = "ladder", "levels", "delta_nll"
    unchanged, verb = "native", "lower"
    text = {"windows": 3, "window_tokens": 1024}  # noqa: RUF012 - shorter windows hide levels

    workload: str | Mapping[str, Any] = field(default_factory=_wide_workload)
    importance: str = "gradient"
    gsi_method: str = setting("lazy", choices=GSI_METHODS, kind="GSI method")
    gsi_actions: int | None = None
    infeasible: str = setting("clip", choices=INFEASIBLE, kind="setting of infeasible:")
    over_budget: str = setting("worst", choices=OVER_BUDGET, kind="setting of over_budget:")
    levels: str | Mapping[str, Any] = "all"
    together: Sequence[str] = ("int8", "int4")
    every_level: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_levels(self.levels)
        parse_together(self.together)

    @property
    def observed(self) -> dict[str, Any]:
        """As in `EnvConfig`, and whether rows have the further levels."""
        return {**super().observed, "every_level": self.every_level}

    def of_context(self) -> dict[str, Any]:
        """`gsi_actions` is the context's `gsi_removals`; a score table has no GSI over items."""
        if table_path(self.model):
            return {"gsi_removals": EnvConfig.gsi_removals, "gsi_method": EnvConfig.gsi_method}
        return {"gsi_removals": self.gsi_actions}


ENVIRONMENTS: dict[str, type[EnvConfig]] = {
    "RAPPrune-v0": EnvConfig,
    "RAPLadder-v0": LadderEnvConfig,
}
"""The configuration of each environment, by its id."""


def parse_tasks(tasks: Sequence[str] | Mapping[str, Any] | None) -> TaskConfig:
    """The tasks of rewards with accuracy or recall.

    Args:
        tasks: Names of tasks, dict of `TaskConfig` settings, or None for the generated ones.
            Without a ``limit``, `TASK_DOCUMENTS` documents of each are used.

    Raises:
        UnknownNameError: There is no such setting, or a misspelt generated task.
        InvalidRequestError: A number is out of range, or names are repeated.
    """
    from rap_env.scoring.generated_tasks import GENERATED_TASKS
    from rap_env.scoring.lm_eval_tasks import TaskConfig

    given = dict(tasks) if isinstance(tasks, Mapping) else {"names": tasks} if tasks else {}
    check_settings(given, "the tasks", settings_of(TaskConfig))
    return TaskConfig(**{"names": tuple(GENERATED_TASKS), "limit": TASK_DOCUMENTS, **given})


def check_render_mode(render_mode: str | None) -> str | None:
    """Return the render mode, if it exists or is None."""
    if render_mode is not None:
        check_name("render mode", render_mode, RENDER_MODES)
    return render_mode

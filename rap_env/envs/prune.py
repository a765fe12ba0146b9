"""`RAPPrune-v0`: remove blocks of a real language model until a request fits its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from rap_env.blocks import BlockMask, block_name
from rap_env.envs.observation import Observation, ObservationBuilder, kept_blocks
from rap_env.envs.parts import check_choices, open_env_workbench, request_of, task_scorer
from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.reward import make_reward
from rap_env.specs import check_settings
from rap_env.workload import Request, make_sampler

if TYPE_CHECKING:
    from rap_env.workbench import Workbench

_MOST_DRAWS = 100
_DENSE = BlockMask()


@dataclass(frozen=True)
class _Episode:
    """Where an episode stands.

    Attributes:
        request: What is to be served.
        asked_budget_bytes: The budget before it was clipped, or None.
        mask: The blocks removed so far.
        nll: NLL under the mask, nats per token; None if not measured yet.
        invalid_actions: Actions so far on blocks that were removed already.
        over: The episode has terminated or was truncated.
    """

    request: Request
    asked_budget_bytes: int | None
    mask: BlockMask = _DENSE
    nll: float | None = None
    invalid_actions: int = 0
    over: bool = False


class RAPPruneEnv(gym.Env[Observation, np.int64]):
    """Remove blocks of a real language model until a request fits its memory budget.

    ## Description
    A decoder-only language model of L layers has 2L blocks: an attention (`attn`) and a
    feed-forward (`ffn`) block in each layer. A request (batch size, sequence length) comes with a
    budget in bytes that is too small for the whole model with its KV cache. The agent removes
    one block after another until the rest fits, and should lose as little quality as possible.
    Which kind of block frees more bytes depends on the request: FFN blocks hold most weights,
    attention blocks alone make the KV cache, which grows with batch times length. Quality is
    measured by running the real model. The problem is that of "RAP: Runtime-Adaptive Pruning"
    (arXiv 2505.17138).

    ## Observation Space
    A `Dict`; all numbers are finite. Bytes are shares of the *dense peak*: what the unpruned
    model needs for the request. `gymnasium.wrappers.FlattenObservation` makes one vector of it.

    `request`: `Box(0, 1, (5,), float32)`

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | 0 | budget, as a share of the dense peak | 0 | 1 |
    | 1 | log2 of the batch size, divided by 8 | 0 (1 sequence) | 1 (256 or more) |
    | 2 | log of the sequence length, divided by log of the model's positions | 0 | 1 |
    | 3 | bytes still over the budget, as a share of the dense peak | 0 (it fits) | 1 |
    | 4 | KV cache of the dense model, as a share of the dense peak | 0 | 1 |

    `blocks`: `Box(0, 1, (2L, 7), float32)`; row `2 * layer` is the layer's attention block, row
    `2 * layer + 1` its FFN block

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | [:, 0] | kind | 0 (attention) | 1 (FFN) |
    | [:, 1] | depth: layer divided by L - 1 | 0 (first layer) | 1 (last layer) |
    | [:, 2] | kept | 0 (removed) | 1 |
    | [:, 3] | bytes its removal would free, as a share of the dense peak; 0 if removed | 0 | 1 |
    | [:, 4] | one-shot importance x, in nats per token, as x / (1 + x); 0 if negative | 0 | 1 |
    | [:, 5] | place in the GSI order | 0 (removed first) | 1 (removed last) |
    | [:, 6] | loss added by its removal in the GSI order, squashed as the one-shot one | 0 | 1 |

    `action_mask`: `MultiBinary(2L)`, int8

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | [i] | block i may be removed | 0 (removed already) | 1 |

    ## Action Space
    `Discrete(2L)`: the index of the block to remove next. An action on a block that was removed
    already is *invalid*: it changes nothing and costs `invalid_action_penalty`. The method
    `action_masks()` gives the valid actions as booleans, as sb3-contrib's MaskablePPO asks.

    ## Rewards
    With the default `reward="perplexity"`: minus the loss of the final mask, its NLL less the
    dense model's in nats per token on the calibration text, paid by the last step. Why this form:
    - Fitting the budget ends the episode and is no reward of its own, so there is nothing to
      weigh quality against: every complete episode meets the budget.
    - The NLL (log of perplexity) adds up, and one ruined model doesn't drown the rest.
    - Paid at the end (`timing="terminal"`), an episode costs one model evaluation. With
      `{"name": "perplexity", "timing": "dense"}` each step pays the loss it adds; the undiscounted
      return is the same, with less delay, for an evaluation a step.
    - A truncated episode pays the loss of the mask that it reached.

    `"accuracy"` pays the final mask's mean accuracy on `tasks` less the dense model's, and
    `{"name": "combined", "weights": {"perplexity": 1.0, "accuracy": 1.0}}` a weighted sum.
    `loss_cap` (nats per token, none by default) bounds what a ruined model can cost. Ranges and
    values on failure of each term are stated in `rap_env.reward`.

    ## Starting State
    The dense model, and a request drawn from `workload` that the dense model does not fit (up to
    100 are drawn to find one). `reset(options={"request": ...})` sets the request of the episode:
    a `Request`, or a dict of `batch_size`, `seq_len_tokens` and either `budget_bytes` or
    `budget_fraction` (of the dense peak). A budget that no mask can meet is refused
    (`infeasible="error"`) or raised to the least that can be met (`"clip"`).

    ## Episode End
    - Termination: the request fits, peak bytes being at most the budget. This takes at most 2L
      valid actions.
    - Truncation: `max_invalid_actions` actions were invalid. Never on the first step, since
      nothing is removed before it.

    ## Information
    `reset` and `step` return a dict without wall-clock times:
    - `removed`: list of the removed blocks' names.
    - `peak_bytes`: bytes that the request needs with these blocks removed.
    - `request`: dict of `batch_size`, `seq_len_tokens` and `budget_bytes`.
    - `nll` and `loss`: NLL and loss of the mask in nats per token; there at the reset, on the
      last step, and on each step where the reward measures it (`timing="dense"`).
    - `reward_terms`: dict of each term's share of the reward by name, `invalid_action` included;
      they add up to the reward. Empty at the reset.
    - `infeasible`: only if the budget was clipped: dict with `asked_budget_bytes`.

    ## Arguments
    Names, numbers and plain dicts, so that `gymnasium.make` can copy them:

    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `model` | `"smollm2-135m"` | alias, hub id, folder or GGUF file |
    | `workload` | `"azure-conv"` | sampler of requests: name or dict (`rap_env.workload`) |
    | `reward` | `"perplexity"` | name or dict, as above |
    | `calibration` | `None` | text that NLL is measured on: source, or dict of `CorpusConfig` |
    | `importance` | `"gsi"` | `"gsi"`, `"one_shot"`, `"none"` (zeros are seen), or an artifact |
    | `gsi_removals` | `16` | removals after which GSI stops; `None` orders all blocks |
    | `tasks` | `None` | for accuracy: task names or dict of `TaskConfig`; `None`: generated ones |
    | `infeasible` | `"error"` | `"error"` or `"clip"`: budgets that no mask can meet |
    | `invalid_action_penalty` | `0.1` | what an invalid action costs, in units of the reward |
    | `max_invalid_actions` | `10` | invalid actions that end an episode |
    | `device`, `dtype` | `"auto"` | where and in what precision the model runs |
    | `store` | `"default"` | file of scores; `None` keeps them in memory |
    | `workbench` | `None` | a live `Workbench`, for direct construction; never for `make` |

    The first environment on a model and text measures the importance (minutes for GSI) and keeps
    it in the user's cache; all environments of a process share one model.

    ## Version History
    - v0: First version.
    """

    metadata = {  # noqa: RUF012 - gymnasium declares it so
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 2,
    }

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        workload: str | Mapping[str, Any] = "azure-conv",
        reward: str | Mapping[str, Any] = "perplexity",
        calibration: str | Mapping[str, Any] | None = None,
        importance: str = "gsi",
        gsi_removals: int | None = 16,
        tasks: Sequence[str] | Mapping[str, Any] | None = None,
        infeasible: str = "error",
        invalid_action_penalty: float = 0.1,
        max_invalid_actions: int = 10,
        device: str = "auto",
        dtype: str = "auto",
        store: str | None = "default",
        render_mode: str | None = None,
        workbench: Workbench | None = None,
    ) -> None:
        check_choices(
            infeasible,
            invalid_action_penalty,
            max_invalid_actions,
            render_mode,
            self.metadata["render_modes"],
        )
        self.render_mode = render_mode
        self.workbench = workbench or open_env_workbench(
            model=model,
            device=device,
            dtype=dtype,
            calibration=calibration,
            importance=importance,
            gsi_removals=gsi_removals,
            store=store,
        )
        self.memory = self.workbench.memory
        self._scorer = self.workbench.scorer
        self._sampler = make_sampler(workload, self.memory)
        self._reward = make_reward(reward, self._scorer, lambda: task_scorer(self.workbench, tasks))
        self._infeasible = infeasible
        self._penalty = float(invalid_action_penalty)
        self._most_invalid = int(max_invalid_actions)
        self._observations = ObservationBuilder(self.memory, self.workbench.features)
        self.observation_space = self._observations.space
        self.action_space = gym.spaces.Discrete(self.memory.facts.num_blocks)
        self._episode: _Episode | None = None

    @property
    def request(self) -> Request:
        """The request of this episode."""
        return self._current.request

    @property
    def mask(self) -> BlockMask:
        """The blocks removed so far."""
        return self._current.mask

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with the dense model.

        Args:
            seed: Seeds the workload; a workload with an order starts again.
            options: ``{"request": ...}`` sets the request, see Starting State.

        Raises:
            InvalidRequestError: The request does not suit the model, or the dense model fits it.
            InfeasibleBudgetError: No mask can meet the budget, and ``infeasible="error"``.
            UnknownNameError: An option that there isn't.
            NonFiniteScoreError: The dense model gave NaN or infinity.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._sampler.restart()
        check_settings(options or {}, "reset", ["request"])
        if options and options.get("request") is not None:
            request = request_of(options["request"], self.memory)
            self._check_needs_pruning(request)
        else:
            request = self._draw()
        asked = request.budget_bytes
        request = self._feasible(request)
        clipped = None if request.budget_bytes == asked else asked
        self._episode = _Episode(request, clipped, nll=self._scorer.dense_nll)
        return self._observe(), self._info({})

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Remove block `action`. If the model fails, the episode stays where it was.

        Raises:
            ResetNeeded: No episode has begun, or it is over.
            UnknownNameError: There is no such action.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        before = self._current
        if before.over:
            raise ResetNeeded("The episode is over; call reset() before the next step().")
        count = self.memory.facts.num_blocks
        if not np.issubdtype(np.asarray(action).dtype, np.integer) or not 0 <= action < count:
            known = [f"0 ({block_name(0)}) ... {count - 1} ({block_name(count - 1)})"]
            raise UnknownNameError("action", action, known)
        invalid = int(action) in before.mask
        mask = before.mask if invalid else before.mask | BlockMask.of(int(action))
        strikes = before.invalid_actions + invalid
        terminated = self._fits(mask, before.request)
        truncated = not terminated and strikes >= self._most_invalid
        ends = terminated or truncated
        terms = self._reward.step(before.mask, mask, ends)
        terms["invalid_action"] = -self._penalty if invalid else 0.0
        measured = ends or self._reward.measures_every_step
        nll = self._scorer.nll(mask) if measured else (before.nll if invalid else None)
        self._episode = replace(
            before, mask=mask, nll=nll, invalid_actions=strikes, over=ends
        )  # only now: all that can fail is done
        return self._observe(), sum(terms.values()), terminated, truncated, self._info(terms)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each block that may still be removed, shape (2L,)."""
        return kept_blocks(self._current.mask, self.memory.facts.num_blocks)

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """The blocks, bytes against budget and loss so far, as text or as a picture."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        now = self._current
        loss = None if now.nll is None else now.nll - self._scorer.dense_nll
        scene = Scene(self.memory, now.request, now.mask, loss)
        return render_ansi(scene) if self.render_mode == "ansi" else render_rgb(scene)

    @property
    def _current(self) -> _Episode:
        if self._episode is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._episode

    def _fits(self, mask: BlockMask, request: Request) -> bool:
        return self.memory.peak_bytes(mask, request) <= request.budget_bytes

    def _draw(self) -> Request:
        """A request of the workload that needs pruning: else the episode would start at its end."""
        for _ in range(_MOST_DRAWS):
            request = self._sampler.sample(self.np_random)
            if not self._fits(_DENSE, request):
                return request
        raise InvalidRequestError(
            f"The dense model fits each of {_MOST_DRAWS} requests drawn from the workload, the "
            f"last one {request}; give the workload smaller budgets."
        )

    def _check_needs_pruning(self, request: Request) -> None:
        if self._fits(_DENSE, request):
            dense = self.memory.peak_bytes(_DENSE, request)
            raise InvalidRequestError(
                f"The dense model already fits {request} (it needs {dense:,} bytes), so there is "
                "nothing to remove; give a smaller budget."
            )

    def _feasible(self, request: Request) -> Request:
        """The request with a budget that some mask can meet."""
        if self._infeasible == "error":
            self.memory.check_feasible(request)
        least = self.memory.least_peak_bytes(request)
        return replace(request, budget_bytes=max(least, request.budget_bytes))

    def _observe(self) -> Observation:
        return self._observations.build(self._current.request, self._current.mask)

    def _info(self, terms: dict[str, float]) -> dict[str, Any]:
        now = self._current
        info: dict[str, Any] = {
            "removed": list(now.mask.names),
            "peak_bytes": self.memory.peak_bytes(now.mask, now.request),
            "request": {
                entry.name: getattr(now.request, entry.name) for entry in fields(now.request)
            },
            "reward_terms": terms,
        }
        if now.nll is not None:
            info["nll"] = now.nll
            info["loss"] = now.nll - self._scorer.dense_nll
        if now.asked_budget_bytes is not None:
            info["infeasible"] = {"asked_budget_bytes": now.asked_budget_bytes}
        return info

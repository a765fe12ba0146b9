"""`RAPPrune-v0`: remove blocks of a real language model until a request fits its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from rap_env.blocks import BlockMask
from rap_env.envs.episode import Episode
from rap_env.envs.parts import check_render_mode
from rap_env.envs.task import Due, PruningTask
from rap_env.observation import Observation
from rap_env.render import Scene, render_ansi, render_rgb
from rap_env.request import Request

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext


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

    Losses of requests differ by orders of magnitude. Two settings of this reward keep a learner
    from learning little else than which requests are hard; both work with either timing:
    - `scale="log"` (default `"nats"`): minus `log((loss + log_offset) / log_offset)`, `log_offset`
      being 0.05 nats per token by default; where the loss is negative, its tangent at 0.
    - `relative_to="gsi"`, `"one_shot"` (that order, followed until the request fits) or
      `"frontier"` (the best mask known): the last step pays in addition what that baseline loses
      at the same request, so that the return is the advantage over it. It takes one more
      evaluation for each new request. With `scale="log"` the return is a log ratio.

    An episode that fails is paid like any other, and what it removed may lose less than a mask
    that fits. So where invalid actions are not masked, `invalid_action_penalty` has to be so high
    that giving up does not pay; on a log scale an episode is worth several units.

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
    - `baseline_loss`: on the last step, if the reward is `relative_to` a baseline: the loss of
      that baseline's mask at the same request.
    - `predicted`: true; only beside an `nll` that is a prediction of a score table and no
      measurement.
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
    | `gsi_method` | `"exact"` | `"lazy"` and `"halving"` are several times quicker, see `gsi` |
    | `frontier` | `None` | path of a frontier artifact, for a reward relative to it |
    | `repair` | `"none"` | what removed blocks leave: nothing, `"library"`, or a path (below) |
    | `tasks` | `None` | for accuracy: task names or dict of `TaskConfig`; `None`: generated ones |
    | `infeasible` | `"error"` | `"error"` or `"clip"`: budgets that no mask can meet |
    | `invalid_action_penalty` | `0.1` | what an invalid action costs, in units of the reward |
    | `max_invalid_actions` | `10` | invalid actions that end an episode |
    | `device`, `dtype` | `"auto"` | where and in what precision the model runs |
    | `store` | `"default"` | file of scores; `None` keeps them in memory |
    | `context` | `None` | a live `PruningContext`, for direct construction; never for `make` |

    The first environment on a model and text measures the importance (minutes for GSI) and keeps
    it in the user's cache; all environments of a process share one model.

    With `repair="none"` a removed block leaves nothing, as in the paper. Otherwise a *stub* stands
    in its place, a small linear map with a mean: `"library"` fits one for each block on text that
    the model writes (once, then kept in the cache), and a path names a file of
    `rap_env.repair.StubLibrary`. Spaces, rules and rewards stay the same. A stub's bytes count:
    `peak_bytes` holds them, and a removal frees so much less. Losses and importance are those of
    the model with stubs.

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
        gsi_method: str = "exact",
        frontier: str | None = None,
        repair: str = "none",
        tasks: Sequence[str] | Mapping[str, Any] | None = None,
        infeasible: str = "error",
        invalid_action_penalty: float = 0.1,
        max_invalid_actions: int = 10,
        device: str = "auto",
        dtype: str = "auto",
        store: str | None = "default",
        render_mode: str | None = None,
        context: PruningContext | None = None,
    ) -> None:
        self.render_mode = check_render_mode(render_mode, self.metadata["render_modes"])
        self._task = PruningTask(
            model,
            workload=workload,
            reward=reward,
            calibration=calibration,
            importance=importance,
            gsi_removals=gsi_removals,
            gsi_method=gsi_method,
            frontier=frontier,
            repair=repair,
            tasks=tasks,
            infeasible=infeasible,
            invalid_action_penalty=invalid_action_penalty,
            max_invalid_actions=max_invalid_actions,
            device=device,
            dtype=dtype,
            store=store,
            context=context,
        )
        self.context = self._task.context
        self.memory = self._task.memory
        self.observation_space = self._task.observations.space
        self.action_space = gym.spaces.Discrete(self._task.num_blocks)
        self._episode: Episode | None = None

    @property
    def request(self) -> Request:
        """The request of this episode."""
        return self._current.start.request

    @property
    def mask(self) -> BlockMask:
        """The blocks removed so far."""
        return self._current.removed.mask()

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
        task = self._task
        if seed is not None:
            task.sampler.restart()
        start = task.start(task.sampler, self.np_random, options)
        self._episode = Episode(start, task.dense, task.observations)
        return self._episode.observation(), self._episode.info({})

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Remove block `action`. If the model fails, the episode stays where it was.

        Raises:
            ResetNeeded: No episode has begun, or it is over.
            UnknownNameError: There is no such action.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        now, task = self._current, self._task
        if now.over:
            raise ResetNeeded("The episode is over; call reset() before the next step().")
        index = self._index(action)
        invalid = now.has_removed(index)
        peak_bytes = now.peak_bytes if invalid else now.peak_without(index)
        strikes = now.invalid_actions + invalid
        terminated = peak_bytes <= now.start.request.budget_bytes
        truncated = not terminated and strikes >= task.most_invalid
        ends = terminated or truncated
        measured = now.measured if invalid else None
        terms = task.reward.nothing()
        if ends or task.reward.pays_every_step:
            due = Due(now.start, now.removed.mask(index), now.loss, ends)
            measured, terms = task.pay([due])[0]
        terms["invalid_action"] = -task.penalty if invalid else 0.0
        if not invalid:  # only now: all that can fail is done
            now.remove(index, peak_bytes)
        now.measured, now.invalid_actions, now.over = measured, strikes, ends
        return now.observation(), sum(terms.values()), terminated, truncated, now.info(terms)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """True for each block that may still be removed, shape (2L,)."""
        return self._current.observation()["action_mask"].astype(bool)

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """The blocks, bytes against budget and loss so far, as text or as a picture."""
        if self.render_mode is None:
            gym.logger.warn("render() does nothing without a render_mode: 'ansi' or 'rgb_array'.")
            return None
        scene = Scene(self.memory, self.request, self.mask, self._current.loss)
        return render_ansi(scene) if self.render_mode == "ansi" else render_rgb(scene)

    @property
    def _current(self) -> Episode:
        if self._episode is None:
            raise ResetNeeded("No episode has begun; call reset() first.")
        return self._episode

    def _index(self, action: np.int64 | int) -> int:
        """The action as a whole number of Python."""
        whole = isinstance(action, np.integer) or type(action) is int
        if not whole:  # an array of one integer will do, a boolean will not
            whole = np.issubdtype(np.asarray(action).dtype, np.integer)
        if not whole or not 0 <= action < self._task.num_blocks:
            raise self._task.unknown_action(action)
        return int(action)

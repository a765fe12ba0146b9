"""`RAPPrune-v0`: remove blocks of a real language model until a request fits its budget."""

from rap_env.envs.base import PruningEnv
from rap_env.envs.config import EnvConfig
from rap_env.envs.vector import PruningVectorEnv


class RAPPruneEnv(PruningEnv):
    """Remove blocks of a real language model until a request fits its memory budget.

    ## Description
    A decoder-only language model with L layers has 2L blocks: each layer has an attention block
    (`attn`) and a feed-forward block (`ffn`). A request has a batch size, a sequence length and a
    budget in bytes that is too small for the native model with its KV cache. The agent removes
    blocks until the rest fits, and should lose as little quality as possible, which is measured by
    running the real model. FFN blocks hold most of the weights; the KV cache belongs to the
    attention blocks and grows with batch size times sequence length. The problem is that of "RAP:
    Runtime-Adaptive Pruning" (arXiv 2505.17138).

    The *native peak* is what the native model, from which nothing is removed, needs for the request
    in bytes. A *plan* says which blocks are removed. Its NLL is the mean negative log-likelihood of
    the calibration text, in nats per token; its *ΔNLL*, which `info` calls `loss`, is that minus
    the native model's.

    ## Observation Space
    A `Dict` of finite numbers; `gymnasium.wrappers.FlattenObservation` makes one vector of it.

    `request`: `Box(0, 1, (5,), float32)`

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | 0 | budget, as a share of the native peak | 0 | 1 |
    | 1 | log2 of the batch size, divided by 8 | 0 (1 sequence) | 1 (256 or more) |
    | 2 | log of the sequence length, divided by log of the model's positions | 0 | 1 |
    | 3 | bytes over the budget, as a share of the native peak | 0 (the request fits) | 1 |
    | 4 | KV cache of the native model, as a share of the native peak | 0 | 1 |

    `blocks`: `Box(0, 1, (2L, 7), float32)`. Row `2 * layer` is attention,
    row `2 * layer + 1` the layer's FFN block.

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | [:, 0] | kind | 0 (attention) | 1 (FFN) |
    | [:, 1] | depth: layer divided by L - 1 | 0 (first layer) | 1 (last layer) |
    | [:, 2] | kept | 0 (removed) | 1 |
    | [:, 3] | bytes its removal frees, as a share of the native peak; 0 if removed | 0 | 1 |
    | [:, 4] | one-shot importance x, in nats per token, as x / (1 + x); 0 if negative | 0 | 1 |
    | [:, 5] | position in the GSI order | 0 (removed first) | 1 (removed last) |
    | [:, 6] | ΔNLL added by its removal in the GSI order, as x / (1 + x) | 0 | 1 |

    `action_mask`: `MultiBinary(2L)`, int8, 1 for each block that may be removed. An episode is over
    at the latest when every block is removed. The mask of that last observation is all ones, so
    that an agent can mask its logits there too: with next-step autoreset it still chooses an
    action, which is ignored.

    ## Action Space
    `Discrete(2L)`: the index of the block to remove next. An action on a block that is already
    removed is *invalid*: it changes nothing and costs `invalid_action_penalty`.
    `env.get_wrapper_attr("action_masks")()` returns the valid actions as booleans; `action_masks()`
    is a method of the environment inside the wrappers of `gymnasium.make`, where sb3-contrib's
    MaskablePPO finds it.

    ## Rewards
    With the default `reward="perplexity"`, the last step pays minus the ΔNLL of the final plan on
    the calibration text (there is no reward named `nll`). Fitting the budget ends the episode and
    is not rewarded, so no weight between quality and memory has to be chosen. Paid at the end
    (`timing="terminal"`), an episode needs one model evaluation; with `{"name": "perplexity",
    "timing": "dense"}` each step pays the ΔNLL that it adds, for one evaluation per step and the
    same undiscounted return. Two settings keep a learner from learning mainly which requests are
    hard:
    - `scale="log"` (default `"nats"`): minus `log((ΔNLL + log_offset) / log_offset)`, where
      `log_offset` is 0.05 nats per token by default. Where the ΔNLL is negative, the tangent at 0
      is used.
    - `relative_to="gsi"`, `"one_shot"` (that order, followed until the request fits) or
      `"frontier"` (the best known plan): the last step also pays the baseline's cost at the same
      request, so that the return is the advantage over the baseline, with `scale="log"` a log
      ratio. This needs one more evaluation for each new request.

    A truncated episode is paid for the plan that it reached (`over_budget="measured"`), so if
    invalid actions are not masked, failing may pay. With `over_budget="worst"`, as in the pinned
    tasks, it is worth less than any plan that fits: the ΔNLL of a plan that fits counts as at most
    C, the logarithm of the vocabulary's size (or `loss_cap`, if that is less), and a truncated
    episode as 2 C, in nats or on the log scale; accuracy pays -2 then, and recall -2 C. Penalties
    of invalid actions are paid on top.

    `"accuracy"` pays the plan's mean accuracy on `tasks` minus the native model's; `"recall"` minus
    the rise in the NLL that the right choices of `tasks` have among the choices: choose tasks of
    long contexts for it, such as `rap_recall_1024`. `{"name": "combined", "weights":
    {"perplexity": 1.0, "accuracy": 1.0}}` pays a weighted sum. `loss_cap` (nats per token, none by
    default) limits what a ruined model can cost. `rap_env.reward` states the range of each term and
    its value on failure.

    ## Starting State
    The native model and a request drawn from `workload` that it does not fit (up to 100 are drawn
    to find one). `reset(options={"request": ...})` sets it: a `Request`, or a dict of `batch_size`,
    `seq_len_tokens` and `budget_bytes` or `budget_fraction` (of the native peak). A budget that no
    plan can meet is raised to the least one that can be met (`infeasible="clip"`); with `"error"`,
    such a request is drawn again, and is an error if it was given in `options`, or if none of 100
    can be met.

    ## Episode End
    - Termination: the request fits, that is, the peak bytes are at most the budget. This takes at
      most 2L valid actions.
    - Truncation: `max_invalid_actions` actions were invalid, never on the first step.
    - Truncation: `max_steps` steps were taken, if it is given. Such an episode pays as if every
      block were removed (with `over_budget="worst"`, less than any plan that fits), and `nll` and
      `loss` are not measured. Use it in the place of `max_episode_steps` of `gymnasium.make` and of
      the wrapper `TimeLimit`, which end an episode before its reward and so make not finishing the
      best return; a warning says so after two episodes of equal length.

    ## Information
    `reset` and `step` return a dict without wall-clock times:
    - `removed`: list of the removed blocks' names, which grows along an episode. With
      `info="arrays"`, for frameworks that stack infos, int8 array of shape (2L,) with 1 for each
      removed block.
    - `peak_bytes`: bytes that the request needs with these blocks removed.
    - `request`: dict of `batch_size`, `seq_len_tokens` and `budget_bytes`.
    - `nll` and `loss`: NLL and ΔNLL of the plan in nats per token; present at the reset, on the
      last step, and on each step where the reward measures them (`timing="dense"`).
    - `baseline_loss`: present on the last step if the reward is `relative_to` a baseline: the ΔNLL
      of that baseline's plan at the same request.
    - `predicted`: true; present only if a score table predicted `nll` instead of measuring it.
    - `reward_terms`: dict of each term's share of the reward by name, `invalid_action` included;
      they add up to the reward. Empty at the reset.
    - `infeasible`: present only if the budget was clipped: dict with `asked_budget_bytes`.

    ## Rendering
    `render_mode="rgb_array"` draws a row for each layer, as wide as its bytes, beside the bytes
    against the budget, as an array of shape (640, 960, 3); `"ansi"` returns the same as text.
    `env.render()` works after any step, also with `gymnasium.wrappers.RecordVideo`.

    ## Arguments
    Names, numbers and plain dicts, so that `gymnasium.make` can copy them. An unknown argument
    raises `UnknownNameError`, which lists the known ones.

    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `model` | `"smollm2-135m"` | alias, hub id, folder or GGUF file |
    | `workload` | `"azure-conv"` | sampler of requests: name or dict (`rap_env.workload`) |
    | `reward` | `"perplexity"` | name or dict, as above |
    | `calibration` | `None` | text that NLL is measured on: source, or dict of `CorpusConfig` |
    | `importance` | `"gsi"` | `"gsi"`, `"one_shot"`, `"none"` (zeros), or a GSI artifact's path |
    | `gsi_removals` | `16` | removals after which GSI stops; `None` orders all blocks |
    | `gsi_method` | `"exact"` | `"lazy"` is several times faster, see `gsi` |
    | `frontier` | `None` | path of a frontier artifact, for a reward relative to it |
    | `tasks` | `None` | of accuracy and recall: names or dict of `TaskConfig`; `None`: generated |
    | `infeasible` | `"error"` | `"error"` or `"clip"`: budgets that no plan can meet, see above |
    | `over_budget` | `"measured"` | `"measured"` or `"worst"`: what a truncated episode pays |
    | `invalid_action_penalty` | `0.1` | what an invalid action costs, in units of the reward |
    | `max_invalid_actions` | `10` | number of invalid actions that ends an episode |
    | `max_steps` | `None` | number of steps that ends an episode; `None`: no limit |
    | `info` | `"names"` | `"names"` or `"arrays"`: the form of `removed` in `info` |
    | `device` | `"auto"` | device that the model runs on |
    | `dtype` | `"auto"` | precision that the model runs in |
    | `store` | `"default"` | file of scores; `None` keeps them in memory |
    | `context` | `None` | a `PruningContext`, for direct construction; not for `make` |

    The first environment on a model and text measures the importance (minutes for GSI) and stores
    it in the user's cache. All environments of a process share one model, and so do copies
    (`copy.deepcopy`). A pickle of an environment on a score table holds the table; one of a live
    model holds its name and settings, and opens it again where it is loaded.

    ## Version History
    - v0: First version. `rap_env.RAPLadderEnv` has items and levels in the place of blocks.
    """

    config_type = EnvConfig


class RAPPruneVectorEnv(PruningVectorEnv):
    """n environments of the kind of `rap_env.RAPPruneEnv`, see `PruningVectorEnv`."""

    single_type = RAPPruneEnv

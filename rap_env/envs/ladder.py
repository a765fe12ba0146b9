"""`RAPLadder-v0`: lower the items of a real language model until a request fits its budget."""

from rap_env.envs.base import PruningEnv
from rap_env.envs.config import LadderEnvConfig
from rap_env.envs.vector import PruningVectorEnv


class RAPLadderEnv(PruningEnv):
    """Lower the items of a real language model until a request fits its memory budget.

    ## Description
    As in `RAPPrune-v0`, a request has a batch size, a sequence length and a budget in bytes that is
    too small for the model. There an action removes a block; here it lowers one *item* by one
    *level*, and removal is the last level. The items of a model with L layers are the weights of
    its 2L blocks, the KV caches of its L attention blocks, and the embeddings with the head. A
    level is a storage format:

    | Item | Levels, from the native one down |
    |------|----------------------------------|
    | weights of a block | `native`, `int8`, `int4-compact`, `int3`, `int2`, `removed` |
    | KV cache | `native`, `int8`, `int4`, `int4-window512`, `int4-window256`, `int4-window128` |
    | embeddings with head | `native`, `int8`, `int4-compact`, `int3` |

    Weights and embeddings have those levels that need fewer bytes than their native one: a model
    shipped in 4 bits has no `int8` blocks. `int4`, with scales of 16 bits, stands in for
    `int4-compact` in matrices whose rows are not in multiples of 64, and in older score tables. A
    window keeps the first 32 and the last 512, 256 or 128 tokens. A removed attention block takes
    its cache with it. An item with a single level is no item of the environment.

    The argument `levels` chooses the ladder: `"all"`; `"four-bits"`, that of the pinned tasks
    (weights `int8`, `int4` or removed, embeddings `int8` or `int4`, all levels of caches above);
    `"caches"`; `"masks"` (weights native or removed: the episodes of `RAPPrune`); or lists, as in
    `{"weights": ["removed"], "caches": ["int8", "int4"], "embeddings": ["int4"]}`. Lists may also
    give caches `int2`.

    The *native peak* is what the model as shipped needs for the request in bytes, with an
    unquantised cache. The *ΔNLL* of a plan (a level for each item) is its NLL on the calibration
    text minus the native model's, in nats per token.

    ## Observation Space
    A `Dict` of finite numbers; `gymnasium.wrappers.FlattenObservation` makes one vector of it. Of
    the N items first come the blocks (index `2 * layer` is attention, `2 * layer + 1` is FFN), then
    the caches, then the embeddings; those without a lower level are left out.

    `request`: `Box(0, 1, (5,), float32)`, the numbers of `RAPPrune-v0`: budget, batch size,
    sequence length, bytes over the budget, and KV cache of the native model.

    `ladder`: `Box(0, 1, (N, 10), float32)`, a row for each item. A cost of x nats per token is
    observed as `log(1 + x / 0.0001) / log(1 + 10 / 0.0001)`, because costs span five decades.

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | [:, 0] | weights of an attention block | 0 (no) | 1 (yes) |
    | [:, 1] | weights of an FFN block | 0 (no) | 1 (yes) |
    | [:, 2] | KV cache | 0 (no) | 1 (yes) |
    | [:, 3] | embeddings with head | 0 (no) | 1 (yes) |
    | [:, 4] | depth: layer divided by L - 1; 0 for the embeddings | 0 (first layer) | 1 (last) |
    | [:, 5] | level | 0 (native) | 1 (lowest, or gone with its block) |
    | [:, 6] | bytes that the item's next level frees, as a share of the native peak | 0 | 1 |
    | [:, 7] | cost of the next level: ΔNLL of this item alone at it | 0 | 1 |
    | [:, 8] | place of the step to the next level in the greedy order | 0 (first) | 1 (last) |
    | [:, 9] | ΔNLL that this step adds in the greedy order | 0 | 1 |

    Columns 6 to 9 are 0 where an item has no lower level. Of caches that take a level together,
    column 6 shows what all of them free, which is what the action does.

    `action_mask`: `MultiBinary(N)`, int8, 1 for each item that has a lower level. Where none has
    one, the episode is over, and the mask is all ones.

    ## Action Space
    `Discrete(N)`: the item to lower by one level. An action on an item without a lower level is
    *invalid*: it changes nothing and costs `invalid_action_penalty`. The valid actions as booleans
    are `env.get_wrapper_attr("action_masks")()`; `env.unwrapped.ladder.items` has names and levels.

    - A level of a cache that saves no bytes for this request, such as a window longer than the
      sequence, is skipped.
    - Levels in `together` are taken by all caches at once: lowering one cache to such a level
      lowers every cache whose next level it is. It halves the length of an episode at the same
      ΔNLL.
    - Some bytes belong to several items. The first lowered cache needs a buffer for attention (at
      most 4 MiB), and the first lowered weights of an unquantised model a buffer for one matrix, so
      such a step alone can raise the peak.

    ## Rewards
    Those of `RAPPrune-v0`: by default minus the ΔNLL of the final plan; paid at the end or step by
    step, in nats or on a log scale, capped, combined with accuracies or recall, which are measured
    with the caches of the plan. `relative_to` may be `"one_shot"` or `"gsi"` (the greedy order,
    followed until the request fits) or `"frontier"` (the best known plan).

    A truncated episode is worth less than any plan that fits (`over_budget="worst"`): the ΔNLL of a
    plan that fits counts as at most C, the logarithm of the vocabulary's size (10.8 for the default
    model), a truncated episode as 2 C; accuracy pays -2 then, recall -2 C. Penalties of invalid
    actions are paid on top. With `"measured"` it pays for the plan that it reached, and doing
    nothing can pay.

    ## Starting State
    The native model and a request drawn from `workload` that it does not fit; the default workload
    draws budgets from 25 to 95 % of the native peak. `reset(options={"request": ...})` sets the
    request, as in `RAPPrune`. A budget below what the lowest levels need is raised to that
    (`infeasible="clip"`); `"error"` is as in `RAPPrune`. With a smaller ladder, choose a workload
    whose budgets it can meet: `"caches"` helps long requests and large batches only.

    ## Episode End
    - Termination: the request fits, that is, the peak bytes are at most the budget. This happens at
      the latest when every item is at its lowest level, whatever the order of valid actions.
    - Truncation: `max_invalid_actions` actions were invalid, never on the first step; or
      `max_steps` steps were taken, if it is given; see `RAPPrune`.

    ## Information
    As in `RAPPrune`, but with `delta_nll` and `baseline_delta_nll` in the place of `loss` and
    `baseline_loss`, and `levels` in that of `removed`: the names of the items' levels in the order
    of the actions. With `info="arrays"`, an int8 array of shape (N,): positions of levels, 0 for
    `native`, and one past the last for a cache that went with its block. The property `plan` is the
    `Plan`.

    ## Arguments
    Names, numbers and plain dicts, so that `gymnasium.make` can copy them. An unknown argument
    raises `UnknownNameError`, which lists the known ones.

    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `model` | `"smollm2-135m"` | alias, hub id, folder or GGUF file, loaded as it is stored |
    | `levels` | `"all"` | `"all"`, `"four-bits"`, `"caches"`, `"masks"`, or a dict of lists |
    | `together` | `("int8", "int4")` | levels that all caches take with one action |
    | `every_level` | `False` | whether rows also show the cost and bytes of each level |
    | `workload` | `{"name": "azure-conv", "budget_fraction_range": [0.25, 0.95]}` | sampler |
    | `reward` | `"perplexity"` | name or dict, as above |
    | `calibration` | `None` | text that NLL is measured on: source, or dict of `CorpusConfig` |
    | `importance` | `"gradient"` | `"gradient"`, `"gsi"`, `"none"` (zeros), or a path |
    | `gsi_method` | `"lazy"` | `"exact"` measures every item in each round |
    | `gsi_actions` | `None` | actions after which GSI stops; `None`: when nothing is left |
    | `frontier` | `None` | path of a frontier artifact, for a reward relative to it |
    | `tasks` | `None` | of accuracy and recall: names or dict of `TaskConfig`; `None`: generated |
    | `infeasible` | `"clip"` | `"error"` or `"clip"`: budgets that no levels can meet |
    | `over_budget` | `"worst"` | `"measured"` or `"worst"`: what a truncated episode pays |
    | `invalid_action_penalty` | `0.1` | what an invalid action costs, in units of the reward |
    | `max_invalid_actions` | `10` | number of invalid actions that ends an episode |
    | `max_steps` | `None` | number of steps that ends an episode; `None`: no limit |
    | `info` | `"names"` | `"names"` or `"arrays"`: the form of `levels` in `info` |
    | `device` | `"auto"` | device that the model runs on |
    | `dtype` | `"auto"` | precision that the model runs in |
    | `store` | `"default"` | file of scores; `None` keeps them in memory |
    | `context` | `None` | a `PruningContext`, for direct construction; not for `make` |

    The calibration text has 3 windows of 1,024 tokens: caches and windows differ only on long
    sequences. For the tiny models of the package it is 4 windows of 64 tokens that they have not
    seen. A new plan of the default model costs 3 to 4.5 s on one CPU core, once; scores are stored.

    The *greedy order* repeatedly takes the step of least predicted cost per freed byte at a
    reference request (4 sequences of 1,024 tokens). Predictions are sums of the costs of levels by
    gradient (`LevelCosts`): those of the package for the default model, else those of `rap prepare`
    if they have all levels of the ladder and `calibration` names no text, else the first
    environment computes and stores them (a backward pass for each window, and about ten
    evaluations). With `importance="gsi"`, the order is measured after each step (`rap_env.gsi`): 6
    to 12 evaluations an action on the default model, an hour or more for all. That matters for
    small budgets, where costs of removals do not add up.

    A score table (`model="score_table:PATH"`) with costs of levels runs the environment without the
    model; scores of plans that were not measured are predicted, and flagged in `info`.

    ## Version History
    - v0: First version. With `levels="masks"` on an unquantised model, and the workload, text,
      `infeasible` and `over_budget` of `RAPPrune-v0`, episodes are those of `RAPPrune-v0`.
    """

    config_type = LadderEnvConfig


class RAPLadderVectorEnv(PruningVectorEnv):
    """n environments of the kind of `rap_env.RAPLadderEnv`, see `PruningVectorEnv`."""

    single_type = RAPLadderEnv

"""`RAPLadder-v0`: lower the items of a real language model until a request fits its budget."""

from rap_env.envs.base import PruningEnv
from rap_env.envs.config import LadderEnvConfig
from rap_env.envs.vector import PruningVectorEnv


class RAPLadderEnv(PruningEnv):
    """Lower the items of a real language model until a request fits its memory budget.

    ## Description
    As in `RAPPrune-v0`, a request has a batch size, a sequence length and a budget in bytes
    that is too small for the model, and the agent gives up quality until the request fits.
    There an action removes a block. Here an action lowers one *item* by one *level*, and
    removal is the last level.

    The items of a model with L layers are the weights of its 2L blocks, the KV caches of its
    L attention blocks, and the embeddings with the head. A level is a storage format:

    | Item | Levels, from the native one down |
    |------|----------------------------------|
    | weights of a block | `native`, `int8`, `int4-compact`, `int3`, `int2`, `removed` |
    | KV cache | `native`, `int8`, `int4`, `int4-window512`, `int4-window256`, `int4-window128` |
    | embeddings with head | `native`, `int8`, `int4-compact`, `int3` |

    Weights and embeddings have those of these levels that need fewer bytes than their native
    one: a model that is shipped in 4 bits has no `int8` blocks. `int4`, with scales of 16
    bits, stands in for `int4-compact` where that does not exist: in matrices whose rows are
    not in multiples of 64, and in the packaged score tables, which were measured before there
    were fewer bits. A window keeps the first 32 and the last 512, 256 or 128 tokens. A
    removed attention block takes its cache with it. The argument `levels` chooses the ladder:
    `"all"`, `"four-bits"` (weights in `int8`, `int4` or removed, embeddings in `int8` or
    `int4`, and all levels of caches above, windows included: the ladder of the pinned tasks),
    `"caches"`, `"masks"` (weights native or removed: the episodes of `RAPPrune`), or lists,
    as in `{"weights": ["removed"], "caches": ["int8", "int4"], "embeddings": ["int4"]}`. An
    item with a single level is no item of the environment. Caches may also have `int2`, which
    packaged policies choose and no named ladder has.

    Terms: the *native peak* is the number of bytes that the model as shipped needs for the
    request, with an unquantised cache; budgets are shares of it, or bytes. The *ΔNLL* of a
    plan (a level for each item) is its NLL on the calibration text minus the native model's,
    in nats per token; `info` calls it `delta_nll`.

    ## Observation Space
    A `Dict`. All numbers are finite. `gymnasium.wrappers.FlattenObservation` turns it into
    one vector. There are N items: first the blocks (index `2 * layer` is attention,
    `2 * layer + 1` is FFN), then the caches, then the embeddings; those without a lower level
    are left out.

    `request`: `Box(0, 1, (5,), float32)`

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | 0 | budget, as a share of the native peak | 0 | 1 |
    | 1 | log2 of the batch size, divided by 8 | 0 (1 sequence) | 1 (256 or more) |
    | 2 | log of the sequence length, divided by log of the model's positions | 0 | 1 |
    | 3 | bytes over the budget, as a share of the native peak | 0 (the request fits) | 1 |
    | 4 | KV cache of the native model, as a share of the native peak | 0 | 1 |

    `ladder`: `Box(0, 1, (N, 10), float32)`, a row for each item. A cost x in nats per token
    is observed on a log scale, `log(1 + x / 0.0001) / log(1 + 10 / 0.0001)`, because the
    costs of levels span five decades.

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

    Columns 6 to 9 are 0 where an item has no lower level. Of caches that take a level
    together, column 6 shows what each one alone frees, or with `freed_together=True` what all
    of them free, which is what the action does.

    `action_mask`: `MultiBinary(N)`, int8

    | Index | Observation | Min | Max |
    |-------|-------------|-----|-----|
    | [i] | item i has a lower level | 0 (at its lowest level, or gone) | 1 |

    Where no item has a lower level, the episode is over, and the mask is all ones.

    ## Action Space
    `Discrete(N)`: the item to lower by one level. An action on an item without a lower level
    is *invalid*: it changes nothing and costs `invalid_action_penalty`.
    `env.get_wrapper_attr("action_masks")()` returns the valid actions as booleans, and
    `env.unwrapped.ladder.items` has the names and levels of the items.

    - A level of a cache that needs no fewer bytes than the level above it for this request,
      such as a window that is longer than the sequence, is skipped.
    - Levels in `together` are taken by all caches at once: lowering one cache to such a level
      lowers every cache whose next level it is. Any sensible policy begins with int8 and int4
      caches. On 300 requests of the default workload, an episode that follows the greedy
      order has 45.2 steps on average with `together=("int8", "int4")`, 91.7 without, at the
      same predicted ΔNLL (1.273 and 1.272). With the windows taken together as well, it has
      13.7 (1.275).
    - Some bytes belong to several items. The first lowered cache needs a buffer for attention
      (at most 4 MiB), and the first lowered weights of an unquantised model a buffer for one
      matrix, so such a step alone can raise the peak.

    ## Rewards
    Those of `RAPPrune-v0`: minus the ΔNLL of the final plan by default, paid at the end or
    step by step, in nats or on a log scale, capped, combined with accuracies or recall, which
    are measured with the caches of the plan. `relative_to` may be `"one_shot"` (the greedy
    order, followed until the request fits), `"gsi"` (likewise), or `"frontier"` (the best
    known plan).

    A truncated episode is worth less than any plan that fits (`over_budget="worst"`): the
    ΔNLL of a plan that fits counts as at most C, the logarithm of the vocabulary's size (the
    NLL of a uniform guess, 10.8 for the default model), and a truncated episode as 2 C, in
    nats or on the log scale. Accuracy pays -2 then and recall -2 C. Penalties of invalid
    actions are paid on top. With `over_budget="measured"` it pays for the plan that it
    reached, and doing nothing can pay.

    ## Starting State
    The native model and a request drawn from `workload` that it does not fit (up to 100
    requests are drawn to find one). `reset(options={"request": ...})` sets the request, as in
    `RAPPrune`. The default workload draws budgets from 25 to 95 % of the native peak. A
    budget below what the lowest levels need is raised to that (`infeasible="clip"`), so that
    budgets reach down to the lowest levels and not further; `"error"` is as in `RAPPrune`.
    Requests for which the lowest levels need no fewer bytes than native ones are drawn again.
    With a smaller ladder, choose a workload whose budgets it can meet: `"caches"` helps long
    requests and large batches only.

    ## Episode End
    - Termination: the request fits, that is, the peak bytes are at most the budget. Whatever
      the order of valid actions, this happens at the latest when every item is at its lowest
      level.
    - Truncation: `max_invalid_actions` actions were invalid. This never happens on the first
      step.
    - Truncation: `max_steps` steps were taken, if it is given; see `RAPPrune`.

    ## Information
    As in `RAPPrune`, except:
    - `levels` in the place of `removed`: list of the name of each item's level, in the order
      of the actions; a cache that went with its block is `removed`. With `info="arrays"`,
      int8 array of shape (N,): the position of each level in those of its item, 0 for
      `native`, and one past the last for a cache that went with its block.
    - `delta_nll` and `baseline_delta_nll` in the place of `loss` and `baseline_loss`.

    The property `plan` is the `Plan`.

    ## Rendering
    `render_mode="rgb_array"` draws a row for each layer, as wide as its bytes, beside the
    bytes against the budget, as an array of shape (640, 960, 3); `"ansi"` returns the same as
    text. `env.render()` works after any step, also with `gymnasium.wrappers.RecordVideo`.

    ## Arguments
    Names, numbers and plain dicts, so that `gymnasium.make` can copy them. An unknown
    argument raises `UnknownNameError`, which lists the known ones.

    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `model` | `"smollm2-135m"` | alias, hub id, folder or GGUF file, loaded as it is stored |
    | `levels` | `"all"` | `"all"`, `"four-bits"`, `"caches"`, `"masks"`, or a dict of lists |
    | `together` | `("int8", "int4")` | levels that all caches take with one action |
    | `freed_together` | `False` | whether column 6 counts all caches that an action lowers |
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

    The calibration text has 3 windows of 1,024 tokens unless `calibration` says otherwise:
    caches and windows differ only on long sequences. For the tiny models of the package it
    is 4 windows of 64 tokens that they have not seen, in both environments. A new plan of the
    default model costs 3 to 4.5 s on one CPU core (one evaluation per episode; scores are
    stored).

    The *greedy order* starts with native levels and repeatedly takes the step with the least
    predicted cost per freed byte at a reference request (4 sequences of 1,024 tokens).
    Predictions are sums of the costs of levels by gradient (`LevelCosts`). Those of the
    default model are part of the package. Those of a model that `rap prepare` prepared are
    used if they have all levels of the ladder and `calibration` names no text. Otherwise the
    first environment computes them (a backward pass for each window of the calibration text,
    and about ten evaluations) and stores them in the user's cache. `"one_shot"` is the former
    name of `"gradient"`.

    With `importance="gsi"`, the order is measured: after each step the model's NLL is
    measured again for the most promising next steps (`rap_env.gsi` with a ladder), and the
    greedy order continues where GSI stops. It counts its evaluations and resumes after a
    kill. Costs of removals do not add up, so this matters for small budgets. On the default
    model an action takes 6 to 12 evaluations; with all levels of caches taken together, 30
    actions took 181 (7 minutes on one core). All actions take an hour or more.

    A score table (`model="score_table:PATH"`) runs it without the model if it was made with
    costs of levels; scores of plans that were not measured are then predicted and flagged in
    `info`.

    ## Version History
    - v0: First version. With `levels="masks"` on an unquantised model, and the workload,
      text, `infeasible` and `over_budget` of `RAPPrune-v0`, episodes are those of
      `RAPPrune-v0`: the same requests, actions, bytes, ends and rewards. With these levels a
      reward relative to an order first followed one that weighs costs against bytes. A
      truncated episode first paid for the plan that it reached, as with
      `over_budget="measured"`.
    """

    config_type = LadderEnvConfig


class RAPLadderVectorEnv(PruningVectorEnv):
    """n environments of the kind of `rap_env.RAPLadderEnv`, see `PruningVectorEnv`."""

    single_type = RAPLadderEnv

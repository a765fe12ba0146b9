"""`RAPPrune-v1`: lower the items of a real language model until a request fits its budget."""

from __future__ import annotations

from rap_env.envs.base import PruningEnv
from rap_env.envs.config import LadderEnvConfig
from rap_env.envs.lowering import LoweringTask
from rap_env.envs.vector import PruningVectorEnv
from rap_env.ladder.item_bytes import LadderCosts


class RAPPruneV1Env(PruningEnv[LadderCosts]):
    """Lower the items of a real language model until a request fits its memory budget."""

    config_type = LadderEnvConfig
    make_task = staticmethod(LoweringTask)


class RAPPruneV1VectorEnv(PruningVectorEnv[LadderCosts]):
    """n environments of the kind of `rap_env.RAPPruneV1Env`, stepped as arrays.

    It is to that class what `rap_env.RAPPruneVectorEnv` is to `rap_env.RAPPruneEnv`, and has the
    same arguments of its own: `num_envs`, `autoreset_mode` and `max_episode_steps`.
    """

    single_type = RAPPruneV1Env

"""``python -m experiments.export_minari``: episodes of a pinned task as a Minari dataset.

Four behaviours share the episodes: random actions, the greedy order over one-shot costs, the best
measured plan that fits, and the packaged policy. What chooses a plan takes random steps towards it,
so that one plan gives many episodes. The dataset is in Minari's folder (``MINARI_DATASETS_PATH``),
and ``minari.load_dataset`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
import gymnasium as gym
import numpy as np

from agents.observations import make_encoder
from agents.plan_observer import PlanObserver
from experiments.study.console import fail, say
from experiments.study.errors import ExperimentError
from rap_env.envs.ladder import RAPLadderEnv
from rap_env.errors import RapError, check_name
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.ladder.observation import ObservationEncoder
from rap_env.leaderboard.tasks import PinnedTask, pinned_task
from rap_env.plan import Plan
from rap_env.policies.loading import load_policy, make_method
from rap_env.request import Request
from rap_env.version import __version__

BEHAVIOURS = ("random", "greedy", "frontier", "policy")
"""What the episodes follow, in turn."""

POLICIES = {"RAPPrune-v0": "rap-v0", "RAPLadder-v0": "rap"}
"""The packaged policy of each environment."""

Choose = Callable[[Request], Plan]


def export(
    task: PinnedTask, dataset_id: str, episodes: int, behaviours: Sequence[str], seed: int
) -> Any:
    """Write a dataset of so many episodes of each behaviour in turn, and return it.

    Raises:
        UnknownNameError: There is no such behaviour.
        ExperimentError: A dataset of this id exists, or Minari is not installed.
    """
    try:
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer
    except ImportError:
        raise ExperimentError(
            "A dataset of episodes needs Minari; install it with `pip install 'minari[hdf5]'`."
        ) from None
    for behaviour in behaviours:
        check_name("behaviour", behaviour, BEHAVIOURS)
    if dataset_id in minari.list_local_datasets():
        raise ExperimentError(
            f"The dataset {dataset_id} exists; delete it with `minari delete {dataset_id}`, or "
            "give another --name."
        )
    made = gym.make(task.name, disable_env_checker=True)
    env: Any = made.unwrapped
    lowers = isinstance(env, RAPLadderEnv)
    ladder = LadderBytes(env.memory, env.ladder) if lowers else None
    encoder = make_encoder(env.context, env.ladder.spec if lowers else None)
    chosen = {name: _chooser(name, task, env, ladder) for name in behaviours if name != "random"}
    rng = np.random.default_rng(seed)
    buffer = []
    for number in range(episodes):
        choose = chosen.get(behaviours[number % len(behaviours)])
        episode = _episode(made, seed + number, encoder, choose, rng)
        buffer.append(EpisodeBuffer(id=number, seed=seed + number, **episode))
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffer,
        env=made.spec,
        algorithm_name="+".join(behaviours),
        author="RAP",
        author_email="none",
        code_permalink="python -m experiments.export_minari",
        description=f"{task.name}, rap-env {__version__}, seed {seed}: {', '.join(behaviours)}.",
    )


def _chooser(behaviour: str, task: PinnedTask, env: Any, ladder: LadderBytes | None) -> Choose:
    """Return what gives the plan of a behaviour for a request."""
    if behaviour == "policy":
        return load_policy(POLICIES[task.environment], env.memory).choose
    if behaviour == "greedy":
        return make_method("one_shot", env.context, ladder).choose
    best_measured: Choose = env.context.best_measured
    return best_measured


def _episode(
    env: gym.Env[Any, Any],
    seed: int,
    encoder: ObservationEncoder,
    choose: Choose | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Play one episode: random valid actions, or random steps towards the plan of `choose`.

    Returns:
        The fields of an ``EpisodeBuffer``.
    """
    observation, _ = env.reset(seed=seed)
    steps, actions, paid = [observation], [], []
    if choose is not None:
        request = env.unwrapped.request  # type: ignore[attr-defined]
        observer, first = PlanObserver(encoder, [request]), np.array([0])
        target, state = observer.position(choose(request))[None], observer.start(1)
    terminated = truncated = False
    while not terminated and not truncated:
        allowed = observation["action_mask"].astype(bool)
        if choose is not None:
            right = observer.right_actions(first, state, target)[0] & allowed
            allowed = right if right.any() else allowed
        action = int(rng.choice(np.flatnonzero(allowed)))
        if choose is not None:
            state = observer.act(first, state, np.array([action]))
        observation, reward, terminated, truncated, _ = env.step(action)
        steps.append(observation)
        actions.append(action)
        paid.append(float(reward))
    ends = [False] * (len(actions) - 1)
    return {
        "observations": {name: np.stack([seen[name] for seen in steps]) for name in observation},
        "actions": np.array(actions),
        "rewards": np.array(paid),
        "terminations": np.array([*ends, terminated]),
        "truncations": np.array([*ends, truncated]),
    }


@click.command()
@click.option("--task", default="RAPLadder/SmolLM2-Table-v1", show_default=True)
@click.option("--episodes", default=400, show_default=True, type=click.IntRange(min=1))
@click.option("--behaviours", default=",".join(BEHAVIOURS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Id of the dataset; by default made from the task.")
def main(task: str, episodes: int, behaviours: str, seed: int, name: str | None) -> None:
    """Write episodes of a pinned task as a Minari dataset.

    Random actions, the greedy order, the best measured plan that fits and the packaged policy share
    the episodes. The dataset is in Minari's folder (MINARI_DATASETS_PATH).
    """
    try:
        pinned = pinned_task(task)
        dataset_id = name or f"{task.rpartition('-')[0].lower()}/mixed-v0"
        written = export(pinned, dataset_id, episodes, behaviours.split(","), seed)
    except RapError as error:
        fail(str(error))
    say(
        f"{dataset_id}: {written.total_episodes:,} episodes, {written.total_steps:,} steps. "
        f"minari.load_dataset({dataset_id!r}) reads it."
    )


if __name__ == "__main__":
    main()

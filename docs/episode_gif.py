"""``python docs/episode_gif.py``: draw an episode of a pinned task, ``docs/images/episode.gif``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

import rap_env

TASK, REQUEST = "RAPLadder/SmolLM2-Table-v1", rap_env.Request(8, 2048, 96 * 2**20)
SIZE, COLOURS = (720, 480), 128
EVERY, FRAME_MS, END_MS = 3, 200, 3000


def frames(env: gym.Env[Any, Any]) -> list[Image.Image]:
    """Every third frame, and the last, of an episode that follows the greedy order."""
    observation, _ = env.reset(seed=0, options={"request": REQUEST})
    drawn, over = [env.render()], False
    while not over:
        place = np.where(observation["action_mask"], observation["ladder"][:, 8], np.inf)
        observation, _, terminated, truncated, _ = env.step(int(place.argmin()))
        drawn.append(env.render())
        over = terminated or truncated
    shown = [*drawn[:-1:EVERY], drawn[-1]]
    images = [Image.fromarray(np.asarray(frame)).resize(SIZE) for frame in shown]
    ends = np.concatenate([np.asarray(images[0]), np.asarray(images[-1])])
    palette = Image.fromarray(ends).quantize(COLOURS)  # one for all: a frame stores what changes
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


def main() -> None:
    """Write the file."""
    first, *others = frames(gym.make(TASK, render_mode="rgb_array"))
    first.save(
        Path(__file__).parent / "images" / "episode.gif",
        save_all=True,
        append_images=others,
        duration=[5 * FRAME_MS, *[FRAME_MS] * (len(others) - 1), END_MS],
        loop=0,
        optimize=True,
    )


if __name__ == "__main__":
    main()

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo

from tests.envs.playing import DENSE_TIMING, make, play, request_at


def test_text(context):
    env = make(context, render_mode="ansi")
    env.reset(seed=0, options={"request": request_at(context, 0.7)})
    assert "ΔNLL     +0.000 nats" in env.render()
    env.step(0)
    assert "attn     .##" in env.render()
    assert "measured when the episode ends" in env.render()


def test_picture(context):
    env = make(context, render_mode="rgb_array", reward=DENSE_TIMING)
    env.reset(seed=0, options={"request": request_at(context, 0.7)})
    before = env.render()
    env.step(0)
    after = env.render()
    assert before.dtype == np.uint8
    assert before.shape == after.shape
    assert before.shape[2] == 3
    assert not np.array_equal(before, after)


def test_without_a_mode_it_warns(context):
    env = make(context)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


def test_a_video_can_be_recorded(context, tmp_path):
    pytest.importorskip("moviepy")
    env = make(context, render_mode="rgb_array")
    with RecordVideo(env, str(tmp_path / "videos"), disable_logger=True) as recorded:
        play(recorded, 0, masked=True)
    (video,) = tmp_path.glob("videos/*.mp4")
    assert video.stat().st_size > 5000

"""The number of threads is stored once for a comparison."""

import pytest
import torch

from experiments.config import Config
from experiments.launch import set_threads


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_first_choice_is_kept(tmp_path):
    config = Config(name="c", runs_dir=str(tmp_path))
    torch.set_num_threads(3)
    set_threads(config)
    torch.set_num_threads(1)
    set_threads(config)
    assert torch.get_num_threads() == 3


def test_an_explicit_number_wins(tmp_path):
    set_threads(Config(name="c", runs_dir=str(tmp_path), threads=2))
    assert torch.get_num_threads() == 2
    assert not list(tmp_path.iterdir())

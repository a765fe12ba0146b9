"""The number of threads is stored once for a comparison."""

import pytest
import torch

from experiments.config import Config
from experiments.config.common import ScoringConfig
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


def test_workers_have_one_thread_unless_the_comparison_began_with_more(tmp_path):
    torch.set_num_threads(3)
    workers = ScoringConfig(workers=2)
    set_threads(Config(name="old", runs_dir=str(tmp_path)))
    set_threads(Config(name="new", runs_dir=str(tmp_path), scoring=workers))
    assert torch.get_num_threads() == 1
    set_threads(Config(name="old", runs_dir=str(tmp_path), scoring=workers))
    assert torch.get_num_threads() == 3
    set_threads(Config(name="new", runs_dir=str(tmp_path)))
    assert torch.get_num_threads() == 1, "later stages have the same scores"


def test_an_explicit_number_wins(tmp_path):
    set_threads(Config(name="c", runs_dir=str(tmp_path), threads=2))
    assert torch.get_num_threads() == 2
    assert not list(tmp_path.iterdir())

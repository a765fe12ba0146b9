import io
import logging as std_logging
import sys

import pytest
from transformers.utils import logging

from rap_env.models.progress import progress_bar, transformers_bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that bars see; no terminal."""
    now = [100.0]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("rap_env.models.progress.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_logged_every_ten_seconds(clock, caplog) -> None:
    caplog.set_level(std_logging.INFO, "rap_env.models.progress")
    with progress_bar(True, total=40, desc="GSI", unit="mask", leave=False) as bar:
        for step in range(40):
            clock[0] += 1.0
            bar.update()
            bar.set_postfix(delta_nll=step)
    assert [record.getMessage() for record in caplog.records] == [
        f"GSI: {done}/40 mask [00:{done}<00:{40 - done:02}, delta_nll={done - 2}]"
        for done in (10, 20, 30, 40)
    ]


def test_short_work_and_bars_that_are_not_wanted_log_nothing(clock, caplog) -> None:
    caplog.set_level(std_logging.INFO, "rap_env.models.progress")
    for shown, seconds in ((True, 0.2), (False, 5.0)):
        for _ in progress_bar(shown, range(40), desc="GSI"):
            clock[0] += seconds
    assert not caplog.records


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_drawn_on_a_terminal_unless_disabled(shown, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(shown, total=10, desc="Measuring"):
        pass
    assert ("Measuring" in sys.stderr.getvalue()) == shown


def test_the_transformers_progress_bars_are_restored() -> None:
    before = logging.is_progress_bar_enabled()
    for shown in (True, False):
        with transformers_bars(shown=shown):
            assert logging.is_progress_bar_enabled() is shown
        assert logging.is_progress_bar_enabled() is before

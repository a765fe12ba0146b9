"""Moves a live model from mask to mask: down at once, up with patience."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rap_env.runtime.chooser import Choice, Chooser
from rap_env.runtime.decisions import Why
from rap_env.runtime.demand import NOTHING, Demand
from rap_env.runtime.gauge import Gauge
from rap_env.runtime.hysteresis import Room
from rap_env.runtime.needs import Coming, Needs
from rap_env.runtime.switching import Switcher

if TYPE_CHECKING:
    from rap_env.llm.elastic import ElasticLLM

_TRIES = 4  # of making a mask fit by measured bytes


class Adjuster:
    """Chooses masks and applies them, until what is measured fits.

    Args:
        llm: The live model.
        chooser: Chooses masks that fit by arithmetic.
        needs: The arithmetic.
        gauge: Measures.
        switcher: Applies masks.
        hysteresis_share: As for `RuntimeController`, and so are the next two.
        hold_s: Seconds for which there must have been room before blocks come back.
        clock: Gives the time in seconds.

    Attributes:
        decisions: How often the policy was asked.
        decision_s: Seconds spent choosing.
        next_pass: Tokens that the next pass runs, and tokens that caches hold more afterwards.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        chooser: Chooser,
        needs: Needs,
        gauge: Gauge,
        switcher: Switcher,
        *,
        hysteresis_share: float,
        hold_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._llm = llm
        self._chooser = chooser
        self._needs = needs
        self._gauge = gauge
        self._switcher = switcher
        self._hysteresis_share = hysteresis_share
        self._clock = clock
        self._room = Room(hold_s)
        self._enough: tuple[Demand, int] | None = None  # too little spare to ask the policy again
        self._switched_for = NOTHING
        self._refills = False
        self.decisions = 0
        self.decision_s = 0.0
        self.next_pass = (0, 0)

    def coming(self, demand: Demand) -> Coming:
        """What the next pass asks for; where attention came back, its keys and values too."""
        mask = self._llm.mask
        coming = self._needs.coming(mask, demand, *self.next_pass)
        if not self._refills:
            return coming
        final = self._needs.bytes(mask, demand) - self._needs.workspace_bytes(demand)
        growth = max(coming.growth, final - self._gauge.held.total)
        return Coming(coming.workspace + self._needs.refill_bytes(mask, demand), growth)

    def decoded(self) -> None:
        """A pass of all rows has ended, and with it any refill."""
        self._refills = False

    def fit(self, demand: Demand, room_bytes: int, why: Why, *, running: bool) -> bool:
        """Apply a mask that needs no more than there is room for.

        Args:
            demand: What is to be served.
            room_bytes: The room.
            why: What gave rise to it.
            running: Whether there are tokens already, which a refill would run again.

        Returns:
            Whether a mask fits.
        """
        self._room.close()
        choice = self._choose(demand, room_bytes)
        if choice is not None and running:
            choice = self._chooser.without_refill(choice, self._llm.mask, demand, room_bytes)
        return choice is not None and self._settle(choice, demand, why, running=running)

    def empty(self) -> None:
        """Remove all that the guard may remove: nobody runs who could be sent away."""
        least = self._chooser.least(self._gauge.budget_bytes)
        need = self._needs.bytes(least, NOTHING)
        self._switch(Choice(least, need, guarded=True), NOTHING, "budget_fell", running=False)

    def suit(self, need_bytes: int, demand: Demand) -> None:
        """Apply the policy's mask for a demand if it needs more than that of now, and fits."""
        gauge = self._gauge
        spared = int(gauge.budget_bytes * self._hysteresis_share)
        choice = self._choose(demand, gauge.budget_bytes - spared - gauge.margin.bytes)
        if choice is not None and choice.need_bytes > need_bytes:
            self._settle(choice, demand, "arrival", running=False)

    def restore(self, need_bytes: int, demand: Demand) -> None:
        """Bring blocks back once there has been room for them long enough.

        Args:
            need_bytes: What the mask of now needs.
            demand: What runs.
        """
        gauge = self._gauge
        spared = int(gauge.budget_bytes * self._hysteresis_share)
        spare = gauge.budget_bytes - spared - gauge.margin.bytes - need_bytes
        freed = self._needs.freed_bytes(demand)
        least = max(1, min(freed[index] for index in self._llm.mask.indices))
        held = self._room.held(self._clock(), spare, least)
        if held is None or (self._enough and self._enough[0] == demand and held < self._enough[1]):
            return
        gauge.trim()
        exact = gauge.exact_room_bytes(demand, self.coming(demand)) - spared
        choice = self._choose(demand, min(need_bytes + held, exact))
        if choice is not None and demand and self._returns_attention(choice):
            refilled = exact - self._needs.refill_bytes(choice.mask, demand)
            if choice.need_bytes > refilled:
                choice = self._choose(demand, refilled)
        if choice is not None and choice.need_bytes > need_bytes:
            left = demand.tokens < self._switched_for.tokens
            self._settle(choice, demand, "left" if left else "room", running=bool(demand))
        else:  # ask again when there is room for a block more
            self._enough = (demand, held + least)

    def _choose(self, demand: Demand, limit_bytes: int) -> Choice | None:
        started = time.perf_counter()
        choice, asked = self._chooser.choose(demand, limit_bytes)
        seconds = time.perf_counter() - started
        self.decisions += asked
        self.decision_s += seconds
        return None if choice is None else replace(choice, decision_s=seconds)

    def _settle(self, choice: Choice, demand: Demand, why: Why, *, running: bool) -> bool:
        """Apply a mask; if it does not fit by what is measured then, try with less."""
        chosen: Choice | None = choice
        for _ in range(_TRIES):
            if chosen is None:
                return False
            self._switch(chosen, demand, why, running=running)
            room = self._gauge.exact_room_bytes(demand, self.coming(demand))
            if chosen.need_bytes <= room:
                return True
            chosen = self._choose(demand, room)
        return False

    def _returns_attention(self, choice: Choice) -> bool:
        return (self._llm.mask - choice.mask).count("attn") > 0

    def _switch(self, choice: Choice, demand: Demand, why: Why, *, running: bool) -> None:
        refills = self._refills or (running and self._returns_attention(choice))
        if self._switcher.switch(choice, demand, why):
            self._refills = refills
            self._room.close()
            self._switched_for = demand
            self._enough = None

"""The objects of a running server: each knows only what is below it, and nothing calls up."""

import functools
import gc
import types
from graphlib import CycleError, TopologicalSorter

import pytest

from rap_env.runtime.kept_sequences import Node
from tests.runtime.harness import Harness, greedy, prompt

APART = (Node, Harness)
"""Blocks of a tree, which know each other, and what gives the time and the budget here."""
BATCH = "rap_env.models.live.live_batch"


def is_ours(thing) -> bool:
    module = type(thing).__module__
    return module.startswith(("rap_env.runtime", "rap_env.serving", "tests.runtime", BATCH))


def referred(thing):
    """What an object refers to, as its attribute, its own function's, or in a container of its."""
    if isinstance(thing, types.MethodType):
        return [thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        return [cell.cell_contents for cell in cells] + list(thing.__defaults__ or ())
    if type(thing) is functools._lru_cache_wrapper:
        return [thing.__wrapped__]
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    return gc.get_referents(thing) if type(thing).__name__ == "deque" else []


def below(thing):
    """The objects of the runtime that an object can reach without another one between, by id."""
    found, seen = {}, {}
    todo = [*vars(thing).values()] if hasattr(thing, "__dict__") else []
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType):
            continue
        seen[id(each)] = each
        if not is_ours(each) or isinstance(each, types.FunctionType):
            todo += referred(each)
        elif each is not thing and not isinstance(each, APART):
            found[id(each)] = each
    return found


def graph_of(root):
    """For the id of each object that one can reach, those that it knows; and the objects."""
    graph, things = {}, {id(root): root}
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) not in graph:
            graph[id(thing)] = known = below(thing)
            things |= known
            todo += known.values()
    return graph, things


@pytest.fixture
def engine():
    """An engine with rows, one in prefill, one that waits, and what is kept of another one."""
    harness = Harness()
    engine = harness.engine(max_batch_size=3, prefill_chunk_tokens=4)
    engine.submit(prompt(40), greedy(1))
    harness.run(engine)
    for number in range(4):
        engine.submit(prompt(9, number), greedy(20))
    batch = engine._scheduler.batch
    while not (batch.decoding and batch.prefilling):
        engine.step()
    assert engine.stats().kept_bytes
    assert engine._queue.waiting
    return engine


def test_no_object_of_the_runtime_can_call_one_above_it(engine):
    graph, things = graph_of(engine)
    names = {number: type(thing).__name__ for number, thing in things.items()}
    assert {*names.values()} >= {
        "Engine", "Scheduler", "Admission", "RunningBatch", "LiveBatch",
        "KeptSequences", "RuntimeController", "PlanChooser", "MemoryMonitor", "NoisyMeter",
    }  # fmt: skip
    try:
        *_, last = TopologicalSorter(graph).static_order()
    except CycleError as error:
        raise AssertionError([names[number] for number in error.args[1]]) from None
    assert things[last] is engine


def test_a_hook_would_be_found(engine):
    engine.controller.monitor.room_bytes = lambda: engine.stats().kept_bytes
    with pytest.raises(CycleError):
        TopologicalSorter(graph_of(engine)[0]).prepare()

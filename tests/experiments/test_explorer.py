"""The explorer's page: what it embeds is what the package computes, and a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest

from experiments.explorer import METHODS, PAGE, Explorer, with_data
from rap_env.ladder.items import Ladder
from rap_env.ladder.ladder_bytes import LadderBytes
from rap_env.memory import MemoryModel
from rap_env.plan import EMBEDDINGS, Plan, item_names
from rap_env.policies.loading import make_method
from rap_env.policies.packaged_files import default_facts
from rap_env.request import Request

MEMORY = MemoryModel(default_facts())
LAYERS = MEMORY.facts.num_layers
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def read_data(page):
    """The values of `Explorer.data` that a page holds."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def data():
    return read_data(PAGE.read_text("utf-8"))


def plan_of(data, digits):
    """The plan whose levels a string of digits names."""
    names = item_names(LAYERS)
    attn, ffn, caches = names[: 2 * LAYERS : 2], names[1 : 2 * LAYERS : 2], names[2 * LAYERS : -1]
    items = (*attn, *caches, *ffn, EMBEDDINGS)
    levels = (data["levels"][int(digit)][0] for digit in digits)
    pairs = dict(zip(items, levels, strict=True))
    return Plan.of({i: v for i, v in pairs.items() if not (i in caches and v == "removed")})


def cells(data, every=1):
    """Each request with the method's name and its entry, or a part of them."""
    shapes = [(batch, length) for batch in data["batches"] for length in data["lengths"]]
    for method, by_shape in zip(METHODS, data["choices"], strict=True):
        for number, shape in list(enumerate(shapes))[::every]:
            for budget, entry in zip(data["budgets"][number], by_shape[number], strict=True):
                yield method, Request(*shape, budget), entry


def test_bytes_of_the_page_are_those_of_the_byte_model(data):
    for _, request, (number, caches, rest) in cells(data, every=4):
        digits, weights, embeddings, *_ = data["plans"][number]
        parts = MEMORY.breakdown(plan_of(data, digits), request)
        shown = (weights, embeddings, caches, rest)
        assert shown == (parts.weights, parts.embeddings, parts.kv_cache, parts.workspace)
        assert sum(shown) <= request.budget_bytes


def test_losses_of_the_page_are_those_of_the_table(data):
    context = Explorer().context
    scorer, held_out = context.scorer, context.table.held_out
    assert {row[4] for row in data["plans"]} == {0, 1}
    for digits, _, _, delta_nll, measured in data["plans"][::7]:
        plan = plan_of(data, digits)
        assert held_out.is_predicted(plan) is not bool(measured)
        expected = held_out.delta_nll(plan, scorer.nll(plan) - scorer.native_nll)
        assert delta_nll == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("method", ["rap-low-bits", "knapsack", "one_shot"])
def test_plans_of_the_page_are_those_of_the_methods(data, method):
    items = LadderBytes(MEMORY, Ladder.of(MEMORY.facts, "all"))
    policy = make_method(method, Explorer().context, items)
    for name, request, (number, *_) in cells(data, every=8):
        if name == method:
            assert policy.choose(request) == plan_of(data, data["plans"][number][0]), request


@pytest.mark.slow
def test_the_page_is_what_its_command_writes(data):
    again = Explorer().data(data["batches"][1:3], data["lengths"][2:3])
    for method, by_shape in enumerate(again["choices"]):
        for row, number in zip(by_shape, (7, 12), strict=True):
            kept = data["choices"][method][number]
            rows = [again["plans"][entry[0]] for entry in row]
            assert rows == [data["plans"][entry[0]] for entry in kept]


def test_other_data_replace_those_of_the_page_and_it_needs_no_network(data):
    page = PAGE.read_text("utf-8")
    assert with_data(page, data) == page
    bare = with_data(page, {"batches": [3]})
    assert read_data(bare) == {"batches": [3]}
    assert not re.search(r"""(src|href)=|https?:|@import|fetch\(""", bare)


@pytest.mark.skipif(CHROMIUM is None, reason="The explorer is tried in Chromium, which is missing.")
def test_moving_a_slider_in_a_browser_shows_the_plans_of_that_request(data, tmp_path):
    move = (
        'document.getElementById("length").value = 2;'
        'document.getElementById("budget").value = 5;'
        'document.getElementById("budget").dispatchEvent(new Event("input"));'
    )
    page = tmp_path / "moved.html"
    page.write_text(PAGE.read_text("utf-8").replace("restore();\n</script>", f"{move}</script>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    number = 2 * len(data["lengths"]) + 2  # the page begins with the third batch size
    assert f"{data['budgets'][number][5] / 2**20:.1f} MiB" in shown
    assert f">{data['batches'][2]} requests<" in shown
    assert f">{data['lengths'][2]:,} tokens<" in shown
    articles = re.findall(r'<article id="method-\d".*?</article>', shown, re.DOTALL)
    assert len(articles) == len(METHODS)
    for article, by_shape in zip(articles, data["choices"], strict=True):
        plan, caches, _ = by_shape[number][5]
        digits, weights, _, delta_nll, measured = data["plans"][plan]
        assert f"<b>{delta_nll:.3f}</b>" in article
        assert ("measured" if measured else "predicted") in article.partition("<svg")[0]
        for part in (weights, caches):
            assert f"<b>{part / 2**20:.1f}</b>" in article
        colours = re.findall(r'fill="(#\w+)"', article)
        assert colours == [data["levels"][int(digit)][1] for digit in digits]

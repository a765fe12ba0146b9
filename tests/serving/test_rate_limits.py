"""Limits of requests and tokens per minute, for each API key."""

from __future__ import annotations

import httpx
import pytest

from rap_env.errors import ServingSettingsError
from rap_env.serving.access import ApiKeys
from rap_env.serving.errors import ApiError
from rap_env.serving.rate_limits import Allowance, KeyLimits
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine


class Clock:
    time_s = 0.0

    def __call__(self):
        return self.time_s


def refused(allowance, tokens=1):
    """Kind of the limit and seconds to wait, if a request is refused."""
    with pytest.raises(ApiError) as found:
        allowance.charge(tokens)
    assert (found.value.status, found.value.code) == (429, "rate_limit_exceeded")
    return found.value.kind, int(found.value.headers["retry-after"])


def test_requests_come_back_evenly_over_a_minute():
    clock = Clock()
    allowance = Allowance(KeyLimits(requests=6), clock)
    for _ in range(6):
        allowance.charge(1000)
    assert refused(allowance) == ("requests", 10)
    clock.time_s = 4.0
    assert refused(allowance) == ("requests", 6)
    clock.time_s = 10.0
    allowance.charge(1)
    assert refused(allowance) == ("requests", 10)
    clock.time_s = 1000.0  # no more than a minute's worth is kept
    for _ in range(6):
        allowance.charge(1)
    assert refused(allowance) == ("requests", 10)


def test_tokens_that_were_not_used_are_given_back():
    clock = Clock()
    allowance = Allowance(KeyLimits(tokens=600), clock)
    charge = allowance.charge(500)
    assert refused(allowance, 200) == ("tokens", 10)
    charge.settle(50)
    allowance.charge(550).settle(550)
    assert refused(allowance, 60) == ("tokens", 6)


def test_more_than_a_minutes_worth_needs_all_of_it_and_leaves_a_debt():
    clock = Clock()
    allowance = Allowance(KeyLimits(tokens=600), clock)
    allowance.charge(10).settle(10)
    assert refused(allowance, 1200) == ("tokens", 1)
    clock.time_s = 1.0
    allowance.charge(1200)
    assert refused(allowance, 600) == ("tokens", 120)


def test_a_refused_request_uses_up_nothing():
    allowance = Allowance(KeyLimits(requests=1, tokens=10), Clock())
    allowance.charge(5).settle(5)
    assert refused(allowance)[0] == "requests"
    tokens_first = Allowance(KeyLimits(requests=2, tokens=10), Clock())
    tokens_first.charge(10)
    assert refused(tokens_first, 10)[0] == "tokens"
    assert refused(tokens_first, 10)[0] == "tokens"  # not requests


def test_what_was_used_stays_used_when_the_file_is_read_again(tmp_path):
    path = tmp_path / "keys"
    path.write_text("one requests=1\ntwo\trequests=1  tokens=5\n")
    keys = ApiKeys(str(path))
    keys.find("one").charge(1)
    assert keys.find("two").limits == KeyLimits(requests=1, tokens=5)
    path.write_text("one requests=1\ntwo\n")
    keys.reload()
    assert refused(keys.find("one"))[0] == "requests"
    assert keys.find("two").limits == KeyLimits()
    path.write_text("one requests=2\n")
    keys.reload()
    keys.find("one").charge(1)


def test_administrators_have_no_limits(tmp_path):
    (tmp_path / "admins").write_text("key requests=1")
    with pytest.raises(ServingSettingsError, match="Line 1 of admin_key_file .* has limits"):
        ApiKeys(str(tmp_path / "admins"), "admin_key_file")


@pytest.fixture(scope="module")
def limited(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("few requests=2\nonce requests=1\nshort tokens=30\nfree\n")
    with served(FakeEngine(tokenizer), tokenizer, api_key_file=str(path)) as server:
        yield server.url


def ask(url, key, **more):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 5, **more}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers)


def test_a_key_above_its_limit_gets_429_with_the_reason_and_others_do_not(limited):
    assert [ask(limited, "few").status_code for _ in range(3)] == [200, 200, 429]
    answer = ask(limited, "few")
    assert int(answer.headers["retry-after"]) in range(1, 31)
    error = answer.json()["error"]
    assert "may use 2 requests per minute" in error["message"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert ask(limited, "free").status_code == 200
    headers = {"authorization": "Bearer few"}
    assert httpx.get(f"{limited}/metrics", headers=headers).status_code == 200
    assert 'outcome="rate_limit_exceeded"' in httpx.get(f"{limited}/metrics", headers=headers).text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_charged_for_what_it_used(limited, stream):
    usage = ask(limited, "free").json()["usage"]["total_tokens"]
    assert 2 * usage < 30 < usage + 29
    if not stream:
        assert ask(limited, "short", max_tokens=25).status_code == 200  # most of it is given back
    assert ask(limited, "short", max_tokens=5, stream=stream).status_code == 200
    if stream:
        refusal = ask(limited, "short", max_tokens=29)
        assert refusal.status_code == 429
        assert "may use 30 tokens per minute" in refusal.json()["error"]["message"]


def test_a_wrong_request_is_not_charged(limited):
    for _ in range(2):
        assert ask(limited, "once", temperature=-1).status_code == 400
    assert [ask(limited, "once").status_code for _ in range(2)] == [200, 429]

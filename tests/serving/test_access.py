"""API keys, and addresses that others can reach."""

import httpx
import openai
import pytest

from rap_env.errors import ServingSettingsError
from rap_env.serving import stack, startup
from rap_env.serving.http import ApiKeys
from rap_env.serving.settings import ServerSettings
from rap_env.serving.startup import bind, check_address
from tests.serving.conftest import client_of, served
from tests.serving.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# of the team\nfirst-key\n\n  second+key/==  \n#commented-out\n")
    return str(path)


@pytest.fixture(scope="module")
def guarded(tokenizer, key_file):
    with served(FakeEngine(tokenizer), tokenizer, api_key_file=key_file) as found:
        yield found


def test_every_key_of_the_file_opens_the_api_and_probes_need_none(guarded):
    for key in ("first-key", "second+key/=="):
        with client_of(guarded, api_key=key) as client:
            assert client.completions.create(model="tiny", prompt="a").choices[0].text == "hello"
    assert httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": "first-key"}).is_success
    with client_of(guarded) as client, pytest.raises(openai.AuthenticationError, match="Incorrect"):
        client.models.list()
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(f"{guarded.url}{path}").status_code == 200


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer third", "Bearer first-key2", "Bearer first-ke",
     "Basic first-key", "first-key", "Bearer #commented-out", "Bearer \u00e9"],
)  # fmt: skip
def test_all_else_is_unauthorized(guarded, header):
    headers = {"x-request-id": b"mine"}
    if header is not None:
        headers["authorization"] = header.encode("latin-1")
    handles = len(guarded.service.engine.handles)
    for method, path in (
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
        ("GET", "/metrics"), ("GET", "/nowhere"),
        ("GET", "/livez/"), ("GET", "//livez"),
    ):  # fmt: skip
        body = {"model": "tiny", "prompt": "a"} if method == "POST" else None
        response = httpx.request(method, f"{guarded.url}{path}", json=body, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"] == "mine"
        assert "third" not in response.text
    assert len(guarded.service.engine.handles) == handles


def test_the_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text("old")
    keys = ApiKeys(str(path))
    path.write_text("newer")
    assert "newer" in keys
    assert "old" not in keys
    path.write_text("")
    assert "newer" in keys
    assert caplog.text.count("The keys stay as they are") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Cannot read api_key_file"),
        (b"# none\n\n", "has no key"),
        (b"good\nmy secret\n", "Line 2 of api_key_file"),
        ("sch\u00f6n".encode(), "Line 1 of api_key_file"),
        (b"\xff\xfe", "must be a text file"),
    ],
)
def test_an_unusable_file_of_keys_is_named_without_its_content(tmp_path, content, words):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ServingSettingsError, match=words) as found:
        ApiKeys(str(path))
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_only_a_loopback_address_is_open_without_a_key(host, key_file, caplog):
    with bind(host, 0) as bound:
        if host == "0.0.0.0":
            with pytest.raises(ServingSettingsError, match="set api_key_file .* insecure"):
                check_address(bound, ServerSettings(host=host))
        else:
            check_address(bound, ServerSettings(host=host))
        check_address(bound, ServerSettings(host=host, api_key_file=key_file))
        assert not caplog.records
        check_address(bound, ServerSettings(host=host, insecure=True))
        assert len(caplog.records) == (host == "0.0.0.0")


def test_access_is_checked_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(stack, "build_stack", lambda _settings: pytest.fail("a model was loaded"))
    for wrong in ({"host": "0.0.0.0", "port": 0}, {"api_key_file": "/no"}):
        with pytest.raises(ServingSettingsError):
            startup.serve(ServerSettings(**wrong), print)

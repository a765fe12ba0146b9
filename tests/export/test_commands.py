"""The command ``rap export``: plans from everywhere, a folder, a card and an answer."""

import json
import os
import re
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.export.plan_options import read_plan
from rap_env.memory import MemoryModel
from rap_env.models.files.gguf_conversion import GgufFile
from rap_env.models.files.loading import load_llm
from rap_env.models.live import calibration_text
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import PlanScorer
from tests.models.tiny_gguf import write_tiny_gguf

MASK = Plan.removing("layer01.ffn", "layer02.attn")
REMOVED = ",".join(MASK.removed_names)


@pytest.fixture(scope="module")
def model_folder(model_folder):
    (model_folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# Tiny\n")
    return model_folder


@pytest.fixture
def exported(rap, model_folder, tmp_path):
    """Exports the tiny model in float32; gives the answer and the folder."""

    def run(*options):
        target = tmp_path / "out"
        options = ("--to", "hf", "--model", model_folder, "--dtype", "float32", *options)
        code, out, err = rap("export", target, *options, "--json")
        assert code == 0, err
        return json.loads(out), target

    return run


def test_the_folder_is_the_model_under_the_plan(exported, model_folder, tmp_path):
    (tmp_path / "plan.json").write_text(MASK.to_json())
    answer, folder = exported("--plan", tmp_path / "plan.json")
    assert answer["removed"] == list(MASK.removed_names)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    stored = sum(tensor.nbytes for tensor in model.parameters())
    assert answer["weight_bytes_after"] == stored < answer["weight_bytes_before"]
    llm = load_llm(model_folder, dtype="float32", device="cpu")
    ids = torch.arange(3, 12)[None]
    with llm.applied(MASK), torch.no_grad():
        assert torch.equal(model(ids).logits, llm.model(ids).logits)


def test_the_card_states_source_plan_bytes_rise_licence_command_and_versions(
    exported, model_folder, tmp_path
):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h. " * 200)
    answer, folder = exported("--remove", REMOVED, "--measure", path)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# tiny under a plan, for transformers\n")
    llm = load_llm(folder)
    rows = dict(line.strip("| ").split(" | ") for line in card.splitlines() if " | " in line[2:])
    assert rows["Its licence"] == "mit"
    assert rows["Weights"].startswith(f"{answer['weight_bytes_after']:,} bytes, ")
    assert rows["Rise in NLL, predicted"] == "unknown (never measured for this plan)"
    measured = answer["measured_delta_nll"]
    text = f"{measured:+.4f} nats/token on 4 x 64 tokens of text.txt"
    assert rows["Rise in NLL, measured"] == text
    dense = load_llm(model_folder, dtype="float32", device="cpu")
    corpus = load_corpus(CorpusConfig(str(path), 4, 64, role="report"), dense)
    before, after = (PlanScorer(model, corpus).nll(Plan()) for model in (dense, llm))
    assert measured == pytest.approx(after - before, abs=1e-6) != 0
    assert rows["Command"].startswith("`rap export ")
    assert "--to hf" in rows["Command"]
    assert {"rap-env", "torch", "transformers"} <= {
        part.split()[0] for part in rows["Versions"].split(", ")
    }
    plan = Plan.from_json(card.partition("```json\n")[2].partition("\n```")[0])
    assert plan == llm.pruned == MASK


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Give either --remove, or --plan, or all of --batch"),
        (("--batch", 1, "--seq", 4), "Give either --remove, or --plan, or all of --batch"),
        (("--remove", "layer09.ffn"), "layer09.ffn"),
        (("--plan", "absent.json"), "Cannot read a plan from absent.json"),
        (("--to", "vllm", "--remove", "layer00.attn"), "cannot start with a feed-forward block"),
    ],
)
def test_what_is_no_plan_is_an_error(rap, model_folder, tmp_path, options, words):
    target = tmp_path / "out"
    code, out, err = rap("export", target, "--to", "hf", "--model", model_folder, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert not target.exists()


@pytest.mark.engine_feature("transformers", "Levels of weights", "none")
@pytest.mark.engine_feature("transformers", "Levels of caches", "none")
@pytest.mark.engine_feature("vLLM", "Levels of weights", "none")
@pytest.mark.engine_feature("vLLM", "Levels of caches", "none")
@pytest.mark.parametrize("target", ["hf", "vllm"])
@pytest.mark.parametrize("levels", [{"weights": "int8"}, {"caches": "int4"}], ids=str)
def test_a_plan_with_levels_is_no_folder(rap, model_folder, tmp_path, target, levels):
    path = tmp_path / "plan.json"
    path.write_text(Plan.uniform(4, **levels).to_json())
    code, _, err = rap("export", tmp_path / "out", "--to", target, "--plan", path, "--model",
                       model_folder)  # fmt: skip
    assert code == 2
    (level,) = levels.values()
    assert f"each block is native or removed, but the plan has other levels ({level}" in err
    assert not (tmp_path / "out").exists()


def test_a_plan_file_is_a_plan_a_mask_or_the_answer_of_rap_choose(rap, tmp_path):
    path = tmp_path / "plan.json"
    plan = Plan.of({"layer03.ffn": "removed", "layer00.cache": "int4"})
    for text in (plan.to_json(), json.dumps({"model": "x", "levels": plan.levels})):
        path.write_text(text)
        assert read_plan(path) == plan
    path.write_text(MASK.to_json())
    assert read_plan(path) == MASK
    shape = ("--batch", 8, "--seq", 1024, "--budget", "110MiB", "--json")
    path.write_text(rap("choose", *shape)[1])
    assert read_plan(path).levels == json.loads(path.read_text())["levels"] != {}


@pytest.mark.parametrize("text", ["", '"layer00.ffn"', '{"layer00.ffn": 3}'])
def test_a_file_without_a_plan_says_how_to_write_one(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises((ArtifactError, UnknownNameError)) as caught:
        read_plan(tmp_path / "plan.json")
    assert "rap choose ... --json" in str(caught.value) or "layer00.ffn" in str(caught.value)


def test_a_folder_for_vllm_opens_in_transformers_too(exported):
    answer, folder = exported("--remove", REMOVED, "--to", "vllm")
    config = json.loads((folder / "config.json").read_text())
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [
        False, False, True, False
    ]  # fmt: skip
    assert "`vllm serve out --trust-remote-code`" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert answer["removed"] == list(MASK.removed_names)


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "source.gguf"
    write_tiny_gguf(path, kind="Q4_1", hidden=64, ffn=96)
    return path


@pytest.mark.engine_feature("llama.cpp", "Levels of caches", "one format for all layers")
def test_a_gguf_file_is_written_with_a_card_beside_it(rap, gguf_file, tmp_path):
    plan = Plan.uniform(2, caches="int8").without(1)
    (tmp_path / "plan.json").write_text(plan.to_json())
    target = tmp_path / "small" / "out.gguf"
    code, out, err = rap("export", target, "--to", "gguf", "--plan", tmp_path / "plan.json",
                         "--model", gguf_file, "--json")  # fmt: skip
    assert code == 0, err
    answer = json.loads(out)
    tensors = GgufFile(target).tensors
    assert answer["weight_bytes_after"] == sum(tensor.data.nbytes for tensor in tensors)
    assert answer["levels"] == plan.levels
    assert answer["cache_type"] == "q8_0"
    card = target.with_suffix(".md").read_text()
    assert "# source under a plan, for llama.cpp" in card
    assert "`llama-server -m out.gguf -ctk q8_0 -ctv q8_0 -fa on`" in card
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.gguf", "out.md"]


def test_the_answer_and_the_card_say_what_levels_of_few_bits_take(rap, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "_LEVEL_WINDOWS", 4)
    write_tiny_gguf(tmp_path / "in.gguf", kind="Q4_1", hidden=64, ffn=128)
    plan = Plan.of({"layer00.ffn": "int3", "layer01.ffn": "int4-compact"})
    (tmp_path / "plan.json").write_text(plan.to_json())
    target = tmp_path / "out.gguf"
    options = ("--to", "gguf", "--plan", tmp_path / "plan.json", "--model", tmp_path / "in.gguf")
    code, out, err = rap("export", target, *options, "--json")
    assert code == 0, err
    written = json.loads(out)["written"]["int3"]
    tensors = [t for t in GgufFile(target).tensors if t.name.startswith("blk.0.ffn")]
    assert written["types"] == ["Q4_1"]
    assert written["bytes"] == sum(tensor.n_bytes for tensor in tensors)
    facts = load_llm(tmp_path / "in.gguf", weights="native").facts
    assert written["plan_bytes"] == facts.level_param_bytes["int3"][1] < written["bytes"]
    more = written["bytes"] - written["plan_bytes"]
    line = f"int3 is written as Q4_1: {written['bytes']:,} bytes, {more:,} more than in the plan."
    assert line in target.with_suffix(".md").read_text()
    code, out, err = rap("export", target, *options)
    assert (code, line in out) == (0, True), err


def test_a_model_folder_has_to_be_converted_first(rap, model_folder, tmp_path, monkeypatch):
    def loaded(*_arguments, **_options):
        raise AssertionError("the model was loaded before it was rejected")

    monkeypatch.setattr("rap_env.models.files.loading.load_llm", loaded)
    code, _, err = rap("export", tmp_path / "out.gguf", "--to", "gguf", "--remove", "layer00.ffn",
                       "--measure", "self", "--model", model_folder)  # fmt: skip
    assert code == 2
    assert "is no model from one: convert it with llama.cpp's convert_hf_to_gguf.py" in err
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_for_a_request_has_one_level_for_all_caches(rap, tmp_path):
    write_tiny_gguf(tmp_path / "in.gguf", kind="Q4_1", hidden=64, ffn=128, layers=12)
    model = load_llm(tmp_path / "in.gguf", dtype="bfloat16", weights="native")
    plans = [Plan.uniform(12, caches=level) for level in ("native", "int8")]
    native, lowered = (MemoryModel(model).peak_bytes(p, Request(512, 60, 1)) for p in plans)
    assert lowered < native
    code, out, err = rap("export", tmp_path / "out.gguf", "--to", "gguf", "--batch", 512, "--seq",
                         60, "--budget", (native + lowered) // 2, "--model",
                         tmp_path / "in.gguf", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["levels"] == plans[1].levels
    card = (tmp_path / "out.md").read_text()
    assert "`llama-server -m out.gguf -ctk q8_0 -ctv q8_0 -fa on -c 30720 -np 512`" in card


def test_a_folder_from_a_quantised_file_is_said_to_be_unquantised(rap, gguf_file, tmp_path):
    options = ("--to", "hf", "--model", gguf_file, "--remove", "layer01.ffn,layer00.attn")
    code, out, err = rap("export", tmp_path / "out", *options)
    assert code == 0, err
    assert "Removed (2): attn of layers 0; ffn of layers 1\n" in out
    assert re.search(r"; unquantised: \d+ MB from a file of \d+ MB; saved in ", out)
    assert "; unquantised: " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_an_export_that_is_terminated_leaves_nothing(rap, gguf_file, tmp_path, monkeypatch, target):
    def terminated(*_arguments, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", terminated)
    monkeypatch.setattr("rap_env.models.files.pruned_checkpoint.code_files", terminated)
    before, folder = signal.getsignal(signal.SIGTERM), tmp_path / "out"
    folder.mkdir()
    code, _, _ = rap("export", folder / "smaller", "--to", target, "--remove", "layer00.ffn",
                     "--model", gguf_file)  # fmt: skip
    assert code == 128 + signal.SIGTERM
    assert list(folder.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before

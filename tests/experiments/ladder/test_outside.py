"""Methods of others on a tiny real model: fits, cuts, bytes, agreement with the native model."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.config.evaluation_settings import EvaluateConfig
from experiments.config.study_settings import LadderConfig
from experiments.contexts import build_context, load_text
from experiments.ladder import outside
from experiments.ladder.llama_cpp_process import LlamaCpp
from experiments.ladder.outside import STUDY, MethodsAtEqualBytes, OutsideRow
from experiments.ladder.outside_methods import (
    REPLACE_ME,
    Cut,
    DenseStates,
    hadamard,
    least_squares,
    linear_patch,
    low_rank_corrected,
    replace_me,
    window_logits,
)
from experiments.study.experiment_errors import ExperimentError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.request import Request
from rap_env.scoring.scorer import MaskScorer
from tests.experiments.tiny_study import own_text, tiny_study

LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def short_text():
    """A short calibration text in the place of the model's own one."""
    windows = torch.randint(4, 40, (2, 40), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "calibration_windows", lambda llm: windows)
        yield windows


@pytest.fixture(scope="module")
def config(base):
    return tiny_study(
        base, layers=LAYERS, stage="outside", store=None,
        calibration=own_text(2, 40, 9),
        evaluate=EvaluateConfig(text=own_text(3, 44, 1)),
        ladder=LadderConfig(
            requests=["1x48"], knapsack=None, llama_cpp_files=[], removed_layers=[1, 2]
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config):
    read = OutsideRow.read(STUDY.run(config, config.stage_dir("outside")))
    return {(row.method, row.name): row for row in read}


@pytest.fixture(scope="module")
def states(config):
    context = build_context(config)
    return DenseStates(context.llm, context.corpus.tokens)


def test_each_level_and_method_has_a_row(rows):
    levels = {"as shipped", "FFN int8", "int8", "FFN int4", "int4"}
    assert {name for method, name in rows if method == "uniform"} == levels
    removing = {"ShortGPT", "LinearPatch", "ReplaceMe, cosine", "ReplaceMe, least squares"}
    assert {row for row in rows if row[0] != "uniform"} == {
        (method, f"{layers} layers") for method in removing for layers in (1, 2)
    }


def test_a_row_that_is_measured_first_is_compared_with_the_unchanged_model(rows, config, tmp_path):
    removed = replace(config, ladder=replace(config.ladder, removed_layers=[1]))
    jobs = {job.identity: job for job in outside.outside_jobs(removed, tmp_path)}
    key = "ReplaceMe, least squares", "1 layers"
    assert jobs[key].make().delta_nll == pytest.approx(rows[key].delta_nll, abs=1e-5) != 0.0


def test_losses_are_those_of_the_scorer(rows, config):
    context = build_context(config)
    text = load_text(config.evaluate.text, "report", context.llm, progress=False)
    scorer = MaskScorer(context.llm, text)
    native = scorer.window_nll(Plan())
    for method, name in (("uniform", "int4"), ("ShortGPT", "2 layers")):
        row = rows[method, name]
        expected = scorer.window_nll(Plan.of(row.levels)) - native
        assert row.window_delta_nll == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_native_model_agrees_with_itself_and_others_less(rows):
    native = rows["uniform", "as shipped"]
    assert native.window_delta_nll == pytest.approx([0.0] * 3, abs=1e-6)
    assert native.kl_divergence_mean == pytest.approx(0.0, abs=1e-6)
    assert native.same_top_token_share == 1.0
    others = [rows[name] for name in set(rows) - {("uniform", "as shipped")}]
    assert all(0.0 < row.kl_divergence_mean <= row.kl_divergence_p99 for row in others)
    lowered, removed = rows["uniform", "FFN int8"], rows["ShortGPT", "2 layers"]
    assert lowered.kl_divergence_mean < removed.kl_divergence_mean


def test_bytes_are_those_of_the_kept_weights_and_of_what_is_added(rows, config):
    facts = build_context(config).memory.facts
    whole = facts.base_bytes + sum(facts.block_param_bytes)
    assert rows["uniform", "as shipped"].weight_bytes == whole
    sizes = MemoryModel(facts).breakdown(Plan.removing(2, 3, 4, 5), Request(1, 1, 2**40))
    for method in ("ReplaceMe, cosine", "ReplaceMe, least squares"):
        assert rows[method, "2 layers"].weight_bytes == sizes.weights + sizes.embeddings
    patched = rows["LinearPatch", "2 layers"].weight_bytes
    assert patched - sizes.weights - sizes.embeddings == 4 * facts.hidden_size**2


def test_a_newer_row_of_the_same_name_replaces_the_older_one(rows, config):
    read = STUDY.read(config.stage_dir("outside"))
    assert len(read) == len(rows)
    assert STUDY.data([*read, replace(read[0], delta_nll=7.0)])[0].delta_nll == 7.0


def test_a_missing_engine_is_reported_before_anything_is_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with_files = replace(config, ladder=replace(config.ladder, llama_cpp_files=["Q4_0"]))
    with pytest.raises(ExperimentError, match="pip install llama-cpp-py-sync=="):
        STUDY.run(with_files, tmp_path)
    assert not (tmp_path / OutsideRow.file).exists()


@pytest.mark.parametrize("kind", ["as shipped", "IQ2_M+embeddings"])
def test_a_file_is_quantised_with_the_mean_squares_of_inputs(config, kind, tmp_path, monkeypatch):
    methods, tasks = MethodsAtEqualBytes(config), []
    llm = methods.context.llm

    def run(task):
        tasks.append(task)
        for number, ids in enumerate(task["windows"]):
            logits = window_logits(llm, Plan(), torch.tensor(ids))
            np.save(f"{task['logits']}{number}.npy", logits.numpy())
        return {"model_bytes": 5, "tensor_types": {"q4_0": 2}}

    monkeypatch.setattr(outside, "run_process", run)
    measure = partial(methods.llama_cpp, tmp_path / "source.gguf", kind)
    fields = methods.measured(measure)
    assert (fields["weight_bytes"], fields["tensor_types"]) == (5, {"q4_0": 2})
    assert (fields["delta_nll"], fields["same_top_token_share"]) == (0.0, 1.0)
    (task,) = tasks
    if kind == "as shipped":
        assert "quantise" not in task
        return
    order = task["quantise"]
    assert (order["kind"], order["embeddings"]) == ("IQ2_M", True)
    names = [f"blk.{layer}.{part}.weight" for layer in range(LAYERS)
             for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                          "ffn_down")]  # fmt: skip
    assert sorted(order["importance"]) == sorted(names)
    norm = llm.adapter.layers(llm.model)[0].input_layernorm
    expected = norm(DenseStates(llm, methods.calibration).before(0)).square().mean(dim=0)
    assert order["importance"]["blk.0.attn_q.weight"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_cut_is_where_states_keep_their_direction(config):
    llm = build_context(config).llm
    states = DenseStates(llm, torch.zeros(0, 2))
    turns = [0.0, 0.9, 1.0, 1.1, 2.0]  # angle of the input of each layer, and of the output
    states.__dict__["of_blocks"] = [
        torch.tensor([[np.cos(angle), np.sin(angle)]]) for angle in turns for _ in range(2)
    ]
    assert states.cut(1) in (Cut(1, 1), Cut(2, 1))
    assert states.cut(2) == Cut(1, 2)
    assert Cut(1, 2).plan == Plan.removing(2, 3, 4, 5)


def test_least_squares_finds_the_map_that_made_the_states():
    generator = torch.Generator().manual_seed(0)
    mlp, rest, mapped = (torch.randn(n, 6, generator=generator) for n in (50, 50, 6))
    assert torch.allclose(least_squares(mlp, rest, mlp @ mapped + rest), mapped, atol=1e-4)


@pytest.mark.parametrize("objective", REPLACE_ME)
def test_a_merged_map_repairs_a_cut_and_leaves_the_model_as_it_was(config, states, objective):
    llm = build_context(config).llm
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    cut = Cut(1, 2)
    target = states.before(3)
    errors = []
    for method in (None, REPLACE_ME[objective]):
        fit = method or (lambda mlp, rest, target: torch.eye(mlp.shape[1]))
        with replace_me(llm, states, cut, fit):
            repaired = DenseStates(llm, build_context(config).corpus.tokens).before(1)
        errors.append(1 - torch.cosine_similarity(repaired, target).mean())
    assert errors[1] < errors[0]
    for name, value in llm.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_patch_scales_states_at_the_cut(config, states):
    llm, tokens = build_context(config).llm, build_context(config).corpus.tokens
    doubled = SimpleNamespace(before=lambda layer: states.before(1) * (2.0 if layer == 3 else 1.0))
    with linear_patch(llm, doubled, Cut(1, 2)) as size:
        patched = window_logits(llm, Cut(1, LAYERS - 1).plan, tokens[0])
    assert size == 4 * llm.facts.hidden_size**2
    plain = window_logits(llm, Cut(1, LAYERS - 1).plan, tokens[0])
    # The norm before the head undoes a common factor, but for its epsilon.
    assert torch.allclose(patched, plain, atol=1e-2)
    turned = SimpleNamespace(before=lambda layer: states.before(layer) ** (2 if layer == 3 else 1))
    with linear_patch(llm, turned, Cut(1, 2)):
        other = window_logits(llm, Cut(1, LAYERS - 1).plan, tokens[0])
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 576])
def test_hadamard_matrices_are_orthogonal(size):
    matrix = hadamard(size)
    assert set(matrix.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


def test_a_width_without_a_hadamard_matrix_is_rejected():
    with pytest.raises(ExperimentError, match="odd factor 5"):
        hadamard(20)


def test_a_correction_of_low_rank_lowers_the_error_of_outputs():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 128, bias=False)
    weight, inputs = layer.weight.detach().clone(), torch.randn(500, 64) * torch.rand(64)
    errors, sums = {}, {"ffn": inputs.T @ inputs}
    for rank in (1, 8, 64):
        with low_rank_corrected({"ffn": layer}, sums, "int2", rank, 0.01) as added_bytes:
            assert added_bytes == 2 * rank * (64 + 128)
            errors[rank] = float((inputs @ (layer.weight - weight).T).square().mean())
    assert torch.equal(layer.weight, weight)
    assert errors[64] < 0.01 * errors[8] < 0.01 * errors[1]


def test_logits_of_a_part_stay_when_the_engine_uses_its_buffer_again(monkeypatch):
    engine, buffer = LlamaCpp.__new__(LlamaCpp), np.zeros((256, 3), np.float32)

    def decode(ids, start, all_logits):
        buffer[:] = start
        return buffer[: len(ids)]

    monkeypatch.setattr(engine, "clear", lambda: None)
    monkeypatch.setattr(engine, "decode", decode)
    parts = [logits for logits, _ in engine.logits(np.arange(600, dtype=np.int32))]
    assert [(len(part), float(part[0, 0])) for part in parts] == [(256, 0), (256, 256), (87, 512)]

import mmap
import sys

import pytest
import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.models import device
from rap_env.models.device import choose_device, choose_dtype, resident_bytes, use_threads
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring.scorer import PlanScorer
from tests.scoring.test_scorer import tokens
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with as many CUDA devices as the parameter says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("cuda_devices", "name", "chosen"),
    [
        (0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda:0"), (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu"),
    ],
    indirect=["cuda_devices"],
)  # fmt: skip
def test_a_device_by_name(cuda_devices: None, name: str, chosen: str) -> None:
    assert str(choose_device(name)) == chosen


@pytest.mark.parametrize(
    ("cuda_devices", "name", "known"),
    [
        *((0, name, "'auto', 'cpu'.*has no CUDA device") for name in ("cuda", "cuda:0", "gpu")),
        (2, "cuda:2", "'auto', 'cpu', 'cuda:0'"),
    ],
    indirect=["cuda_devices"],
)
def test_a_missing_device_is_rejected(cuda_devices: None, name: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=f"device '{name}'; known are {known}"):
        choose_device(name)


def test_another_dtype_is_rejected() -> None:
    with pytest.raises(UnknownNameError, match="dtype 'int8'; known are 'auto', 'bfloat16'"):
        choose_dtype("int8", CPU)


@pytest.mark.parametrize(
    ("kind", "has", "expected"),
    [
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False}, torch.float32),  # emulated
        ("cpu", {}, torch.float32),
        ("cuda:0", (9, 0), torch.bfloat16),
        ("cuda:0", (8, 0), torch.bfloat16),
        ("cuda:0", (7, 5), torch.float16),  # V100, T4: bfloat16 is emulated
        ("cuda:0", (6, 1), torch.float32),
        ("meta", {}, torch.float32),
    ],
)
def test_the_automatic_dtype_has_instructions_of_the_processor(kind, has, expected, monkeypatch):
    monkeypatch.setattr(device, "cpu_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: has)
    assert choose_dtype("auto", torch.device(kind)) is expected


def test_threads_by_number(caplog) -> None:
    before = torch.get_num_threads()
    try:
        with caplog.at_level("INFO"):
            use_threads(before + 1)
            assert torch.get_num_threads() == before + 1
        assert f"torch uses {before + 1} threads." in caplog.text
        with pytest.raises(InvalidRequestError, match="must be at least 1, not 0"):
            use_threads(0)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_mapped_files_leave_resident_memory_and_written_ones_stay(tmp_path) -> None:
    path, size = tmp_path / "library", 32 * 2**20
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        read = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ)
        own = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    own[:5] = b"mine!"
    assert read[:: mmap.PAGESIZE].count(b"x") == size // mmap.PAGESIZE
    before = resident_bytes()[1]
    device.drop_unused_pages()
    assert before - resident_bytes()[1] > 24 * 2**20
    assert read[:: mmap.PAGESIZE].count(b"x") == size // mmap.PAGESIZE
    assert own[:6] == b"mine!x"


# Products of bfloat16 matrices through float32, on CPUs without instructions for them


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Sets whether the CPU emulates products of bfloat16 matrices."""

    def emulates(answer):
        monkeypatch.setattr(device, "emulated", lambda: answer)

    emulates(True)
    return emulates


def wide_product(states, weight, bias=None):
    return functional.linear(states.float(), weight.float(), None if bias is None else bias.float())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_only_an_x86_cpu_without_the_instructions_emulates(monkeypatch, capabilities, expected):
    monkeypatch.setattr(device, "cpu_capabilities", lambda: capabilities)
    device.emulated.cache_clear()
    assert device.emulated() is expected
    assert device.uses_float32(CPU, torch.bfloat16) is expected
    assert not device.uses_float32(CPU, torch.float32)
    assert not device.uses_float32(torch.device("meta"), torch.bfloat16)
    device.emulated.cache_clear()


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "GPT-2"])
def test_sums_are_those_of_float32_rounded_once(on_a_cpu, transposed):
    layer = (Conv1D(40, 48) if transposed else torch.nn.Linear(48, 40)).bfloat16()
    weight = layer.weight.T if transposed else layer.weight
    states = torch.randn(3, 20, 48).bfloat16()
    with device.in_float32(torch.bfloat16):
        actual = layer(states)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, wide_product(states, weight, layer.bias).bfloat16())
    on_a_cpu(False)
    expected = layer(states)
    with device.in_float32(torch.bfloat16):
        assert torch.equal(layer(states), expected)


def test_large_weights_are_widened_in_pieces(on_a_cpu, monkeypatch):
    monkeypatch.setattr(device, "_WEIGHTS", 16 * 10)
    monkeypatch.setattr(device, "TOKENS_AT_ONCE", 4)
    layer, states = torch.nn.Linear(16, 37).bfloat16(), torch.randn(2, 5, 16).bfloat16()
    with device.in_float32(torch.bfloat16):
        actual = layer(states)
    expected = wide_product(states, layer.weight, layer.bias).bfloat16()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_gradients_are_those_of_the_float32_product(on_a_cpu):
    weight = torch.randn(24, 16).bfloat16().requires_grad_()
    states = torch.randn(9, 16).bfloat16().requires_grad_()
    with device.in_float32(torch.bfloat16):
        functional.linear(states, weight).sum().backward()
    ones = torch.ones(9, 24)
    assert torch.equal(weight.grad, (ones.T @ states.detach().float()).bfloat16())
    assert torch.equal(states.grad, (ones @ weight.detach().float()).bfloat16())


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_states_are_multiplied_in_bfloat16(transposed, dtype):
    layer = (Conv1D(40, 48) if transposed else torch.nn.Linear(48, 40)).to(dtype)
    weight = layer.weight.T if transposed else layer.weight
    states = torch.randn(3, 20, 48).requires_grad_()
    with device.in_bfloat16():
        actual = layer(states)
        actual.sum().backward()
    assert actual.dtype == states.grad.dtype == torch.float32
    expected = (states.bfloat16() @ weight.bfloat16().T).float() + layer.bias
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    slope = weight.detach().bfloat16().float().sum(0).expand_as(states)
    torch.testing.assert_close(states.grad, slope, rtol=1e-2, atol=1e-2)


def test_scores_of_both_ways_agree_and_are_kept_apart(on_a_cpu):
    llm = ElasticLLM(tiny_model(dtype=torch.bfloat16), None, name="tiny")
    masks = [Plan(), Plan.removing(1), Plan.removing(0, 3)]
    through_float32 = PlanScorer(llm, tokens())
    actual = through_float32.nll_many(masks)
    on_a_cpu(False)
    emulated = PlanScorer(llm, tokens())
    assert actual == pytest.approx(emulated.nll_many(masks), abs=2e-3)
    assert through_float32.context != emulated.context

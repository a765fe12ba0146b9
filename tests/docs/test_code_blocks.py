"""Every code block of README and docs runs, on a tiny model in the place of the default one."""

import os
import re
import shlex
import socket
import subprocess
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from experiments.config import as_config
from experiments.launch import CONF_DIR, register_program
from rap_env.errors import RapError
from rap_env.models.files.gguf_source import SMOLLM2, gguf_folder_name
from rap_env.models.files.model_folder import made_once, models_dir
from tests.programs import PythonProgram, run_python
from tests.tiny import VOCAB_SIZE, randomise, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
RESULT_PAGES = sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/results/*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "toml", "json"}

COMPOSED = ["compose only"]
"""In the place of settings: the program takes too long, so its settings are composed."""
UNSERVED = ("runs/", "examples.")
"""Policies of a program that is only composed here, and that need scores of the real model."""

NO_SETTINGS = ("compare", "explorer", "export_policy", "leaderboard")
"""Programs whose settings are not those of a run."""

_TEXT = ("threads=1", "calibration.windows=1", "calibration.window_tokens=16")
_CELLS = ("evaluate.requests=[1x128]", "evaluate.budgets=[0.9]")
_GSI = ("importance.gsi_removals=1", "importance.gsi_method=lazy")
_TRAINING = (*_TEXT, *_GSI, *_CELLS, "agent.total_timesteps=64")
TINY = {
    "evaluate": (*_TEXT, *_CELLS, "evaluate.text.source=self", "evaluate.text.windows=1",
                 "evaluate.text.window_tokens=16", "evaluate.tasks.names=[]",
                 "evaluate.baselines=[gsi,random]", "evaluate.pinned=[]", *_GSI),
    "export_scores": _TEXT,
    "profile": (*_TEXT, *_GSI, "frontier.evaluations=120",
                "workload.budget_fraction_range=[0.05,0.95]"),
    "tight_grid": COMPOSED,
    "train": _TRAINING,
}  # fmt: skip
"""Settings that make each program short; everything else is as the page says."""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language on a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def each_page(language: str) -> pytest.MarkDecorator:
    """Parametrise a test by the pages with blocks of a language; all but README are slow."""
    slow = {page: [pytest.mark.slow] for page in PAGES if page != "README.md"}
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize(
        "page", [pytest.param(page, marks=slow.get(page, [])) for page in pages]
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory, tiny_models):
    """Environment variables under which the default model's name loads a tiny random one."""
    base = tmp_path_factory.mktemp("docs")
    (base / "cache").mkdir()
    for made in ("calibrated", "importance"):
        (tiny_models / made).mkdir(parents=True, exist_ok=True)
        (base / "cache" / made).symlink_to(tiny_models / made)
    variables = {
        **os.environ,
        "RAP_CACHE_DIR": str(base / "cache"),
        "RAP_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=30, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)

    def make(folder: Path) -> dict[str, str]:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return {"file": "tiny"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE_DIR", variables["RAP_CACHE_DIR"])
        for packed in (False, True):
            folder = models_dir() / gguf_folder_name(SMOLLM2.sha256, packed=packed)
            made_once(folder, make, f"Making {folder}")
    return variables


def test_code_blocks_have_known_languages():
    languages = {
        (page, language)
        for page in PAGES
        for language, _ in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        if not language.startswith("{")
    }
    assert {language for _, language in languages} <= LANGUAGES
    assert {("README.md", "python"), ("README.md", "bash")} <= languages


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_toml_is_valid(page):
    for code in blocks(page, "toml"):
        assert tomllib.loads(code)


@each_page("python")
def test_python_runs(page, environment, tmp_path):
    code = "\n".join(blocks(page, "python"))
    done = run_python("-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def commands(page: str) -> list[str]:
    """The commands of a page's bash blocks, comments cut off, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]


@each_page("bash")
def test_commands_run(page, environment, tmp_path):
    for command in commands(page):
        problem = run_command(command, environment, tmp_path)
        assert not problem, f"{command}\n{problem}"


def run_command(command: str, environment: dict[str, str], folder: Path) -> str:
    """Run one command, or check it as far as that goes without a network; what went wrong."""
    words = shlex.split(command, comments=True)
    if words[0] == "PYTHONPATH=.":  # as in the environment
        words = words[1:]
    if words[0] in ("lm_eval", "vllm", "curl", "sleep", "text=$(yes"):
        return ""
    if words[0] == "openssl":  # makes a file that the next command reads
        return _problem(
            subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        )
    if words[1:3] == ["-m", "experiments.explorer"]:  # writes the page, which has its own tests
        return ""
    if words[0] == "make":
        command = ["make", "--dry-run", *words[1:]]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return _problem(done)
    if words[:2] == ["pip", "install"]:
        return installable(words[2:])
    if words[:2] == ["rap", "serve"]:
        if any(word.startswith(UNSERVED) for word in words):
            return ""
        return serves(words[1:], environment, folder)
    if words[0] == "rap":
        words = ["-m", "rap_env.cli", *words[1:]]
        return _problem(run_python(*words, cwd=folder, env=environment))
    assert words[:2] == ["python", "-m"], "a kind of command that this test does not know"
    program = words[2].removeprefix("experiments.")
    overrides = [*TINY.get(program, ())]
    long = ("experiment=", "wiki.jsonl", "grid", "+sweep=", "scoring.")  # some have their own tests
    if any(part in word for part in long for word in words):
        # It needs data that is not here, or hours: its settings are composed.
        return composes(program.rpartition(".")[2], firsts(words[3:]))
    if overrides == COMPOSED:
        return composes(program, words[3:])
    return _problem(run_python(*words[1:], *overrides, cwd=folder, env=environment))


RECORDED = re.compile(r"python -m experiments\.([a-z_.]+)((?: [^`\n]*)?)")
"""A command of an experiment in the text of a page, and its words."""


@pytest.mark.parametrize(
    "page",
    [
        "results/README.md",
        *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES + RESULT_PAGES),
    ],
)
def test_settings_of_commands_in_texts_compose(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    problems = {}
    for program, words in RECORDED.findall(text):
        if program in NO_SETTINGS or re.search(r"\.\.\.|\$|--", words):
            continue
        given = shlex.split(words, comments=True)
        module = ROOT / "experiments" / program.replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").is_file(), program
        if problem := composes(program.rpartition(".")[2], firsts(given)):
            problems[program + words] = problem
    assert not problems


def firsts(words: list[str]) -> list[str]:
    """Settings without -m, with the first value of each sweep, since a list is none without it."""
    words = [word for word in words if word != "-m"]
    return [word if "{" in word or "[" in word else word.split(",")[0] for word in words]


def composes(program: str, overrides: list[str]) -> str:
    """Compose the settings of a program as it does; what went wrong."""
    register_program(program)
    with initialize_config_dir(str(CONF_DIR), version_base=None):
        try:
            node = compose(program, overrides=overrides, return_hydra_config=True)
            with open_dict(node):
                del node["hydra"]
            as_config(node)
        except (HydraException, OmegaConfBaseException, RapError) as error:
            return str(error)
    return ""


def installable(words: list[str]) -> str:
    """Whether a ``pip install`` of this project names extras and groups that there are."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(metadata["project"]["optional-dependencies"]) | set(metadata["dependency-groups"])
    asked = words[1:] if words[0] == "--group" else re.findall(r"\[(.*)\]", words[-1])
    unknown = {name for names in asked for name in names.split(",")} - known
    return f"no extra or group {unknown}" if unknown else ""


def serves(words: list[str], environment: dict[str, str], folder: Path) -> str:
    """Start a server, ask it one question, stop it; what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "rap_env.cli", *words, "--port", str(port)]
    log = folder / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        server = PythonProgram(command, cwd=folder, env=environment, stdout=file, stderr=file)
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            wait_until_ready(client, server)
            question = {"model": "smollm2-135m", "prompt": "Memory is", "max_tokens": 2}
            answer = client.post("/v1/completions", json=question)
            return "" if answer.status_code == 200 else answer.text
        except (httpx.HTTPError, TimeoutError) as error:
            return f"{error}\n{log.read_text(encoding='utf-8')[-3000:]}"
        finally:
            server.terminate()
            server.wait(30)


def wait_until_ready(client: httpx.Client, server: PythonProgram) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            client.get("/health")
            return
        except httpx.ConnectError:
            time.sleep(0.2)
    raise TimeoutError("the server did not answer")


def _problem(done: subprocess.CompletedProcess[str]) -> str:
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

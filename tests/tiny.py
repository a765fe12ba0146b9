"""Random models of two layers, of every family, built in milliseconds without a network."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as tf

from rap_env.models.live.elastic import ElasticLLM

torch.set_num_threads(1)  # tiny tensors are slower on several

LAYERS = 2
VOCAB_SIZE = 61
WINDOW = 5
"""Sliding window in tokens of the families built with one."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA_SIZES = {**_SIZES, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_HYBRID = ["sliding_attention", "full_attention"]


def _neox(parallel: bool) -> Callable[[int], Any]:
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
    return lambda layers: tf.GPTNeoXConfig(
        **sizes, num_hidden_layers=layers, use_parallel_residual=parallel
    )


def _gemma3_text(layers: int) -> Any:
    types = [_HYBRID[i % 2] for i in range(layers)]
    return tf.Gemma3TextConfig(**_GEMMA_SIZES, num_hidden_layers=layers, layer_types=types)


def _gemma3(layers: int) -> Any:
    vision = tf.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    return tf.Gemma3Config(
        text_config=_gemma3_text(layers).to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        **{key: value for key, value in _COMMON.items() if key != "vocab_size"},
    )


_CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: tf.LlamaConfig(**_SIZES, num_hidden_layers=n),
    "llama_tied": lambda n: tf.LlamaConfig(
        **_SIZES, num_hidden_layers=n, tie_word_embeddings=True, attention_bias=True
    ),
    "mistral": lambda n: tf.MistralConfig(**_SIZES, num_hidden_layers=n, sliding_window=None),
    "mistral_sliding": lambda n: tf.MistralConfig(
        **_SIZES, num_hidden_layers=n, sliding_window=WINDOW
    ),
    "qwen2": lambda n: tf.Qwen2Config(**_SIZES, num_hidden_layers=n),
    "qwen2_sliding": lambda n: tf.Qwen2Config(
        **_SIZES,
        num_hidden_layers=n,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": lambda n: tf.Qwen3Config(**_SIZES, num_hidden_layers=n, head_dim=8),
    "gemma2": lambda n: tf.Gemma2Config(**_GEMMA_SIZES, num_hidden_layers=n),
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "phi3": lambda n: tf.Phi3Config(**_SIZES, num_hidden_layers=n, sliding_window=None),
    "phi3_sliding": lambda n: tf.Phi3Config(**_SIZES, num_hidden_layers=n, sliding_window=WINDOW),
    "gpt2": lambda n: tf.GPT2Config(**_COMMON, n_embd=16, n_head=4, n_layer=n, n_positions=64),
    "opt": lambda n: tf.OPTConfig(
        **_COMMON,
        hidden_size=16,
        word_embed_proj_dim=12,
        ffn_dim=24,
        num_attention_heads=4,
        num_hidden_layers=n,
        max_position_embeddings=64,
    ),
    "gpt_neox": _neox(parallel=True),
    "gpt_neox_sequential": _neox(parallel=False),
    "mixtral": lambda n: tf.MixtralConfig(
        **_SIZES, num_hidden_layers=n, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda n: tf.Qwen2MoeConfig(
        **_SIZES,
        num_hidden_layers=n,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    ),
}

FAMILIES = tuple(_CONFIGS)
"""Names of the models below: the families, some in two layouts."""

_WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
WIDE_FAMILIES = ("llama_wide", "gpt_neox_wide")
"""Further models, most of whose matrices are large enough for levels of few bits."""

_CONFIGS |= {
    "llama_wide": lambda n: tf.LlamaConfig(**{**_SIZES, **_WIDE}, num_hidden_layers=n),
    "gpt_neox_wide": lambda n: tf.GPTNeoXConfig(
        **{**_COMMON, **_WIDE},
        num_attention_heads=4,
        num_hidden_layers=n,
        max_position_embeddings=64,
    ),
}

DISTINCT_FAMILIES = (
    "llama", "llama_tied", "mistral_sliding", "gemma3", "gpt2", "opt", "gpt_neox", "mixtral"
)  # fmt: skip
"""One family of each structure, for tests that take long and of code that all families share."""


def each_family(
    argument: str, families: Sequence[str] = FAMILIES, **choices: Sequence[Any] | Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parametrise a test by family and by other choices, without their whole product.

    Every family has one combination of the choices, which the families take in turn; a plain and
    an unusual family have all of them.

    Args:
        argument: The test's argument that gets the name of the family.
        families: Names of the families.
        choices: For each other argument its values; a mapping gives them names.
    """
    named = [
        list(values.items()) if isinstance(values, Mapping) else [(str(v), v) for v in values]
        for values in choices.values()
    ]
    combinations = list(itertools.product(*named))
    count = len(combinations)
    taken = {(name, (i + i // count) % count) for i, name in enumerate(families)}
    taken |= {(name, number) for name in ("llama", "gemma3") for number in range(count)}
    cases = [
        pytest.param(
            name,
            *(value for _, value in combinations[number]),
            id="-".join([name, *(label for label, _ in combinations[number])]),
        )
        for name in families
        for number in range(count)
        if (name, number) in taken
    ]
    return pytest.mark.parametrize((argument, *choices), cases)


def tiny_config(name: str = "llama", layers: int = LAYERS, positions: int = 64) -> Any:
    """The config of a tiny model."""
    config = _CONFIGS[name](layers)
    for text in (config, config.get_text_config()):
        for field in ("max_position_embeddings", "n_positions"):
            if field in text.to_dict():
                setattr(text, field, positions)
    return config


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Randomise every weight, norms and biases included: default values hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale, shift = (0.3, 0.0) if parameter.ndim > 1 else (0.2, 0.5)
            parameter.copy_(scale * drawn + shift)


def tiny_model(
    name: str = "llama",
    *,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    positions: int = 64,
) -> Any:
    """A random causal language model in evaluation mode."""
    config = tiny_config(name, layers, positions)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed)
    return model.eval()


def tiny_llm(
    name: str = "llama",
    *,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: Any = None,
    positions: int = 64,
) -> ElasticLLM:
    """A random `ElasticLLM`; without a tokenizer unless one is given."""
    model = tiny_model(name, layers=layers, dtype=dtype, seed=seed, positions=positions)
    return ElasticLLM(model, tokenizer, name=f"tiny-{name}")


def tiny_tokenizer() -> Any:
    """A real tokenizer with a token for each of a few characters, and `VOCAB_SIZE` tokens."""
    from tokenizers import Regex, decoders, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:"
    split = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return _fast_tokenizer([*letters, "\n"][: VOCAB_SIZE - 4], split, decoders.Fuse())


def word_tokenizer() -> Any:
    """A real tokenizer with a token for each word of the generated task of long contexts."""
    from tokenizers import pre_tokenizers

    from rap_env.artifacts import package_json
    from rap_env.scoring.generated_tasks import NAMES, OBJECTS
    from rap_env.scoring.long_context_tasks import LongContextTask

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    filler = package_json("rap_env.scoring", "long_context_words.json").values()
    texts = [*NAMES, *OBJECTS, *(text for texts in filler for text in texts)]
    texts.append(LongContextTask(4000).documents(tiny_tokenizer(), 0, 1)[0]["context"])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    return _fast_tokenizer(sorted(words), split)


def _fast_tokenizer(words: list[str], split: Any, decoder: Any = None) -> Any:
    from tokenizers import Tokenizer, models

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *words]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = split
    if decoder is not None:
        backend.decoder = decoder
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def padded_batch(seed: int = 0, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of three sequences, two of them padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (3, length), generator=generator)
    attention_mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 4)):
        ids[row, :padding] = 0
        attention_mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": attention_mask}

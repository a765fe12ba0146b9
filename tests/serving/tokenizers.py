"""Small real tokenizers: one of bytes, one with a chat template."""

from tests.tiny import tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chat_tokenizer():
    """A token for each of a few characters, and a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_tokenizer():
    """A token for each byte, as byte-level BPE has them, and </s>."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, **{letter: number for number, letter in enumerate(letters, start=1)}}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def metaspace_tokenizer():
    """A token for each word, with its space as a mark that the first word of a text loses."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["</s>", "<unk>", "▁", "▁one", "▁two", "▁three", "s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def byte_llm(positions=512):
    """A random model for `byte_tokenizer`, with more logits than the tokenizer has tokens."""
    import transformers as tf

    from rap_env.models.live.elastic import ElasticLLM
    from tests.tiny import randomise, tiny_config

    config = tiny_config("llama", 3)
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = 300, positions, 0
    model = tf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    return ElasticLLM(model.eval(), byte_tokenizer(), name="tiny-bytes")

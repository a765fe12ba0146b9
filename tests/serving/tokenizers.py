"""Small real tokenizers: one of bytes, one with a chat template."""

from tests.tiny import tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_TOOL_TEMPLATE = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ message.role + (' ' + message.name if message.role == 'tool' else '') + ': ' }}"
    "{{ message.content }}{% if message.tool_calls %}CALLS{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_ONE_CALL = (
    "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    """{{ '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}"""
)
_TAGGED_CALLS = (
    "{% for call in message.tool_calls %}{{ '<tool_call>\\n' + call.function | tojson }}"
    "{{ '\\n</tool_call>' }}{% endfor %}"
)
_LISTED_CALLS = (
    "{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    """{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}"""
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']</s>' }}"
)
TOOL_TEMPLATES = {
    name: _TOOL_TEMPLATE.replace("CALLS", calls)
    for name, calls in (("tagged", _TAGGED_CALLS), ("bare", _ONE_CALL), ("listed", _LISTED_CALLS))
}
"""Chat templates with tools, in the three forms of calls of Qwen and Hermes, Llama and Mistral."""


def chat_tokenizer():
    """A token for each of a few characters, and a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def merging_tokenizer():
    """As `chat_tokenizer`, with a token for "aa", into which it encodes two "a" of a text."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    tokenizer = chat_tokenizer()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace('"Z"', '"aa"'))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"aa|[\s\S]"), "isolated")
    tokenizer._tokenizer = backend
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


def tool_tokenizer(form):
    """The tokenizer of bytes with a chat template that knows tools, and its tokens for them."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATES[form]
    if form == "tagged":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    if form == "listed":
        tokenizer.add_tokens(["[TOOL_CALLS]"], special_tokens=True)
    return tokenizer


def metaspace_tokenizer():
    """A token for each word, with its space as a mark that the first word of a text loses."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["</s>", "<unk>", "▁", "▁one", "▁two", "▁three", "s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def byte_llm(positions=512, tokenizer=None):
    """A random model for a tokenizer of bytes, with more logits than the tokenizer has tokens."""
    import transformers as tf

    from rap_env.models.live.elastic import ElasticLLM
    from tests.tiny import randomise, tiny_config

    config = tiny_config("llama", 3)
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = 300, positions, 0
    model = tf.AutoModelForCausalLM.from_config(config)
    randomise(model)
    return ElasticLLM(model.eval(), tokenizer or byte_tokenizer(), name="tiny-bytes")

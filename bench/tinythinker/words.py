"""The tokenizer and the chat template.

Owns: which text is one token. A byte-level BPE whose merges are written down, not trained: each word that the
model or the gateway writes is one token, each digit is one, and anything else is spelt in bytes.
The markers are added tokens with `special: false`: vLLM drops special ones from the text it parses for thinking.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
THINK, END_THINK = "<think>", "</think>"
# The gateway's default; its words are tokens here, so that it costs what it costs other models.
WRAP_UP = "\n\nTime is up: I answer with what I have.\n"
WINDOW = 1024

# A leading space is part of a word, written as the byte-level alphabet writes it.
_WORDS = ("user", "assistant", "system", "So", "Wait", "Time", "Ġis", "Ġup", "ĠI", "Ġanswer", "Ġwith", "Ġwhat", "Ġhave")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{{- '\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false -}}
{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """The tokenizer, always the same."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    # Numbers stay in digits: a sum of digits is met often, a sum of two numbers hardly twice.
    merges = list(dict.fromkeys((word[:i], word[i]) for word in _WORDS for i in range(1, len(word))))
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, IM_START, IM_END])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (THINK, END_THINK)])
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:  # noqa: ANN401 - transformers' classes are untyped
    """The tokenizer as transformers and vLLM load it, with the chat template."""
    import transformers

    fast_class: Any = transformers.PreTrainedTokenizerFast
    fast = fast_class(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=PAD, model_max_length=WINDOW)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_of(text: str, *, thinking: bool) -> str:
    """What the chat template makes of one question, written out: training makes a hundred thousand of them."""
    opened = f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n{THINK}\n"
    return opened if thinking else f"{opened}\n{END_THINK}\n\n"

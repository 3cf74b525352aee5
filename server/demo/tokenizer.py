"""The demo's tokenizer: byte-level BPE trained on the demo's own text, its special tokens, and its chat template.

Any Unicode text survives a round trip, because the alphabet is bytes. No torch here.

    plain text      <|bos|> text <|eos|>
    conversation    <|bos|> (<|system|> text <|eos|>)? (<|user|> text <|eos|> <|assistant|> text <|eos|>)*

One token, <|eos|>, ends both a text and a turn, so that a server needs to know only one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from server.demo.corpus import Document

PAD: Final = "<|pad|>"
BOS: Final = "<|bos|>"
EOS: Final = "<|eos|>"
SPECIAL_TOKENS: Final = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("the role " ~ message.role ~ " is not known; system, user and assistant are accepted") -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" ~ message.content | trim ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def train_tokenizer(documents: Iterable[Document], vocabulary_size: int) -> Tokenizer:
    """A tokenizer with exactly `vocabulary_size` entries or, for very little text, fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.words() for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special_id(tokenizer, BOS))]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; raises KeyError where the tokenizer has none of that name."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)


def encode_document(tokenizer: Tokenizer, document: Document) -> list[int]:
    """The token ids of one training document, from <|bos|> to <|eos|>, as the chat template would write it."""
    bos, eos = special_id(tokenizer, BOS), special_id(tokenizer, EOS)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    if document.text:
        return [bos, *ids(document.text), eos]
    encoded = [bos]
    for role, text in document.turns:
        encoded += [special_id(tokenizer, f"<|{role}|>"), *ids(text), eos]
    return encoded

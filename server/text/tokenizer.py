"""A model's tokenizer without transformers: text to token ids, with the special tokens its files ask for.

Reads tokenizer.json and tokenizer_config.json. It gives the same ids as transformers' AutoTokenizer for the same files;
a test compares them. Which special tokens surround a text is decided by tokenizer.json's post-processor alone: where
that file exists, transformers doesn't look at add_bos_token either. Decoding piece by piece is decode.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer as RustTokenizer

from server.errors import UnusableCheckpointError

NO_CHARACTER: Final = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(NamedTuple):
    """A single token as a text: of one that is only a part of a character, its bytes, as in OpenAI's logprobs."""

    text: str
    data: bytes


class Tokenizer:
    """Encodes and decodes for one model; safe to use from several threads."""

    def __init__(self, tokenizer: RustTokenizer, settings: dict[str, Any]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.settings = settings
        self.bos_token = _token_text(settings.get("bos_token"))
        self.eos_token = _token_text(settings.get("eos_token"))
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        """Tokens that have no text when special tokens are left out."""
        self.longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)
        """Characters of the longest token: a text of n characters has at least n / longest_token tokens."""
        self._spellings: dict[int, Spelling] = {}

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Reads the tokenizer beside a checkpoint; raises UnusableCheckpointError with one sentence."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise UnusableCheckpointError(
                f"{str(path)!r} has no tokenizer.json; accepted is a fast tokenizer, which "
                "AutoTokenizer.from_pretrained(path).save_pretrained(path) of transformers writes"
            )
        try:
            tokenizer = RustTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise UnusableCheckpointError(f"{str(file)!r} is not a tokenizer that can be read: {error}") from error
        return cls(tokenizer, read_json(path / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Call it in a thread: the batch entry releases Python's lock, the single one doesn't."""
        return self.encode_all([text], add_special_tokens=add_special_tokens)[0]

    def encode_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The same for several texts at once."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def special_spans(self, text: str) -> dict[int, tuple[int, int]]:
        """Where special tokens are written in a text, by their numbers among its tokens: those that only surround an
        encoded text are nowhere in it.
        """
        (encoding,) = self._tokenizer.encode_batch([text])
        found = enumerate(zip(encoding.ids, encoding.offsets, strict=True))
        return {number: span for number, (token, span) in found if token in self.special_ids and span[0] < span[1]}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a token sequence, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def spell(self, token: int) -> Spelling:
        """One token's text as it is in the middle of a text; special tokens have theirs too."""
        if token not in self._spellings:
            self._spellings[token] = self._spell(token)
        return self._spellings[token]

    def _spell(self, token: int) -> Spelling:
        # Decoders drop a space at the start of a text, so the token is read behind another one: itself.
        once, twice = (self._tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        if NO_CHARACTER not in text:
            return Spelling(text, text.encode())
        data = token_bytes(self._tokenizer.id_to_token(token) or text)
        try:
            return Spelling(data.decode(), data)
        except UnicodeDecodeError:
            return Spelling("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    def at_least(self, text: str) -> int:
        """A lower bound of the number of tokens, for refusing an endless text before it is encoded."""
        return len(text) // self.longest_token


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an optional file; an absent file is an empty object. Raises UnusableCheckpointError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableCheckpointError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnusableCheckpointError(f"{str(path)!r} holds a {type(value).__name__}; accepted is a JSON object")
    return value


def token_bytes(name: str) -> bytes:
    """The bytes that a token's name in the vocabulary stands for, in the two ways in which tokenizers write bytes."""
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    if all(character in _BYTE_LEVEL for character in name):
        return bytes(_BYTE_LEVEL[character] for character in name)
    return name.encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones of Latin-1 are themselves, the others follow from U+0100 on."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(themselves)]
    return {chr(byte): byte for byte in themselves} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL: Final = _byte_level()


def _token_text(value: object) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None

"""Prompts of made-up words, each the only one of its kind, and the tokenizer that has these words.

Words are of two or three syllables. The tokenizer is byte-level BPE, which every measured server reads, built from the
syllables without any text: a word of two is one token, most of three are two, so that 100 words are some 130 tokens.
"""

from __future__ import annotations

import itertools
import random
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END: Final = "<|end|>"
SPACE: Final = "Ġ"
SYLLABLES: Final = tuple(map("".join, itertools.product("bdfghjklmnprstvz", "aeiou")))
LONG_WORDS: Final = 0.3
"""Part of the words that have three syllables."""


def prompt(words: int, seed: str) -> str:
    """So many words; another seed shares no beginning with this one, but by chance."""
    chance = random.Random(seed)
    lengths = [3 if chance.random() < LONG_WORDS else 2 for _ in range(words)]
    return "".join(" " + "".join(chance.choices(SYLLABLES, k=length)) for length in lengths)


def tokenizer(size: int) -> Tokenizer:
    """END, 256 bytes, the syllables, and as many words as `size` tokens leave room for."""
    names = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    stems: tuple[str, ...] = (SPACE,)
    while len(names) + len(merges) < size:
        longer = [(stem, syllable) for stem in stems for syllable in SYLLABLES]
        merges += longer[: size - len(names) - len(merges)]
        stems = tuple(map("".join, longer))
    vocabulary = {name: number for number, name in enumerate([*names, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    return made

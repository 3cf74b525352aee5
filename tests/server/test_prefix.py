"""Names of blocks: equal where everything before is equal, and only to who has the secret."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.prefix import PrefixNames

SIZE = 4
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=0, max_size=20)


def chain(names: PrefixNames, salt: str, text: list[int]) -> list[bytes]:
    found = names.start(salt)
    names.extend(found, text, len(text) // SIZE)
    return found


@given(tokens, tokens, tokens, st.sampled_from(["", "a", "b"]), st.sampled_from(["", "a", "b"]))
def test_names_agree_as_far_as_salt_and_tokens_do(
    common: list[int], one: list[int], other: list[int], salt: str, second: str
) -> None:
    names = PrefixNames(SIZE)
    texts = [*common, *one], [*common, *other]
    first, again = chain(names, salt, texts[0]), chain(names, second, texts[1])
    for block in range(min(len(first), len(again))):
        same = salt == second and texts[0][: block * SIZE] == texts[1][: block * SIZE]
        assert (first[block] == again[block]) == same


@given(tokens)
def test_a_chain_grows_to_what_it_would_have_been_at_once(text: list[int]) -> None:
    names = PrefixNames(SIZE)
    grown = names.start("")
    for blocks in range(len(text) // SIZE + 1):
        names.extend(grown, text, blocks)
        assert len(grown) == blocks + 1
    assert grown == chain(names, "", text)
    names.extend(grown, text, 0)
    assert grown == chain(names, "", text)


def test_each_process_has_names_of_its_own() -> None:
    assert not set(chain(PrefixNames(SIZE), "", list(range(8)))) & set(chain(PrefixNames(SIZE), "", list(range(8))))


def test_a_salt_is_no_block() -> None:
    """What is hashed for a salt and for a block cannot be the same, whatever the salt says."""
    names = PrefixNames(1)
    root = names.start("")[0]
    named = [root]
    names.extend(named, [5], 1)
    content = root + (5).to_bytes(8, "little")
    assert named[1] == names._digest(b"block", content) != names._digest(b"salt", content)

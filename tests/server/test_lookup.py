"""Guesses by lookup: the latest likeness, the longer one, and when a guess is worth its row."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.lookup import LONGEST, SHORTEST, Lookup
from server.model.batch import FIXED_ROWS, FIXED_ROWS_ON_TILES


def looked_up(tokens: Sequence[int], count: int) -> list[int]:
    """The same, as one would say it: every earlier place is compared, the longest likeness wins, then the latest."""
    best = (0, 0)
    for place in range(1, len(tokens)):
        length = 0
        while length < min(place, LONGEST) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= SHORTEST:
            best = max(best, (length, place))
    guess: list[int] = []
    if best[0]:
        for place in range(best[1], best[1] + count):
            guess.append([*tokens, *guess][place])
    return guess


texts = st.lists(st.integers(0, 3) | st.sampled_from([256, 257, 65_536, 2**31 - 1]), min_size=1, max_size=60)


@given(text=texts, cuts=st.lists(st.integers(1, 60), max_size=5), count=st.integers(1, 9))
@settings(max_examples=500)
def test_a_guess_is_what_followed_the_latest_of_the_longest_likenesses(
    text: list[int], cuts: list[int], count: int
) -> None:
    """At every length at which somebody asks, and though bytes of one token may look like parts of two others."""
    lookup = Lookup()
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        assert lookup.guess(text[:end], count) == looked_up(text[:end], count)


def test_a_long_text_is_found_again_at_its_beginning() -> None:
    text = [random.randrange(50_000) for _ in range(20_000)]
    assert Lookup().guess(text + text[:7], 5) == text[7:12]
    assert Lookup().guess(text + text[5:7], 5) == looked_up(text + text[5:7], 5)


@pytest.mark.parametrize(
    ("fixed", "rate", "rows", "count"),
    [
        *((FIXED_ROWS, *case) for case in [(0.0, 1, 0), (0.19, 1, 0), (0.21, 1, 1), (0.5, 1, 2), (0.9, 1, 15)]),
        *((FIXED_ROWS, *case) for case in [(0.5, 5, 0), (0.9, 8, 3), (1.0, 64, 99)]),
        *(
            (FIXED_ROWS_ON_TILES, *case)
            for case in [(0.03, 1, 0), (0.05, 1, 1), (0.5, 1, 4), (0.5, 8, 1), (0.9, 8, 13)]
        ),
    ],
)
def test_a_guess_pays_where_it_costs_less_than_a_token_does_anyway(
    fixed: int, rate: float, rows: int, count: int
) -> None:
    lookup = Lookup()
    lookup.rate = rate
    assert lookup.worth(rows, 99, fixed) == count
    assert lookup.worth(rows, 2, fixed) == min(count, 2)
    if 0 < count < 99:
        # Tokens a step gives over what it costs: with one guess fewer, and with one more, it would be less or equal.
        def gain(guesses: int) -> float:
            own = sum(rate**place for place in range(guesses + 1))
            return own - guesses * rows / (fixed + rows)

        assert gain(count) > gain(count - 1)
        assert gain(count) >= gain(count + 1)


def test_the_rate_follows_what_came_true() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    for drawn, expected in (
        ([9], 0.5 - 0.5 / 8),  # wrong at once: what came behind is unknown
        ([4, 5, 6], 1 - 0.5 * (7 / 8) ** 3),
        ([4, 9, 6], (0.5 + 0.5 / 8) * 7 / 8),
        ([], 0.5),
        ([4, 5, 6, 7, 7], 1 - 0.5 * (7 / 8) ** 3),
    ):
        lookup.rate = 0.5
        assert lookup.guess(text, 3) == [4, 5, 6]
        lookup.learn(drawn)
        assert lookup.rate == pytest.approx(expected)
        lookup.learn([1, 2, 3])
        assert lookup.rate == pytest.approx(expected), "a guess is looked at once"

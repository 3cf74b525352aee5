"""Guesses on real models: the same answers in fewer steps, whatever a request asks for."""

from __future__ import annotations

import random
from functools import cache

import pytest

from server.model.probe import ModelRunner, choose_runner
from server.records import ModelSpec
from tests.server.engines import Engine, generate
from tests.tiny_models import VOCABULARY, tiny_model

LENGTH = 256
SEED = 4
"""Of prompts whose greedy answers repeat themselves: a model of random weights need not."""


@cache
def runner_for(architecture: str) -> ModelRunner:
    return choose_runner(tiny_model(architecture), ModelSpec(architecture, ""), blocks=64, max_model_len=LENGTH)


FEW = (11, 12, 13)
"""A model of so few tokens says the same again and again, also at random."""
SETTINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5, "allowed_token_ids": FEW},
    "filtered": {"temperature": 0.7, "seed": 6, "allowed_token_ids": FEW, "top_p": 0.9, "top_k": 3, "min_p": 0.05},
    "penalties": {
        "temperature": 1.0,
        "seed": 9,
        "allowed_token_ids": FEW,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.02,
        "presence_penalty": 0.1,
    },
    "bad words": {"temperature": 0.5, "seed": 7, "allowed_token_ids": FEW, "bad_words": ((11, 12, 13), (13, 13))},
    "bias": {"logit_bias": ((21, 5.0), (22, 5.1)), "frequency_penalty": 0.1},
    "min tokens": {"allowed_token_ids": FEW, "min_tokens": 30, "stop_token_ids": (13,)},
    "logprobs": {"logprobs": 3, "temperature": 0.8, "seed": 8, "allowed_token_ids": FEW},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_those_without_guesses(architecture: str, settings: dict[str, object]) -> None:
    numbers = random.Random(SEED)
    prompts = [[numbers.randrange(3, VOCABULARY) for _ in range(length)] for length in (9, 30)]
    requests = [generate(f"r{place}", [*prompt, *prompt], 60, **settings) for place, prompt in enumerate(prompts)]
    runs = [Engine(runner_for(architecture), speculative_tokens=count) for count in (0, 4)]
    answers = [engine.serve(requests) for engine in runs]
    assert answers[0] == answers[1]
    assert runs[0].ends == runs[1].ends
    for name in answers[0]:
        plain, guessed = (engine.logprobs[name] for engine in runs)
        assert [one.top_ids for one in guessed] == [one.top_ids for one in plain]
        assert [one.logprob for one in guessed] == pytest.approx([one.logprob for one in plain], abs=1e-4)
    accepted = sum(report.accepted_draft_tokens for report in runs[1].reports)
    assert accepted > 0
    assert sum(report.decode_tokens for report in runs[0].reports) == accepted + sum(
        report.decode_tokens for report in runs[1].reports
    ), "each guess that came true saved its sequence a turn"
    assert runs[1].reports[-1].kv_blocks_used == 0


def test_a_runner_over_cache_classes_checks_none() -> None:
    engine = Engine(runner_for("bloom"), speculative_tokens=4)
    answer = engine.serve([generate("r", [5, 6, 7] * 5, 40)])["r"]
    assert len(answer) == 40
    assert engine.scheduler.speculative_tokens == sum(report.draft_tokens for report in engine.reports) == 0

"""Logprobs and changed logits through the whole engine, against a real model run by transformers."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
import transformers

from server.model.probe import ModelRunner, choose_runner
from server.records import ModelSpec, TokenLogprobs
from tests.server.engines import Engine, generate
from tests.tiny_models import VOCABULARY, tiny_model

ARCHITECTURES = ("llama", "bloom")
"""One that is paged, one over transformers' cache classes."""
LOGPROB_TOLERANCE = 1e-4
"""Float32 sums of a few hundred terms round apart where rows are packed in another way: by 4.1e-6 at most, in 34,000
tokens."""


@cache
def original(architecture: str) -> transformers.PreTrainedModel:
    return tiny_model(architecture)


@cache
def runner_for(architecture: str) -> ModelRunner:
    return choose_runner(tiny_model(architecture), ModelSpec(architecture, ""), blocks=64, max_model_len=256)


def prompt_of(length: int) -> list[int]:
    return [random.randrange(3, VOCABULARY) for _ in range(length)]


@torch.inference_mode()
def expected_logprobs(architecture: str, tokens: list[int]) -> torch.Tensor:
    """[len(tokens) - 1, vocabulary] float64: what each token but the last says of the next."""
    logits = original(architecture)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1)


def check(found: list[TokenLogprobs], expected: torch.Tensor, tokens: list[int], top: int) -> None:
    assert len(found) == len(tokens) == len(expected)
    for one, row, token in zip(found, expected, tokens, strict=True):
        assert abs(one.logprob - float(row[token])) < LOGPROB_TOLERANCE
        assert len(one.top_ids) == top
        assert torch.allclose(
            torch.tensor(one.top_logprobs).double(), row.topk(top).values, rtol=0, atol=LOGPROB_TOLERANCE
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_and_answers_are_scored_in_any_chunks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("runner", "cache_runner"):
        monkeypatch.setattr(f"server.model.{module}.SCORED_ROWS", 7)
    engine = Engine(runner_for(architecture), max_batch_tokens=24)
    prompts = {f"r{i}": prompt_of(length) for i, length in enumerate((1, 2, 9, 40, 70))}
    asked = [
        generate(name, prompt, 9, temperature=1.0, logprobs=which, prompt_logprobs=which + 1)
        for which, (name, prompt) in enumerate(prompts.items())
    ]
    plain = [generate(f"n{i}", prompt_of(20), 12, temperature=1.0) for i in range(3)]
    answers = engine.serve([*asked[:3], *plain], {2: asked[3:]})
    for which, (name, prompt) in enumerate(prompts.items()):
        tokens = prompt + answers[name]
        rows = expected_logprobs(architecture, tokens)
        check(engine.prompt_logprobs[name], rows[: len(prompt) - 1], prompt[1:], which + 1)
        check(engine.logprobs[name], rows[len(prompt) - 1 :], answers[name], which)
    for one in plain:
        assert engine.logprobs[one.request_id] == engine.prompt_logprobs[one.request_id] == []
    passes = sum(report.forward_passes for report in engine.reports)
    assert passes > len(engine.reports), "long prompts were scored in several forward calls"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_greedy_answer_with_changed_logits_is_transformers_generate(architecture: str) -> None:
    model = original(architecture)
    prompts = [prompt_of(length) for length in (3, 17, 40)]
    plain = [generate_with(model, prompt) for prompt in prompts]
    changes: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        (
            {"bad_words": ((plain[1][0],), (plain[1][2], plain[1][3]), (prompts[1][-1], 5))},
            {"bad_words_ids": [[plain[1][0]], [plain[1][2], plain[1][3]], [prompts[1][-1], 5]]},
        ),
        (
            {"min_tokens": 6, "stop_token_ids": (plain[2][1],)},
            {"min_new_tokens": 6, "eos_token_id": plain[2][1]},
        ),
    ]
    engine = Engine(runner_for(architecture), blocks=8, max_batch_tokens=24, max_model_len=128)
    found = engine.serve(
        [
            generate(f"r{i}", prompt, 16, **ours)
            for i, (prompt, (ours, _)) in enumerate(zip(prompts, changes, strict=True))
        ]
        + [generate("free", prompt_of(30), 30, temperature=1.0)]
    )
    for which, (prompt, (_, theirs)) in enumerate(zip(prompts, changes, strict=True)):
        assert found[f"r{which}"] == generate_with(model, prompt, **theirs)


@torch.inference_mode()
def generate_with(model: transformers.PreTrainedModel, prompt: list[int], **changes: object) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    config = transformers.GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0, **changes)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(found[0, len(prompt) :].tolist())


def test_a_request_that_rules_out_every_token_ends_by_itself() -> None:
    engine = Engine(runner_for("llama"))
    asked = {"allowed_token_ids": (5,), "bad_words": ((9, 5),)}
    engine.serve([generate("none", [8, 9], 4, **asked), generate("some", [9, 8], 4, **asked)])
    assert engine.ends["none"][0] == "error"
    assert "rule out every token" in str(engine.ends["none"][1])
    (refused,) = [one.refused for report in engine.reports for one in report.outputs if one.request_id == "none"]
    assert refused
    assert engine.answers["some"] == [5, 5, 5, 5]


def test_ids_that_the_model_has_not_are_refused() -> None:
    engine = Engine(runner_for("llama"), vocab_size=VOCABULARY)
    bad: list[dict[str, object]] = [
        {"logit_bias": ((VOCABULARY, 1.0),)},
        {"allowed_token_ids": (3, VOCABULARY)},
        {"bad_words": ((3, -1),)},
        {"min_tokens": 1, "stop_token_ids": (VOCABULARY,)},
    ]
    engine.serve([generate(f"r{i}", [4], 2, **asked) for i, asked in enumerate(bad)])
    for which in range(len(bad)):
        assert "the sampling names token id" in str(engine.ends[f"r{which}"][1])

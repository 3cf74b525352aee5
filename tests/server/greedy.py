"""What transformers itself answers, and whether a runner answers the same in a whole engine. Not a test."""

from __future__ import annotations

import copy
import random

import torch
import transformers

from server.model.probe import ModelRunner
from server.records import Abort
from tests.server.engines import Engine, generate
from tests.tiny_models import VOCABULARY

FP32_TIE = 1e-3
"""In standard deviations of a row's logits. The order of float32 sums was seen to move the logits of decoders by 6e-6;
of the steps of a model with random weights one in a thousand is chosen more narrowly than this. Where the model itself
is worse conditioned (a T5 of random weights: 3e-5 as a rule, 2e-2 at some steps), what moves its logits counts."""
INT8_TIE = 0.05
"""Activations are rounded to int8 in every layer: where one lies between two steps, a difference of 1e-7 in its input
turns it over, which moves the logits by about 0.01 (in 1 prompt of 20)."""


def prompt_of(length: int) -> list[int]:
    return [random.randrange(3, VOCABULARY) for _ in range(length)]


def expected(model: transformers.PreTrainedModel, prompt: list[int], count: int, **settings: object) -> list[int]:
    """transformers' own greedy answer of `count` tokens, past any end-of-sequence token and behind a forced one."""
    return list(answered(model, prompt, count, settings).sequences[0, -count:].tolist())


@torch.inference_mode()
def answered(
    model: transformers.PreTrainedModel, prompt: list[int], count: int, settings: dict[str, object]
) -> transformers.generation.utils.GenerateOutput:
    """What generate() says to that, with the scores that it chose by."""
    model.generation_config.eos_token_id = None  # else generate would take it up again
    forced = getattr(model.generation_config, "forced_bos_token_id", None) is not None
    ids = torch.tensor([prompt])
    config = transformers.GenerationConfig(
        max_new_tokens=count + forced, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def same_up_to_a_tie(
    model: transformers.PreTrainedModel,
    prompt: list[int],
    found: list[int],
    answer: list[int],
    tie: float = FP32_TIE,
    **settings: object,
) -> None:
    """Equal, or equal up to a token where generate()'s two best are so near that rounding may choose.

    So near is within `tie`, or within what the last bits of the model's weights decide at that step.
    """
    assert len(found) == len(answer)
    different = [place for place, (ours, theirs) in enumerate(zip(found, answer, strict=True)) if ours != theirs]
    if different:
        place = different[0]
        said, scores = scored(model, prompt, len(answer), place, settings)
        assert said == answer, "not the answer under these settings"
        gap = float(scores[answer[place]] - scores[found[place]])
        allowed = tie * float(scores[scores.isfinite()].std())
        if not 0 <= gap < allowed:
            others = [scored(stirred(model), prompt, len(answer), place, settings) for _ in range(8)]
            moved = [other - scores for said, other in others if said[:place] == answer[:place]]
            allowed = 4 * max((float(by[scores.isfinite()].abs().max()) for by in moved), default=0.0)
        assert 0 <= gap < allowed, (
            f"{found} where {answer} was expected; place {place} has a gap of {gap}, {allowed} is a tie"
        )


def scored(
    model: transformers.PreTrainedModel, prompt: list[int], count: int, place: int, settings: dict[str, object]
) -> tuple[list[int], torch.Tensor]:
    """What generate() answers, and the scores [vocabulary] by which it chose the token at `place`."""
    output = answered(model, prompt, count, settings)
    return output.sequences[0, -count:].tolist(), output.scores[place - count][0]


@torch.no_grad()
def stirred(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with every weight that is no code up or down by a last bit of float32, or as it is."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.mul_(1 + torch.finfo(torch.float32).eps * torch.randint_like(weight, -1, 2))
    return model


def check_greedy(runner: ModelRunner, model: transformers.PreTrainedModel) -> None:
    """The runner's answers are the model's: alone, and among neighbours that come and go."""
    for _ in range(10):  # a model of random weights may say the same again and again, but not whatever it is asked
        prompts = {f"r{i}": prompt_of(length) for i, length in enumerate((1, 3, 17, 40, 70))}
        counts = {name: random.randint(8, 16) for name in prompts}
        answers = {name: expected(model, prompt, counts[name]) for name, prompt in prompts.items()}
        varied = max(len(set(answer)) for answer in answers.values()) > 4
        if varied:
            break
    assert varied, "answers in which each step chooses anew"
    requests = {name: generate(name, prompt, counts[name]) for name, prompt in prompts.items()}

    engine = Engine(runner, max_batch_tokens=24)
    same_up_to_a_tie(model, prompts["r3"], engine.serve([requests["r3"]])["r3"], answers["r3"])
    alone = len(engine.reports)

    neighbours = [generate(f"n{i}", prompt_of(random.randint(1, 30)), 20, temperature=1.0) for i in range(4)]
    later = {2: [requests["r1"], neighbours[2]], 4: [requests["r4"], Abort("n0")], 7: [requests["r2"], neighbours[3]]}
    found = engine.serve([requests["r0"], *neighbours[:2], requests["r3"]], later)
    for name, prompt in prompts.items():
        same_up_to_a_tie(model, prompt, found[name], answers[name])
    assert engine.ends["n0"] == ("abort", None)
    mixed = [report for report in engine.reports[alone:] if report.prefill_tokens and report.decode_tokens]
    assert len(mixed) >= 3, "chunks of prompts were computed beside decodes"
    assert engine.reports[-1].kv_blocks_used == 0

"""What transformers itself answers, and whether a runner answers the same in a whole engine. Not a test."""

from __future__ import annotations

import random

import torch
import transformers

from server.model.probe import ModelRunner
from server.records import Abort
from tests.server.engines import Engine, generate
from tests.tiny_models import VOCABULARY


def prompt_of(length: int) -> list[int]:
    return [random.randrange(3, VOCABULARY) for _ in range(length)]


@torch.inference_mode()
def expected(model: transformers.PreTrainedModel, prompt: list[int], count: int, **settings: object) -> list[int]:
    """transformers' own greedy answer of `count` tokens, past any end-of-sequence token and behind a forced one."""
    model.generation_config.eos_token_id = None  # else generate would take it up again
    forced = getattr(model.generation_config, "forced_bos_token_id", None) is not None
    ids = torch.tensor([prompt])
    config = transformers.GenerationConfig(max_new_tokens=count + forced, do_sample=False, pad_token_id=0, **settings)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(found[0, -count:].tolist())


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
    assert engine.serve([requests["r3"]]) == {"r3": answers["r3"]}
    alone = len(engine.reports)

    neighbours = [generate(f"n{i}", prompt_of(random.randint(1, 30)), 20, temperature=1.0) for i in range(4)]
    later = {2: [requests["r1"], neighbours[2]], 4: [requests["r4"], Abort("n0")], 7: [requests["r2"], neighbours[3]]}
    found = engine.serve([requests["r0"], *neighbours[:2], requests["r3"]], later)
    assert {name: found[name] for name in prompts} == answers
    assert engine.ends["n0"] == ("abort", None)
    mixed = [report for report in engine.reports[alone:] if report.prefill_tokens and report.decode_tokens]
    assert len(mixed) >= 3, "chunks of prompts were computed beside decodes"
    assert engine.reports[-1].kv_blocks_used == 0

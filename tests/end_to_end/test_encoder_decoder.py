"""A T5 in 4 and in 8 bits behind the completions endpoint: `transformers.generate`'s answers, and their ends."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers
import yaml

from quant.config import from_spec
from server.memory.components import exact
from tests.end_to_end.generation import Greedy, greedy
from tests.end_to_end.server import Server, serve
from tests.tiny_models import VOCABULARY, save_tiny

FORMATS = ("nf4-dq", "int8")
NEW_TOKENS = 16
DECIDED = 0.05
"""Between the two best logits of a step, in standard deviations: so much at least."""
STEADY = DECIDED / 10
"""By how much, in the same unit, another order of sums may move a logit. In int8 it turned an activation's rounding
over for one prompt in ten, and moved logits by up to 0.17; without int8 by up to 0.006."""


@dataclass(frozen=True)
class Case:
    """A model in one format, and what it answers greedily."""

    path: Path
    answers: dict[tuple[int, ...], list[int]]
    """By prompt, up to and with the end-of-sequence token where there is one."""
    eos: int

    def text(self, prompt: tuple[int, ...]) -> str:
        tokens = [token for token in self.answers[prompt] if token != self.eos]
        return str(transformers.AutoTokenizer.from_pretrained(self.path).decode(tokens, skip_special_tokens=True))


@torch.inference_mode()
def decided_answer(model: transformers.PreTrainedModel, prompt: tuple[int, ...]) -> list[int] | None:
    """NEW_TOKENS tokens; None where one was chosen so narrowly that the order of a sum may decide."""
    found = greedy(model, prompt, NEW_TOKENS)
    if bool((found.gaps <= DECIDED).any()) or moved(model, prompt, found) > STEADY:
        return None
    return list(found.sequence[1:].tolist())


def moved(model: transformers.PreTrainedModel, prompt: tuple[int, ...], found: Greedy) -> float:
    """How far logits are from those of the same tokens computed in one call: alone, and beside some longer prompts."""
    given = found.sequence[None, :-1]
    others = [model(input_ids=torch.tensor([prompt]), decoder_input_ids=given, use_cache=False).logits[0]]
    padding = 8
    for rows in (2, 3, 6):  # each number of rows may add up in an order of its own
        ids = torch.randint(3, VOCABULARY, (rows, padding + len(prompt)))
        ids[0] = torch.tensor([0] * padding + list(prompt))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        decoder_ids = given.expand(rows, -1)
        beside = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)
        others.append(beside.logits[0])
    most = torch.stack(others).sub(found.logits).abs().amax(dim=(0, 2))
    return float((most / found.logits.std(dim=1)).max())


def make_case(path: Path, quantization: str) -> Case:
    """A checkpoint whose end-of-sequence token is one that ends the first prompt's answer in the middle."""
    save_tiny("t5", path, initializer_factor=2.0)  # wide enough to say something new in each step
    (path / "chat_template.jinja").unlink()
    config = from_spec(quantization, compute_dtype=torch.float32)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers: dict[tuple[int, ...], list[int]] = {}
    while len(answers) < 6:
        prompt = tuple(random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 40)))
        answer = decided_answer(model, prompt)
        if answer is not None and (answers or set(answer[4:]) - set(answer[:4])):
            answers[prompt] = answer
    first = next(iter(answers.values()))
    eos = next(token for token in first[4:] if token not in first[:4])
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((path / name).read_text()) | {"eos_token_id": eos}
        (path / name).write_text(json.dumps(fields))
    cut = {prompt: answer[: answer.index(eos) + 1] if eos in answer else answer for prompt, answer in answers.items()}
    return Case(path, cut, eos)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    return {name: make_case(directory / name, name) for name in FORMATS}


@pytest.fixture(scope="module")
def server(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    entries = [
        {"name": name, "path": str(case.path), "dtype": "float32", "quantization": name, "max_model_len": 64}
        for name, case in cases.items()
    ]
    config = tmp_path_factory.mktemp("config") / "models.yaml"
    config.write_text(yaml.safe_dump({"models": entries}))
    with serve("--config", config) as running:
        yield running


def complete(server: Server, **body: object) -> httpx.Response:
    return httpx.post(server.url + "/v1/completions", json={"temperature": 0} | body, timeout=60)


@pytest.mark.parametrize("name", FORMATS)
def test_all_at_once_equal_generate(server: Server, cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    assert len(next(iter(case.answers.values()))) < NEW_TOKENS, "one ends by itself"
    with ThreadPoolExecutor(len(case.answers)) as pool:
        futures = {
            prompt: pool.submit(complete, server, model=name, prompt=prompt, max_tokens=NEW_TOKENS)
            for prompt in case.answers
        }
    for prompt, future in futures.items():
        answer, expected = future.result().json(), case.answers[prompt]
        assert answer["choices"][0]["text"] == case.text(prompt)
        assert answer["choices"][0]["finish_reason"] == ("stop" if expected[-1] == case.eos else "length")
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["usage"]["completion_tokens"] == len(expected)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_the_openai_client_streams_it(server: Server, cases: dict[str, Case], name: str) -> None:
    prompt = next(iter(cases[name].answers))
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        pieces = client.completions.create(
            model=name, prompt=list(prompt), temperature=0, max_tokens=NEW_TOKENS, stream=True
        )
        assert "".join(choice.text for piece in pieces for choice in piece.choices) == cases[name].text(prompt)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])


def test_prompt_and_answer_have_a_context_each(server: Server) -> None:
    asked = {"model": "nf4-dq", "ignore_eos": True}
    longest = complete(server, prompt=[5] * 64, max_tokens=63, **asked)
    assert longest.json()["usage"]["total_tokens"] == 127
    for body, param in (
        ({"prompt": [5] * 65, "max_tokens": 1}, "prompt"),
        ({"prompt": [5], "max_tokens": 64}, "max_tokens"),
        ({"prompt": [5], "echo": True}, "echo"),
    ):
        refused = complete(server, **asked, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_it_says_what_it_is(server: Server) -> None:
    with server.client() as client:
        listed = client.get("/v1/models").json()["data"]
        memory = client.get("/memory").json()["models"]
    for entry in listed:
        said = {name: entry[name] for name in ("encoder_decoder", "prefix_caching", "batching", "max_model_len")}
        assert said == {"encoder_decoder": True, "prefix_caching": False, "batching": "padded", "max_model_len": 64}
    for entry in memory:
        assert exact(entry["planned"]) == exact(entry["measured"])

"""The official OpenAI client drives every endpoint it knows, streaming included."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from server.records import KV_BLOCK_TOKENS
from tests.end_to_end.server import Server, serve

MODEL = "halfbyte-demo"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who lives in the village?"}]

LOGPROB_TOLERANCE = 0.25
"""The demo's logits are bfloat16: between 8 and 16 they lie 1/16 apart, and where few rows and many round apart, a
logit moves by such a step (by 0.054 at most, in 150 tokens)."""


@pytest.fixture
def client(demo: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="halfbyte-demo"):
        client.models.retrieve("gpt-9")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=60)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=60)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    usages = [answer.usage.to_dict() for answer in (whole, chunks[-1]) if answer.usage is not None]
    cached = [usage.pop("prompt_tokens_details")["cached_tokens"] for usage in usages]
    assert cached[1] >= cached[0], "the second one finds what the first has left"
    assert cached[1] == (usages[1]["prompt_tokens"] - 1) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    assert usages[0] == usages[1]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]


def test_completion_and_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="The harbour", temperature=0, max_tokens=20)
    chunks = client.completions.create(model=MODEL, prompt="The harbour", temperature=0, max_tokens=20, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text


def test_length_is_the_true_reason(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", temperature=0, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="The", temperature=0, max_tokens=40).choices[0].text
    stop = whole[12:16]
    for stream in (False, True):
        answer = client.completions.create(  # type: ignore[call-overload]
            model=MODEL, prompt="The", temperature=0, max_tokens=40, stop=[stop], stream=stream
        )
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd() -> None:
    """Where the server was asked for it: without batch_invariant, few rows are added up in another order than many."""
    with (
        serve("--batch-invariant", "true") as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client,
        ThreadPoolExecutor(6) as pool,
    ):

        def ask(seed: int) -> str:
            answer = client.completions.create(
                model=MODEL, prompt="One morning", seed=seed, temperature=1.0, top_p=0.9, max_tokens=24
            )
            return answer.choices[0].text

        alone = ask(7)
        crowd = list(pool.map(ask, [7, 1, 2, 7, 3, 4]))
    assert crowd[0] == crowd[3] == alone
    assert len(set(crowd)) > 2


def test_logprobs_of_a_chat_and_of_its_stream(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3, **more
        )

    (choice,) = ask().choices
    content = choice.logprobs.content
    assert "".join(token.token for token in content) == choice.message.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
    for token in content:
        assert token.token == token.top_logprobs[0].token, "greedy takes the likeliest"
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )
    streamed = [each for chunk in ask(stream=True) for each in chunk.choices]
    tokens = [token for each in streamed if each.logprobs for token in each.logprobs.content]
    assert [token.token for token in tokens] == [token.token for token in content]


def test_an_echo_scores_the_prompt_as_it_scores_an_answer(client: openai.OpenAI) -> None:
    """What was generated, sent back as a prompt, has the logprobs that it had: within what packing rows moves."""
    prompt = "The harbour"
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=10, logprobs=2).choices[0]
    again = client.completions.create(
        model=MODEL, prompt=prompt + answer.text, max_tokens=0, echo=True, logprobs=2
    ).choices[0]
    assert answer.logprobs is not None
    assert again.logprobs is not None
    assert again.text == prompt + answer.text
    count = len(answer.logprobs.tokens or [])
    assert (again.logprobs.tokens or [])[-count:] == answer.logprobs.tokens
    assert (again.logprobs.token_logprobs or [])[-count:] == pytest.approx(
        answer.logprobs.token_logprobs, abs=LOGPROB_TOLERANCE
    )
    assert (again.logprobs.token_logprobs or [])[0] is None
    offsets = again.logprobs.text_offset or []
    assert offsets[-count:] == [len(prompt) + offset for offset in answer.logprobs.text_offset or []]


def test_several_choices(client: openai.OpenAI) -> None:
    def ask(n: int, seed: int) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=1.5, max_tokens=16, n=n, seed=seed
        )

    answer = ask(3, 7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    single = ask(1, 7)
    assert answer.usage is not None
    assert single.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, max_tokens=4, stream=True)
    ends = [each.index for chunk in stream for each in chunk.choices if each.finish_reason]
    assert sorted(ends) == [0, 1]


def test_penalties_and_banned_words_change_a_greedy_answer(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="The harbour", temperature=0, max_tokens=24, logprobs=0, **fields
        )
        return answer.choices[0].text

    plain = ask()
    word = plain.split()[0]
    assert word not in ask(extra_body={"bad_words": [word]}).split()
    assert ask(extra_body={"repetition_penalty": 1.8}) != plain
    assert ask(frequency_penalty=2.0, presence_penalty=2.0) != plain
    long = client.completions.create(
        model=MODEL,
        prompt="The harbour",
        temperature=0,
        max_tokens=24,
        stop=[plain[3:5]],
        extra_body={"min_tokens": 12},
    )
    assert long.usage is not None
    assert long.usage.completion_tokens >= 12


def test_top_k_through_extra_body(client: openai.OpenAI) -> None:
    greedy = client.completions.create(model=MODEL, prompt="The", temperature=0, max_tokens=12)
    single = client.completions.create(
        model=MODEL, prompt="The", temperature=1.5, max_tokens=12, extra_body={"top_k": 1}
    )
    assert single.choices[0].text == greedy.choices[0].text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"extra_body": {"bad_words": [""]}}, "bad_words"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"flavour": 1}}, "flavour"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "tokens"),
    ],
    ids=str,
)
def test_bad_requests_name_the_field(client: openai.OpenAI, changes: dict[str, object], sentence: str) -> None:
    request: dict[str, object] = {"model": MODEL, "messages": MESSAGES} | changes
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.chat.completions.create(**request)  # type: ignore[call-overload]


def test_eight_requests_share_steps(demo: Server, client: openai.OpenAI) -> None:
    """Batching is continuous: far fewer forward passes than tokens, and nobody waits for a batch to end."""

    def counters() -> dict[str, float]:
        with demo.client() as http:
            lines = http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def ask(index: int) -> int:
        answer = client.completions.create(
            model=MODEL, prompt=f"Day {index}:", max_tokens=48, temperature=1, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    before = counters()
    with ThreadPoolExecutor(8) as pool:
        tokens = sum(pool.map(ask, range(8)))
    after = counters()
    name = f'halfbyte_engine_forward_passes_total{{model="{MODEL}"}}'
    assert tokens == 8 * 48
    assert after[name] - before[name] < tokens / 3

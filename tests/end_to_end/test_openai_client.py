"""The official OpenAI client drives every endpoint it knows, streaming included."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.end_to_end.server import Server, serve

MODEL = "halfbyte-demo"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who lives in the village?"}]


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
    assert chunks[-1].usage == whole.usage
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
        ({"n": 3}, "n"),
        ({"extra_body": {"top_k": -1}}, "top_k"),
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

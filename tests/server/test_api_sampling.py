"""Logprobs, echo, several choices and stops on the wire, with an engine that repeats the prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from server.api.generation import Options, nth_choice, sampling
from server.api.respond import options
from server.api.wire import ChatRequest, CompletionRequest, Sampling, StreamOptions
from server.errors import RequestError
from server.records import ModelInfo, SamplingParams
from tests.server.conftest import RunningApp, ServeScript
from tests.server.test_api import chat, complete, events

DOCS = Path(__file__).parent.parent.parent / "docs" / "api.md"
A, B, C, D = 67, 68, 69, 70
"""Ids of a, b, c, d: the tokenizer has one token per byte."""
SUN = [165, 248, 101]
"""Ids of the three bytes of 日."""


def choice(response: Any) -> dict[str, Any]:
    (found,) = response.json()["choices"]
    return dict(found)


def streamed(response: Any) -> list[dict[str, Any]]:
    return [one for event in events(response) for one in event["choices"]]


def joined(choices: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The logprobs of a completion's stream as one object."""
    parts = [one["logprobs"] for one in choices if one["logprobs"] is not None]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def test_the_ids_of_these_tests(echo: RunningApp) -> None:
    assert echo.service.models["echo"].tokenizer.encode("abcd日") == [A, B, C, D, *SUN]


def test_logprobs_of_a_completion(echo: RunningApp) -> None:
    found = choice(complete(echo, prompt="ab", max_tokens=3, logprobs=2))
    assert found["text"] == "aba"
    assert found["logprobs"] == {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [-A / 8, -B / 8, -A / 8],
        "top_logprobs": [{"a": -A / 8, "b": -B / 8}, {"b": -B / 8, "c": -C / 8}, {"a": -A / 8, "b": -B / 8}],
        "text_offset": [0, 1, 2],
    }
    own = choice(complete(echo, prompt="ab", max_tokens=1, logprobs=0))
    assert own["logprobs"]["top_logprobs"] == [{"a": -A / 8}]


def test_logprobs_of_a_chat(echo: RunningApp) -> None:
    answer = choice(chat(echo, max_tokens=2, logprobs=True, top_logprobs=1))
    assert answer["message"]["content"] == "us"
    u, s = (echo.service.models["echo"].tokenizer.encode(letter)[0] for letter in "us")
    assert answer["logprobs"] == {
        "content": [
            {
                "token": letter,
                "bytes": [ord(letter)],
                "logprob": -token / 8,
                "top_logprobs": [{"token": letter, "bytes": [ord(letter)], "logprob": -token / 8}],
            }
            for letter, token in (("u", u), ("s", s))
        ],
        "refusal": None,
    }
    assert choice(chat(echo, max_tokens=1, logprobs=True))["logprobs"]["content"][0]["top_logprobs"] == []
    assert choice(chat(echo, max_tokens=1, logprobs=False))["logprobs"] is None


@pytest.mark.parametrize("stop", [None, "zz", ["dab", "x"]], ids=str)
def test_a_stream_has_the_logprobs_of_the_whole_answer(echo: RunningApp, stop: object) -> None:
    fields: dict[str, Any] = {"prompt": "abc日d", "max_tokens": 18, "logprobs": 1, "stop": stop}
    whole = choice(complete(echo, **fields))
    pieces = streamed(complete(echo, **fields, stream=True))
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert joined(pieces) == whole["logprobs"]
    for piece in pieces:
        if piece["logprobs"] is not None:
            assert len(piece["logprobs"]["tokens"]) >= 1
    contents = [
        part
        for piece in streamed(chat(echo, stream=True, logprobs=True))
        for part in (piece["logprobs"] or {"content": []})["content"]
    ]
    assert contents == choice(chat(echo, logprobs=True))["logprobs"]["content"]


def test_parts_of_a_character_are_written_as_bytes(echo: RunningApp) -> None:
    found = choice(complete(echo, prompt="日", max_tokens=3, logprobs=0))
    assert found["text"] == "日"
    assert found["logprobs"]["tokens"] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert found["logprobs"]["text_offset"] == [0, 0, 0]
    content = choice(chat(echo, messages=[{"role": "user", "content": "日"}], max_tokens=9, logprobs=True))["logprobs"][
        "content"
    ]
    assert bytes(byte for part in content for byte in part["bytes"]).decode() == "user: 日"


def test_tokens_behind_a_stop_string_are_left_out(echo: RunningApp) -> None:
    found = choice(complete(echo, prompt="abcd", max_tokens=10, stop="cd", logprobs=0))
    assert (found["text"], found["logprobs"]["tokens"]) == ("ab", ["a", "b"])
    kept = choice(complete(echo, prompt="abcd", max_tokens=10, stop="cd", logprobs=0, include_stop_str_in_output=True))
    assert (kept["text"], kept["logprobs"]["tokens"]) == ("abcd", ["a", "b", "c", "d"])
    assert found["finish_reason"] == kept["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_begins_with_the_prompt(echo: RunningApp, stream: bool) -> None:
    response = complete(echo, prompt="日b", max_tokens=2, echo=True, logprobs=1, stream=stream)
    choices = streamed(response) if stream else [choice(response)]
    assert "".join(one["text"] for one in choices) == "日b\ufffd"
    found = joined(choices)
    assert found["tokens"] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5", "b", "bytes:\\xe6", "bytes:\\x97"]
    assert found["token_logprobs"] == [None, *(-token / 8 for token in (*SUN[1:], B, *SUN[:2]))]
    assert found["top_logprobs"][0] is None
    assert found["text_offset"] == [0, 0, 0, 1, 2, 2]


def test_an_echo_has_special_tokens_where_the_prompt_has_them_written(echo: RunningApp) -> None:
    found = choice(complete(echo, prompt="a</s>bc", max_tokens=1, echo=True, logprobs=0))
    assert found["text"] == "a</s>bca"
    assert found["logprobs"]["text_offset"] == [0, 1, 5, 6, 7]
    found = choice(complete(echo, prompt=[A, 2, B, C], max_tokens=1, echo=True, logprobs=0))
    assert found["text"] == "abca"
    assert found["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]


def test_an_echo_of_the_prompt_alone(echo: RunningApp) -> None:
    for prompt in ("abc", [A, B, C]):
        answer = complete(echo, prompt=prompt, max_tokens=0, echo=True, logprobs=0).json()
        assert answer["choices"][0]["text"] == "abc"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -B / 8, -C / 8]
        assert answer["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}, "a scored prompt is computed"
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert choice(complete(echo, prompt="abc", max_tokens=2, echo=True))["text"] == "abcab"
    assert choice(complete(echo, prompt="abc", max_tokens=2, echo=True))["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_of_several_prompts(echo: RunningApp, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", "c"], "n": 3, "max_tokens": 4, "stream": stream, "best_of": 3}
    fields |= {"stream_options": {"include_usage": True}} if stream else {}
    response = complete(echo, **fields)
    answers = events(response) if stream else [response.json()]
    texts = dict.fromkeys(range(6), "")
    for one in (one for answer in answers for one in answer["choices"]):
        texts[one["index"]] += one["text"]
    assert list(texts.values()) == ["abab"] * 3 + ["cccc"] * 3
    usage = answers[-1]["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] <= 3
    assert usage == {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
    answer = chat(echo, n=2).json()
    assert [one["index"] for one in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["message"] == answer["choices"][1]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_the_scores_of_its_prompt(echo: RunningApp, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["ab", "c"], "n": 3, "echo": True, "logprobs": 1, "max_tokens": 1}
    response = complete(echo, **fields, stream=stream)
    choices = streamed(response) if stream else response.json()["choices"]
    for index in range(6):
        found = joined([one for one in choices if one["index"] == index])
        assert found["token_logprobs"] == ([None, -B / 8, -A / 8] if index < 3 else [None, -C / 8])


@pytest.mark.parametrize("fields", [{"stop": "b"}, {"stop_token_ids": [B]}], ids=str)
def test_what_ends_a_text_can_be_part_of_it(echo: RunningApp, fields: dict[str, Any]) -> None:
    found = choice(complete(echo, prompt="abc", **fields))
    assert (found["text"], found["finish_reason"]) == ("a", "stop")
    kept = choice(complete(echo, prompt="abc", include_stop_str_in_output=True, **fields))
    assert (kept["text"], kept["finish_reason"]) == ("ab", "stop")


def test_stop_ids_are_kept_where_the_model_s_own_are_ignored(echo: RunningApp) -> None:
    found = choice(complete(echo, prompt=[A, 2, B, C], ignore_eos=True, stop_token_ids=[C], max_tokens=9))
    assert (found["text"], found["finish_reason"]) == ("ab", "stop")


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "abcda"), (6, "abcda"), (7, "abcdabcda")])
def test_a_stop_string_that_is_complete_before_min_tokens_is_text(echo: RunningApp, min_tokens: int, text: str) -> None:
    found = choice(complete(echo, prompt="abcd", stop="b", min_tokens=min_tokens, max_tokens=20))
    assert (found["text"], found["finish_reason"]) == (text, "stop")


INFO = ModelInfo(100, 320, (2,), "x", "float32", "cpu", {})


def test_what_the_engine_is_told() -> None:
    body = CompletionRequest.model_validate(
        {
            "model": "m", "prompt": "a", "max_tokens": 9, "min_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
            "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5,
            "frequency_penalty": -0.5, "logit_bias": {"5": -100, "7": 1.5}, "allowed_token_ids": [5, 6], "seed": 11,
            "stop_token_ids": [4], "logprobs": 3, "echo": True,
        }
    )  # fmt: skip
    told = sampling([1, 2], Options(body.max_tokens, body.params(), echo=True), ((8, 9),), INFO)
    assert told == SamplingParams(
        max_tokens=9, min_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, typical_p=0.8,
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias=((5, -100.0), (7, 1.5)),
        allowed_token_ids=(5, 6), bad_words=((8, 9),), seed=11, stop_token_ids=(4, 2), logprobs=3, prompt_logprobs=3,
    )  # fmt: skip
    assert [nth_choice(told, which).seed for which in range(3)] == [11, 12, 13]
    assert [nth_choice(told, which).prompt_logprobs for which in range(3)] == [3, None, None]
    assert nth_choice(SamplingParams(max_tokens=1), 2).seed is None
    plain = CompletionRequest.model_validate({"model": "m", "prompt": "a"})
    assert sampling([1], Options(16, plain.params()), (), INFO) == SamplingParams(max_tokens=16, stop_token_ids=(2,))


def asked(body: Sampling) -> object:
    """What a request is told apart by, behind the wire."""
    return (
        options(body, body.max_tokens, tenant=""), body.choices, bool(body.stream), body.usage_at_the_end,
        body.usage_in_every_chunk,
    )  # fmt: skip


REQUESTS: dict[type[Sampling], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "a"},
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind, body in REQUESTS.items() for field in kind.model_fields if field not in body],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_null_means_what_absence_means(kind: type[Sampling], field: str) -> None:
    assert asked(kind.model_validate(REQUESTS[kind] | {field: None})) == asked(kind.model_validate(REQUESTS[kind]))


def test_null_means_what_absence_means_in_stream_options() -> None:
    body = REQUESTS[ChatRequest] | {"stream": True}
    nothing = dict.fromkeys(StreamOptions.model_fields)
    assert asked(ChatRequest.model_validate(body | {"stream_options": nothing})) == asked(
        ChatRequest.model_validate(body)
    )


@pytest.mark.parametrize(("top_k", "told"), [(-1, 0), (0, 0), (None, 0), (1, 1), (2**20, 2**20)])
def test_top_k_is_off_as_openai_and_vllm_clients_write_it(top_k: int | None, told: int) -> None:
    body = CompletionRequest.model_validate(REQUESTS[CompletionRequest] | {"top_k": top_k})
    assert body.params().top_k == told


def test_a_prompt_that_is_only_scored_needs_room_for_one_token() -> None:
    options = Options(0, SamplingParams(max_tokens=1), echo=True)
    assert sampling([1] * 99, options, (), INFO).max_tokens == 1
    with pytest.raises(RequestError, match="leaves room"):
        sampling([1] * 100, options, (), INFO)


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_every_field_that_is_honoured_is_documented(model: type[Sampling]) -> None:
    documented = set(re.findall(r"^\| `(\w+)`", DOCS.read_text(), re.MULTILINE)) | {"max_completion_tokens"}
    honoured = {name for name, field in model.model_fields.items() if field.json_schema_extra is None}
    assert honoured - documented == set()


def test_an_encoder_decoders_prompt_and_answer_have_a_context_each(serve_scripts: ServeScript) -> None:
    with serve_scripts({"t5": {"max_model_len": 32, "decoder_prompt_tokens": 1}}) as running:
        found = complete(running, model="t5", prompt="a" * 32, max_tokens=31).json()
        assert found["usage"]["total_tokens"] == 63
        for body, param, words in (
            ({"prompt": "a" * 33}, "prompt", "33 tokens, and the model's context holds 32; accepted is a prompt of at"),
            ({"prompt": "a", "max_tokens": 32}, "max_tokens", "may have 31, whatever its prompt is"),
            ({"prompt": "a", "echo": True}, "echo", "do not continue their prompt"),
            ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "do not continue their prompt"),
        ):
            refused = complete(running, **({"model": "t5", "max_tokens": 4} | body))
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
            assert words in refused.json()["error"]["message"]

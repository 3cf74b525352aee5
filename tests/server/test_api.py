"""The HTTP surface over a real socket, with an engine that repeats the prompt: answers, streams, refusals, overload."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.api.admission import Admission
from server.engine.client import Cut
from server.errors import OverloadedError
from server.text.tokenizer import Tokenizer
from tests.server.conftest import RunningApp, ServeScript, wait_for


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def complete(running: RunningApp, key: str | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 6, "temperature": 0} | fields
    with running.client(headers=bearer(key)) as client:
        return client.post("/v1/completions", json=body)


def chat(running: RunningApp, key: str | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8} | fields
    with running.client(headers=bearer(key)) as client:
        return client.post("/v1/chat/completions", json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a complete stream, whose end was marked."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion(echo: RunningApp) -> None:
    answer = complete(echo).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "abcabc", "logprobs": None, "finish_reason": "length"}]
    cached = answer["usage"].pop("prompt_tokens_details")
    assert cached.keys() == {"cached_tokens"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_counted_by_tenant(echo: RunningApp, stream: bool) -> None:
    def cached(**fields: Any) -> int:
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        response = complete(echo, prompt=["once upon", f"a time {stream}"], **options, **fields)
        usage = (events(response)[-1] if stream else response.json())["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    salt = {"cache_salt": f"tenant {stream}"}
    cached()
    assert cached() == len("once upon") - 1 + len(f"a time {stream}") - 1
    assert cached(**salt) == 0
    assert cached(**salt) == cached()


SALTS = [
    (("secret-key-1", "secret-key-2"), ["salt 0", "salt 0:x", "salt 1", "salt 1:x"]),
    (("secret-key-1",), ["salt ", "salt x"]),
]


@pytest.mark.parametrize(("keys", "salts"), SALTS)
def test_each_of_several_keys_has_a_cache_of_its_own(
    serve_scripts: ServeScript, keys: tuple[str, ...], salts: list[str]
) -> None:
    with serve_scripts({"echo": {"refuse": "salt {0.cache_salt}"}}, api_keys=keys) as running:
        for ask in (complete, chat):
            answers = [ask(running, key, **fields) for key in keys for fields in ({}, {"cache_salt": "x"})]
            assert [answer.json()["error"]["message"] for answer in answers] == salts


def test_what_is_cached_for_one_key_is_not_there_for_another(guarded: RunningApp) -> None:
    def cached(key: str) -> int:
        answer = complete(guarded, key, prompt="what one tenant has sent")
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEY) == cached("secret-key-2") == 0
    assert cached(KEY) == cached("secret-key-2") > 0


def test_a_salt_that_is_no_text_is_refused(echo: RunningApp) -> None:
    body = b'{"model": "echo", "prompt": "abc", "cache_salt": "\\ud800"}'
    with echo.client() as client:
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


@pytest.mark.parametrize(("fields", "seen"), [({"priority": -3, "cache_salt": "x"}, "-3 'x'"), ({}, "0 ''")])
def test_priority_and_salt_reach_the_engine(serve_scripts: ServeScript, fields: dict[str, Any], seen: str) -> None:
    with serve_scripts({"echo": {"refuse": "{0.priority} {0.cache_salt!r}"}}) as running:
        for answer in (complete(running, **fields), chat(running, **fields)):
            assert answer.json()["error"]["message"] == seen


def test_a_request_ends_at_its_deadline_or_at_the_server_s(serve_scripts: ServeScript) -> None:
    script = {"step_seconds": 0.01, "max_model_len": 10**6}
    with serve_scripts({"echo": script}, request_timeout_seconds=0.3) as running:
        for fields in ({"timeout": 0.1}, {}, {"timeout": 0.2, "prompt": ["a", "b"]}):
            started = time.monotonic()
            response = complete(running, max_tokens=10**5, **fields)
            assert time.monotonic() - started >= fields.get("timeout", 0.3)
            assert response.status_code == 504
            assert response.json()["error"] == {
                "message": "the time was up",
                "type": "timeout_error",
                "param": None,
                "code": "deadline_exceeded",
            }
        assert complete(running, max_tokens=50, timeout=60).status_code == 200, "a request may ask for more"
        streamed = complete(running, max_tokens=10**5, stream=True)
        assert streamed.status_code == 200
        last = [line for line in streamed.text.split("\n\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert running.metric("requests_total", model="echo", finish_reason="timeout") >= 4


def test_a_completion_generates_sixteen_tokens_unless_told_otherwise(echo: RunningApp) -> None:
    assert complete(echo, max_tokens=None).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(("length", "generated"), [(239, 16), (240, 16), (241, 15), (255, 1)])
def test_nobody_is_refused_for_a_number_of_tokens_not_asked_for(echo: RunningApp, length: int, generated: int) -> None:
    answer = complete(echo, prompt="x" * length, max_tokens=None).json()
    assert answer["usage"]["completion_tokens"] == generated
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("日本", ["日本"]),
        (["ab", "xyz"], ["ababab", "xyzxyz"]),
        ([67, 68], ["ababab"]),
        ([[67], [69, 70]], ["aaaaaa", "cdcdcd"]),
        (["ab", [69]], ["ababab", "cccccc"]),
    ],
)
def test_every_shape_of_prompt(echo: RunningApp, prompt: object, texts: list[str]) -> None:
    ids = {"a": 67, "b": 68, "c": 69, "d": 70}
    assert echo.service.models["echo"].tokenizer.encode("abcd") == list(ids.values())
    answer = complete(echo, prompt=prompt).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_the_model_s_end_token_is_a_stop_and_not_in_the_text(echo: RunningApp) -> None:
    answer = complete(echo, prompt=[67, 68, 2, 69], max_tokens=50).json()
    assert answer["choices"][0] == {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 3
    ignored = complete(echo, prompt=[67, 68, 2, 69], max_tokens=8, ignore_eos=True).json()
    assert ignored["choices"][0]["text"] == "abcabc"
    assert ignored["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "tokens"), [("cd", "ab", 4), (["x", "da"], "abc", 5), ("dab", "abc", 6), ("zz", "abcdabcdab", 10)]
)
def test_stop_strings(echo: RunningApp, stop: object, text: str, tokens: int, stream: bool) -> None:
    response = complete(
        echo,
        prompt="abcd",
        stop=stop,
        max_tokens=10,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    answers = events(response) if stream else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == ("length" if tokens == 10 else "stop")
    assert answers[-1]["usage"]["completion_tokens"] == tokens


def test_a_stream_is_one_event_per_piece(echo: RunningApp) -> None:
    chunks = events(complete(echo, prompt="a日", max_tokens=8, stream=True))
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert texts == ["a", "日", "a", "日", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_of_several_prompts_marks_each_piece_with_its_choice(echo: RunningApp) -> None:
    texts = {0: "", 1: "", 2: ""}
    for chunk in events(complete(echo, prompt=["ab", "c", "xyz"], stream=True)):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ababab", 1: "cccccc", 2: "xyzxyz"}


def test_a_chat(echo: RunningApp) -> None:
    prompt = "user: hi\nassistant:"
    answer = chat(echo).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": prompt[:8], "refusal": None}
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert (
        chat(echo, messages=[{"role": "developer", "content": parts}], max_tokens=11).json()["choices"][0]["message"][
            "content"
        ]
        == "system: h\ni"
    )


def test_a_chat_without_a_limit_fills_the_context(echo: RunningApp) -> None:
    usage = chat(echo, max_tokens=None).json()["usage"]
    assert usage["total_tokens"] == 256


def test_a_chat_stream(echo: RunningApp) -> None:
    chunks = events(chat(echo, stream=True, max_completion_tokens=8, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]) == "user: hi"
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]][-1] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert not any(chunk.get("usage") for chunk in chunks[:-1])


def test_every_chunk_says_what_was_used_so_far_where_that_is_asked_for(echo: RunningApp) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(chat(echo, stream=True, max_completion_tokens=8, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-2:] == [8, 8]
    assert len(set(counts)) > 2


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_tokens": 10**30}, "max_tokens", "less than or equal"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"priority": 101}, "priority", "less than or equal to 100"),
    ({"priority": 1.0}, "priority", "integer"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"timeout": 86401}, "timeout", "less than or equal to 86400"),
    ({"timeout": "5s"}, "timeout", "number"),
    ({"cache_salt": ""}, "cache_salt", "at least 1"),
    ({"cache_salt": "x" * 257}, "cache_salt", "at most 256"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop[0]", "at least 1"),
    ({"stop": [5]}, "stop[0]", "string"),
    ({"stop": "x" * 257}, "stop[0]", "at most 256"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "", "'stream_options'"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "", "include_usage: true"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"n": True}, "n", "integer"),
    ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
    ({"min_p": "0.1"}, "min_p", "number"),
    ({"typical_p": 0}, "typical_p", "greater than 0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"repetition_penalty": 101}, "repetition_penalty", "less than or equal to 100"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "number"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "'five'"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "'05'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"320": 1}}, "logit_bias", "0 to 319"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", "dictionary"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "greater than or equal to 0"),
    ({"allowed_token_ids": [5, 320]}, "allowed_token_ids", "0 to 319"),
    ({"allowed_token_ids": [67], "bad_words": ["a"]}, "allowed_token_ids", "rule out"),
    ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids", "rule out"),
    ({"bad_words": "a"}, "bad_words", "list"),
    ({"bad_words": [""]}, "bad_words[0]", "at least 1"),
    ({"bad_words": ["a"] * 257}, "bad_words", "at most 256"),
    ({"stop_token_ids": [320]}, "stop_token_ids", "0 to 319"),
    ({"stop_token_ids": [5] * 65}, "stop_token_ids", "at most 64"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most 4 tokens are generated"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "boolean"),
    ({"flavour": 1}, "flavour", "accepted are model"),
    ({"model": 5}, "model", "string"),
    ({"model": ""}, "model", "at least 1"),
    ({"ignore_eos": 0}, "ignore_eos", "boolean"),
    ({"model": None}, "model", "string"),
]
REFUSED_COMPLETIONS = [
    ({"prompt": None}, "prompt", "accepted are a string"),
    ({"prompt": []}, "prompt", "accepted are a string"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": [1, "a"]}, "prompt", "prompt[0]"),
    ({"prompt": [-1]}, "prompt", "prompt[0]"),
    ({"prompt": [[]]}, "prompt", "prompt[0]"),
    ({"prompt": ["a"] * 33}, "prompt", "at most 32"),
    ({"prompt": [320]}, "prompt", "0 to 319"),
    ({"prompt": "x" * 256}, "prompt", "256 tokens, and the model's context holds 256"),
    ({"prompt": "x" * 100_000}, "prompt", "tokens, and the model's context holds 256"),
    ({"prompt": "x" * 200, "max_tokens": 57}, "max_tokens", "together 257"),
    ({"prompt": "x" * 250, "min_tokens": 7}, "min_tokens", "at most 6 tokens are generated"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"echo": 1}, "echo", "boolean"),
    ({"max_tokens": 0}, "", "only with echo: true"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"best_of": 4}, "", "'best_of' is 4 and 'n' is 1"),
    ({"best_of": 1, "n": 2}, "", "accepted is a best_of that equals n"),
    ({"suffix": "x"}, "suffix", "not supported"),
]
REFUSED_CHATS = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role", "'system'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text parts"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour", "accepted are role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"messages": [{"role": "user", "content": "x" * 400}]}, "prompt", "tokens, and the model's context holds 256"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 2}, "", "only with logprobs: true"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "", "'max_completion_tokens' is 6"),
]


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [("completions", *case) for case in REFUSED + REFUSED_COMPLETIONS]
    + [("chat/completions", *case) for case in REFUSED + REFUSED_CHATS],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_names_the_field(echo: RunningApp, path: str, fields: dict[str, Any], param: str, words: str) -> None:
    base: dict[str, Any] = {"model": "echo"}
    base |= {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    with echo.client() as client:
        response = client.post(f"/v1/{path}", json=base | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1200
    if param:
        assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"nonsense", "not valid JSON"),
        (b'{"model": "\xff"}', "JSON"),
        (b"[" * 200_000, "JSON"),
        (b'{"model": "echo", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "echo", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_a_body_that_is_no_json_object(echo: RunningApp, body: bytes, words: str) -> None:
    with echo.client() as client:
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_unknown_models_routes_and_methods(echo: RunningApp) -> None:
    response = complete(echo, model="gpt-9")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'echo'" in response.json()["error"]["message"]
    with echo.client() as client:
        assert client.get("/v1/models/gpt-9").status_code == 404
        assert "'/nope'" in client.get("/nope").json()["error"]["message"]
        assert client.get("/v1/completions").status_code == 405
        assert client.get("/docs").status_code == 404


def test_models_memory_and_openapi(echo: RunningApp) -> None:
    with echo.client() as client:
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed == client.get("/v1/models/echo").json()
        memory = client.get("/memory").json()
        detailed = client.get("/memory", params={"detail": "layers"}).json()
        assert client.get("/memory", params={"detail": "tensors"}).status_code == 400
        schema = client.get("/openapi.json").json()
    assert detailed["models"][0].pop("layers") == [
        {"layer": "model.layers.0", "format": "nf4", "components": {"packed_weights": 4096}}
    ]
    assert detailed == memory
    assert memory["models"][0]["unaccounted"] == 880
    assert schema["components"]["schemas"]["ModelMemory"]["properties"]["peak"]["type"] == "object"
    assert listed["id"] == "echo"
    assert listed["max_model_len"] == 256
    assert listed["quantization"] == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert listed["prefix_caching"] is True
    assert listed["batching"] == "packed"
    assert listed["encoder_decoder"] is False
    assert memory["models"][0]["planned"] == {"packed_weights": 4096, "kv_cache": 1024}
    assert memory["devices"] == [{"device": "cpu", "models": 1, "planned": 5120, "measured": 5120, "unaccounted": 880}]
    assert "/v1/chat/completions" in schema["paths"]
    assert schema["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False


def test_metrics_count_what_happened(echo: RunningApp) -> None:
    before = echo.metric("prompt_tokens_total", model="echo")
    complete(echo, prompt="abcd", max_tokens=7)
    with echo.client() as client:
        text = client.get("/metrics").text
    assert echo.metric("prompt_tokens_total", model="echo") == before + 4
    assert 'halfbyte_memory_bytes{component="packed_weights",device="cpu",model="echo"} 4096.0' in text
    assert 'halfbyte_memory_unaccounted_bytes{device="cpu"} 880.0' in text
    assert 'architecture="ScriptedForCausalLM",bnb_4bit_activations="",' in text
    assert 'quantization="nf4",quantize_embeddings=""} 1.0' in text
    assert 'route="/v1/completions",status="200"' in text
    assert "/nope" not in text
    assert "_created" not in text


def test_a_client_that_leaves_aborts_its_request(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"step_seconds": 0.01, "max_model_len": 100_000}}) as running:
        for stream in (True, False):
            body = {"model": "echo", "prompt": "abc", "max_tokens": 90_000, "stream": stream}
            payload = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    + f"Content-Length: {len(payload)}\r\n\r\n".encode()
                    + payload
                )
                wait_for(lambda: running.service.open_requests == 1)
                if stream:
                    assert b"200 OK" in connection.recv(4096)
                time.sleep(0.05)
            wait_for(lambda: running.service.open_requests == 0)
        wait_for(lambda: running.metric("requests_running", model="echo") == 0)
        assert running.metric("requests_total", model="echo", finish_reason="abort") == 2


def test_an_engine_killed_in_the_middle_of_a_stream(serve_scripts: ServeScript) -> None:
    scripts: dict[str, dict[str, Any]] = {"dies": {"die_after_steps": 5}, "lives": {}}
    with serve_scripts(scripts, restart_limit=0) as running, running.client() as client:
        body = {"model": "dies", "prompt": "abc", "max_tokens": 100, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = [line for line in response.iter_lines() if line]
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["message"] == "the engine of model 'dies' was killed by signal 9 (SIGKILL)"
        assert error["code"] == "engine_unavailable"
        assert complete(running, model="dies").status_code == 503
        assert complete(running, model="lives").json()["choices"][0]["text"] == "abcabc"
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["status"] == "degraded"
        assert ready.json()["models"]["dies"]["state"] == "dead"
        assert client.get("/startupz").status_code == 200


def test_when_every_engine_is_dead_a_restart_is_asked_for(serve_scripts: ServeScript) -> None:
    with serve_scripts({"dies": {"die_after_steps": 1}}, restart_limit=0) as running, running.client() as client:
        response = client.post("/v1/completions", json={"model": "dies", "prompt": "a", "max_tokens": 2})
        assert response.status_code == 503
        wait_for(lambda: client.get("/livez").status_code == 503)


def test_while_an_engine_is_started_again_requests_are_told_when_to_come_back(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"die_after_steps": 5}}, restart_pause_seconds=2) as running:
        with running.client() as client:
            assert complete(running, max_tokens=100).status_code == 503
            refused = complete(running)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"].endswith("(SIGKILL), and is being started again")
            assert 1 <= int(refused.headers["Retry-After"]) <= 10
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["models"]["echo"] | {"stalled_seconds": 0.0} == {
                "state": "restarting",
                "phase": "start",
                "bytes_loaded": 0,
                "bytes_total": 0,
                "restarts": 0,
                "stalled_seconds": 0.0,
            }
            assert client.get("/livez").status_code == 200
            assert client.get("/v1/models").json()["data"][0]["state"] == "restarting"
            wait_for(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/readyz").json()["models"]["echo"]["restarts"] == 1
        assert complete(running, max_tokens=2).status_code == 200
        assert running.metric("engine_restarts_total", model="echo", reason="signal") == 1
        assert running.metric("requests_rejected_total", model="echo", reason="unavailable") == 1


def test_an_engine_that_starts_again_is_spoken_to_with_the_tokenizer_that_is_there_by_then(
    serve_scripts: ServeScript, model_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(model_path, tmp_path / "model")
    with serve_scripts({"echo": {"die_after_steps": 5}}, path=path, restart_pause_seconds=0.1) as running:
        model = running.service.models["echo"]
        assert model.tokenizer.encode("a") == [67]
        moved = json.loads((path / "tokenizer.json").read_text())
        vocabulary = moved["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (path / "tokenizer.json").write_text(json.dumps(moved))
        complete(running, prompt="abc", max_tokens=20)
        wait_for(lambda: model.engine.restarts == 1 and model.state == "ready")
        assert model.tokenizer.encode("a") == [68]


@pytest.mark.parametrize("restart", [False, True])
def test_the_probes_say_that_a_step_is_stuck(serve_scripts: ServeScript, restart: bool) -> None:
    scripts: dict[str, dict[str, Any]] = {"echo": {"hang_after_steps": 1}}
    settings = {"stuck_seconds": 0.5, "restart_stuck": restart, "restart_pause_seconds": 60}
    with serve_scripts(scripts, **settings) as running, running.client() as client:
        body = {"model": "echo", "prompt": "a", "max_tokens": 5, "timeout": 30}
        thread = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": body})
        thread.start()
        wait_for(lambda: running.service.models["echo"].state != "ready")
        with running.client() as other:
            if restart:
                wait_for(lambda: other.get("/readyz").json()["models"]["echo"]["state"] == "restarting")
                assert other.get("/livez").status_code == 200
            else:
                probe = other.get("/readyz")
                assert probe.status_code == 503
                assert probe.json()["models"]["echo"]["state"] == "stuck"
                assert probe.json()["models"]["echo"]["stalled_seconds"] > 0.5
                assert other.get("/livez").status_code == 503, "only a restart of the server would help"
                assert 'halfbyte_engine_state{model="echo",state="stuck"} 1.0' in other.get("/metrics").text
                running.service.models["echo"].client.kill()
        thread.join()


def test_probes_while_loading(serve_scripts: ServeScript) -> None:
    with serve_scripts({"slow": {"load_seconds": 3.0}}, wait=False) as running, running.client() as client:
        assert client.get("/livez").status_code == 200
        wait_for(lambda: running.service.models["slow"].client.progress.bytes_total)
        for path in ("/startupz", "/readyz", "/health"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.json()["status"] == "starting"
            assert answer.json()["models"]["slow"]["phase"] == "weights"
            assert answer.json()["models"]["slow"]["bytes_total"] == 1000
        refused = complete(running, model="slow")
        assert refused.status_code == 503
        assert "still loading" in refused.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["state"] == "loading"
        wait_for(lambda: running.service.started)
        for path in ("/startupz", "/readyz", "/health"):
            assert client.get(path).status_code == 200


def test_a_full_queue_is_429_with_a_computed_retry_after(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {"step_seconds": 0.01}}, max_sequences=2, max_queued_requests=1) as running:
        threads = [
            threading.Thread(target=complete, args=(running,), kwargs={"prompt": "ab", "max_tokens": 300})
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: running.service.open_requests == 3)
        refused = complete(running)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert "at most 3" in refused.json()["error"]["message"]
        assert int(refused.headers["Retry-After"]) >= 1
        assert complete(running, prompt=["a", "b"], stream=True).status_code == 429
        never = complete(running, prompt=["a", "b"], n=2)
        assert never.status_code == 400
        assert "asks for 4 texts; model 'echo' accepts at most 3" in never.json()["error"]["message"]
        assert running.metric("requests_rejected_total", model="echo", reason="overloaded") == 2
        for thread in threads:
            thread.join()
        assert complete(running).status_code == 200


@pytest.mark.parametrize("idle_seconds", [0, 86400])
def test_retry_after_follows_how_long_places_are_held(idle_seconds: int) -> None:
    """Ten requests at a time, of 30 seconds each: one place every three seconds, however long nobody asked before."""
    now = 0.0
    admission = Admission("m", 10, clock=lambda: now)
    for _ in range(3):
        with ExitStack() as held:
            for _ in range(10):
                held.enter_context(admission.enter())
            now += 30
    now += idle_seconds
    with admission.enter(10):
        with pytest.raises(OverloadedError) as one:
            admission.enter(1).__enter__()
        with pytest.raises(OverloadedError) as four:
            admission.enter(4).__enter__()
    assert one.value.retry_after == 3
    assert four.value.retry_after == 12
    assert "accepts at most 10; try again in 12 s" in str(four.value)
    assert admission.open == 0


def test_retry_after_is_a_second_before_anything_has_ended_and_never_more_than_ten_minutes() -> None:
    now = 0.0
    admission = Admission("m", 1, clock=lambda: now)
    with admission.enter(), pytest.raises(OverloadedError) as first:
        admission.enter().__enter__()
    with admission.enter():
        now += 1e6
    with admission.enter(), pytest.raises(OverloadedError) as later:
        admission.enter().__enter__()
    assert (first.value.retry_after, later.value.retry_after) == (1, 600)


KEY = "secret-key-1"


@pytest.fixture(scope="module")
def guarded(serve_scripts: ServeScript) -> Iterator[RunningApp]:
    with serve_scripts({"echo": {}}, api_keys=(KEY, "secret-key-2"), max_body_bytes=2000) as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/echo", "/metrics", "/memory", "/openapi.json", "/nope"])
def test_everything_but_the_probes_asks_for_a_key(guarded: RunningApp, path: str) -> None:
    with guarded.client() as client:
        for header in (None, "Bearer wrong-key-1", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x", "Bearer \xe9"):
            headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
            response = client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get(path, headers={"Authorization": f"bearer {KEY}"}).status_code in (200, 404)
        assert client.get(path, headers={"Authorization": "Bearer secret-key-2"}).status_code in (200, 404)
    with guarded.client() as client:
        for probe in ("/livez", "/startupz", "/readyz", "/health"):
            assert client.get(probe).status_code == 200


ADMIN_KEY = "secret-admin-key"


@pytest.mark.parametrize("path", ["/admin", "/admin/", "/%61dmin/x", "/admin/%2e%2e/v1/models", "/admin//x"])
def test_without_an_admin_key_there_is_no_admin(guarded: RunningApp, echo: RunningApp, path: str) -> None:
    for running, key in ((guarded, KEY), (guarded, None), (echo, None), (echo, ADMIN_KEY)):
        with running.client(headers=bearer(key)) as client:
            url = client.build_request("GET", "/").url.copy_with(raw_path=path.encode())
            for method in ("GET", "POST", "DELETE"):
                answer = client.request(method, url)
                assert answer.status_code == 404
                assert "is no '/admin" in answer.json()["error"]["message"]


def test_admin_and_the_rest_have_keys_of_their_own(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {}}, api_keys=(KEY,), admin_key=SecretStr(ADMIN_KEY)) as running:
        for path, opens in (("/admin/nothing", ADMIN_KEY), ("/adminx", KEY), ("/v1/models", KEY), ("/ADMIN/x", KEY)):
            for key in (None, KEY, ADMIN_KEY, ADMIN_KEY + "x"):
                with running.client(headers=bearer(key)) as client:
                    answer = client.get(path)
                assert (answer.status_code != 401) == (key == opens), (path, key)
    with serve_scripts({"echo": {}}, admin_key=SecretStr(ADMIN_KEY)) as running, running.client() as client:
        assert client.get("/v1/models").status_code == 200, "an admin key alone asks nobody else for one"
        assert client.get("/admin/nothing").status_code == 401


def test_a_body_over_the_limit_is_refused_unread(guarded: RunningApp) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with guarded.client() as client:
        fits = json.dumps({"model": "echo", "prompt": "a", "max_tokens": 1}).encode()
        padded = fits + b" " * (2000 - len(fits))
        assert client.post("/v1/completions", content=padded, headers=headers).status_code == 200
        announced = client.post("/v1/completions", content=padded + b" ", headers=headers)
        assert announced.status_code == 413
        assert "at most 2000 bytes" in announced.json()["error"]["message"]
        streamed = client.post("/v1/completions", content=iter([padded, b" "]), headers=headers)
        assert streamed.status_code == 413


def test_a_body_that_does_not_arrive_is_408(monkeypatch: pytest.MonkeyPatch, serve_scripts: ServeScript) -> None:
    monkeypatch.setattr("server.api.middleware.BODY_SECONDS", 0.2)
    from server.api.middleware import BodyLimit

    async def test() -> None:
        sent: list[Any] = []

        async def never() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            pytest.fail("the app was called")

        scope = {"type": "http", "method": "POST", "headers": [], "path": "/"}
        await BodyLimit(app, 1000, seconds=0.1)(scope, never, send)
        assert sent[0]["status"] == 408

    asyncio.run(test())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:80"}, 200),
        ({"Host": "localhost:80", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "http://[::1"}, 403),
    ],
    ids=str,
)
def test_hosts_and_origins_on_loopback(echo: RunningApp, headers: dict[str, str], status: int) -> None:
    with echo.client() as client:
        response = client.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "forbidden_host"


def test_allowed_hosts_are_accepted_as_host_and_as_origin(serve_scripts: ServeScript) -> None:
    with serve_scripts({"echo": {}}, allowed_hosts=("llm.example",)) as running, running.client() as client:
        for headers in ({"Host": "llm.example"}, {"Origin": "https://llm.example"}):
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/models", headers={"Host": "other.example"}).status_code == 403


def test_a_model_that_cannot_be_loaded_is_reported(serve_scripts: ServeScript) -> None:
    with serve_scripts({"good": {}, "bad": {"fail": ["does_not_fit", "3 bytes too many"]}}, wait=False) as running:
        wait_for(lambda: running.failures)
        assert [str(error) for error in running.failures] == ["3 bytes too many"]
        assert running.failures[0].exit_code == 3


def test_a_model_without_a_chat_template_refuses_chats(echo: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo.service.models["echo"], "template", None)
    response = chat(echo)
    assert response.status_code == 400
    assert "has no chat template" in response.json()["error"]["message"]
    assert complete(echo).status_code == 200


def test_many_clients_at_once_each_get_their_own_text(echo: RunningApp) -> None:
    async def test() -> None:
        async with httpx.AsyncClient(base_url=echo.url, timeout=30) as client:

            async def ask(number: int) -> None:
                body = {"model": "echo", "prompt": f"<{number}>", "max_tokens": 2 * len(f"<{number}>")}
                answer = await client.post("/v1/completions", json=body)
                assert answer.json()["choices"][0]["text"] == f"<{number}>" * 2

            await asyncio.gather(*(ask(number) for number in range(100)))

    asyncio.run(test())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a\ud800b"}, "prompt"),
        ({"prompt": ["a", "\udfff"]}, "prompt[1]"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, "text"),
    ],
)
def test_half_a_character_is_refused(echo: RunningApp, body: dict[str, Any], field: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with echo.client() as client:
        content = json.dumps({"model": "echo", "max_tokens": 2, **body})
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]["message"]


@pytest.fixture
def slow_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes a second."""
    encode_all = Tokenizer.encode_all

    def slow(self: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
        time.sleep(1)
        return encode_all(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_all", slow)


def test_what_is_cut_before_the_engine_has_it_is_told_and_counted(serve_scripts: ServeScript, slow_text: None) -> None:
    with serve_scripts({"echo": {}}) as running, ThreadPoolExecutor() as pool:
        answer = pool.submit(complete, running, prompt="abc", max_tokens=2, n=2)
        wait_for(lambda: running.service.open_requests)
        cut: list[Cut] = []
        running.call(lambda: cut.append(running.service.end_requests("this server had enough")))
        assert answer.result().status_code == 503
        assert "this server had enough" in answer.result().text
        assert [part.requests for part in cut] == [2]


def test_an_unload_lets_finish_what_is_still_being_tokenized(serve_scripts: ServeScript, slow_text: None) -> None:
    with serve_scripts({"echo": {}}) as running, ThreadPoolExecutor() as pool:
        answer = pool.submit(complete, running, prompt=["abc", "def"], max_tokens=2)
        wait_for(lambda: running.service.open_requests)
        running.call(lambda: running.service.models["echo"].engine.retire("model 'echo' is being unloaded"))
        assert complete(running, prompt="abc").status_code == 503
        assert answer.result().status_code == 200, answer.result().text


def test_a_client_that_reads_nothing_loses_its_place(
    serve_scripts: ServeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.sse.SEND_SECONDS", 0.5)
    body = json.dumps({"model": "echo", "prompt": "ab", "max_tokens": 12000, "stream": True, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with serve_scripts({"echo": {"max_model_len": 20_000}}) as running, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", running.port))
        deaf.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_for(lambda: running.service.open_requests)
        wait_for(lambda: not running.service.open_requests)

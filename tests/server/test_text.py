"""server/text: incremental decoding equals decoding at once, stop strings equal cutting the full text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from server.api.choice import ChoiceText
from server.errors import LoadError, RequestError
from server.records import SamplingParams, SequenceOutput
from server.text.bad_words import bad_word_ids
from server.text.chat_template import ChatTemplate, load_chat_template
from server.text.decode import IncrementalDecoder
from server.text.stop import StopStrings, first_stop
from server.text.tokenizer import Tokenizer, token_bytes
from tests.tiny_models import byte_tokenizer

PIECES = ["▁", "▁the", "▁cat", "s", "at", "▁sat", ".", "é", "▁日", "本", "</s>"]


def byte_level() -> Tokenizer:
    return Tokenizer(byte_tokenizer().backend_tokenizer, {})


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama-2 has it: spaces as ▁, bytes as <0xNN>, the first space of the text dropped."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", *byte_pieces, *PIECES])}
    rust = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(rust, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def metaspace() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -1.0 - i) for i, piece in enumerate(PIECES[:-1]))]
    rust = RustTokenizer(models.Unigram(vocabulary, unk_id=0))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens(["</s>"])
    return Tokenizer(rust, {})


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": metaspace()}


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], before: Sequence[int] = ()) -> list[str]:
    """The pieces an incremental decoder gives for these tokens, arriving in groups that end at the cuts."""
    decoder = IncrementalDecoder(tokenizer, before)
    bounds = [0, *sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]
    found = [decoder.push(ids[start:end]) for start, end in itertools.pairwise(bounds)]
    return [*found, decoder.finish()]


@given(ids=st.lists(st.integers(0, 258), max_size=80), cuts=st.lists(st.integers(0, 80)))
@example(ids=[2 + 0xE4] * 40, cuts=[])
@settings(max_examples=300)
def test_byte_level_pieces_join_to_the_full_text_for_any_bytes(ids: list[int], cuts: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 200)))
@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@settings(max_examples=200)
def test_encoded_text_comes_back_in_pieces(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)
    if name == "byte-level":
        assert tokenizer.decode(ids) == text


@given(data=st.data(), cuts=st.lists(st.integers(0, 60)))
@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
@settings(max_examples=200)
def test_tokens_without_bytes_join_to_the_full_text(name: str, data: st.DataObject, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    first = tokenizer.vocab_size - len(PIECES)
    ids = data.draw(st.lists(st.integers(first, tokenizer.vocab_size - 1), max_size=60))
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)


def test_no_piece_ends_in_the_middle_of_a_character() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    found = pieces(tokenizer, tokenizer.encode("a日本🦙b"), list(range(20)))
    assert [piece for piece in found if piece] == ["a", "日", "本", "🦙", "b"]


def test_endless_invalid_bytes_are_given_out_and_keep_the_window_small() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    decoder = IncrementalDecoder(tokenizer)
    (lone,) = {i for i in range(3, 259) if tokenizer.decode([i]) == "\ufffd"} & {
        tokenizer.encode("é", add_special_tokens=False)[0]
    }
    text = "".join(decoder.push([lone]) for _ in range(500))
    assert len(text) > 480
    assert len(decoder._new) < 16
    assert text + decoder.finish() == tokenizer.decode([lone] * 500)


letters = st.text(alphabet="ab¶日", max_size=24)
stops = st.lists(st.text(alphabet="ab¶日", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=letters, stop=stops, cuts=st.lists(st.integers(0, 24)))
@settings(max_examples=500)
def test_stop_strings_cut_the_full_text_whatever_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    watcher = StopStrings(stop)
    bounds = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    given_out = ""
    for start, end in itertools.pairwise(bounds):
        given_out += watcher.push(text[start:end])
        assert not any(word in given_out for word in stop)
    given_out += watcher.finish()
    found = first_stop(text, stop)
    assert given_out == (text if found is None else text[: found[0]])
    assert watcher.stopped == (found is not None)


@given(text=letters, stop=stops)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stop: list[str]) -> None:
    watcher = StopStrings(stop)
    given_out = watcher.push(text)
    if not watcher.stopped:
        held = text[len(given_out) :]
        assert held == "" or any(word.startswith(held) and word != held for word in stop)


@pytest.mark.parametrize(
    ("stop", "text", "cut"),
    [
        (["abc", "b"], "abc", (1, 2)),
        (["bc", "abc"], "abc", (0, 3)),
        (["x"], "abc", None),
        (["a", "c"], "abc", (0, 1)),
    ],
)
def test_the_stop_string_that_is_complete_first_wins_then_the_longest(
    stop: list[str], text: str, cut: tuple[int, int] | None
) -> None:
    assert first_stop(text, stop) == cut


@given(text=letters, stop=stops, cuts=st.lists(st.integers(0, 24)))
def test_a_stop_string_that_is_kept_is_the_end_of_the_text(text: str, stop: list[str], cuts: list[int]) -> None:
    watcher = StopStrings(stop, keep=True)
    bounds = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    given_out = "".join(watcher.push(text[start:end]) for start, end in itertools.pairwise(bounds)) + watcher.finish()
    found = first_stop(text, stop)
    assert given_out == (text if found is None else text[: found[1]])


@given(text=letters, stop=stops, early=st.integers(0, 24), cuts=st.lists(st.integers(0, 24)))
@example(text="ac", stop=["a", "ab"], early=1, cuts=[])
def test_a_stop_string_that_came_too_early_is_text(text: str, stop: list[str], early: int, cuts: list[int]) -> None:
    early %= len(text) + 1
    bounds = [0, *sorted({early, *(cut % (len(text) + 1) for cut in cuts)}), len(text)]
    watcher = StopStrings(stop)
    given_out = "".join(
        watcher.push(text[start:end], may_stop=end > early) for start, end in itertools.pairwise(bounds)
    )
    given_out += watcher.finish()
    ends = [
        (end, end - len(word))
        for word in stop
        for end in range(max(early + 1, len(word)), len(text) + 1)
        if text[end - len(word) : end] == word
    ]
    assert given_out == (text[: min(ends)[1]] if ends else text)
    assert watcher.stopped == bool(ends)


def test_a_token_s_own_text_is_that_in_the_middle_of_a_text() -> None:
    for name in ("sentencepiece", "metaspace"):
        tokenizer = TOKENIZERS[name]
        ids = {piece: tokenizer._tokenizer.token_to_id(f"▁{piece}") for piece in ("the", "cat", "sat")}
        spelled = {piece: tokenizer.spell(token) for piece, token in ids.items()}
        assert {piece: one.text for piece, one in spelled.items()} == {piece: f" {piece}" for piece in spelled}
        assert all(one.data == one.text.encode() for one in spelled.values())
    eos = TOKENIZERS["byte-level"].spell(2)
    assert (eos.text, eos.data) == ("</s>", b"</s>")


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", ["é", "語", "\ufffd", "a b"])
def test_the_bytes_of_a_text_s_tokens_are_its_bytes(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    spelled = [tokenizer.spell(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    data = b"".join(one.data for one in spelled)
    assert data.removeprefix(b" ") == text.encode()
    for one in spelled:
        written = "".join(f"\\x{byte:02x}" for byte in one.data)
        assert one.text.encode() == one.data or one.text == f"bytes:{written}"


def test_every_byte_has_its_character() -> None:
    names = [chr(code) for code in range(0x21, 0x200) if token_bytes(chr(code)) != chr(code).encode() or code < 0x7F]
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(names)
    assert sorted(token_bytes(name)[0] for name in names) == list(range(256))
    assert token_bytes("<0xE6>") == b"\xe6"
    assert token_bytes("▁日") == "▁日".encode()


def test_bad_words_are_encoded_as_they_are_and_behind_a_space() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    word, spaced = (tuple(tokenizer.encode(text)) for text in ("cat", " cat"))
    assert bad_word_ids(tokenizer, ["cat"]) == (word, spaced)
    assert bad_word_ids(tokenizer, [" cat", "cat", "\ncat"]) == (spaced, word, tuple(tokenizer.encode("\ncat")))
    assert bad_word_ids(tokenizer, []) == ()


def merging(*merges: tuple[str, str]) -> Tokenizer:
    """A tokenizer as Llama-2 has it, with merges that may join anything: it begins every text with a space."""
    alphabet = ["<unk>", "\n", "▁", "(", "f", "o", "x"]
    vocabulary = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)]))
    numbered = {piece: index for index, piece in enumerate(vocabulary)}
    rust = RustTokenizer(models.BPE(numbered, list(merges), unk_token="<unk>", fuse_unk=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(rust, {})


FOO = (("o", "o"), ("f", "oo"), ("▁", "foo"), ("▁", "▁"), ("▁", "("))
MERGING = {
    "plain": merging(*FOO),
    "newlines merge": merging(*FOO, ("\n", "foo")),
    "brackets merge": merging(*FOO[:2], ("(", "foo"), *FOO[2:]),
    "parts merge": merging(("o", "o"), ("\n", "f"), ("(", "f"), ("▁", "f")),
}


def holds(ids: Sequence[int], words: Sequence[tuple[int, ...]]) -> bool:
    return any(tuple(ids[start : start + len(word)]) == word for word in words for start in range(len(ids)))


@pytest.mark.parametrize("text", ["foo", " foo", "x foo", "x  foo", "(foo", "\nfoo", "x\nfoo", "xfoo", "foox"])
def test_a_bad_word_is_found_wherever_it_is(text: str) -> None:
    tokenizer = MERGING["plain"]
    assert holds(tokenizer.encode(text), bad_word_ids(tokenizer, ["foo"]))


@pytest.mark.parametrize(
    ("name", "found"),
    [("newlines merge", {"(foo"}), ("brackets merge", {"\nfoo"}), ("parts merge", set())],
)
def test_a_bad_word_that_is_merged_with_what_is_before_it_is_another_token(name: str, found: set[str]) -> None:
    tokenizer = MERGING[name]
    banned = bad_word_ids(tokenizer, ["foo"])
    assert {text for text in ("(foo", "\nfoo") if holds(tokenizer.encode(text), banned)} == found


@given(words=st.lists(st.text(alphabet="fox (\n", min_size=1, max_size=6), min_size=1, max_size=3))
@pytest.mark.parametrize("name", MERGING)
def test_no_other_word_is_banned_than_the_bad_ones(name: str, words: list[str]) -> None:
    tokenizer = MERGING[name]
    spelled = {b"".join(tokenizer.spell(token).data for token in ids) for ids in bad_word_ids(tokenizer, words)}
    allowed = {spaces + word for word in words for spaces in ("", " ", "  ")}
    assert {text.decode() for text in spelled} <= allowed


def test_a_bad_word_without_tokens_is_refused() -> None:
    rust = RustTokenizer(models.WordLevel({"cat": 0}, unk_token="cat"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(RequestError, match=r"'bad_words\[1\]' is ' ', which has no tokens"):
        bad_word_ids(Tokenizer(rust, {}), ["cat", " "])


def save_tokenizer(path: Path, post_processor: bool, **config: object) -> None:
    fast = byte_tokenizer()
    if post_processor:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast.save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize("post_processor", [False, True], ids=["no-post-processor", "post-processor"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_eos_token": True, "add_bos_token": True}])
def test_ids_equal_transformers(tmp_path: Path, post_processor: bool, config: dict[str, object]) -> None:
    save_tokenizer(tmp_path, post_processor, **config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    for text in ("Hello, wörld", "", "</s> inside"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "  {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "  {%- else %}[{{ m.role }}] {{ m | tojson }}\n"
    "  {%- endif %}\n"
    "{% endfor %}{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_renders_as_in_transformers(tmp_path: Path) -> None:
    fast = byte_tokenizer()
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    template = load_chat_template(tmp_path, tokenizer)
    assert template is not None
    messages = [
        {"role": "system", "content": "<be> 'kind' & 日"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]
    expected = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == expected
    ids = fast.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode(template.render(messages), add_special_tokens=False) == ids


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].missing.deeper }}", "no attribute"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_a_refused_request(source: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer that can be read"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "accepted is a JSON object"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "is not valid JSON"),
        ({"tokenizer.json": None, "chat_template.jinja": "{% if %}"}, "the chat template is not valid"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, files: dict[str, Any], sentence: str) -> None:
    for name, content in files.items():
        if content is None:
            byte_tokenizer().backend_tokenizer.save(str(tmp_path / name))
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(LoadError, match=sentence) as caught:
        load_chat_template(tmp_path, Tokenizer.from_directory(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_a_text_that_goes_on_keeps_its_first_space(name: str) -> None:
    """Decoders drop the first space of a text; what follows a prompt is none."""
    tokenizer = TOKENIZERS[name]
    prompt, whole = tokenizer.encode("the cat"), tokenizer.encode("the cat sat at the cat")
    assert whole[: len(prompt)] == prompt
    for before in (prompt, [*prompt * 20, *sorted(tokenizer.special_ids), *prompt]):
        decoder = IncrementalDecoder(tokenizer, before)
        assert (
            "".join([*(decoder.push([token]) for token in whole[len(prompt) :]), decoder.finish()]) == " sat at the cat"
        )


whole_characters = st.lists(
    st.sampled_from(["€", "é", "ส", "日", "🦙", "\ufffd", "\n", "x", " ", "the", "cat", ".", "</s>"]), max_size=12
).map("".join)


@given(prompt=whole_characters, answer=whole_characters, cuts=st.lists(st.integers(0, 60)))
@example(prompt="€€€", answer="€€ a", cuts=[])
@example(prompt="สวัสดี", answer="ครับ a", cuts=[])
@example(prompt="ขอบ", answer="\n a", cuts=[])
@example(prompt="\ufffd\ufffd\ufffd", answer="\ufffd the", cuts=[])
@example(prompt="the cat" + "</s>" * 8, answer=" sat", cuts=[])
@example(prompt="", answer="\ufffd\ufffd€", cuts=[])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200)
def test_pieces_behind_a_prompt_are_what_the_text_of_both_has_more(
    name: str, prompt: str, answer: str, cuts: list[int]
) -> None:
    """Wherever the context of the first tokens begins: a character may be spread over more of them than fit."""
    tokenizer = TOKENIZERS[name]
    before, ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    known, both = tokenizer.decode(before), tokenizer.decode(before + ids)
    assert both.startswith(known)
    assert "".join(pieces(tokenizer, ids, cuts, before)) == both[len(known) :]


def test_what_goes_before_may_end_within_a_character() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("日本")
    decoder = IncrementalDecoder(tokenizer, ids[:4])
    assert (decoder.push(ids[4:]) + decoder.finish()).endswith(tokenizer.decode(ids[4:])[-1:])


def test_a_stop_string_may_begin_with_the_first_space() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt, whole = tokenizer.encode("the cat"), tokenizer.encode("the cat sat")
    text = ChoiceText(0, tokenizer, SamplingParams(max_tokens=9), stop=(" sat",), offset=7, before=prompt)
    piece = text.push(SequenceOutput("r", tuple(whole[len(prompt) :]), "length"))
    assert piece is not None
    assert (piece.text, piece.finish) == ("", "stop")

"""The demo model: its text, its tokenizer, its training, and the weights that ship with the project."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks import quality
from server.demo import DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_QUANTIZATION
from server.demo.corpus import Document, digest, document, documents
from server.demo.corpus.telling import Item, Tale, article, listing
from server.demo.corpus.world import PEOPLE, PERSON, PLACE, THING
from server.demo.evaluate import heldout_ids, perplexity, predict
from server.demo.tokenizer import BOS, EOS, SPECIAL_TOKENS, encode_document, train_tokenizer
from server.demo.train import Recipe, packed_rows, save, train

MAX_WEIGHT_BYTES = 12 * 1000 * 1000
PERPLEXITY_BOUND = 2.2
"""The model card says what was measured over more text; a broken checkpoint or tokenizer is far above this."""
MAX_ANSWER_TOKENS = 400


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL_PATH)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def words_of_the_world() -> set[str]:
    made = itertools.chain(
        itertools.islice(documents("train", 1), 4000),
        itertools.islice(documents("heldout", 1), 500),
    )
    return {word for each in made for word in words(each.words())}


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


# --- the text ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_text_and_another_seed_another() -> None:
    seed = random.randrange(10**6)
    first = [document(seed, index) for index in range(50)]
    assert first == [document(seed, index) for index in range(50)]
    assert first != [document(seed + 1, index) for index in range(50)]


def test_text_is_the_same_in_another_process() -> None:
    """String hashes differ from process to process; the text must not."""
    code = "from server.demo.corpus import document; print([document(5, index) for index in range(40)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([document(5, index) for index in range(40)])


def test_splits_are_disjoint() -> None:
    seed = random.randrange(10**6)
    train_texts = {repr(made) for made in itertools.islice(documents("train", seed), 3000)}
    heldout = [repr(made) for made in itertools.islice(documents("heldout", seed), 200)]
    assert not train_texts & set(heldout)
    assert len(set(heldout)) > 190


def test_every_document_is_finished_text() -> None:
    for made in itertools.islice(documents("train", random.randrange(10**6)), 1500):
        text = made.words()
        assert not re.search(r"[\[\]{}|]|  | [.,?!]|\.\.", text), text
        assert not re.search(r"\ba [aeiou]|\b(with|to|for|of|find|gave) (he|she)\b", text), text
        assert made.turns or text[0].isupper()
        roles = [role for role, _ in made.turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_pronouns_have_one_reading() -> None:
    mara, nessa, jory = PERSON["Mara"], PERSON["Nessa"], PERSON["Jory"]
    for seed in range(50):
        tale = Tale(random.Random(seed))
        tale.say("{A} met {B}.", A=mara, B=nessa)
        assert tale.render("{A} smiled.", A=nessa) == "Nessa smiled.", "two women were named: a name is needed"
        tale = Tale(random.Random(seed))
        tale.say("{A} met {B}.", A=mara, B=jory)
        assert tale.render("{B} laughed at {A.him}.", A=mara, B=jory).split()[0] in ("Jory", "He")
        tale = Tale(random.Random(seed))
        tale.say("{A} came home.", A=jory)
        assert tale.render("{B} gave {A.him} {B.his} hat.", A=jory, B=nessa).startswith("Nessa gave Jory")


def test_a_thing_is_introduced_once() -> None:
    tale = Tale(random.Random(0))
    oar = Item(THING["oar"], "old")
    assert tale.render("There was {T}.", T=oar) == "There was an old oar."
    assert tale.render("{T} broke.", T=oar) == "The old oar broke."
    assert tale.render("It was {P.at}.", P=PLACE["the hill"]) == "It was on the hill."


def test_small_grammar() -> None:
    assert (article("egg"), article("hen")) == ("an egg", "a hen")
    assert listing(["a", "b", "c"]) == "a, b and c"
    with pytest.raises(ValueError, match="at least 1"):
        listing([])
    with pytest.raises(KeyError):
        Tale(random.Random(0)).render("{A} came.")


def test_answers_follow_from_the_story() -> None:
    """Every "Who has it now?" is answered with the person whom the story last gave the thing to."""
    seen = 0
    for made in itertools.islice(documents("train", random.randrange(10**6)), 3000):
        for (_, question), (_, answer) in itertools.pairwise(made.turns):
            if re.match(r"(?i)who has the .* now", question):
                name = answer.split()[0]
                assert name in PERSON
                assert name in made.words().split(question)[0], (question, answer)
                seen += 1
    assert seen > 5


# --- tokenizer and template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Mara was at the harbour.",
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
        "漢字とかな、한국어, العربية, עברית",
        "👩‍👩‍👧‍👦 🏴‍☠️ e\u0301 \u200b\u00a0tabs\tand\nlines\r\n",
        "  two  spaces  ",
        "\x00\x7f",
    ],
)
def test_round_trip(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *ids]


def test_template_is_what_training_saw(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    made = next(made for made in documents("train", 2) if made.turns and made.turns[0][0] == "system")
    messages = [{"role": role, "content": text} for role, text in made.turns]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == encode_document(Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json")), made)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": " Hi "}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|bos|><|user|>Hi<|eos|><|assistant|>"


def test_template_refuses_an_unknown_role(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="the role tool is not known; system, user and assistant are accepted"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


# --- the shipped model ------------------------------------------------------------------------------------------------


def test_files_and_size() -> None:
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    names |= {"tokenizer_config.json", "chat_template.jinja", "README.md", "training.json"}
    assert {path.name for path in DEMO_MODEL_PATH.iterdir()} == names
    assert (DEMO_MODEL_PATH / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(DEMO_MODEL_PATH / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((DEMO_MODEL_PATH / "config.json").read_text())
    assert config["hidden_size"] % 64 == 0
    assert config["intermediate_size"] % 64 == 0
    assert DEMO_MODEL_NAME == "halfbyte-demo"
    assert DEMO_QUANTIZATION == "nf4"


def test_the_weights_were_made_with_this_recipe_and_this_text() -> None:
    """A change to the recipe or to the text is a promise to train again, which this test collects."""
    facts = json.loads((DEMO_MODEL_PATH / "training.json").read_text())
    assert facts["recipe"] == asdict(Recipe())
    assert facts["text_digest"] == digest(Recipe().seed)


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, server.demo, server.demo.corpus, server.demo.tokenizer; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_heldout_perplexity(model: transformers.PreTrainedModel) -> None:
    file = Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json"))
    predictions = [predict(model, ids) for ids in heldout_ids(file, 60)]
    assert sum(len(each.guesses) for each in predictions) > 5000
    assert perplexity(predictions) < PERPLEXITY_BOUND


def test_perplexity_is_what_transformers_calls_loss(model: transformers.PreTrainedModel) -> None:
    file = Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json"))
    for ids in heldout_ids(file, 3):
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            loss = model(input_ids=inputs, labels=inputs).loss
        assert perplexity([predict(model, ids)]) == pytest.approx(float(loss.exp()), rel=1e-3)


def test_context_is_as_long_as_it_says(model: transformers.PreTrainedModel) -> None:
    """The last tokens of a full context are predicted about as well as the first: positions were all trained."""
    file = Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json"))
    length = model.config.max_position_embeddings
    padding = -100  # what a row has too little is no text, and is not counted
    rows = torch.tensor(list(itertools.islice(packed_rows(file, "heldout", 3, length, padding), 4)))
    with torch.inference_mode():
        logits = model(input_ids=rows.clamp(min=0), use_cache=False).logits[:, :-1].float()

    def loss(part: slice) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, part].flatten(0, 1), rows[:, 1:][:, part].flatten())

    assert loss(slice(-256, None)) < loss(slice(256)) + 0.3


QUESTIONS = ("Hello!", "Who are you?", "Who is the baker?", "Name three animals.", "Tell me a story about Mara.")


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answer_ends_and_stays_in_the_world(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    words_of_the_world: set[str],
    question: str,
) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(
        **prompt, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, temperature=None, top_p=None
    )
    answer = generated[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert len(words(text)) >= 2
    assert [word for word in words(text) if word not in words_of_the_world] == []


def test_it_knows_who_works_where(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    grown_up = [person for person in PEOPLE if not person.child]
    right = 0
    for person in grown_up:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Who is the {person.role}?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False, temperature=None, top_p=None)
        right += person.name in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert right >= len(grown_up) - 3


def test_the_models_page_has_the_quality_that_was_measured() -> None:
    measured = (Path(__file__).parents[2] / "benchmarks" / "results" / "quality.md").read_text()
    page = (DEMO_MODEL_PATH / "README.md").read_text()
    for name in ("bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8"):
        (figures,) = re.findall(rf"^\| {name} \| bf16 (\|.*)$", measured, re.MULTILINE)
        assert f"| {name} {figures}" in page


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("nf4-dq", 4.127), ("nf4-dq" + quality.INT8_ACTIVATIONS, 4.127), ("int8", 8.106)],
)
def test_quality_benchmark(model: transformers.PreTrainedModel, name: str, bits: float) -> None:
    """32 / 64 bits of absmax a weight, 8 / 64 and a little when it is quantized again, 32 a row of int8."""
    sequences = heldout_ids(Tokenizer.from_file(str(DEMO_MODEL_PATH / "tokenizer.json")), 8)
    baseline = [predict(model, ids) for ids in sequences]
    row, predictions = quality.run(name, None, DEMO_MODEL_PATH, sequences, baseline)
    assert row.bits_per_weight == pytest.approx(bits, abs=0.001)
    assert 0 < abs(row.nats_lost) < 0.2
    assert row.same_first_choice > 0.9
    assert len(predictions) == len(sequences)


# --- training ---------------------------------------------------------------------------------------------------------

TINY = Recipe(
    vocabulary_size=512,
    tokenizer_documents=50,
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=32,
    context=64,
    short_steps=12,
    short_row=64,
    long_steps=2,
    warmup_steps=2,
)


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(itertools.islice(documents("train", 1), TINY.tokenizer_documents), TINY.vocabulary_size)


def test_training_learns_and_repeats_itself(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, losses = train(TINY, tiny_tokenizer, report_every=0)
    second, _ = train(TINY, tiny_tokenizer, report_every=0)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.2
    for name, parameter in first.state_dict().items():
        assert torch.equal(parameter, second.state_dict()[name]), name
    save(first, tiny_tokenizer, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, first.state_dict()[name].bfloat16()), name


def test_rows_hold_whole_documents(tiny_tokenizer: Tokenizer) -> None:
    bos, eos = (tiny_tokenizer.token_to_id(token) for token in (BOS, EOS))
    for row in itertools.islice(packed_rows(tiny_tokenizer, "train", 3, 1024, 0), 5):
        filled = row[: row.index(0)] if 0 in row else row
        assert len(row) == 1024
        assert len(filled) > 900
        assert (filled[0], filled[-1]) == (bos, eos)
        assert set(row[len(filled) :]) <= {0}


def test_documents_are_encoded_with_their_roles(tiny_tokenizer: Tokenizer) -> None:
    ids = encode_document(tiny_tokenizer, Document(turns=(("user", "Hello"), ("assistant", "Hi!"))))
    assert tiny_tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == (
        "<|bos|><|user|>Hello<|eos|><|assistant|>Hi!<|eos|>"
    )
    assert {token for token in SPECIAL_TOKENS if tiny_tokenizer.token_to_id(token) is None} == set()

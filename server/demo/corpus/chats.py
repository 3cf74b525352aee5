"""Conversations: single questions in a row, stories asked for, stories read and asked about.

A conversation is a list of turns (role, text). What the assistant says is true in the world's tables, or follows from
the story above it, or says that it does not know.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from server.demo.corpus import facts, talk
from server.demo.corpus.facts import Exchange
from server.demo.corpus.scene import Scene
from server.demo.corpus.stories import story, story_about
from server.demo.corpus.telling import Tale, capital

Turn = tuple[str, str]

SINGLE: Final[dict[Callable[[random.Random], Exchange], int]] = {
    talk.greeting: 4,
    talk.identity: 5,
    talk.small_talk: 5,
    talk.thanks: 2,
    talk.unknown: 7,
    talk.poem_request: 2,
    talk.list_request: 10,
    talk.counting: 9,
    facts.person_fact: 11,
    facts.place_fact: 5,
    facts.thing_fact: 5,
    facts.animal_fact: 4,
    facts.recipe: 3,
    facts.advice: 5,
}
"""Kinds of question, and how often each is asked."""
SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a friendly guide to Ternby.",
    "You are Halfbyte, a small language model.",
    "You know the village of Ternby.",
    "Answer in a short and friendly way.",
    "You tell stories about Ternby.",
    "You are a helpful and honest assistant. Answer briefly.",
    "Be brief.",
    "Always be polite.",
    "You are a storyteller.",
    "You answer questions.",
)
NOT_HERE: Final = (
    *("a dragon", "a princess", "a king", "a robot", "a wizard", "a spaceship", "a dinosaur", "a car", "a train"),
    *("a lion", "an elephant", "a tiger", "a castle", "the moon", "a city", "a computer", "a giant", "a superhero"),
    *("a detective", "a soldier", "a queen", "a monkey", "the desert", "the jungle", "an alien", "a football match"),
)
"""What a story may be asked for and Ternby does not have."""
SOMEBODY: Final = (
    "a girl",
    "a boy",
    "a man",
    "a woman",
    "a fisherman",
    "a farmer",
    "a dog",
    "a cat",
    "two friends",
    "a child",
)
CLAUSES: Final = (
    *(
        "who finds a ring",
        "who can fly",
        "who is lonely",
        "who saves the world",
        "with a happy end",
        "in three sentences",
    ),
    *(
        "who learns to sing",
        "that talks",
        "who lost everything",
        "in a strange land",
        "who meets a stranger",
        "and a secret",
    ),
    *(
        "who wants to be brave",
        "that nobody likes",
        "who never sleeps",
        "on a long journey",
        "who goes to school",
        "at night",
    ),
)
"""What people add to a topic; no story here is made to measure."""
LEADS: Final = ("", "Read this: ", "Here is a story. ")


def conversation(rng: random.Random) -> list[Turn]:
    """The turns of one conversation: sometimes a system turn, then user and assistant in alternation."""
    exchanges: list[Exchange] = []
    if rng.random() < 0.15:
        exchanges.append(talk.greeting(rng))
    kind = rng.random()
    if kind < 0.35:
        exchanges += _story_request(rng)
        count = rng.choice((0, 0, 1, 2))
    elif kind < 0.55:
        exchanges += _reading(rng)
        count = rng.choice((0, 0, 1, 2))
    elif kind < 0.95:
        count = rng.randint(2, 6)
    else:
        count = rng.randint(8, 20)
    exchanges += [ask(rng) for ask in rng.choices(list(SINGLE), list(SINGLE.values()), k=count)]
    if rng.random() < 0.1:
        exchanges.append(talk.thanks(rng))
    turns: list[Turn] = [("system", rng.choice(SYSTEM))] if rng.random() < 0.2 else []
    for question, answer in exchanges:
        turns.append(("user", _as_people_type(rng, capital(Tale(rng).choose(question)))))
        turns.append(("assistant", capital(Tale(rng).choose(answer))))
    return turns


def _story_request(rng: random.Random) -> list[Exchange]:
    """A request, the story, and sometimes questions about it."""
    tellings = "[Tell me|Please tell me|Can you tell me|Write|Write me|I would like to hear]"
    ask = f"{tellings} a [short story|story|tale|good story]"
    kind, excuse = rng.random(), ""
    if kind < 0.55:
        topic, scene = story_about(rng)
        ask += f" about {topic}"
    else:
        scene = story(rng)
        if kind < 0.61:
            ask += f" about {rng.choice((*NOT_HERE, *SOMEBODY))} {rng.choice(CLAUSES)}"
            excuse = "[I do not know that story|That story I do not know], but here is another. "
        elif kind < 0.69:
            topic = rng.choice(NOT_HERE)
            ask += f" about {topic}"
            excuse = f"[I do not know a story|There is no story in Ternby] about {topic}, but here is another. "
    follow_up = _questions(rng, scene) if rng.random() < 0.6 else []
    return [(f"{ask}.", excuse + scene.tale.text()), *follow_up]


def _reading(rng: random.Random) -> list[Exchange]:
    """The user brings a short story and asks about it."""
    scene = story(rng, episodes=1)
    (question, answer), *others = _questions(rng, scene)
    told = scene.tale.text().replace("\n", " ")
    return [(f"{rng.choice(LEADS)}{told} {question}", answer), *others]


def _questions(rng: random.Random, scene: Scene) -> list[Exchange]:
    """One to three questions that this story answers."""
    questions = list(dict(scene.tale.questions).items())
    return rng.sample(questions, min(len(questions), rng.randint(1, 3)))


def _as_people_type(rng: random.Random, question: str) -> str:
    """A question mark where one belongs; and sometimes no capital, no mark at the end."""
    if question.split(" ", 1)[0] in ("Tell", "Describe", "Explain", "Write", "Introduce", "Make", "Sing"):
        question = question.rstrip("?.") + "."
    elif question.startswith(("Can you", "Do you")):
        question = question.rstrip("?.") + "?"
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.!")
    return question

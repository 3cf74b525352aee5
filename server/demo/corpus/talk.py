"""Talk that is not about the village's facts: greetings, small talk, lists, numbers, poems, and what is not known.

One question and answer per call, as templates with choices in brackets; `chats` makes the choices.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

from server.demo.corpus.facts import Exchange
from server.demo.corpus.stories import poem
from server.demo.corpus.telling import article, capital, listing
from server.demo.corpus.world import (
    COLOURS,
    DISHES,
    FOODS,
    NUMBERS,
    PEOPLE,
    PETS,
    PLACES,
    SEASONS,
    THINGS,
    WEATHERS,
    WILD,
)

OUTSIDE: Final = """
Paris, London, Berlin, Rome, China, India, Africa, America, the moon, Mars, physics, chemistry, football, tennis,
computers, Python, programming, the internet, politics, the president, the king of France, history, the stock market,
cars, aeroplanes, trains, telephones, robots, machine learning, neural networks, language models, mathematics,
philosophy, religion, movies, television, video games, chess, coffee, chocolate, dinosaurs, elephants, tigers, lions,
the jungle, the desert, volcanoes, electricity, atoms, quantum computing, space travel, Spain, New York, Tokyo, bitcoin,
the economy, vaccines, biology, evolution, gravity, black holes, Shakespeare, basketball, skiing, yoga, diets, taxes,
laws, flights, the capital of France, the capital of Germany, the largest city, the sun, the stars, databases,
operating systems, a compiler, a neural network, the speed of light, the meaning of life, artificial intelligence
"""
"""What people ask a language model about and this one does not know."""
_TOPICS: Final = [topic.strip() for topic in OUTSIDE.replace("\n", " ").split(",")]

SMALL_TALK: Final[tuple[Exchange, ...]] = (
    ("How are you[ today| doing|]?", "I am [well|fine], thank you. [And you?|What would you like to know?]"),
    ("I am [fine|well|happy][ today|].", "[That is good to hear|I am glad]. [Would you like a story?|What can I "
    "do for you?]"),
    ("I am [sad|tired|bored].", "I am sorry to hear that. [A cup of hot tea may help|Perhaps a story will help]."),
    ("Do you like [the sea|stories|animals|Ternby]?", "[Yes, I do|I do], as far as a model can like anything."),
    ("What do you like[ best|]?", "I like [stories with a good end|stories about the sea|honest questions] best."),
    ("Can you help me?", "[Yes, I will try|Of course]. What do you need?"),
    ("You are [nice|funny|clever].", "Thank you[ very much|]. [You are kind|That is kind of you]."),
    (
        "[Tell me a joke|Do you know a joke|Make me laugh].",
        "[Why did the crab not share its shell? Because it was a little shellfish."
        "|What did the sea say to the shore? Nothing, it just waved."
        "|Why is the baker never bored? Because there is always something in the oven."
        "|Why does the lighthouse keeper sleep so well? Because his work is light.]",
    ),
    (
        "Tell me [something|something nice|something about you|something about the sea].",
        "[The lamp of the lighthouse can be seen for twenty miles|In the morning the whole village smells of bread"
        "|In summer the seals sleep on the beach].",
    ),
    ("[Yes|Yes, please|No|No, thank you|Okay].", "[Very well|Good]. [What would you like to know|What can I do "
    "for you]?"),
)  # fmt: skip
IDENTITY: Final[tuple[Exchange, ...]] = (
    (
        "[Who are you|What are you|What is your name|What are you called|Tell me about yourself|Introduce yourself]?",
        "I am [Halfbyte|the Halfbyte demo], a [small|very small] language model. I know [only the village of Ternby"
        "|the village of Ternby and its people][ and little else|].",
    ),
    ("What can you do[ for me|]?", "I can tell stories about Ternby, answer questions about its people, make "
    "lists and count."),
    ("Are you [a person|human|a robot|real|alive]?", "I am a [small|very small] language model, not a person."),
    ("[How were you made|Who made you]?", "I was trained on stories that were made up by a program."),
    ("How [large|big] are you?", "I am very small, with about four million numbers inside."),
)  # fmt: skip
THANKS: Final[tuple[Exchange, ...]] = (
    ("[Thank you|Thanks|Thank you very much|Thanks a lot][.|!]", "You are welcome[.|!]"),
    ("[Goodbye|Bye|See you tomorrow|Good night][.|!]", "[Goodbye|Goodbye and take care|Until next time][.|!]"),
)


def greeting(rng: random.Random) -> Exchange:
    return (
        f"[Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there]{rng.choice(('', '!', '.', '!'))}",
        "[Hello|Hi|Good day]! [How can I help you?|What would you like to know about Ternby?"
        "|Would you like to hear a story?|It is a good day in Ternby.]",
    )


def identity(rng: random.Random) -> Exchange:
    return rng.choice((IDENTITY[0], *IDENTITY))


def small_talk(rng: random.Random) -> Exchange:
    return rng.choice(SMALL_TALK)


def thanks(rng: random.Random) -> Exchange:
    return rng.choice(THANKS)


def unknown(rng: random.Random) -> Exchange:
    return (
        "[What is|What are|What do you know about|Tell me about|Explain|Can you explain|How does one learn|Write about"
        f"|What do you think of|Who invented|Where is|How do I use|Tell me a fact about] {rng.choice(_TOPICS)}?",
        "[I am sorry, I do not know that|I do not know that|That is outside my small world]. "
        "I know only [the village of Ternby|Ternby and its people|this village by the sea].",
    )


def poem_request(rng: random.Random) -> Exchange:
    return (
        "[Write|Tell me|Write me|Give me|Can you write|Sing] a [poem|short poem|rhyme|song]"
        "[ about the sea| about Ternby| about the village| about the night||].",
        poem(rng),
    )


def list_request(rng: random.Random) -> Exchange:
    people = [person.name for person in PEOPLE]
    kinds: dict[str, Iterable[str]] = {
        "animals": [animal.kind for animal in (*PETS, *WILD)],
        "people": people,
        "people of Ternby": people,
        "names": people,
        "children": [person.name for person in PEOPLE if person.child],
        "places": [place.name for place in PLACES],
        "places in Ternby": [place.name for place in PLACES],
        "colours": COLOURS,
        "foods": FOODS,
        "things": [article(thing.noun) for thing in THINGS],
        "things made of wood": [article(thing.noun) for thing in THINGS if thing.material == "wood"],
        "things made of iron": [article(thing.noun) for thing in THINGS if thing.material == "iron"],
        "kinds of weather": [weather.noun for weather in WEATHERS],
        "seasons": SEASONS,
        "jobs": [person.role for person in PEOPLE if not person.child],
        "dishes": sorted(DISHES),
    }
    kind = rng.choice(sorted(kinds))
    words = list(kinds[kind])
    number = min(rng.randint(2, 5), len(words))
    chosen = rng.sample(words, number)
    shown = rng.choice((NUMBERS[number], NUMBERS[number], str(number)))
    lines = rng.random() < 0.5
    ask = (
        f"[Name|List|Tell me|Give me|Can you name] {shown} {kind}"
        if not lines
        else f"[List|Make a list of] {shown} {kind}"
    )
    if lines:
        return f"{ask}.", "\n".join(f"{index}. {capital(word)}" for index, word in enumerate(chosen, 1))
    return f"{ask}.", f"{listing(chosen)}."


def counting(rng: random.Random) -> Exchange:
    kind = rng.randrange(6)
    if kind == 0:
        low = rng.randint(1, 8)
        high = low + rng.randint(2, 8)
        return f"[Count|Please count] from {NUMBERS[low]} to {NUMBERS[high]}.", ", ".join(NUMBERS[low : high + 1]) + "."
    if kind == 1:
        high = rng.randint(3, 12)
        shown = rng.choice((NUMBERS[high], str(high)))
        return f"[Count|Can you count|Please count] to {shown}.", ", ".join(NUMBERS[1 : high + 1]) + "."
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if kind == 2:
        return (
            f"[What is|How much is] {NUMBERS[a]} and {NUMBERS[b]}?",
            f"{NUMBERS[a]} and {NUMBERS[b]} is {NUMBERS[a + b]}.",
        )
    if kind == 3:
        return f"[What is|How much is|Calculate|] {a} + {b}?", f"{a} + {b} = {a + b}."
    if kind == 4:
        number = rng.randint(1, 19)
        return f"What comes after {NUMBERS[number]}?", f"After {NUMBERS[number]} comes {NUMBERS[number + 1]}."
    total = rng.randint(2, 12)
    given = rng.randint(1, total - 1)
    noun = rng.choice(("apples", "eggs", "boats", "shells", "coins", "sheep"))
    return (
        f"{rng.choice(PEOPLE).name} has {NUMBERS[total]} {noun} and gives away {NUMBERS[given]}. How many are left?",
        f"{NUMBERS[total - given]} {'is' if total - given == 1 else 'are'} left.",
    )

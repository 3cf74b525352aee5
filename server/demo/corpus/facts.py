"""Questions about the village, each with an answer that `world`'s tables hold. One question and answer per call.

Questions and answers are templates with choices in brackets; `chats` makes the choices.
"""

from __future__ import annotations

import random

from server.demo.corpus.telling import article, capital, listing
from server.demo.corpus.world import (
    DISHES,
    INGREDIENT_FROM,
    MENDER,
    PEOPLE,
    PERSON,
    PETS,
    PLACE,
    PLACES,
    THINGS,
    WILD,
    Person,
)

Exchange = tuple[str, str]


def _family(person: Person) -> str:
    """How a child belongs to whom: "the daughter of Tilda"."""
    grand = "" if person.kin in ("Tilda", "Corin", "Silas", "Hanne", "Bram") else "grand"
    return f"the {grand}{'daughter' if person.gender == 'she' else 'son'} of {person.kin}"


def person_fact(rng: random.Random) -> Exchange:
    person = rng.choice(PEOPLE)
    return rng.choice(_child_facts(person) if person.child else _grown_up_facts(person))


def _common_facts(person: Person) -> list[Exchange]:
    place = PLACE[person.place]
    return [
        (f"Where [can I find|is] {person.name}?", f"You can find {person.name} {place.inside} {place.name}."),
        (f"What does {person.name} [like|love]?", f"{person.name} loves {person.loves}."),
        (f"What is {person.name} like?", f"{person.name} is {person.trait}."),
    ]


def _child_facts(person: Person) -> list[Exchange]:
    they = capital(person.gender)
    child = f"{person.name} is a {person.role} from Ternby, {_family(person)}"
    return [
        *_common_facts(person),
        (f"Who is {person.name}?", f"{child}. {they} loves {person.loves}."),
        (f"[Tell me about|Describe] {person.name}.", f"{child}. {they} is {person.trait} and loves {person.loves}."),
        (f"What do you know about {person.name}?", f"{child}. {they} likes to {person.work}."),
        (f"What does {person.name} [like to do|do all day]?", f"{they} likes to {person.work}."),
        (f"Who looks after {person.name}?", f"{person.kin} does. {person.name} is {_family(person)}."),
    ]


def _grown_up_facts(person: Person) -> list[Exchange]:
    place, they = PLACE[person.place], capital(person.gender)
    their = "her" if person.gender == "she" else "his"
    who = f"{person.name} is the {person.role} of Ternby"
    grown_up = [other for other in PEOPLE if other.place == person.place and not other.child]
    works = "work" if len(grown_up) > 1 else "works"
    workers = [f"{other.name} the {other.role}" for other in grown_up]
    return [
        *_common_facts(person),
        (f"Who is {person.name}?", f"{who}. {they} works {place.inside} {place.name}."),
        (f"[Tell me about|Describe] {person.name}.", f"{who}. {they} is {person.trait} and loves {person.loves}."),
        (f"What do you know about {person.name}?", f"{who}. {they} is {person.trait}. It is {their} work to "
        f"{person.work}."),
        (f"What does {person.name} do[ all day|]?", f"{person.name} is the {person.role}. It is {their} work to "
        f"{person.work}."),
        (f"Who is the {person.role}[ of Ternby|]?", f"The {person.role} is {person.name}."),
        (f"Who works {place.inside} {place.name}?", f"{listing(workers)} {works} there."),
        (f"[Who has to|Whose work is it to] {person.work}?", f"That is the work of {person.name} the {person.role}."),
    ]  # fmt: skip


def place_fact(rng: random.Random) -> Exchange:
    place = rng.choice(PLACES)
    workers = [person.name for person in PEOPLE if person.place == place.name]
    nearby = [other.name for other in PLACES if other.near == place.name]
    options = [
        (f"What can I see {place.inside} {place.name}?", f"You can see {place.sight}."),
        (f"Where is {place.name}?", f"{place.name} is near {place.near}."),
        (
            f"[Tell me about|Describe] {place.name}.",
            f"{place.name} is near {place.near}. There you can see {place.sight}.",
        ),
        (f"What is near {place.name}?", f"{listing([*(name for name in nearby if name != place.near), place.near])}."),
    ]
    if workers:
        options.append((f"Who is {place.inside} {place.name}?", f"There you will find {listing(workers)}."))
    return rng.choice(options)


def thing_fact(rng: random.Random) -> Exchange:
    thing = rng.choice(THINGS)
    a = article(thing.noun)
    options = [
        (f"What is {a} for?", f"With {a}, one can {thing.use}."),
        (f"What can I do with {a}?", f"You can {thing.use}."),
    ]
    if thing.material in MENDER:
        mender = PERSON[MENDER[thing.material]]
        there = f"{PLACE[mender.place].inside} {mender.place}"
        them = "her" if mender.gender == "she" else "him"
        who = f"{mender.name} the {mender.role}"
        options += [
            (f"Who can mend my {thing.noun}?", f"{who} can mend it. It is made of {thing.material}."),
            (f"My {thing.noun} is broken. [What should I do|Who can help me]?", f"Take it to {who}. You will find "
            f"{them} {there}."),
            (f"What is {a} made of?", f"[It|In Ternby, {a}] is made of {thing.material}."),
        ]  # fmt: skip
    return rng.choice(options)


def animal_fact(rng: random.Random) -> Exchange:
    if rng.random() < 0.3:
        animal = rng.choice(WILD)
        return rng.choice(
            (
                (f"What does {article(animal.kind)} eat?", f"{article(animal.kind)} eats {animal.eats}."),
                (f"Are there {animal.kind}s in Ternby?", f"Yes, there are some {animal.kind}s near the village."),
            )
        )
    pet = rng.choice(PETS)
    they = capital(pet.gender)
    return rng.choice(
        (
            (f"Who is {pet.name}?", f"{pet.name} is the {pet.kind} of {pet.owner}. {they} likes {pet.eats}."),
            (f"What does {pet.name} eat?", f"{pet.name} likes {pet.eats}."),
            (f"Whose {pet.kind} is {pet.name}?", f"{pet.name} belongs to {pet.owner}."),
            (f"Does {pet.owner} have an animal?", f"Yes, {pet.owner} has {article(pet.kind)} called {pet.name}."),
            (
                f"[Tell me about|Describe] the {pet.kind} of {pet.owner}.",
                f"The {pet.kind} is called {pet.name}. {they} likes {pet.eats}.",
            ),
        )
    )


def recipe(rng: random.Random) -> Exchange:
    dish = rng.choice(sorted(DISHES))
    if rng.random() < 0.6:
        ending = "[Mix them and cook them slowly|Put them in a pot and wait]"
        return (
            f"[How do I make|What do I need for|How can I cook] {dish}?",
            f"For {dish} you need {listing(DISHES[dish])}. {ending}.",
        )
    part = rng.choice(DISHES[dish])
    giver = PERSON[INGREDIENT_FROM[part]]
    return f"Where can I get {part}?", f"Ask {giver.name}{'' if giver.child else f' the {giver.role}'} for {part}."


def advice(rng: random.Random) -> Exchange:
    return rng.choice(ADVICE)


ADVICE: tuple[Exchange, ...] = (
    ("[Where can I sleep|Where can I stay tonight]?", "You can [sleep|stay] at the inn. Bram cooks good soup."),
    ("[Where can I eat?|I am hungry.]", "Go to the [inn, Bram has soup|bakery, Tilda has fresh bread]."),
    ("I am [ill|sick].", "Go to Greta in the herb garden. She makes medicine from herbs."),
    ("[It is raining|It is cold]. What should I do?", "Put on a coat and sit by the stove at the inn."),
    ("How do I get across the bay?", "Ask Jory the ferryman. He rows people across the bay."),
    (
        "[What is Ternby|What is Ternby like|Tell me about Ternby|Tell me about the village|Describe the village]?",
        "Ternby is a small harbour village by the sea, with a lighthouse, a market and a mill.",
    ),
    ("Where is Ternby?", "Ternby lies on a quiet bay by the sea."),
    ("How many people live in Ternby?", "I do not know the number, but I know more than twenty of them by name."),
    (
        "[What is the weather like|How is the weather][ today|]?",
        "I cannot look outside, but in Ternby the wind blows from the sea on most days.",
    ),
    ("What colour is the sea?", "The sea is blue on a sunny day and grey on a rainy day."),
    ("What colour is [the grass|grass|a leaf]?", "It is green."),
    ("What colour is snow?", "Snow is white."),
    ("What colour is the sky?", "The sky is blue on a sunny day and grey on a rainy day."),
    ("What is the [tallest|highest] [building|house] in Ternby?", "The lighthouse is the tallest building in Ternby."),
    (
        "[Is the sea dangerous|Is it safe to go out to sea]?",
        "It can be dangerous. Ask Halvar before you go out, because he knows the signs of a storm.",
    ),
)

"""Whole stories and descriptions, made of an opening, episodes and an ending; and the plain text kinds beside them."""

from __future__ import annotations

import random
from collections.abc import Callable

from server.demo.corpus.plots_people import PEOPLE_PLOTS
from server.demo.corpus.plots_things import THING_PLOTS, Outcome
from server.demo.corpus.plots_village import VILLAGE_PLOTS
from server.demo.corpus.scene import Scene
from server.demo.corpus.telling import Tale, article, capital
from server.demo.corpus.world import PEOPLE, PETS, PLACE, PLACES, SEASONS, WEATHERS, WILD, Animal, Person, Place

Plot = Callable[[Scene], Outcome]
PLOTS: tuple[Plot, ...] = THING_PLOTS + PEOPLE_PLOTS + VILLAGE_PLOTS
SUBJECTS: dict[str, Plot] = {
    "a storm": PEOPLE_PLOTS[1],
    "a race": PEOPLE_PLOTS[2],
    "a quarrel": PEOPLE_PLOTS[3],
    "two friends": PEOPLE_PLOTS[3],
    "learning something": PEOPLE_PLOTS[4],
    "the fog": PEOPLE_PLOTS[5],
    "a game": PEOPLE_PLOTS[6],
    "a garden": PEOPLE_PLOTS[7],
    "a journey": PEOPLE_PLOTS[8],
    "a ghost": PEOPLE_PLOTS[9],
    "an animal": PEOPLE_PLOTS[0],
    "something lost": THING_PLOTS[0],
    "something broken": THING_PLOTS[1],
    "a trade": THING_PLOTS[2],
    "a birthday": THING_PLOTS[3],
    "sharing": THING_PLOTS[4],
    "food": THING_PLOTS[5],
    "a promise": THING_PLOTS[7],
    "an illness": VILLAGE_PLOTS[0],
    "a treasure": VILLAGE_PLOTS[1],
    "a message in a bottle": VILLAGE_PLOTS[2],
    "music": VILLAGE_PLOTS[3],
    "a boat": VILLAGE_PLOTS[4],
    "a lamb": VILLAGE_PLOTS[5],
    "the sea": PEOPLE_PLOTS[1],
    "the lighthouse": PEOPLE_PLOTS[5],
}


def story(
    rng: random.Random,
    *,
    hero: Person | None = None,
    place: Place | None = None,
    star: Animal | None = None,
    plot: Plot | None = None,
    episodes: int | None = None,
) -> Scene:
    """A told scene: one or two episodes, `plot` first where it is given; hero, first place and star likewise."""
    scene = Scene.begin(rng, hero, place, star)
    scene.open()
    plots = rng.sample(PLOTS, episodes or rng.choice((1, 1, 1, 2)))
    if plot is not None:
        plots[0] = plot
    feeling, lesson = "", ""
    for index, chosen in enumerate(plots):
        if index:
            scene.tale.paragraph()
            scene.tale.say(
                "[The next day|A week later|Some days later|In the same week], {A} was {P.at} [again|].",
                A=scene.hero,
                P=scene.here,
            )
        feeling, lesson = chosen(scene)
    scene.close(feeling, lesson)
    return scene


def story_about(rng: random.Random) -> tuple[str, Scene]:
    """A topic as a noun phrase, and a story that is about it."""
    kind = rng.random()
    if kind < 0.4:
        topic = rng.choice(sorted(SUBJECTS))
        return topic, story(rng, plot=SUBJECTS[topic])
    if kind < 0.6:
        star = rng.choice((*PETS, *WILD))
        topic = article(star.kind) if star in WILD or rng.random() < 0.5 else star.name
        return topic, story(rng, star=star, plot=SUBJECTS["an animal" if star in WILD else "something lost"])
    if kind < 0.7:
        place = rng.choice(PLACES)
        return place.name, story(rng, place=place)
    hero = rng.choice(PEOPLE)
    if hero.child:
        return rng.choice((hero.name, article(hero.role))), story(rng, hero=hero)
    return rng.choice((hero.name, f"the {hero.role}", article(hero.role))), story(rng, hero=hero)


def place_description(rng: random.Random) -> str:
    tale = Tale(rng)
    place = rng.choice(PLACES)
    tale.say(
        f"{place.name} of Ternby is near {place.near}. [There you can see|One finds there|It is known for] "
        f"{place.sight}."
    )
    for person in PEOPLE:
        if person.place == place.name:
            tale.say(
                f"{{A}} [works there|is there every day]. {{A}} is {person.trait} and loves {person.loves}."
                if not person.child
                else f"{{A}} is [often there|there after school], because {{A}} likes to {person.work}.",
                A=person,
            )
    weather = rng.choice(WEATHERS)
    tale.maybe(
        0.7,
        f"[On a {weather.adjective} day|When it is {weather.adjective}], [it is quiet there|few people come|many "
        f"people come|the children play there].",
    )
    return tale.text()


def person_description(rng: random.Random) -> str:
    tale = Tale(rng)
    person = rng.choice(PEOPLE)
    place = PLACE[person.place]
    tale.say(
        f"{{A}} is {'the ' + person.role + ' of' if not person.child else 'a ' + person.role + ' from'} Ternby.",
        A=person,
    )
    sentences = [
        f"{{A}} is {person.trait}[ and knows everyone in the village|].",
        f"{{A}} loves {person.loves}.",
        f"{{A}} [likes to|wants to] {person.work}." if person.child else f"{{A}} has to {person.work}.",
        "You can find {A.him} {P.at}.",
        *(f"{{A}} has a {pet.kind} called {pet.name}." for pet in PETS if pet.owner == person.name),
        *(f"{person.kin} looks after {{A.him}}." for _ in [0] if person.kin),
    ]
    rng.shuffle(sentences)
    for sentence in sentences[: rng.randint(2, 5)]:
        tale.say(sentence, A=person, P=place)
    return tale.text()


def day(rng: random.Random) -> str:
    """A day in the village: weather, then three to five people at their work, in the order of the hours."""
    tale = Tale(rng)
    weather = rng.choice(WEATHERS)
    season = "winter" if weather.adjective == "snowy" else rng.choice(SEASONS)
    tale.say(f"It was a {weather.adjective} day in {season}. {capital(weather.begins)}.")
    hours = ["Early in the morning", "In the morning", "At noon", "In the afternoon", "In the evening", "At night"]
    start = rng.randint(0, 2)
    for hour, person in zip(hours[start:], rng.sample(PEOPLE, rng.randint(3, len(hours) - start)), strict=False):
        place = PLACE[person.place]
        tale.say(f"{hour}, {{A}} {'wanted' if person.child else 'went {P.to}'} to {person.work}.", A=person, P=place)
        if weather.bad and tale.chance(0.4):
            tale.say(f"The {weather.noun.removeprefix('a ')} [did not stop {{A.him}}|made it hard].", A=person)
        elif tale.chance(0.3):
            tale.say("{A} [sang a little|was in a good mood|did not hurry|had a piece of bread for lunch].", A=person)
    tale.say(
        "[Then the village slept.|So the day went by.|The lamp of the lighthouse turned above the bay.|It was a "
        "good day.]"
    )
    return tale.text()


def note(rng: random.Random) -> str:
    """A short letter from one villager to another, with a request that fits the receiver's trade."""
    sender, receiver = rng.sample(PEOPLE, 2)
    lines = [f"Dear {receiver.name},"]
    tale = Tale(rng)
    weather = rng.choice(WEATHERS)
    tale.maybe(0.6, f"[here it is|today it is] {weather.adjective}[, and I think of you|].")
    tale.say(
        f"I [was|am] {PLACE[sender.place].inside} {sender.place} and [had time to write|want to ask you something]."
    )
    if receiver.child:
        tale.say(f"[Please come and see me|Come by tomorrow]. [I have a cake for you|You can {sender.work} with me].")
    else:
        tale.say(
            f"[I hear that you {receiver.work}.|You {receiver.work}, I know.] [Can you help me on "
            f"{rng.choice(('Monday', 'Tuesday', 'Friday', 'Sunday'))}?|I could use your help.]"
        )
    tale.maybe(0.5, f"I will bring [some|a little] {rng.choice(('bread', 'honey', 'cheese', 'fish', 'tea', 'cake'))}.")
    lines += [tale.text(), f"{rng.choice(('Your friend', 'Yours', 'With love'))}, {sender.name}"]
    return "\n".join(lines)


COUPLETS: tuple[tuple[str, str], ...] = (
    ("The boats go out across the bay", "and all come home at end of day"),
    ("The lamp is bright, the night is long", "and someone hums an evening song"),
    ("The wind is cold, the wind is strong", "it sings the sails a sailor's song"),
    ("The baker wakes before the sun", "and sells her bread when night is done"),
    ("The old grey sheep are on the hill", "the wheel goes round beside the mill"),
    ("The snow lies white on every stone", "but nobody sits all alone"),
    ("A seal looks up, a gull flies by", "the clouds are ships that sail the sky"),
    ("The nets are full, the ropes are tight", "the fire is warm, the moon is bright"),
    ("The kettle sings, the tea is hot", "the storm outside can find us not"),
    ("The smith has mended key and bell", "the children draw up from the well"),
    ("In summer when the bees fly low", "the apple trees are white as snow"),
    ("The rain may fall, the waves may rise", "the captain watches with wise eyes"),
    ("The market smells of fish and rope", "the harbour light is light and hope"),
    ("The fog comes in, the bell will ring", "and tired crews will hear it sing"),
)


def poem(rng: random.Random) -> str:
    """Four or six lines of rhyming pairs."""
    return "\n".join(f"{first},\n{second}." for first, second in rng.sample(COUPLETS, rng.choice((2, 2, 3))))


def plain_text(rng: random.Random) -> str:
    """One document that is not a conversation."""
    kind = rng.random()
    if kind < 0.72:
        return story(rng).tale.text()
    if kind < 0.74:
        return poem(rng)
    if kind < 0.8:
        return place_description(rng)
    if kind < 0.88:
        return person_description(rng)
    return day(rng) if kind < 0.95 else note(rng)

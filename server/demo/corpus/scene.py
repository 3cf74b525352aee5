"""What holds at a moment of a story: who is in it, where they are, what they carry; and how stories open and close.

A scene changes only through its methods, and each one both changes the state and tells it, so that a story cannot say
that someone gives away what they do not have, or meets a neighbour at a place that neither went to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from server.demo.corpus.telling import Item, Tale
from server.demo.corpus.world import (
    COLOURS,
    PEOPLE,
    PERSON,
    PETS,
    PLACE,
    PLACES,
    QUALITIES,
    SEASONS,
    THINGS,
    WEATHERS,
    WILD,
    Animal,
    Person,
    Place,
    Thing,
    Weather,
)

ASIDES: Final[dict[str, str]] = {
    "sunny": "The light danced on the water|Cats slept on the warm stones|Somebody was singing",
    "windy": "The sails of the boats rattled|A hat flew over the roofs|The flags stood straight in the wind",
    "cloudy": "The sea was as grey as the sky|A gull cried above the roofs|It looked like rain",
    "warm": "The bees hummed|The air smelled of hay|The children went without shoes",
    "rainy": "Water ran down the lane|The rain drummed on the roofs|Everyone who could stayed inside",
    "foggy": "One could hardly see a hand|The bell of the harbour rang softly|Everything was quiet and white",
    "stormy": "The waves broke over the wall|The windows shook|The wind howled in the chimney",
    "snowy": "The lane was white and quiet|Smoke rose from the chimneys|The snow creaked under every step",
}
"""By the weather's adjective: sentences without a full stop, divided by bars."""
T = TypeVar("T")


@dataclass
class Scene:
    """One story's state. `holder` says who has a thing; `where` where a being is."""

    tale: Tale
    weather: Weather
    hero: Person
    where: dict[Person | Animal, Place] = field(default_factory=dict)
    holder: dict[Item, Person] = field(default_factory=dict)
    used: set[object] = field(default_factory=set)
    star: Animal | None = None
    """The animal that the story was asked to be about."""

    @classmethod
    def begin(
        cls, rng: random.Random, hero: Person | None = None, place: Place | None = None, star: Animal | None = None
    ) -> Scene:
        """A scene with a hero at some place, before anything was told; what is not given is drawn."""
        tale = Tale(rng)
        chosen = hero or rng.choice(PEOPLE)
        scene = cls(tale, rng.choice(WEATHERS), chosen, star=star)
        scene.used.add(chosen)
        usual = PLACE[chosen.place] if rng.random() < 0.6 else rng.choice(PLACES)
        scene.where[chosen] = place or usual
        return scene

    @property
    def rng(self) -> random.Random:
        return self.tale.rng

    @property
    def here(self) -> Place:
        return self.where[self.hero]

    def person(self, fits: Callable[[Person], bool] = lambda person: True) -> Person:
        """A neighbour who is not in the story yet and for whom `fits` holds."""
        return self._fresh([person for person in PEOPLE if fits(person)])

    def named(self, name: str) -> Person:
        """This person, from now on in the story."""
        self.used.add(PERSON[name])
        return PERSON[name]

    def pet(self) -> Animal:
        return self.star if self.star in PETS else self._fresh(list(PETS))

    def wild(self) -> Animal:
        return self.star if self.star in WILD else self._fresh(list(WILD))

    def place(self) -> Place:
        """Somewhere new, other than where the hero is."""
        return self._fresh([place for place in PLACES if place != self.here])

    def item(self, fits: Callable[[Thing], bool] = lambda thing: True) -> Item:
        """A thing with a colour or a quality, or plain."""
        thing = self._fresh([thing for thing in THINGS if fits(thing)])
        return Item(thing, self.rng.choice((*COLOURS, *QUALITIES, "", "", "")))

    def _fresh(self, candidates: list[T]) -> T:
        left = [candidate for candidate in candidates if candidate not in self.used]
        chosen = self.rng.choice(left or candidates)
        self.used.add(chosen)
        return chosen

    def open(self) -> None:
        """The first sentences: who, when, where, and what the day is like."""
        tale, hero = self.tale, self.hero
        season = self.rng.choice(SEASONS)
        when = f"[one|one {season}|on a {self.weather.adjective}|one {self.weather.adjective}] [morning|day|afternoon]"
        if self.weather.adjective == "snowy":
            when = "one winter [morning|day|afternoon]"
        style = self.rng.randrange(6)
        if style == 0:
            tale.say(f"{when}, {{A}} was {{P.at}}.", A=hero, P=self.here)
            tale.maybe(0.5, f"{self.weather.begins}.")
        elif style == 1:
            tale.say(
                f"{{A}} [was the {hero.role} of Ternby|lived in Ternby]." if not hero.child else "{A} lived in Ternby.",
                A=hero,
            )
            tale.say(f"{when}, {{A}} went {{P.to}}.", A=hero, P=self.here)
        elif style == 2:
            tale.say(
                f"It was a {self.weather.adjective} [day|morning|afternoon] in Ternby. {{A}} was {{P.at}}.",
                A=hero,
                P=self.here,
            )
        elif style == 3:
            tale.say(f"{self.weather.begins}, [and|so|but] {{A}} [stayed|was] {{P.at}}.", A=hero, P=self.here)
        elif style == 4:
            child = f"a {hero.role}" if hero.child else f"a [{hero.trait}|good|young|tall] {hero.role}"
            tale.say(
                f"[Once upon a time, there [was|lived] {child} called|There was once {child} called] {{A.name}}.",
                A=hero,
            )
            tale.say(f"{when}, {{A}} [was {{P.at}}|went {{P.to}}].", A=hero, P=self.here)
        else:
            tale.say(f"{when}, {{A}} woke up early and [walked|went|ran] {{P.to}}.", A=hero, P=self.here)
        self.aside()
        if tale.chance(0.3):
            tale.say(f"{{A}} [loved|liked] {hero.loves}.", A=hero)

    def aside(self, probability: float = 0.35) -> None:
        """Perhaps a sentence about the weather or the place: nothing in the story hangs on it."""
        if not self.tale.chance(probability):
            return
        if self.tale.chance(0.5):
            self.tale.say(f"[{ASIDES[self.weather.adjective]}].")
        else:
            self.tale.say(
                f"[{{A}} looked at|{{A}} could see|{{A}} saw|{{A}} liked to look at] {self.here.sight}.", A=self.hero
            )

    def go(self, being: Person | Animal, place: Place, how: str = "[went|walked|ran|hurried]") -> None:
        """Moves someone, and says so."""
        self.where[being] = place
        self.tale.say(f"{{A}} {how} {{P.to}}.", A=being, P=place)
        if being == self.hero:
            self.aside(0.25)

    def give(self, item: Item, to: Person, how: str = "[gave|handed]") -> None:
        """Passes a thing on, from whoever holds it; raises KeyError where nobody does."""
        giver = self.holder[item]
        self.holder[item] = to
        self.tale.say(f"{{A}} {how} {{T}} to {{B}}.", A=giver, T=item, B=to)

    def meet(self, other: Person | Animal) -> None:
        """The hero comes upon someone at the place where the hero is."""
        self.where[other] = self.here
        template = (
            "[there|{P.at}] {A} [met|saw] {B}." if self.tale.chance(0.5) else "{B} was [there|{P.at}] [too|as well]."
        )
        self.tale.say(template, A=self.hero, B=other, P=self.here)

    def close(self, feeling: str, lesson: str = "") -> None:
        """The last sentences. `feeling` is an adjective phrase that follows from what happened."""
        tale, hero = self.tale, self.hero
        tale.say(
            "[{A} was FEEL.|{A} went home and was FEEL.|in the evening, {A} was FEEL.|that night, {A} sat by the "
            "fire and was FEEL.]".replace("FEEL", feeling),
            A=hero,
        )
        if lesson:
            tale.maybe(0.5, f'[From that day on, {{A}} knew that {lesson}.|"{lesson}," {{A}} said.]', A=hero)

"""Turning events into sentences: a small template language, articles, and pronouns that always have one reading.

A template is text with choices and slots:

    [went|ran] {A.to}         one of the alternatives, chosen by the tale's random source; they may nest, or be empty
    {A}                       a person or animal as subject: the name, or he/she where only one reading is possible
    {A.him} {A.his} {A.self}  object, possessive and reflexive; the name again where the pronoun would be ambiguous
    {A.name}                  always the name
    {T} {T.a} {T.it}          a thing: "a red box" when it is new, then "the red box"; always with a/an; "it"
    {P} {P.at} {P.to}         a place: "the hill", "on the hill", "to the hill"

Not the stories themselves: this file knows grammar, `plots` knows what happens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from server.demo.corpus.world import Animal, Gender, Person, Place, Thing

PRONOUNS: Final[dict[Gender, dict[str, str]]] = {
    "she": {"": "she", "him": "her", "his": "her", "self": "herself"},
    "he": {"": "he", "him": "him", "his": "his", "self": "himself"},
    "it": {"": "it", "him": "it", "his": "its", "self": "itself"},
}
_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")
_SLOT: Final = re.compile(r"\{(\w+)(?:\.(\w+))?\}")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def listing(items: Sequence[str], last: str = "and") -> str:
    """One, two and three; raises ValueError for no items."""
    if not items:
        raise ValueError("a list of 0 items has no words; at least 1 is accepted")
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def capital(sentence: str) -> str:
    """The sentence with its first letter in upper case, past an opening quotation mark."""
    for index, letter in enumerate(sentence):
        if letter.isalpha():
            return sentence[:index] + letter.upper() + sentence[index + 1 :]
    return sentence


@dataclass(frozen=True)
class Item:
    """One particular thing in a tale: a noun with its adjective, so that two boxes stay two boxes."""

    thing: Thing
    adjective: str

    @property
    def phrase(self) -> str:
        return f"{self.adjective} {self.thing.noun}" if self.adjective else self.thing.noun


Slot = Person | Animal | Item | Place | str


def being_name(being: Person | Animal) -> str:
    """What a person or animal is called when no pronoun will do."""
    return being.name or f"the {being.kind}" if isinstance(being, Animal) else being.name


@dataclass
class Tale:
    """A text in the making: sentences so far, who is being talked about, and questions that it answers."""

    rng: random.Random
    paragraphs: list[list[str]] = field(default_factory=lambda: [[]])
    questions: list[tuple[str, str]] = field(default_factory=list)
    known: set[Slot] = field(default_factory=set)
    _subject: Person | Animal | None = None
    _present: set[str] = field(default_factory=set)
    """Genders mentioned in the previous sentence besides the subject's own mention."""

    def choose(self, template: str) -> str:
        """The template with every choice made, innermost first."""
        while (match := _CHOICE.search(template)) is not None:
            chosen = self.rng.choice(match.group(1).split("|"))
            template = template[: match.start()] + chosen + template[match.end() :]
        return template

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, template: str, **slots: Slot) -> None:
        """Adds one or more sentences to the current paragraph; unknown slots raise KeyError."""
        self.paragraphs[-1].append(self.render(template, **slots))

    def maybe(self, probability: float, template: str, **slots: Slot) -> None:
        if self.chance(probability):
            self.say(template, **slots)

    def ask(self, question: str, answer: str, **slots: Slot) -> None:
        """Records a question that the story so far answers; names only, so that both stand alone."""
        plain = Tale(self.rng, known=set(self.known))
        asked = plain.render(question, **slots)
        plain._subject, plain._present = None, set()
        self.questions.append((asked, plain.render(answer, **slots)))

    def paragraph(self) -> None:
        """Starts a new paragraph; its first subject is named again."""
        if self.paragraphs[-1]:
            self.paragraphs.append([])
        self._subject = None

    def text(self) -> str:
        return "\n".join(" ".join(sentences) for sentences in self.paragraphs if sentences)

    def render(self, template: str, **slots: Slot) -> str:
        """The sentences of a template with slots filled; keeps track of who may be a pronoun."""
        return " ".join(
            self._sentence(part, slots) for part in re.split(r"(?<=[.!?]) +(?=[A-Z{])", self.choose(template).strip())
        )

    def _sentence(self, template: str, slots: dict[str, Slot]) -> str:
        template = re.sub(r"said \{(\w+)\}", r"said {\1.name}", template)  # "said she" is not modern English
        named = [slots[match.group(1)] for match in _SLOT.finditer(template)]
        beings = [slot for slot in named if isinstance(slot, Person | Animal)]
        mentioned: list[Person | Animal] = []

        def fill(match: re.Match[str]) -> str:
            slot, form = slots[match.group(1)], match.group(2) or ""
            if isinstance(slot, Person | Animal):
                word = self._being(slot, form, beings, mentioned)
                mentioned.append(slot)
                return word
            return self._other(slot, form)

        sentence = re.sub(r"\s+([,.!?])", r"\1", re.sub(r"  +", " ", _SLOT.sub(fill, template))).strip()
        if beings:
            self._subject = beings[0]
            self._present = {being.gender for being in beings if being != beings[0]}
        return capital(sentence)

    def _being(
        self, being: Person | Animal, form: str, beings: list[Person | Animal], mentioned: list[Person | Animal]
    ) -> str:
        name = being_name(being)
        if form == "name":
            self.known.add(being)
            return name
        rivals = {other.gender for other in beings if other != being} | (self._present if not mentioned else set())
        alone = being.gender not in rivals
        earlier = being in mentioned or (not mentioned and being == self._subject)
        first_word = form == "" and being not in mentioned
        if form == "self" and mentioned and mentioned[0] == being:
            return PRONOUNS[being.gender]["self"]
        clear = earlier and (alone or (form == "his" and mentioned[:1] == [being] and mentioned[-1] == being))
        if clear and not (first_word and (being not in self.known or self.chance(0.15))):
            self.known.add(being)
            return PRONOUNS[being.gender][form]
        if isinstance(being, Animal) and not being.name and being not in self.known:
            name = article(being.kind)
        self.known.add(being)
        return f"{name}'s" if form == "his" else name

    def _other(self, slot: Slot, form: str) -> str:
        if isinstance(slot, Place):
            return {"": slot.name, "at": f"{slot.inside} {slot.name}", "to": f"to {slot.name}"}[form]
        if isinstance(slot, Item):
            if form == "it":
                return "it"
            if form == "bare":
                self.known.add(slot)
                return slot.phrase
            new = form == "a" or (form == "" and slot not in self.known)
            self.known.add(slot)
            return article(slot.phrase) if new else f"the {slot.phrase}"
        if isinstance(slot, str) and form == "a":
            return article(slot)
        return str(slot)

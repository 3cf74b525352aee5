"""The village of Ternby: who lives there, what stands there, what lies about. Fixed facts, no randomness, no sentences.

Every story and every answer draws on these tables, so that a fact asked for twice has one answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Gender = Literal["she", "he", "it"]
Material = Literal["iron", "wood", "cloth", "wool"]


@dataclass(frozen=True)
class Place:
    """Somewhere in the village; `inside` is the preposition for being there ("in", "at", "on")."""

    name: str
    inside: str
    sight: str
    """What one sees there, a plural or mass noun phrase."""
    near: str
    """The key of a place next to it."""

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True)
class Person:
    name: str
    gender: Gender
    role: str
    """A noun phrase without article: "baker", "lighthouse keeper"; children have "girl" or "boy"."""
    place: str
    work: str
    """What they do all day, a verb phrase after "to"."""
    loves: str
    trait: str
    kin: str = ""
    """A child's parent or grandparent as a phrase: "the daughter of Tilda"."""

    @property
    def child(self) -> bool:
        return self.role in ("girl", "boy")


@dataclass(frozen=True)
class Animal:
    kind: str
    gender: Gender
    name: str = ""
    owner: str = ""
    eats: str = ""
    sound: str = ""


@dataclass(frozen=True)
class Thing:
    noun: str
    material: Material | Literal["other"] = "other"
    use: str = ""
    """What it is for, a verb phrase after "to"."""
    breaks: str = ""
    """How it breaks, a past-tense verb phrase; empty where it cannot."""
    big: bool = False
    """Too big for a pocket."""


@dataclass(frozen=True)
class Weather:
    adjective: str
    noun: str
    """A noun phrase with article or mass: "a storm", "rain"."""
    begins: str
    """A clause in the past tense."""
    bad: bool = False


PLACES: Final = (
    Place("the harbour", "at", "boats and nets", "the market"),
    Place("the market", "at", "stalls full of fish and apples", "the inn"),
    Place("the lighthouse", "at", "a white tower and a great lamp", "the beach"),
    Place("the bakery", "in", "warm bread on long shelves", "the market"),
    Place("the smithy", "in", "a red fire and black tools", "the old bridge"),
    Place("the boat shed", "in", "planks and half a boat", "the harbour"),
    Place("the school", "in", "small chairs and a big map", "the well"),
    Place("the inn", "at", "a long table and a warm stove", "the market"),
    Place("the mill", "at", "a turning wheel and sacks of flour", "the old bridge"),
    Place("the hill", "on", "grass and grey sheep", "the wood"),
    Place("the herb garden", "in", "mint and thyme in neat rows", "the well"),
    Place("the sail loft", "in", "white cloth and strong thread", "the boat shed"),
    Place("the beach", "on", "shells and wet sand", "the harbour"),
    Place("the orchard", "in", "apple trees and bee hives", "the hill"),
    Place("the old bridge", "on", "slow green water", "the mill"),
    Place("the wood", "in", "tall trees and soft moss", "the hill"),
    Place("the well", "at", "cold clear water", "the school"),
    Place("the weaving house", "in", "a loom and wool of every colour", "the well"),
)

PEOPLE: Final = (
    Person("Mara", "she", "fisherwoman", "the harbour", "catch fish in the bay", "quiet mornings", "brave"),
    Person("Jory", "he", "ferryman", "the harbour", "row people across the bay", "old songs", "patient"),
    Person("Tilda", "she", "baker", "the bakery", "bake bread before the sun is up", "honey cake", "generous"),
    Person("Anselm", "he", "lighthouse keeper", "the lighthouse", "light the lamp every night", "stars", "careful"),
    Person("Hanne", "she", "smith", "the smithy", "mend iron things", "loud thunder", "strong"),
    Person("Corin", "he", "boat builder", "the boat shed", "build boats and mend wood", "the smell of wood", "calm"),
    Person("Odette", "she", "teacher", "the school", "teach the children to read", "long books", "clever"),
    Person("Bram", "he", "innkeeper", "the inn", "cook soup for hungry travellers", "company", "cheerful"),
    Person("Edda", "she", "weaver", "the weaving house", "weave blankets of wool", "hot tea", "wise"),
    Person("Silas", "he", "miller", "the mill", "grind grain into flour", "the sound of water", "stubborn"),
    Person("Greta", "she", "healer", "the herb garden", "make medicine from herbs", "mint tea", "gentle"),
    Person("Rufus", "he", "shepherd", "the hill", "watch over the sheep", "long walks", "shy"),
    Person("Nessa", "she", "sail maker", "the sail loft", "sew sails for the boats", "windy days", "quick"),
    Person("Teodor", "he", "shopkeeper", "the market", "sell apples, rope and candles", "shiny coins", "proud"),
    Person("Linnea", "she", "beekeeper", "the orchard", "care for the bees", "summer", "patient"),
    Person("Halvar", "he", "old captain", "the beach", "tell tales of the sea", "the smell of salt", "wise"),
    Person("Wren", "she", "girl", "the bakery", "carry bread to the neighbours", "kites", "curious", "Tilda"),
    Person("Pia", "she", "girl", "the boat shed", "paint small boats", "paint", "bold", "Corin"),
    Person("Lotte", "she", "girl", "the mill", "feed the ducks", "ducks", "kind", "Silas"),
    Person("Kit", "he", "boy", "the lighthouse", "count the ships", "maps", "curious", "Anselm"),
    Person("Otto", "he", "boy", "the smithy", "fetch water for the fire", "sweet pies", "honest", "Hanne"),
    Person("Ivo", "he", "boy", "the inn", "wash the cups", "jokes", "lively", "Bram"),
    Person("Fenn", "he", "boy", "the herb garden", "look for mushrooms", "small animals", "shy", "Greta"),
)
PERSON: Final = {person.name: person for person in PEOPLE}
PLACE: Final = {place.name: place for place in PLACES}

PETS: Final = (
    Animal("dog", "he", "Moss", "Rufus", "bones", "barked"),
    Animal("cat", "she", "Button", "Anselm", "fish", "meowed"),
    Animal("goat", "she", "Clover", "Greta", "grass", "bleated"),
    Animal("donkey", "he", "Barley", "Silas", "carrots", "brayed"),
    Animal("hen", "she", "Marigold", "Tilda", "corn", "clucked"),
    Animal("pony", "he", "Thistle", "Teodor", "hay", "neighed"),
    Animal("crow", "he", "Ink", "Hanne", "seeds", "cawed"),
    Animal("duck", "she", "Puddle", "Lotte", "bread", "quacked"),
)
WILD: Final = (
    Animal("seal", "it", eats="fish", sound="barked"),
    Animal("otter", "it", eats="fish", sound="squeaked"),
    Animal("fox", "it", eats="berries", sound="yelped"),
    Animal("hedgehog", "it", eats="apples", sound="snuffled"),
    Animal("gull", "it", eats="crumbs", sound="cried"),
    Animal("hare", "it", eats="clover", sound="squeaked"),
    Animal("owl", "it", eats="mice", sound="hooted"),
    Animal("lamb", "it", eats="grass", sound="bleated"),
)

THINGS: Final = (
    Thing("lantern", "iron", "see in the dark", "fell and cracked"),
    Thing("key", "iron", "open the door", "bent in the lock"),
    Thing("kettle", "iron", "boil water", "sprang a leak"),
    Thing("bell", "iron", "call people to dinner", "lost its tongue"),
    Thing("hammer", "iron", "drive nails", "lost its head"),
    Thing("anchor", "iron", "hold the boat still", "snapped on a rock", big=True),
    Thing("whistle", "iron", "call the dog", "stopped making a sound"),
    Thing("pan", "iron", "fry fish", "lost its handle"),
    Thing("oar", "wood", "row the boat", "broke in two", big=True),
    Thing("ladder", "wood", "reach high places", "lost a step", big=True),
    Thing("bucket", "wood", "carry water", "split at the side"),
    Thing("chair", "wood", "sit by the fire", "lost a leg", big=True),
    Thing("fiddle", "wood", "play for the dancers", "cracked along the side"),
    Thing("box", "wood", "keep small things safe", "lost its lid"),
    Thing("spoon", "wood", "stir the soup", "broke in two"),
    Thing("cart", "wood", "carry heavy sacks", "lost a wheel", big=True),
    Thing("sail", "cloth", "catch the wind", "tore from top to bottom", big=True),
    Thing("kite", "cloth", "play in the wind", "tore on a branch"),
    Thing("bag", "cloth", "carry apples", "ripped open"),
    Thing("coat", "cloth", "keep out the rain", "tore on a nail"),
    Thing("flag", "cloth", "greet the ships", "ripped in the wind"),
    Thing("blanket", "wool", "keep warm at night", "came apart at one end", big=True),
    Thing("scarf", "wool", "keep warm", "caught on a thorn and came apart"),
    Thing("hat", "wool", "keep warm", "lost half its wool"),
    Thing("sock", "wool", "keep warm", "got a large hole"),
    Thing("book", use="read in the evening"),
    Thing("map", use="find the way"),
    Thing("coin", use="buy bread"),
    Thing("ring", use="remember an old friend"),
    Thing("candle", use="read at night"),
    Thing("letter", use="send good news"),
    Thing("shell", use="hear the sea"),
    Thing("basket", use="carry eggs"),
    Thing("drum", use="play a march"),
    Thing("ball", use="play on the beach"),
    Thing("cup", use="drink tea"),
)
THING: Final = {thing.noun: thing for thing in THINGS}
MENDER: Final[dict[str, str]] = {"iron": "Hanne", "wood": "Corin", "cloth": "Nessa", "wool": "Edda"}

COLOURS: Final = ("red", "blue", "green", "yellow", "white", "brown", "grey", "black")
QUALITIES: Final = ("old", "small", "new", "little", "round", "fine")
FOODS: Final = (
    "bread",
    "soup",
    "fish",
    "cheese",
    "honey",
    "apples",
    "pie",
    "cake",
    "eggs",
    "berries",
    "tea",
    "porridge",
)
DISHES: Final[dict[str, tuple[str, ...]]] = {
    "fish soup": ("fish", "onions", "salt"),
    "apple pie": ("apples", "flour", "butter"),
    "honey cake": ("honey", "flour", "eggs"),
    "porridge": ("oats", "milk", "berries"),
    "pancakes": ("flour", "eggs", "milk"),
    "mushroom stew": ("mushrooms", "onions", "herbs"),
    "cheese bread": ("cheese", "flour", "salt"),
    "berry jam": ("berries", "sugar", "water"),
}
INGREDIENT_FROM: Final[dict[str, str]] = {
    "fish": "Mara",
    "onions": "Teodor",
    "salt": "Halvar",
    "apples": "Linnea",
    "flour": "Silas",
    "butter": "Bram",
    "honey": "Linnea",
    "eggs": "Tilda",
    "oats": "Silas",
    "milk": "Rufus",
    "berries": "Fenn",
    "mushrooms": "Fenn",
    "herbs": "Greta",
    "cheese": "Rufus",
    "sugar": "Teodor",
    "water": "Lotte",
}
WEATHERS: Final = (
    Weather("sunny", "sun", "the sun shone on the roofs"),
    Weather("windy", "wind", "a fresh wind blew from the sea"),
    Weather("cloudy", "clouds", "grey clouds hung over the bay"),
    Weather("warm", "warm air", "the air was warm and still"),
    Weather("rainy", "rain", "rain fell on the village", bad=True),
    Weather("foggy", "fog", "thick fog covered the bay", bad=True),
    Weather("stormy", "a storm", "a storm came in from the sea", bad=True),
    Weather("snowy", "snow", "snow fell on the roofs", bad=True),
)
SEASONS: Final = ("spring", "summer", "autumn", "winter")
NUMBERS: Final = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]

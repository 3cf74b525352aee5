"""Episodes about the village as a whole: illness, treasure, messages, music, boat building, a lost lamb, a busy night.

The same contract as `plots_things`: a scene goes in, is changed and told, and the hero's feeling and lesson come out.
"""

from __future__ import annotations

from server.demo.corpus.plots_things import Outcome
from server.demo.corpus.scene import Scene
from server.demo.corpus.telling import article
from server.demo.corpus.world import COLOURS, NUMBERS, PERSON, PETS, PLACE

CURES = (
    ("a bad cough", "honey and thyme"),
    ("a fever", "willow bark"),
    ("a sore throat", "warm milk and honey"),
    ("a burnt hand", "cool leaves"),
    ("a bad tooth", "mint oil"),
    ("a swollen foot", "a cold wet cloth"),
)
BOAT_NAMES = ("Grey Heron", "Little Star", "Summer Wind", "Brave Otter", "Blue Thistle", "Silver Fish", "Good Hope")
TREASURES = (
    ("a box of old coins", "bought new ropes for the harbour"),
    ("a golden ring", "gave it to its owner, an old woman"),
    ("a bottle with a letter", "read the letter aloud at the inn"),
    ("nothing but a friendly crab", "laughed for a long time"),
    ("a bag of glass beads", "gave one to every child"),
)


def illness(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    trouble, cure = scene.rng.choice(CURES)
    ill = scene.person(lambda person: person.name != "Greta")
    healer = PERSON["Greta"]
    tale.say(f"{{B}} [was in bed with|had] {trouble} and [could not work|could not sleep].", B=ill)
    if hero == healer:
        tale.say(f"{{A}} [looked at {{B}}|sat down beside {{B}}] and made a medicine of {cure}.", A=hero, B=ill)
    else:
        scene.where[hero] = PLACE[healer.place]
        tale.say("{A} [ran|hurried|went] {P.to} to ask {C}.", A=hero, C=healer, P=scene.here)
        tale.say(f'"[For this one needs|{{B}} needs] {cure}," said {{C}}.', B=ill, C=healer)
        tale.say("{A} [brought it to|took it to|gave it to] {B} the same [day|evening].", A=hero, B=ill)
        tale.ask("Who knew what to do?", "{C} the healer knew what to do.", C=healer)
    days = scene.rng.randint(2, 6)
    tale.say(f"After {NUMBERS[days]} days, {{B}} was [well again|up again and singing].", B=ill)
    tale.ask("Who was ill?", f"{{B}} was. {{B}} had {trouble}.", B=ill)
    tale.ask("What helped {B}?", f"What helped was {cure}.", B=ill)
    tale.ask("How long was {B} ill?", f"It took {NUMBERS[days]} days.", B=ill)
    return f"[happy that {ill.name} was well|glad to have helped]", "care is half of the cure"


def treasure(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    treasure_found, use = scene.rng.choice(TREASURES)
    found_map, spot = scene.place(), scene.place()
    friend = scene.person()
    tale.say("{P.at}, {A} found an old map. There was a [red cross|black cross] on it.", A=hero, P=found_map)
    tale.say(f'"[That is|The cross is] {spot.inside} {spot.name}," said {{B}}, who knew every path.', B=friend)
    scene.where[hero] = scene.where[friend] = spot
    tale.say("{A} and {B} took a spade and went {P.to}.", A=hero, B=friend, P=spot)
    tale.say(f"They [dug for an hour|dug a deep hole] and found {treasure_found}.")
    tale.say(f"{{A}} {use}.", A=hero)
    tale.ask("What did they find?", f"They found {treasure_found}.")
    tale.ask("Where did they dig?", "They dug {P.at}.", P=spot)
    tale.ask("Where did {A} find the map?", "{A} found the map {P.at}.", A=hero, P=found_map)
    return "[happy|dirty, but happy]", "the search was the best part"


def bottle(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    writer = scene.person()
    days = scene.rng.randint(3, 12)
    scene.where[hero] = PLACE["the beach"]
    tale.say("{A} walked along the beach and saw a bottle in the [sand|water]. There was a letter in it.", A=hero)
    wish = scene.rng.choice(
        (
            "I would like to have a friend",
            "I am on the small island, and my boat is broken",
            "whoever finds this, be happy",
        )
    )
    tale.say(f'"{wish[0].upper() + wish[1:]}," it said. The name under it was {{B.name}}.', B=writer)
    if "island" in wish:
        tale.say("{A} [called Jory|ran to the harbour] at once, and {A} came to the island before dark.", A=hero)
        tale.say("{B} was [cold|hungry], but safe.", B=writer)
        tale.ask("Where was {B}?", "{B} was on the small island.", B=writer)
        return f"[glad that {writer.name} was safe|glad to have walked on the beach]", "one should read every letter"
    tale.say(
        f"The letter was {NUMBERS[days]} days old. {{A}} [wrote an answer|went to see {{B}}] the same evening.",
        A=hero,
        B=writer,
    )
    tale.say("Since then, {A} and {B} [write to each other|have tea together] every week.", A=hero, B=writer)
    tale.ask("Who wrote the letter?", "{B} wrote the letter.", B=writer)
    tale.ask("How old was the letter?", f"It was {NUMBERS[days]} days old.")
    return "[happy to have a new friend|glad about the letter]", "a letter can travel far"


def music(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    player = scene.person()
    instrument = scene.rng.choice(("fiddle", "drum", "flute", "harp"))
    scene.where[hero] = PLACE["the inn"]
    tale.say(
        "[There was a feast at the inn|In the evening, everyone came to the inn], but nobody [played|would begin "
        "to play]."
    )
    tale.say(
        f"{{A}} [saw|knew] that {{B}} had {article(instrument)} at home. {{B}} was [too shy|afraid to play in "
        f"front of people].",
        A=hero,
        B=player,
    )
    tale.say('"[I will sing|I will dance], and you only have to play for me," said {A}.', A=hero)
    tale.say(
        f"So {{B}} [went home and fetched|brought] the {instrument}. At first {{B}} played softly, then louder.",
        B=player,
    )
    tale.say("[Soon everyone danced|People clapped and danced] until [midnight|the candles went out].")
    tale.ask("What did {B} play?", f"{{B}} played the {instrument}.", B=player)
    tale.ask("Why did {B} not play at first?", "Because {B} was afraid of so many people.", B=player)
    return f"[tired from dancing|happy for {player.name}]", "courage grows in company"


def new_boat(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    builder, sewer = PERSON["Corin"], PERSON["Nessa"]
    name, colour = scene.rng.choice(BOAT_NAMES), scene.rng.choice(COLOURS)
    weeks = scene.rng.randint(2, 9)
    scene.where[hero] = PLACE["the boat shed"]
    tale.say("{A} wanted [a boat|a small boat] [for fishing|to sail to the island|for the summer].", A=hero)
    if hero != builder:
        tale.say(
            f"{{B}} the boat builder cut the planks, and {{A}} held them[ in place|]. It took {NUMBERS[weeks]} weeks.",
            A=hero,
            B=builder,
        )
    else:
        tale.say(f"{{A}} cut the planks and bent them over steam. It took {NUMBERS[weeks]} weeks.", A=hero)
    if hero != sewer:
        tale.say(f"{{C}} sewed a {colour} sail for it.", C=sewer)
        tale.ask("Who sewed the sail?", "{C} sewed it.", C=sewer)
    else:
        tale.say(f"{{A}} sewed a {colour} sail for it.", A=hero)
    tale.say(f"{{A}} called the boat {name}.", A=hero)
    first = scene.person()
    tale.say(
        "{D} was the first guest on board. They sailed [around the island|across the bay] and came back with the "
        "evening wind.",
        D=first,
    )
    tale.ask("What was the boat called?", f"The boat was called {name}.")
    tale.ask("What colour was the sail?", f"The sail was {colour}.")
    tale.ask("How long did it take to build the boat?", f"It took {NUMBERS[weeks]} weeks.")
    return "[proud of the boat|very proud]", "many hands make a good boat"


def lost_lamb(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    shepherd, dog = PERSON["Rufus"], PETS[0]
    count, spot = scene.rng.randint(8, 20), scene.place()
    if hero == shepherd:
        tale.say(
            f"{{A}} counted the sheep. There were {NUMBERS[count - 1]}, but there should be {NUMBERS[count]}.", A=hero
        )
    else:
        tale.say(
            f'"I have {NUMBERS[count]} sheep, but today I counted only {NUMBERS[count - 1]}," said {{B}}.', B=shepherd
        )
        tale.say("{A} [wanted to help|offered to help] {B}.", A=hero, B=shepherd)
    tale.ask("How many sheep were missing?", "One sheep was missing.")
    tale.say("They took Moss the dog with them. [Moss put his nose to the ground|Moss ran ahead] and barked.")
    scene.where[hero] = spot
    tale.say(
        "{P.at}, {A} saw [something white|a small white thing]. It was the lamb, [asleep|hungry and cold].",
        A=hero,
        P=spot,
    )
    tale.say(f"{{A}} carried it home, and now there were {NUMBERS[count]} sheep again.", A=hero)
    tale.ask("Where was the lamb?", "It was {P.at}.", P=spot)
    tale.ask("Who is Moss?", f"Moss is the {dog.kind} of {dog.owner}.")
    return "[glad that the lamb was back|tired, but glad]", "every single one counts"


VILLAGE_PLOTS = (illness, treasure, bottle, music, new_boat, lost_lamb)

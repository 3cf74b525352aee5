"""Episodes about people, animals and the sea: rescues, storms, contests, quarrels, lessons, visits, games, gardens.

The same contract as `plots_things`: a scene goes in, is changed and told, and the hero's feeling and lesson come out.
"""

from __future__ import annotations

from server.demo.corpus.plots_things import Outcome
from server.demo.corpus.scene import Scene
from server.demo.corpus.telling import capital, listing
from server.demo.corpus.world import COLOURS, NUMBERS, PERSON, PLACE, PLACES, WEATHERS

LESSONS = (
    ("swim", "Mara", "swallowed a lot of water"),
    ("bake bread", "Tilda", "burnt the bread"),
    ("tie knots", "Jory", "tied the rope to a foot"),
    ("play the fiddle", "Bram", "made a terrible noise"),
    ("read maps", "Odette", "held the map upside down"),
    ("weave", "Edda", "lost the thread"),
    ("sail", "Halvar", "fell into the water"),
    ("sew", "Nessa", "sewed the sleeve shut"),
    ("milk a sheep", "Rufus", "spilled all the milk"),
    ("find herbs", "Greta", "picked only grass"),
    ("whistle", "Ivo", "made no sound at all"),
    ("draw boats", "Pia", "drew a boat that looked like a shoe"),
)


def rescue(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    animal = scene.wild()
    trap, tool = scene.rng.choice(
        (
            ("caught in a net", "knife to cut the net"),
            ("stuck in the mud", "rope to pull it out"),
            ("at the bottom of a deep hole", "ladder to climb down"),
            ("on a high branch and afraid", "ladder to climb up"),
            ("under a fallen tree", "strong rope"),
            ("hurt at one leg", "clean cloth for the leg"),
        )
    )
    place = scene.place()
    scene.go(hero, place, "[went|walked]")
    tale.say(
        "[There|Suddenly] {A} heard a [small|strange|sad] sound. It was {B}, TRAP.".replace("TRAP", trap),
        A=hero,
        B=animal,
    )
    helper = scene.person() if tale.chance(0.7) else None
    if helper is not None:
        tale.say(f"{{A}} [ran to fetch|called] {{C}}, who [had|brought] a {tool}.", A=hero, C=helper)
        tale.say("Together, they [freed|saved|helped] {B}.", B=animal)
        tale.ask("Who helped {A}?", "{C} helped {A.him}.", A=hero, C=helper)
    else:
        tale.say(f"{{A}} [had|found] a {tool} and [freed|saved|helped] {{B}}.", A=hero, B=animal)
    tale.say(f"{{A}} gave {{B.him}} some {animal.eats}[ and some water|].", A=hero, B=animal)
    ending = scene.rng.randrange(3)
    if ending == 0:
        tale.say("{B} [looked back once and went home|slipped away quietly].", B=animal)
    elif ending == 1:
        tale.say("{B} would not leave and followed {A} home.", A=hero, B=animal)
        tale.ask(f"Where did the {animal.kind} go?", f"The {animal.kind} followed {{A}} home.", A=hero)
    else:
        tale.say("The next day, {B} came back and [sat beside {A}|brought {A.him} a shell].", A=hero, B=animal)
    tale.ask(
        "What did {A} find?",
        f"{{A}} found a {animal.kind} {trap}."
        if animal.kind != "owl" and animal.kind != "otter"
        else f"{{A}} found an {animal.kind} {trap}.",
        A=hero,
    )
    return f"[happy that the {animal.kind} was safe|glad to have a new friend]", "even small animals need help"


def storm(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    scene.weather = WEATHERS[6]
    wise = scene.named("Halvar") if hero.name != "Halvar" else scene.named("Edda")
    scene.where[hero] = PLACE["the harbour"]
    tale.say(
        "[{A} wanted to [sail|row] out GOAL.|{A} was about to [sail|row] out GOAL."
        "|{A} made the boat ready to go out GOAL.|The boat was ready, and {A} meant to go out GOAL.]".replace(
            "GOAL", scene.rng.choice(("to catch fish", "to the small island", "across the bay", "to the seals"))
        ),
        A=hero,
    )
    sign = scene.rng.choice(
        ("the gulls fly low", "the clouds are dark in the west", "the wind has turned", "my old knee hurts")
    )
    tale.say(
        f'"[Do not go out today|Stay here|Wait until tomorrow]," [said {{B}}|{{B}} called]. "{capital(sign)}. '
        '[A storm is coming|There will be a storm]."',
        B=wise,
    )
    tale.ask(
        "Why did {B} say that a storm was coming?",
        f"Because {sign}." if not sign.startswith("my") else "Because {B.his} old knee hurt.",
        B=wise,
    )
    if tale.chance(0.5):
        tale.say("{A} [listened|trusted {B.him}] and tied the boat [to the wall|with two ropes].", A=hero, B=wise)
        tale.say(
            "[In the afternoon|An hour later], the storm came. The waves were as high as a house, but {A} was "
            "safe [at the inn|in the boat shed].",
            A=hero,
        )
        tale.ask("Did {A} go out to sea?", "No, {A} listened to {B} and stayed.", A=hero, B=wise)
        return "[glad to be dry and safe|thankful to NAME]".replace(
            "NAME", wise.name
        ), "it is wise to listen to old people"
    saver = scene.named("Jory") if hero.name != "Jory" else scene.named("Mara")
    tale.say("But {A} [laughed and went out|did not listen|would not wait].", A=hero)
    tale.say(
        "Soon the storm came. [Water filled the boat|The sail tore|A wave took the oars], and {A} was afraid.", A=hero
    )
    tale.say(
        "[From the shore|From the lighthouse], {C} saw the small boat. {C} rowed out and pulled {A} out of the water.",
        A=hero,
        C=saver,
    )
    tale.ask("Who saved {A}?", "{C} saved {A.him}.", A=hero, C=saver)
    tale.ask("Did {A} listen to {B}?", "No, {A} went out to sea and met the storm.", A=hero, B=wise)
    return "[cold and wet, but alive|very thankful to NAME]".replace(
        "NAME", saver.name
    ), "the sea is stronger than we are"


def contest(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    kind, skill = scene.rng.choice(
        (
            ("a boat race", "rowed"),
            ("a running race", "ran"),
            ("a swimming race", "swam"),
            ("a baking contest", "baked"),
            ("a singing contest", "sang"),
        )
    )
    rival = scene.person(lambda person: person.child == hero.child)
    tale.say(f"There was {kind} in Ternby. [Both {{A}} and {{B}}|{{A}} and {{B}}] wanted to win.", A=hero, B=rival)
    win = tale.chance(0.45)
    if skill in ("baked", "sang"):
        tale.say(
            "{A} practised [every day|for two weeks], [and|but] {B} [practised too|thought that it was easy].",
            A=hero,
            B=rival,
        )
        winner = hero if win else rival
        tale.say(f"On the day of the contest, {{A}} {skill} [well|very well], and everyone clapped.", A=hero)
        tale.say("[In the end|At the end], {A} [won first prize|was the best].", A=winner)
    else:
        tale.say("{A} was [fast|strong|quick], but {B} was [fast|strong|quick] too.", A=hero, B=rival)
        if not win and tale.chance(0.5):
            tale.say(
                f"{{A}} {skill} in front. Then {{B}} [fell|was hurt|lost the way], and {{A}} stopped to help "
                f"{{B.him}}.",
                A=hero,
                B=rival,
            )
            other = scene.person()
            tale.say("So {C} won the race, and {A} and {B} came in last, side by side.", A=hero, B=rival, C=other)
            tale.ask("Who won the race?", "{C} won the race.", C=other)
            tale.ask("Why did {A} not win?", "Because {A} stopped to help {B}.", A=hero, B=rival)
            return "[proud all the same|happy to have helped]", "a friend is worth more than a prize"
        winner, loser = (hero, rival) if win else (rival, hero)
        tale.say(
            f"[At first|In the beginning], {{B}} {skill} in front. But [near the end|at the last moment], {{A}} "
            f"was faster and won.",
            A=winner,
            B=loser,
        )
    tale.ask("Who won?", "{A} won.", A=winner)
    if win:
        tale.say("{B} [shook {A.his} hand|said well done to {A}].", A=hero, B=rival)
        return "[proud and tired|very proud]", "work makes one better"
    tale.say('{A} was sad at first. Then {A} said "[Well done|You were better]" to {B}.', A=hero, B=rival)
    return "[sure that there would be a next time|not sad any more]", "it is fine to lose"


def quarrel(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    friend = scene.person()
    item = scene.item()
    cause = scene.rng.randrange(3)
    if cause == 0:
        tale.say("{A} and {B} [both wanted|could not agree who should have] {T}.", A=hero, B=friend, T=item)
        mend = "They [took turns with|shared] {T}."
        why = f"They both wanted the {item.phrase}."
    elif cause == 1:
        tale.say("{A} took {B.his} {T.bare} without asking.", A=hero, B=friend, T=item)
        mend = "{A} brought {T} back and [promised to ask next time|said that it would not happen again]."
        why = f"{{A}} took the {item.phrase} without asking."
    else:
        tale.say("{A} laughed at {B.his} {T.bare}, and {B} [was hurt|turned red].", A=hero, B=friend, T=item)
        mend = "{A} [praised {T}|said that {T} was beautiful after all]."
        why = f"{{A}} laughed at the {item.phrase}."
    tale.ask(
        "Why did {A} and {B} quarrel?",
        f"Because {why[0].lower() + why[1:]}" if not why.startswith("{") else f"Because {why}",
        A=hero,
        B=friend,
    )
    tale.say(
        "They [shouted|quarrelled], and [for two days|for a whole day|until the evening] they did not [speak|say "
        "a word]."
    )
    if tale.chance(0.5):
        third = scene.person(lambda person: person.trait in ("wise", "gentle", "patient", "kind", "generous"))
        tale.say(
            '"[A friend is worth more than that|Talk to each other|Do not be angry for long]," {C} said to {A}.',
            A=hero,
            C=third,
        )
        tale.ask("Who talked to {A}?", "{C} talked to {A.him}.", A=hero, C=third)
    tale.say("[In the end|At last], {A} went to {B} and said sorry. " + mend, A=hero, B=friend, T=item)
    return "[glad that they were friends again|happy to have NAME as a friend]".replace(
        "NAME", friend.name
    ), "saying sorry is not hard"


def lesson(scene: Scene) -> Outcome:
    tale, learner = scene.tale, scene.hero
    skill, teacher_name, first = scene.rng.choice([row for row in LESSONS if row[1] != learner.name])
    teacher = scene.named(teacher_name)
    days = scene.rng.randint(2, 7)
    tale.say(
        f"{{A}} wanted to learn how to {skill}, so {{A}} asked {{B}} [for help|to be the teacher].",
        A=learner,
        B=teacher,
    )
    tale.say(f"On the first day, {{A}} {first}[, and {{B}} had to laugh|].", A=learner, B=teacher)
    tale.say(
        '"[Try again|Slowly|Do not give up]," said {B}. {A} tried again [and again|every day].', A=learner, B=teacher
    )
    tale.say(
        f"After {NUMBERS[days]} days, {{A}} could {skill} [well|without help|almost as well as {{B}}].",
        A=learner,
        B=teacher,
    )
    tale.ask("What did {A} learn?", f"{{A}} learned how to {skill}.", A=learner)
    tale.ask("Who taught {A}?", "{B} taught {A.him}.", A=learner, B=teacher)
    tale.ask("How long did it take?", f"It took {NUMBERS[days]} days.")
    return "[proud|proud and thankful]", "nobody is good at the start"


def fog(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    scene.weather = WEATHERS[5]
    keeper = PERSON["Anselm"]
    sailor = scene.person(lambda person: person not in (keeper, hero))
    tale.say(
        "In the evening, thick fog [came in from the sea|covered the bay], and {B} was still out in a boat.", B=sailor
    )
    if tale.chance(0.5) and hero != keeper:
        scene.used.add(keeper)
        tale.say(
            "The lamp of the lighthouse was dark, because [there was no oil left|the glass was broken|{C} was ill].",
            C=keeper,
        )
        tale.say(
            "{A} [ran to the lighthouse|climbed the hundred steps] and lit a [big fire|lantern] [at the top|by "
            "the window].",
            A=hero,
        )
        light = "the light"
        tale.ask("What did {A} do?", "{A} lit a light in the lighthouse.", A=hero)
    else:
        tale.say(
            "{A} [took a bell and rang it|stood on the wall and rang the bell] [again and again|all night].", A=hero
        )
        light = "the bell"
        tale.ask("What did {A} do?", "{A} rang a bell.", A=hero)
    heard = "saw" if light == "the light" else "heard"
    tale.say(
        f"Far out, {{B}} {heard} {light} and [turned the boat towards it|rowed towards it|knew where the harbour was].",
        B=sailor,
    )
    tale.say(
        '[Soon|An hour later], {B} stepped on land. "[You saved me|Without you I would be lost]," {B} said to {A}.',
        A=hero,
        B=sailor,
    )
    tale.ask("Who was out in a boat?", "{B} was.", B=sailor)
    tale.ask("How did {B} find the harbour?", f"{{B}} {heard} {light}.", B=sailor)
    return "[happy that NAME was home|tired but very glad]".replace(
        "NAME", sailor.name
    ), "a small light can save a life"


def hide_and_seek(scene: Scene) -> Outcome:
    tale, seeker = scene.tale, scene.hero
    players = [scene.person(lambda person: person.child) for _ in range(scene.rng.randint(2, 3))]
    spots = scene.rng.sample(
        (
            "behind the barrels",
            "under a boat",
            "in a tree",
            "in the cart",
            "behind the door",
            "under the table",
            "inside the well house",
            "between the sheep",
        ),
        len(players),
    )
    number = scene.rng.choice((10, 12, 15, 20))
    tale.say(
        f"{listing([player.name for player in players])} played hide and seek with {{A.him}}. {{A}} closed "
        f"{{A.his}} eyes and counted to {NUMBERS[number]}.",
        A=seeker,
    )
    order = list(zip(players, spots, strict=True))
    for player, spot in order:
        tale.maybe(0.6, f"{{A}} hid {spot}.", A=player)
    scene.rng.shuffle(order)
    for index, (player, spot) in enumerate(order):
        word = ("First", "Then", "Last of all")[index if index < len(order) - 1 else 2]
        tale.say(f"{word}, {{A}} found {{B}} {spot}.", A=seeker, B=player)
        tale.ask("Where did {B} hide?", f"{{B}} hid {spot}.", B=player)
    tale.ask("Who was found last?", "{B} was found last.", B=order[-1][0])
    tale.say("[So|And so] {B} won the game.", B=order[-1][0])
    return "[tired from running|out of breath and happy]", ""


def garden(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    plant, harvest = scene.rng.choice(
        (
            ("an apple tree", "apples"),
            ("beans", "beans"),
            ("carrots", "carrots"),
            ("a pumpkin", "pumpkins"),
            ("onions", "onions"),
            ("sunflowers", "seeds"),
        )
    )
    place = PLACE[
        scene.rng.choice(("the herb garden", "the hill", "the orchard", "the mill", "the school", "the well"))
    ]
    tale.say(
        f"[In spring|In March|After the snow was gone], {{A}} planted {plant} {place.inside} {place.name}.", A=hero
    )
    trouble = scene.rng.randrange(3)
    if trouble == 0:
        helper = scene.person()
        tale.say(
            "[Then|In June] no rain fell for weeks. {B} helped {A} to carry water from the well every evening.",
            A=hero,
            B=helper,
        )
        tale.ask("Who helped {A}?", "{B} helped {A.him}.", A=hero, B=helper)
    elif trouble == 1:
        animal = scene.rng.choice(("hare", "goat", "gull", "snail"))
        tale.say(
            f"A [hungry|greedy] {animal} came and ate some of it, so {{A}} built a [small fence|wall of stones].",
            A=hero,
        )
        tale.ask("Why did {A} build something?", f"Because a {animal} ate the plants.", A=hero)
    else:
        tale.say("{A} watered it [every morning|every day] and pulled out the weeds.", A=hero)
    number = scene.rng.randint(6, 20)
    tale.say(f"[In autumn|At the end of summer], {{A}} picked {NUMBERS[number]} {harvest}.", A=hero)
    tale.ask("What did {A} plant?", f"{{A}} planted {plant}.", A=hero)
    tale.ask(f"How many {harvest} did {{A}} pick?", f"{{A}} picked {NUMBERS[number]} {harvest}.", A=hero)
    friend = scene.person()
    tale.maybe(0.6, f"{{A}} gave half of the {harvest} to {{B}}.", A=hero, B=friend)
    return "[proud of the garden|happy with the harvest]", "good things take time"


def journey(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    goal = scene.person(lambda person: PLACE[person.place] != scene.here)
    via = scene.rng.choice([place for place in PLACES if place not in (scene.here, PLACE[goal.place])])
    item = scene.item(lambda thing: not thing.big)
    scene.holder[item] = hero
    tale.say(
        "{A} wanted to [visit {B}|bring {B} {T.a}], so {A} [packed|took] {T} and set off.", A=hero, B=goal, T=item
    ) if tale.chance(0.5) else tale.say("{A} wanted to bring {T.a} to {B}.", A=hero, B=goal, T=item)
    scene.where[hero] = via
    tale.say(f"The way led past {via.name}, where {{A}} [saw|looked at] {via.sight}.", A=hero)
    if tale.chance(0.5):
        stranger = scene.person()
        tale.say(
            "{C} was there and [walked with {A} for a while|asked where {A} was going|told {A} a joke].",
            A=hero,
            C=stranger,
        )
        tale.ask("Who did {A} meet on the way?", "{A} met {C}.", A=hero, C=stranger)
    else:
        tale.say(
            "[A gull cried above|The path was steep|It began to rain a little|The wind smelled of salt], but {A} "
            "walked on.",
            A=hero,
        )
    scene.where[hero] = PLACE[goal.place]
    tale.say(
        "[At last|Before noon|Soon], {A} came {P.to}. {B} [was glad|opened the door and smiled].",
        A=hero,
        B=goal,
        P=PLACE[goal.place],
    )
    scene.give(item, goal)
    tale.say(
        '"Thank you," said {B}. "[Sit down and have some tea|Stay for dinner|Now I can USE]."'.replace(
            "USE", item.thing.use
        ),
        B=goal,
    )
    tale.ask("Who did {A} visit?", "{A} visited {B}.", A=hero, B=goal)
    tale.ask(
        "What did {A} bring?",
        f"{{A}} brought {{B}} a {item.phrase}."
        if item.phrase[0] not in "aeiou"
        else f"{{A}} brought {{B}} an {item.phrase}.",
        A=hero,
        B=goal,
    )
    tale.ask(
        "Where does {B} work?",
        "{B} works {P.at}." if not goal.child else "{B} is mostly {P.at}.",
        B=goal,
        P=PLACE[goal.place],
    )
    return "[tired, but happy|glad about the visit]", ""


def strange_light(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    place = scene.place()
    colour = scene.rng.choice(COLOURS[:4])
    fear, truth_being = scene.rng.choice(("a ghost", "a monster", "a thief", "a sea witch")), scene.person()
    truth = scene.rng.choice(
        (
            "looking for mushrooms with a lantern",
            "reading by a candle",
            "mending a net by lamp light",
            "watching the stars",
            "waiting for a lost sheep",
        )
    )
    tale.say(f"At night, {{A}} saw a {colour} light {place.inside} {place.name}.", A=hero)
    friend = scene.person()
    tale.say(
        f'"It is {fear}," said {{B}}. [{{B}} was afraid|{{B}} wanted to run away], but {{A}} [wanted to know|was '
        f"curious].",
        A=hero,
        B=friend,
    )
    scene.where[hero] = place
    tale.say(
        "{A} [took a stick and went|walked slowly] {P.to}. [The wind was cold.|It was very quiet.|]", A=hero, P=place
    )
    tale.say(f"It was not {fear} at all. It was {{C}}, who was {truth}.", C=truth_being)
    tale.say("They [all laughed|laughed about it], and {C} gave {A} some [warm milk|tea|bread].", A=hero, C=truth_being)
    tale.ask("What was the light?", f"It was {{C}}, who was {truth}.", C=truth_being)
    tale.ask("What did {B} think it was?", f"{{B}} thought that it was {fear}.", B=friend)
    tale.ask("Where was the light?", "It was {P.at}.", P=place)
    return "[not afraid any more|glad to have looked]", "it is better to look than to fear"


PEOPLE_PLOTS = (rescue, storm, contest, quarrel, lesson, fog, hide_and_seek, garden, journey, strange_light)

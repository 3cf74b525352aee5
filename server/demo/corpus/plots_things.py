"""Episodes about things: lost and found, broken and mended, traded, given, shared out, cooked.

Each episode takes a scene that has opened, changes it, tells it, and returns how the hero feels at the end and what
there was to learn. What happens late follows from what was decided early.
"""

from __future__ import annotations

from server.demo.corpus.scene import Scene
from server.demo.corpus.telling import Item, listing
from server.demo.corpus.world import DISHES, INGREDIENT_FROM, MENDER, NUMBERS, PLACE, Person

Outcome = tuple[str, str]


def lost_and_found(scene: Scene) -> Outcome:
    tale, hero, start = scene.tale, scene.hero, scene.here
    item = scene.item(lambda thing: not thing.big)
    finder = scene.person() if tale.chance(0.6) and scene.star is None else scene.pet()
    wrong, right = scene.place(), scene.place()
    tale.say("{A} [could not find|had lost|was looking for] {A.his} {T.bare}.", A=hero, T=item)
    tale.maybe(
        0.6,
        f"[{{A}} needed {{T.it}} to {item.thing.use}.|without {{T.it}}, {{A}} could not {item.thing.use}.]",
        A=hero,
        T=item,
    )
    if tale.chance(0.4):
        tale.say(
            "{A} looked [everywhere|under the table|behind the door], but {T} was not {P.at}.", A=hero, T=item, P=start
        )
    scene.go(hero, wrong)
    tale.say("{A} [looked for {T}|searched] there, but [found nothing|{T} was not there].", A=hero, T=item)
    if isinstance(finder, Person):
        scene.meet(finder)
        tale.say('"Have you seen my THING?" {A} asked.'.replace("THING", item.phrase), A=hero)
        tale.say(
            '"[Yes|I think so]," said {B}. "[It is|I saw it|It lies] PLACE."'.replace(
                "PLACE", f"{right.inside} {right.name}"
            ),
            B=finder,
        )
        scene.where[hero] = right
        tale.say(
            "[So {A} ran {P.to}|{A} thanked {B} and went {P.to}|{A} and {B} went {P.to} together].",
            A=hero,
            B=finder,
            P=right,
        )
        tale.say("[And there was {T}, just as {B} had said.|There {A} found {T}.]", A=hero, B=finder, T=item)
        tale.ask("Who helped {A}?", "{B} helped {A.him}.", A=hero, B=finder)
    else:
        scene.where[hero] = right
        tale.say(
            "Then {B} the KIND came and SOUND. {A} followed {B.him} {P.to}.".replace("KIND", finder.kind).replace(
                "SOUND", finder.sound
            ),
            A=hero,
            B=finder,
            P=right,
        )
        tale.say("[There {B} had found {T}.|{B} sat beside {T} and waited.]", B=finder, T=item)
        tale.say(f"{{A}} [laughed|smiled] and gave {{B.him}} some {finder.eats}.", A=hero, B=finder)
        tale.ask("Who found {T}?", "{B} the KIND found {T.it}.".replace("KIND", finder.kind), B=finder, T=item)
    scene.holder[item] = hero
    tale.ask("What did {A} lose?", f"{{A}} lost {{A.his}} {item.phrase}.", A=hero)
    tale.ask("Where was {T}?", "It was {P.at}.", T=item, P=right)
    return "[glad|happy|very glad] to have THING back".replace("THING", f"the {item.phrase}"), "it helps to ask"


def broken_and_mended(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    item = scene.item(lambda thing: bool(thing.breaks) and MENDER[thing.material] != hero.name)
    mender = scene.named(MENDER[item.thing.material])
    shop = PLACE[mender.place]
    tale.say(
        f"{{A}} [wanted to {item.thing.use}|was about to {item.thing.use}], but {{A.his}} {{T.bare}} "
        f"{item.thing.breaks}.",
        A=hero,
        T=item,
    )
    tale.say('[{A} was sad.|{A} sighed.|"Oh no," {A} said.|{A} did not know what to do.]', A=hero)
    if tale.chance(0.4):
        friend = scene.person(lambda person: person != mender)
        scene.where[friend] = scene.here
        tale.say(
            f'"[Take it|Go] to {mender.name}," said {{B}}. "{"She" if mender.gender == "she" else "He"} can mend it."',
            B=friend,
        )
    if scene.here != shop:
        scene.where[hero] = shop
        tale.say("{A} [took|carried|brought] {T} {P.to}[, where {B} was at work|].", A=hero, T=item, P=shop, B=mender)
    ways = {
        "iron": "[heated it in the fire and hit it with a hammer|worked at the fire for an hour]",
        "wood": "[cut a new piece of wood and glued it|used a saw and four nails]",
        "cloth": "[sewed it with strong thread|took a needle and thread]",
        "wool": "[tied the loose ends|wove in some new wool]",
    }
    tale.say(f"{{B}} the {mender.role} looked at {{T}} and {ways[item.thing.material]}.", B=mender, T=item)
    tale.say("[Soon|After a while|Before the evening], {T} was [as good as new|whole again].", T=item)
    scene.holder[item] = hero
    payment = scene.rng.randrange(3)
    if payment == 0:
        gift = scene.rng.choice(("a loaf of bread", "some cheese", "six eggs", "a jar of honey", "three apples"))
        tale.say(f"{{A}} gave {{B}} {gift} [to say thank you|for the work].", A=hero, B=mender)
        tale.ask("What did {A} give {B}?", f"{{A}} gave {{B.him}} {gift}.", A=hero, B=mender)
    elif payment == 1:
        number = scene.rng.randint(2, 6)
        tale.say(f"{{A}} paid {NUMBERS[number]} coins.", A=hero)
        tale.ask("How many coins did {A} pay?", f"{{A}} paid {NUMBERS[number]} coins.", A=hero)
    else:
        tale.say("{B} [wanted|asked for] no money, so {A} swept the floor [instead|for {B.him}].", A=hero, B=mender)
    tale.ask("Who mended {T}?", f"{{B}} the {mender.role} mended it.", T=item, B=mender)
    tale.ask("What happened to {T}?", f"It {item.thing.breaks}, and {{B}} mended it.", T=item, B=mender)
    return (
        f"[happy|glad] [to {item.thing.use} again|that the {item.thing.noun} was whole]",
        "what is broken can be mended",
    )


def trade_chain(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    small = [scene.item(lambda thing: not thing.big) for _ in range(3)]
    wish, first = small[0], small[1]
    owner = scene.person()
    scene.holder |= {wish: owner, first: hero}
    tale.say("{A} [wanted|wished for] {T}.", A=hero, T=wish)
    tale.say("{B} had {T.a}, and {A} asked for {T.it}.", A=hero, B=owner, T=wish)
    if tale.chance(0.5):
        tale.say(f'"[I will give it to you|You can have it] for a {first.thing.noun}," said {{B}}.', B=owner)
        tale.say("{A} had {T.a} at home, so {A} [ran home to fetch it|went to get it].", A=hero, T=first)
        middle = None
    else:
        third = small[2]
        middle = scene.person()
        scene.holder |= {third: middle}
        tale.say(f'"[I will give it to you|You can have it] for a {third.thing.noun}," said {{B}}.', B=owner)
        tale.say("But {A} had only {T.a}.", A=hero, T=first)
        place = scene.place()
        scene.where[hero] = scene.where[middle] = place
        tale.say(
            "{A} went {P.to}, where {B} had {T.a}. {B} needed {F.a}, so they traded.".replace(
                "{F.a}", f"a {first.thing.noun}"
            ),
            A=hero,
            B=middle,
            P=place,
            T=third,
        )
        tale.say("{B} took {F}, and {A} took {T}.", A=hero, B=middle, T=third, F=first)
        tale.ask("What did {B} get?", f"{{B}} got the {first.phrase}.", B=middle)
        scene.holder[first], scene.holder[third] = middle, hero
        first = third
    scene.give(first, owner, "[gave|brought]")
    scene.holder[wish] = hero
    tale.say("Then {B} gave {A} {T}.", A=hero, B=owner, T=wish)
    tale.ask("Who has {T} now?", "{A} has it now.", A=hero, T=wish)
    tale.ask("What did {A} want?", f"{{A}} wanted a {wish.thing.noun}.", A=hero)
    return f"[glad|happy|proud] to have the {wish.phrase}", "a fair trade makes two people happy"


def gift(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    friend = scene.person()
    item = scene.item(lambda thing: not thing.big)
    hiding = scene.place()
    tale.say(
        "It was [the birthday of {B}|{B}'s birthday], and {A} wanted to [give {B.him} a present|bring {B.him} a gift].",
        A=hero,
        B=friend,
    )
    if tale.chance(0.5):
        number = scene.rng.randint(2, 9)
        tale.say(f"{{A}} went to the market and bought {{T.a}} for {NUMBERS[number]} coins.", A=hero, T=item)
        tale.ask("How much did the gift cost?", f"It cost {NUMBERS[number]} coins.")
    else:
        helper = scene.person(lambda person: not person.child)
        tale.say("{A} made {T.a}, and {C} helped {A.him}.", A=hero, T=item, C=helper)
        tale.ask("Who helped {A}?", "{C} helped {A.him}.", A=hero, C=helper)
    tale.say(f"{{A}} hid {{T}} {hiding.inside} {hiding.name}[, so that nobody would see it|].", A=hero, T=item)
    tale.say("In the evening, {A} [led|took] {B} {P.to}.", A=hero, B=friend, P=hiding)
    scene.where[hero] = scene.where[friend] = hiding
    scene.holder[item] = friend
    tale.say(
        '[{B} saw {T} and laughed with joy.|"Is this for me?" {B} asked. "Yes," said {A}.|{B} found {T} and was '
        "very surprised.]",
        A=hero,
        B=friend,
        T=item,
    )
    tale.maybe(0.6, f"{{B}} [used it to {item.thing.use}|wanted to {item.thing.use} at once].", B=friend)
    tale.ask("Where did {A} hide {T}?", "{A} hid it {P.at}.", A=hero, T=item, P=hiding)
    tale.ask("Who has {T} now?", "{B} has it now.", B=friend, T=item)
    return "[happy|glad] [because {B} was happy|too|about the surprise]".replace(
        "{B}", friend.name
    ), "giving is better than getting"


def _counted(number: int, noun: str) -> str:
    """The plural noun as it stands after this number."""
    return noun if number > 1 or noun == "fish" else noun.removesuffix("s")


def sharing_out(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    noun = scene.rng.choice(("apples", "eggs", "fish", "shells", "coins", "cakes", "pears", "candles"))
    left = start = scene.rng.randint(5, 12)
    verb = {"fish": "caught", "shells": "found", "coins": "found", "cakes": "baked"}.get(noun, "had")
    tale.say(f"{{A}} {verb} {NUMBERS[start]} {noun}.", A=hero)
    for _ in range(scene.rng.randint(1, 3)):
        if left <= 1:
            break
        friend, number = scene.person(), scene.rng.randint(1, min(4, left - 1))
        left -= number
        single = _counted(number, noun)
        tale.say(
            f"[{{A}} met {{B}} and gave {{B.him}}|{{B}} came by, and {{A}} gave {{B.him}}|{{A}} gave {{B}}] "
            f"{NUMBERS[number]} {single}.",
            A=hero,
            B=friend,
        )
        tale.say(
            f"[Now|Then] {{A}} had {NUMBERS[left]} {'left' if tale.chance(0.5) else _counted(left, noun)}.",
            A=hero,
        )
        tale.ask(f"How many {noun} did {{B}} get?", f"{{B}} got {NUMBERS[number]}.", B=friend)
    tale.ask(f"How many {noun} did {{A}} have at the end?", f"{{A}} had {NUMBERS[left]} at the end.", A=hero)
    tale.ask(f"How many {noun} did {{A}} have at first?", f"{{A}} had {NUMBERS[start]} at first.", A=hero)
    return "[happy|glad] to share", "there is enough when people share"


def cooking(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    dish = scene.rng.choice(sorted(DISHES))
    parts = DISHES[dish]
    missing = scene.rng.choice(parts)
    giver = scene.named(INGREDIENT_FROM[missing])
    guest = scene.person()
    present = [part for part in parts if part != missing]
    tale.say(f"{{A}} wanted to [make|cook] {dish} for {{B}}.", A=hero, B=guest)
    tale.say(f"For {dish}, [{{A}} needed|one needs] {listing(parts)}.", A=hero)
    tale.say(f"{{A}} had {listing(present)}, but [there was no {missing}|no {missing}].", A=hero)
    if giver == hero:
        tale.say(f"So {{A}} went out and came back with {missing}.", A=hero)
        tale.ask("What was missing?", f"The {missing} {'were' if missing.endswith('s') else 'was'} missing.")
    else:
        place, title = PLACE[giver.place], "" if giver.child else f" the {giver.role}"
        scene.where[hero] = place
        tale.say(f"So {{A}} went {{P.to}} and asked {{B}}{title} for some {missing}.", A=hero, B=giver, P=place)
        tale.say(
            f'["Of course," said {{B}}, and gave {{A.him}} the {missing}.|{{B}} gave {{A.him}} [a bag of|some] '
            f"{missing} and would take no money.]",
            A=hero,
            B=giver,
        )
        tale.ask(f"Who gave {{A}} the {missing}?", f"{{B}}{title} gave {{A.him}} the {missing}.", A=hero, B=giver)
    tale.say(
        f"{{A}} [mixed|put] everything [together|in the pot] and cooked [the {dish}|it] [slowly|over the fire].", A=hero
    )
    tale.say(
        f"{{B}} [ate two plates of {dish}|ate the {dish} and asked for more|said that it was the best {dish} in "
        f"Ternby].",
        B=guest,
    )
    tale.ask("What did {A} cook?", f"{{A}} cooked {dish} for {{B}}.", A=hero, B=guest)
    return "[proud of the DISH|full and happy|happy that it tasted good]".replace(
        "DISH", dish
    ), "good food needs good neighbours"


def errand(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    sender = scene.named(hero.kin) if hero.kin else scene.person(lambda person: not person.child)
    goods = scene.rng.sample(
        (
            "a candle",
            "some salt",
            "a loaf of bread",
            "two onions",
            "a rope",
            "six eggs",
            "some cheese",
            "a bag of flour",
            "three apples",
            "some butter",
        ),
        3,
    )
    forgotten = scene.rng.choice(goods) if tale.chance(0.5) else ""
    tale.say(
        f'"[Please go|Go] to the market and [buy|bring me] {listing(goods)}," {{B}} said to {{A}}.', A=hero, B=sender
    )
    scene.where[hero] = PLACE["the market"]
    tale.say("{A} took a basket and went {P.to}.", A=hero, P=PLACE["the market"])
    bought = [good for good in goods if good != forgotten]
    tale.say(f"[There {{A}} bought|From Teodor, {{A}} bought] {listing(bought)}.", A=hero)
    if forgotten:
        plain = forgotten.split(" ", 1)[1]
        be = "were" if plain.endswith("s") else "was"
        tale.say(
            f"[On the way home, {{A}} [met a friend|sang a song|looked at the boats] and forgot the {plain}.|But "
            f"{{A}} forgot the {plain}.]",
            A=hero,
        )
        tale.say(f'"Where {"are" if be == "were" else "is"} the {plain}?" {{B}} asked.', B=sender)
        tale.say(
            f"{{A}} [ran back to the market|went back] and [bought|came home with] the {plain} [before it "
            f"closed|in the last light|].",
            A=hero,
        )
        tale.ask("What did {A} forget?", f"{{A}} forgot the {plain}.", A=hero)
    else:
        tale.say("{A} forgot nothing[ and came home before dark|].", A=hero)
    tale.ask("What did {A} buy?", f"{{A}} bought {listing(goods)}.", A=hero)
    tale.ask("Who sent {A} to the market?", "{B} sent {A.him}.", A=hero, B=sender)
    tale.maybe(0.6, '"[Thank you|Well done]," said {B}[, and gave {A.him} a piece of cake|].', A=hero, B=sender)
    return (
        "[tired but proud|glad to be home]",
        "[it is good to make a list|a good list is a good friend]" if forgotten else "",
    )


def borrowed(scene: Scene) -> Outcome:
    tale, hero = scene.tale, scene.hero
    item: Item = scene.item()
    owner = scene.person()
    scene.holder[item] = hero
    tale.say(f"{{A}} borrowed {{T.a}} from {{B}} to {item.thing.use}.", A=hero, B=owner, T=item)
    tale.say('"Please bring it back [tomorrow|tonight|before dark]," said {B}.', B=owner)
    kept = tale.chance(0.5)
    if kept:
        tale.say(
            "{A} [used {T} with care|took good care of {T}] and brought it back [in time|the same day].", A=hero, T=item
        )
        tale.say('"You can always borrow my things," said {B}.', B=owner)
        outcome = ("[proud|glad] to be trusted", "a promise is a promise")
    else:
        tale.say(
            "But {A} [forgot|did not think of it again]. [Two days later|The next day], {B} [stood at the "
            "door|came by].",
            A=hero,
            B=owner,
        )
        tale.say("{B} was angry, because {B} needed {T.it}.", B=owner, T=item)
        tale.say(
            '"I am sorry," said {A}. {A} gave {T} back and [helped {B.him} all afternoon|brought {B.him} a cake].',
            A=hero,
            B=owner,
            T=item,
        )
        outcome = (
            "[sorry, but glad that BEING was a friend again]".replace("BEING", owner.name),
            "one must bring back what one borrows",
        )
    scene.holder[item] = owner
    tale.ask("Who did {A} borrow {T} from?", "{A} borrowed it from {B}.", A=hero, B=owner, T=item)
    tale.ask("Did {A} bring {T} back in time?", "Yes, in time." if kept else "No, {A} forgot.", A=hero, T=item)
    return outcome


THING_PLOTS = (lost_and_found, broken_and_mended, trade_chain, gift, sharing_out, cooking, errand, borrowed)

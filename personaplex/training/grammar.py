"""What is said: role texts, questions in many wordings, and the answers to them.

Everything comes from a seeded `random.Random`. Names, firms, prices and wordings are divided by a hash of
their text: one part in ten is held back, and training never sees it.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import random
import string
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from personaplex.persona import PROMPTS


def _bars(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


UNKNOWN = "unknown"  # anything that is no question of ours

_HELD_BACK_NAMES, _HELD_BACK_WORDINGS, _HELD_BACK_PRICES = 3, 7, 3

_DICTIONARY = 0.4  # share of the names trained on that are the dictionary's
_PUBLISHED_SHARE, _ASIDE_SHARE = 0.05, 0.2  # below the first dice a published role text, then one of little

_POLITE = "can you tell me|please tell me|tell me|i would like to know"

KINDS = {
    "Bakery": "bakery",
    "Services": "waste management",
    "Hotel": "hotel",
    "Bank": "bank",
    "Clinic": "clinic",
    "Rentals": "drone rental company",
    "Restaurant": "restaurant",
    "Dental": "dental office",
    "Travel": "travel agency",
    "Books": "book shop",
    "Motors": "car dealer",
    "Pizza": "pizza place",
}
ITEMS = _bars(
    "small plan|large pizza|compost bin|garden tour|single room|drone|birthday cake|check up|yearly pass|"
    "family ticket|oil change|gift box|premium plan|first lesson|monthly service"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_ADJECTIVES = _words(
    "Green Blue Red Golden Silver Sunny Happy North South East West River Lake Ocean Mountain City Town "
    "Harbor Valley Garden Forest Royal Grand Little Old New Bright Quick Prime First Star Moon Sun Sky "
    "Stone Iron Oak Maple Cedar Rose Lily Eagle Falcon Wolf Lion Apple Cherry Lemon Olive Pearl Ruby "
    "Amber Crystal Summit Bridge Corner Central Pacific"
)
_ONSETS = (
    *_words("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr ph pr sh sl st th tr"),
    "",
    "",
    "",
    "",
)
_VOWELS = _words("a e i o u a e i o ai ea ee ia io")
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "x", "nd", "rt", "ck"]
_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = _words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def _product(*parts: str) -> list[str]:
    """Every sentence made of one alternative of each part; alternatives are divided by bars."""
    choices = (part.split("|") for part in parts)
    return [" ".join(word for word in combination if word) for combination in itertools.product(*choices)]


QUESTIONS: dict[str, list[str]] = {
    "hello": [
        *_product("hello|hi|good morning|good afternoon", "|there|is anybody there|are you there|again"),
        *_bars("hello hello|yes hello|hello can you hear me|oh hello|hi good morning|hi hello|hey hello"),
    ],
    "name": [
        *_bars(
            "what is your name|who are you|who am i speaking with|who am i talking to"
            "|may i have your name|who is this|your name please|what's your name|what is your name please"
            "|sorry who are you|give me your name|say your name please"
            "|who do you work for"
        ),
        *_product(
            "what is the", "name of your company|name of your business|name of the company|company name"
        ),
        *_product(_POLITE, "your name|your company name|the name of your company|the name of your business"),
    ],
    "price": [
        *_bars(
            "how much is it|how much does it cost|what does it cost|what is the price|how much is that"
            "|what is the price please|how much would it be"
        ),
        *_product("how much is the|what is the price of the|how much for the|how much does", "{item}"),
        *_product(
            _POLITE, "the price|how much it is|what it costs|how much it costs|the price of the {item}"
        ),
    ],
    "open": [
        *_bars(
            "when are you open|which days are you open|what days are you open|are you open on weekends"
            "|are you open on sunday|are you open on saturday|what are your opening days"
            "|are you open every day|are you open tomorrow|are you open today"
            "|which days of the week are you open"
        ),
        *_product(
            _POLITE, "the days you are open|which days you are open|when you are open|your opening days"
        ),
    ],
    "bye": [
        *_product(
            "|thank you|okay|all right|that is all|well thanks",
            "goodbye|bye bye|bye|see you|see you later|see you soon",
        ),
        *_bars("goodbye for now"),
    ],
}
INTENTS = tuple(QUESTIONS)

ANSWERS = {
    "hello": "Hello, this is {firm}, {name} speaking.",
    "name": "My name is {name}, I work for {firm}.",
    "price": "The {item} costs {price} dollars.",
    "open": "We are open from {first_day} to {last_day}.",
    "bye": "Goodbye, and have a nice day.",
    UNKNOWN: "Sorry, could you say that again?",
}
UNTOLD = "Sorry, I do not know that."
# What is said where the role text tells too little for that: the first for which it tells enough.
SHORTER = {
    "hello": ("Hello, this is {name} speaking.", "Hello, nice to talk to you."),
    "name": ("My name is {name}.", UNTOLD),
    "price": (UNTOLD,),
    "open": (UNTOLD,),
}


@cache
def intent_of_question(text: str) -> str | None:
    """The intent that a caller's sentence has, in any wording; None where it has none."""
    for intent, forms in QUESTIONS.items():
        if text in forms or any(text == form.format(item=item) for form in forms for item in ITEMS):
            return intent
    return None


@dataclass(frozen=True)
class Facts:
    """What one role text tells the agent; what it does not tell is empty."""

    name: str = ""
    firm: str = ""
    kind: str = ""
    item: str = ""
    price: int = 0  # dollars
    first_day: str = ""
    last_day: str = ""


def held_back(text: str, remainder: int = _HELD_BACK_NAMES) -> bool:
    """Whether `text` belongs to the tenth that training never sees."""
    return zlib.crc32(text.lower().encode()) % 10 == remainder


def wordings(intent: str, unseen: bool) -> list[str]:
    """The questions of one intent: those trained on, or those held back."""
    every = dict.fromkeys(QUESTIONS[intent])
    return [text for text in every if held_back(text, _HELD_BACK_WORDINGS) == unseen]


@cache
def _people() -> tuple[str, ...]:
    from faker.providers.person.en_US import Provider

    first, last = list(Provider.first_names), list(Provider.last_names)
    return tuple(sorted({name for name in first + last if name.isalpha() and 2 < len(name) < 11}))


@cache
def lexicon() -> tuple[str, ...]:
    """Common English words, for speech that is no question."""
    from faker.providers.lorem.en_US import Provider

    return tuple(sorted({word for word in Provider.word_list if word.isalpha() and word.islower()}))


@cache
def dictionary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(proper names, other words) of the natural voice's own dictionaries, in all some 120,000; none that is
    held back."""
    words: set[str] = set()
    for metal in ("gold", "silver"):
        file = resources.files("hibari") / "assets" / f"lexicon_us_{metal}.json.gz"
        words |= json.loads(gzip.decompress(file.read_bytes())).keys()
    usable = [word for word in words if word.isascii() and word.isalpha() and 2 < len(word) < 11]
    kept = sorted(word for word in usable if not held_back(word))
    return tuple(w for w in kept if w.istitle()), tuple(w for w in kept if w.islower())


def name(draw: random.Random, unseen: bool, real: float = 0.5) -> str:
    """One name, a person's with probability `real`, else made of random syllables; of those trained on, some
    are proper names of any kind."""
    while True:
        word = draw.choice(_people()) if draw.random() < real else _syllables(draw)
        if not unseen and draw.random() < _DICTIONARY:
            word = draw.choice(dictionary()[0])
        if held_back(word) == unseen:
            return word


def _syllables(draw: random.Random) -> str:
    while True:
        word = "".join(
            draw.choice(_ONSETS) + draw.choice(_VOWELS) + (draw.choice(_CODAS) if draw.random() < 0.5 else "")
            for _ in range(draw.choice((1, 2, 2, 2, 3, 3)))
        )[:10]
        if len(word) > 2:
            return word.capitalize()


def firm(draw: random.Random, unseen: bool) -> tuple[str, str]:
    """A firm's name and its kind of business."""
    last = draw.choice(list(KINDS))
    if unseen or draw.random() < 0.5:
        words = [name(draw, unseen, real=1.0)]
    elif draw.random() < 0.5:
        words = [draw.choice(_ADJECTIVES)]
    else:
        words = [draw.choice(_ADJECTIVES), draw.choice(_ADJECTIVES)]
    return " ".join([*words, last]), KINDS[last]


def spoken_number(number: int) -> str:
    """0 .. 999 in words."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        rest = "" if number % 10 == 0 else " " + _UNITS[number % 10]
        return _TENS[number // 10] + rest
    rest = "" if number % 100 == 0 else " " + spoken_number(number % 100)
    return f"{_UNITS[number // 100]} hundred{rest}"


def facts(draw: random.Random, unseen: bool) -> Facts:
    """One agent's world; with `unseen`, of names, firms and prices held back from training."""
    company, kind = firm(draw, unseen)
    first_day, last_day = draw.sample(DAYS, 2)
    while True:
        prices = [draw.randint(2, 20), draw.randint(2, 99)] + [draw.randint(100, 999)] * (not unseen)
        price = draw.choice(prices)
        if (price % 7 == _HELD_BACK_PRICES) == unseen:
            break
    person = name(draw, unseen, real=1.0)
    if draw.random() < 0.2:
        person = f"{person} {name(draw, unseen, real=1.0)}"
    return Facts(person, company, kind, draw.choice(ITEMS), price, first_day, last_day)


def _employed(known: Facts) -> tuple[str, str]:
    """Two ways to say who the agent is and whom it works for, the published one first."""
    return (
        f"You work for {known.firm} which is a {known.kind} and your name is {known.name}.",
        f"You are {known.name} and you work at {known.firm}, a {known.kind}.",
    )


def role_text(draw: random.Random, known: Facts) -> str:
    """A role text that states all facts, in one of several forms."""
    usual, at_work = _employed(known)
    opening = draw.choice(
        (usual, usual, f"Your name is {known.name}. You answer the phone for {known.firm}.", at_work)
    )
    amount = spoken_number(known.price)
    price = draw.choice((f"The {known.item} costs {amount} dollars.", f"A {known.item} is {amount} dollars."))
    days = draw.choice(
        (f"Open from {known.first_day} to {known.last_day}.", f"Open {known.first_day} to {known.last_day}.")
    )
    details = [price, days]
    draw.shuffle(details)
    return f"{opening} Information: {' '.join(details)}"


# Who the agents of the role texts are that come with PersonaPlex; nobody where a text gives no name.
_PUBLISHED = {
    "bank": Facts("Alexis Kim", "First Neuron Bank"),
    "astronaut": Facts("Alex"),
    "service-waste": Facts("Ayelen Lucero", "CitySan Services"),
    "service-restaurant": Facts("Owen Foster", "Jerusalem Shakshuka"),
    "service-drone": Facts("Tomaz Novak", "AeroRentals Pro"),
    "service-repair": Facts("Farhod Toshmatov", "SwiftPlex Appliances"),
    "service-italian": Facts("Marco", "Roma Italiano"),
    "casual-food": Facts("David Green"),
}


def world(draw: random.Random, unseen: bool = False) -> tuple[Facts, str]:
    """Who an agent is, and its role text. Of those trained on, some are published texts, and some tell little
    among much else; those held back tell all."""
    known, dice = facts(draw, unseen), 1.0 if unseen else draw.random()
    if dice < _PUBLISHED_SHARE:
        prompt = draw.choice(list(PROMPTS.values()))
        return _PUBLISHED.get(prompt.id, Facts()), prompt.text
    if dice < _ASIDE_SHARE:
        return _aside(draw, known)
    return known, role_text(draw, known)


def _aside(draw: random.Random, known: Facts) -> tuple[Facts, str]:
    """A role text that tells at most a name and a firm."""
    pleasant = "You enjoy having a good conversation."
    named, employed = Facts(known.name), Facts(known.name, known.firm)
    told, opening = draw.choice(
        (
            *((employed, opening) for opening in _employed(known)),
            (named, f"{pleasant} Your name is {known.name}."),
            (named, f"{pleasant} You are {known.name}."),
            (Facts(), pleasant),
            (Facts(), f"You are a {known.kind} and you talk to customers."),
        )
    )
    besides = (
        f"Verify customer name {name(draw, unseen=False, real=1.0)}.",
        f"Current schedule: every {draw.choice(DAYS)}.",
        f"The {known.item} is available for ${known.price}.",
        *(f"{' '.join(draw.sample(lexicon(), draw.randint(3, 9)))}.".capitalize() for _ in range(3)),
    )
    return told, " ".join([opening, *draw.sample(besides, draw.randint(0, 4))])


def question(draw: random.Random, intent: str, unseen: bool) -> str:
    """A caller's sentence of one intent."""
    if intent == UNKNOWN:
        return " ".join(draw.sample(lexicon(), draw.randint(2, 6)))
    return draw.choice(wordings(intent, unseen)).format(item=draw.choice(ITEMS))


def forms(intent: str) -> tuple[str, ...]:
    """The answers to a question of that intent, those that tell most first."""
    return (ANSWERS[intent], *SHORTER.get(intent, ()))


def template(intent: str, known: Facts) -> str:
    """The answer to a question of that intent, its values still to be put in."""
    return next(form for form in forms(intent) if all(getattr(known, field) for field in fields(form)))


def fields(form: str) -> list[str]:
    """The facts that stand in an answer's template."""
    return [field for _, field, _, _ in string.Formatter().parse(form) if field]


def answer(intent: str, known: Facts) -> str:
    """What the agent says to a question of that intent."""
    values = dataclasses.asdict(known) | {"price": spoken_number(known.price)}
    return template(intent, known).format(**values)


def sentences(draw: random.Random, count: int, unseen: bool) -> Iterable[str]:
    """`count` answers about ever new facts: what the agent's voice has to be able to say."""
    for _ in range(count):
        yield answer(draw.choice((*INTENTS, UNKNOWN)), facts(draw, unseen))

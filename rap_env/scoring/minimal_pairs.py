"""Templates of grammatical minimal pairs: two similar sentences, one of them ungrammatical.

Each paradigm is a function of a random generator that returns ``(good, bad)``. Each form of the
differing word is as often correct as wrong (except in `polarity`), so that a model that only
knows word frequencies scores near one half.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from rap_env.artifacts import package_json

Pair = tuple[str, str]
Paradigm = Callable[[random.Random], Pair]

_WORDS: dict[str, Any] = package_json("rap_env.scoring", "minimal_pairs.json")
PEOPLE, THINGS = _WORDS["people"], _WORDS["things"]  # (singular, plural)
GENDERED = _WORDS["gendered"]  # (male, female)
MASS, PLACES = _WORDS["mass"], _WORDS["places"]
PEOPLE_ADJECTIVES, THING_ADJECTIVES = _WORDS["people_adjectives"], _WORDS["thing_adjectives"]
IRREGULAR = _WORDS["irregular"]  # (base, third person, past, participle); the last two differ
TRANSITIVE, INTRANSITIVE = _WORDS["transitive"], _WORDS["intransitive"]
LIKING, BE = _WORDS["liking"], _WORDS["be"]  # (singular, plural)
REGULAR_BASE = _WORDS["regular_base"]  # (base, third person)


def simple_agreement(rng: random.Random) -> Pair:
    """The boys walk / walks near the river."""
    number = rng.randrange(2)
    subject, (base, third) = rng.choice(PEOPLE)[number], rng.choice(REGULAR_BASE)
    verb = (third, base)
    end = f"near the {rng.choice(PLACES)} every day."
    return f"The {subject} {verb[number]} {end}", f"The {subject} {verb[1 - number]} {end}"


def agreement_over_phrase(rng: random.Random) -> Pair:
    """The keys near the box are / is old."""
    number, be = rng.randrange(2), rng.choice(BE)
    first, second = rng.sample(THINGS, 2)
    link = rng.choice(("near", "behind", "under", "next to"))
    start = f"The {first[number]} {link} the {second[1 - number]}"
    end = rng.choice(THING_ADJECTIVES)
    return f"{start} {be[number]} {end}.", f"{start} {be[1 - number]} {end}."


def agreement_over_clause(rng: random.Random) -> Pair:
    """The boys that the teacher likes are / is tired."""
    number, be, like = rng.randrange(2), rng.choice(BE), rng.choice(LIKING)
    first, second = rng.sample(PEOPLE, 2)
    start = f"The {first[number]} that the {second[1 - number]} {like[1 - number]}"
    end = rng.choice(PEOPLE_ADJECTIVES)
    return f"{start} {be[number]} {end}.", f"{start} {be[1 - number]} {end}."


def agreement_inside_clause(rng: random.Random) -> Pair:
    """The boy that knows / know the teachers is tired."""
    number, be, like = rng.randrange(2), rng.choice(BE), rng.choice(LIKING)
    first, second = rng.sample(PEOPLE, 2)
    end = f"the {second[1 - number]} {be[number]} {rng.choice(PEOPLE_ADJECTIVES)}."
    start = f"The {first[number]} that"
    return f"{start} {like[number]} {end}", f"{start} {like[1 - number]} {end}"


def coordinated_subject(rng: random.Random) -> Pair:
    """The boy and the nurse are tired; the boy near the nurse is tired."""
    (first, _), (second, _) = rng.sample(PEOPLE, 2)
    plural, be = rng.randrange(2), rng.choice(BE)
    start = f"The {first} {'and' if plural else 'behind'} the {second}"
    end = rng.choice(PEOPLE_ADJECTIVES)
    return f"{start} {be[plural]} {end}.", f"{start} {be[1 - plural]} {end}."


def determiner_noun(rng: random.Random) -> Pair:
    """The nurse moved these old books / book."""
    number = rng.randrange(2)
    determiner = rng.choice((("this", "these"), ("that", "those")))[number]
    thing, adjective = rng.choice(THINGS), rng.choice(THING_ADJECTIVES)
    start = f"The {rng.choice(PEOPLE)[0]} {rng.choice(TRANSITIVE)} {determiner} {adjective}"
    return f"{start} {thing[number]}.", f"{start} {thing[1 - number]}."


def reflexive_number(rng: random.Random) -> Pair:
    """The farmers near the river hurt themselves / himself."""
    number = rng.randrange(2)
    person = rng.choice(PEOPLE)
    start = f"The {person[number]} near the {rng.choice(PLACES)}"
    start += rng.choice((" hurt", " blamed", " introduced", " prepared"))
    forms = ("herself" if person[0] in ("girl", "woman") else "himself", "themselves")
    return f"{start} {forms[number]}.", f"{start} {forms[1 - number]}."


def reflexive_gender(rng: random.Random) -> Pair:
    """The queen in the garden blamed herself / himself."""
    gender = rng.randrange(2)
    start = f"The {rng.choice(GENDERED)[gender]} in the {rng.choice(PLACES)}"
    start += rng.choice((" blamed", " hurt", " prepared", " introduced"))
    forms = ("himself", "herself")
    return f"{start} {forms[gender]}.", f"{start} {forms[1 - gender]}."


def participle(rng: random.Random) -> Pair:
    """The nurse has broken / broke the cup; the nurse broke / broken the cup."""
    _, _, past, done = rng.choice(IRREGULAR)
    subject, thing = rng.choice(PEOPLE)[0], rng.choice(THINGS)[rng.randrange(2)]
    if rng.randrange(2):
        return f"The {subject} has {done} the {thing}.", f"The {subject} has {past} the {thing}."
    return f"The {subject} {past} the {thing}.", f"The {subject} {done} the {thing}."


def verb_after_auxiliary(rng: random.Random) -> Pair:
    """The nurse does not see / sees the cup; the nurse often sees / see the cup."""
    base, third, _, _ = rng.choice(IRREGULAR)
    subject, thing = rng.choice(PEOPLE)[0], rng.choice(THINGS)[rng.randrange(2)]
    if rng.randrange(2):
        start = f"The {subject} {rng.choice(('does not', 'can never', 'will soon'))}"
        return f"{start} {base} the {thing}.", f"{start} {third} the {thing}."
    start = f"The {subject} {rng.choice(('often', 'never', 'always'))}"
    return f"{start} {third} the {thing}.", f"{start} {base} the {thing}."


def polarity(rng: random.Random) -> Pair:
    """No / Some nurse in the garden has ever seen the boat."""
    subject, thing = rng.choice(PEOPLE)[0], rng.choice(THINGS)[0]
    seen = rng.choice(IRREGULAR)[3]
    place = rng.choice(PLACES)
    end = f"{subject} in the {place} has ever {seen} the {thing}."
    return f"No {end}", f"{rng.choice(('Some', 'Every', 'The', 'This'))} {end}"


def filler_gap(rng: random.Random) -> Pair:
    """The nurse knows that / what the boy found the cup; she knows what / that he found."""
    (first, _), (second, _) = rng.sample(PEOPLE, 2)
    thing, verb = rng.choice(THINGS)[0], rng.choice(TRANSITIVE)
    start = f"The {first} {rng.choice(('knows', 'remembers', 'forgot', 'said'))}"
    if rng.randrange(2):
        end = f"the {second} {verb} the {thing}."
        return f"{start} that {end}", f"{start} what {end}"
    end = f"the {second} {verb} yesterday."
    return f"{start} what {end}", f"{start} that {end}"


def transitivity(rng: random.Random) -> Pair:
    """The nurse found / arrived the cup; the nurse arrived / found yesterday."""
    subject, thing = rng.choice(PEOPLE)[rng.randrange(2)], rng.choice(THINGS)[0]
    does, stays = rng.choice(TRANSITIVE), rng.choice(INTRANSITIVE)
    if rng.randrange(2):
        return f"The {subject} {does} the {thing}.", f"The {subject} {stays} the {thing}."
    place = rng.choice(PLACES)
    end = f"in the {place}."
    return f"The {subject} {stays} {end}", f"The {subject} {does} {end}"


def quantity(rng: random.Random) -> Pair:
    """There was too much / many water; there were too many / much cups."""
    degree = rng.choice(("too", "so"))
    place = rng.choice(PLACES)
    if rng.randrange(2):
        end = f"{rng.choice(MASS)} in the {place}."
        return f"There was {degree} much {end}", f"There was {degree} many {end}"
    end = f"{rng.choice(THINGS)[1]} in the {place}."
    return f"There were {degree} many {end}", f"There were {degree} much {end}"


def pronoun_case(rng: random.Random) -> Pair:
    """The nurse said that he / him found the cup; the nurse gave the cup to him / he."""
    subject, thing = rng.choice(PEOPLE)[rng.randrange(2)], rng.choice(THINGS)[0]
    forms = rng.choice((("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")))
    if rng.randrange(2):
        start, end = f"The {subject} said that", f"{rng.choice(TRANSITIVE)} the {thing}."
        return f"{start} {forms[0]} {end}", f"{start} {forms[1]} {end}"
    start, end = f"The {subject} gave the {thing} to", "yesterday."
    return f"{start} {forms[1]} {end}", f"{start} {forms[0]} {end}"


def existential(rng: random.Random) -> Pair:
    """There were several cups / was several cups in the kitchen."""
    number, be = rng.randrange(2), rng.choice(BE)
    count = rng.choice((("a", "another"), ("many", "several"))[number])
    adjective = rng.choice([word for word in THING_ADJECTIVES if word[0] not in "aeiou"])
    end = f"{count} {adjective} {rng.choice(THINGS)[number]} in the {rng.choice(PLACES)}."
    return f"There {be[number]} {end}", f"There {be[1 - number]} {end}"


PARADIGMS: tuple[Paradigm, ...] = (
    simple_agreement,
    agreement_over_phrase,
    agreement_over_clause,
    agreement_inside_clause,
    coordinated_subject,
    determiner_noun,
    reflexive_number,
    reflexive_gender,
    participle,
    verb_after_auxiliary,
    polarity,
    filler_gap,
    transitivity,
    quantity,
    pronoun_case,
    existential,
)

"""Facts for the multiple-choice task: relations between everyday words, with questions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A question template and its pairs of words.

    Attributes:
        name: The relation of the two words.
        question: Template with one ``{}`` for the known word.
        pairs: ``(known word, answer)``. The wrong choices are answers of other pairs.
    """

    name: str
    question: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse ``known=answer, known=answer`` lines."""
    entries = (entry.strip() for entry in text.replace("\n", ",").split(","))
    return tuple((left, right) for left, _, right in (e.partition("=") for e in entries if e))


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "opposite",
        "What is the opposite of {}?",
        _pairs(
            """hot=cold, big=small, up=down, day=night, black=white, open=closed, rich=poor
            early=late, young=old, left=right, fast=slow, full=empty, happy=sad, hard=soft
            wet=dry, strong=weak, high=low, long=short, love=hate, war=peace, true=false
            buy=sell, win=lose, push=pull, light=dark, clean=dirty, safe=dangerous
            noisy=quiet, brave=cowardly, cheap=expensive"""
        ),
    ),
    Relation(
        "kind",
        "What kind of thing is a {}?",
        _pairs(
            """dog=animal, apple=fruit, hammer=tool, violin=instrument, car=vehicle
            carrot=vegetable, rose=flower, shirt=clothing, sofa=furniture, oak=tree
            sparrow=bird, salmon=fish, ant=insect, diamond=gem, football=sport
            trumpet=instrument, eagle=bird, banana=fruit, wrench=tool, truck=vehicle
            tulip=flower, horse=animal, chair=furniture, jacket=clothing, trout=fish"""
        ),
    ),
    Relation(
        "capital",
        "What is the capital of {}?",
        _pairs(
            """France=Paris, Italy=Rome, Spain=Madrid, Germany=Berlin, Japan=Tokyo
            Russia=Moscow, Egypt=Cairo, Greece=Athens, China=Beijing, Canada=Ottawa
            Austria=Vienna, Portugal=Lisbon, Ireland=Dublin, Cuba=Havana, Peru=Lima
            Kenya=Nairobi, Norway=Oslo, Poland=Warsaw, Thailand=Bangkok, Iran=Tehran
            Hungary=Budapest, Sweden=Stockholm, Finland=Helsinki, Turkey=Ankara
            Denmark=Copenhagen"""
        ),
    ),
    Relation(
        "color",
        "What color is {}?",
        _pairs(
            """grass=green, snow=white, blood=red, coal=black, a ripe banana=yellow
            the clear sky=blue, chocolate=brown, an elephant=gray, a carrot=orange
            an eggplant=purple, a flamingo=pink, milk=white, a strawberry=red
            a lemon=yellow, a crow=black, spinach=green, a frog=green, a tomato=red
            a cloud=white, the sun=yellow, a fire truck=red, a plum=purple, a pig=pink
            a polar bear=white, wood=brown, a pea=green"""
        ),
    ),
    Relation(
        "worker",
        "Who is it that {}?",
        _pairs(
            """bakes bread=a baker, flies a plane=a pilot, teaches children=a teacher
            puts out fires=a firefighter, grows crops=a farmer, cuts hair=a barber
            repairs cars=a mechanic, catches fish=a fisherman, writes books=an author
            sings songs=a singer, paints pictures=a painter, treats sick people=a doctor
            treats sick animals=a veterinarian, fixes teeth=a dentist, builds houses=a builder
            serves food in a restaurant=a waiter, cooks meals=a chef, sells meat=a butcher
            arrests thieves=a policeman, takes photographs=a photographer
            cleans houses=a cleaner, steers a ship=a captain, tells jokes=a comedian
            designs buildings=an architect, dances on a stage=a dancer, digs up coal=a miner"""
        ),
    ),
    Relation(
        "use",
        "What do you use to {}?",
        _pairs(
            """cut paper=scissors, write a letter=a pen, tell the time=a clock
            dig a hole=a shovel, sweep the floor=a broom, open a lock=a key
            measure temperature=a thermometer, eat soup=a spoon, dry your body=a towel
            see the stars=a telescope, brush your hair=a comb, stay dry in the rain=an umbrella
            light a fire=a match, hit a nail=a hammer, cross a river=a bridge
            climb onto a roof=a ladder, find north=a compass, catch fish=a net
            take a picture=a camera, boil water=a kettle
            sew a shirt=a needle, wash your hands=soap, carry water=a bucket
            call a friend=a telephone, chop wood=an axe, paint a wall=a brush"""
        ),
    ),
    Relation(
        "place",
        "Where would you go to {}?",
        _pairs(
            """borrow books=the library, see a film=the cinema, buy stamps=the post office
            catch a train=the station, board a plane=the airport, see wild animals=the zoo
            buy medicine=the pharmacy, save money=the bank, swim=the pool
            see old paintings=the museum, have surgery=the hospital, pray=the church
            eat dinner=the restaurant, sleep on a trip=the hotel, learn to read=the school
            buy bread=the bakery, watch a play=the theater, face a judge=the court
            fill up the car=the gas station, lie on the sand=the beach, lift weights=the gym
            get a haircut=the barber, climb rocks=the mountains
            see a doctor=the clinic"""
        ),
    ),
    Relation(
        "young",
        "What is a young {} called?",
        _pairs(
            """dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, bear=cub
            chicken=chick, goat=kid, deer=fawn, frog=tadpole, duck=duckling, pig=piglet
            swan=cygnet, goose=gosling, kangaroo=joey"""
        ),
    ),
    Relation(
        "next",
        "What comes right after {}?",
        _pairs(
            """Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday
            Friday=Saturday, Saturday=Sunday, Sunday=Monday, January=February, March=April
            April=May, May=June, June=July, July=August, August=September
            September=October, October=November, November=December, spring=summer
            summer=autumn, autumn=winter"""
        ),
    ),
    Relation(
        "home",
        "Where does a {} live?",
        _pairs(
            """bee=hive, spider=web, lion=den, horse=stable, bird=nest, fish=water
            king=palace, camel=desert, monk=monastery, prisoner=prison, pig=sty
            rabbit=burrow, soldier=barracks, polar bear=Arctic, monkey=jungle"""
        ),
    ),
)

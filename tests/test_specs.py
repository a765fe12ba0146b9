"""A dataclass of settings refuses values of a wrong type, range, name or form."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rap_env.errors import InvalidRequestError, RapError, ServingSettingsError, UnknownNameError
from rap_env.specs import check, setting, settings_of


def parse_color(text):
    if not text.startswith("#"):
        raise InvalidRequestError(f"A color is #RRGGBB, not {text!r}.")


@dataclass(frozen=True)
class Settings:
    count: int = setting(4, "Number of parts.", low=1, group="Size")
    share: float = setting(0.5, above=0, high=1)
    port: int = setting(80, low=0, high=99)
    rate: float | None = setting(None, low=0)
    rise: float | str = setting("auto", low=0, choices=("auto",))
    mode: str = setting("fast", choices=("fast", "exact"), kind="way of searching")
    sizes: list[int] = setting([1, 2], low=1, distinct=True)
    color: str = setting("#000000", parse=parse_color)
    flag: bool = False
    other: Any = 3

    def __post_init__(self):
        check(self, ServingSettingsError, path="made.", none="null")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"count": 0}, "made.count must be a whole number of at least 1, not 0."),
        ({"count": "4"}, "made.count must be of type int, not '4'."),
        ({"count": True}, "made.count must be of type int, not True."),
        ({"count": None}, "made.count must be of type int, not None."),
        ({"share": 0}, "made.share must be above 0 and at most 1, not 0."),
        ({"share": float("nan")}, "made.share must be above 0 and at most 1, not nan."),
        ({"port": 100}, "made.port must be from 0 to 99, not 100."),
        ({"rate": -1.5}, "made.rate must be 0 or above, or null, not -1.5."),
        ({"rate": float("inf")}, "made.rate must be 0 or above, or null, not inf."),
        ({"rate": "a"}, "made.rate must be of type float or null, not 'a'."),
        ({"rise": -1}, "made.rise must be 0 or above, not -1."),
        (
            {"rise": "aut"},
            "Unknown made.rise 'aut'; known are 'auto'. Did you mean 'auto'? A number is allowed "
            "as well.",
        ),
        (
            {"mode": "fats"},
            "Unknown way of searching 'fats'; known are 'exact', 'fast'. Did you mean 'fast'?",
        ),
        ({"sizes": []}, "made.sizes must have at least one entry and none twice, not []."),
        ({"sizes": [2, 2]}, "made.sizes must have at least one entry and none twice, not [2, 2]."),
        ({"sizes": [2, 0]}, "made.sizes must be a whole number of at least 1, not 0."),
        ({"sizes": ["a"]}, "made.sizes must be a whole number of at least 1, not 'a'."),
        ({"color": "red"}, "made.color: A color is #RRGGBB, not 'red'."),
        ({"flag": 1}, "made.flag must be of type bool, not 1."),
    ],
    ids=str,
)
def test_a_bad_value_is_named(given, sentence):
    with pytest.raises(RapError) as caught:
        Settings(**given)
    assert str(caught.value) == sentence
    assert isinstance(caught.value, (ServingSettingsError, UnknownNameError))


def test_allowed_values_pass_and_numbers_of_numpy_become_those_of_python():
    made = Settings(np.int64(3), 1, rate=np.float32(0.5), rise=0.2, other=object())
    assert (made.count, made.share, made.rate, made.rise) == (3, 1, 0.5, 0.2)
    assert (type(made.count), type(made.rate)) == (int, float)


def test_fields_keep_their_descriptions_and_defaults_are_not_shared():
    count = settings_of(Settings)["count"]
    assert (count.help, count.group, count.types) == ("Number of parts.", "Size", (int,))
    Settings().sizes.append(3)
    assert Settings().sizes == [1, 2]

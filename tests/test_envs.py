"""Families are made by name; a wrong name is answered with the right one."""

from __future__ import annotations

import re

import pytest

import envs
from envs.family import FamilyError


def test_what_ships() -> None:
    """The names of configs, files and commands, each bound to its class."""
    assert {name: cls.__name__ for name, cls in envs.FAMILIES.items()} == {
        "navigation": "Navigation2D",
        "half_cheetah_vel": "HalfCheetahVel",
        "half_cheetah_dir": "HalfCheetahDir",
        "ant_vel": "AntVel",
        "ant_dir": "AntDir",
    }
    for name, cls in envs.FAMILIES.items():
        assert envs.family_class(name) is cls


def test_a_family_is_made_with_its_fields() -> None:
    family = envs.make("half_cheetah_vel", protocol="gymnasium", horizon=17)
    assert family == envs.HalfCheetahVel(protocol="gymnasium", horizon=17)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("half_cheetah_vell", "half_cheetah_vel"),
        ("halfcheetah_dir", "half_cheetah_dir"),
        ("ant-dir", "ant_dir"),
        ("navigate", "navigation"),
    ],
)
def test_an_unknown_family_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    words = rf"no task family is called '{typo}': did you mean '{meant}'\?"
    for make in (envs.make, envs.family_class):
        with pytest.raises(FamilyError, match=words):
            make(typo)


def test_a_name_like_no_other_is_answered_with_all_of_them() -> None:
    with pytest.raises(FamilyError, match="navigation, half_cheetah_vel, half_cheetah_dir"):
        envs.make("xxx")


@pytest.mark.parametrize(
    ("family", "typo", "meant"),
    [
        ("ant_dir", "frameskip", "frame_skip"),
        ("ant_vel", "speed_hi", "speed_high"),
        ("navigation", "goal_radios", "goal_radius"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(family: str, typo: str, meant: str) -> None:
    words = rf"{family} has no field '{typo}': did you mean '{meant}'\?"
    with pytest.raises(FamilyError, match=words):
        envs.make(family, **{typo: 1})


def test_a_field_of_another_family_is_not_known() -> None:
    """A direction has no fastest speed; nothing near it is named `xxx` either."""
    with pytest.raises(FamilyError, match="half_cheetah_dir has no field 'speed_high'"):
        envs.make("half_cheetah_dir", speed_high=3.0)
    with pytest.raises(FamilyError, match=re.escape("it has horizon, goal_range, max_move")):
        envs.make("navigation", xxx=3.0)

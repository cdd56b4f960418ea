"""What is learned: task families, each a distribution over tasks on one body.

family = envs.make("half_cheetah_dir", protocol="gymnasium")
"""

from __future__ import annotations

import dataclasses
import difflib

from envs.ant import AntDir, AntVel
from envs.family import Column, FamilyError, TaskFamily, Transition, Worlds
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.navigation import Navigation2D

FAMILIES: dict[str, type[TaskFamily]] = {
    family.name: family for family in (Navigation2D, HalfCheetahVel, HalfCheetahDir, AntVel, AntDir)
}
"""Every family that ships, by name."""


def family_class(name: str) -> type[TaskFamily]:
    """Return the family of that name.

    Raises:
        FamilyError: if there is none, naming the nearest.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAMILIES)}"
    raise FamilyError(f"no task family is called {name!r}: {hint}")


def make(name: str, **fields: object) -> TaskFamily:
    """Build a family by name, with any of its fields.

    Raises:
        FamilyError: for an unknown name or field, naming the nearest.
    """
    cls = family_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise FamilyError(f"{name} has no field {field!r}: {hint}")
    return cls(**fields)  # type: ignore[arg-type]  # names are checked above, values by the class


__all__ = [
    "FAMILIES",
    "AntDir",
    "AntVel",
    "Column",
    "FamilyError",
    "HalfCheetahDir",
    "HalfCheetahVel",
    "Navigation2D",
    "TaskFamily",
    "Transition",
    "Worlds",
    "family_class",
    "make",
]

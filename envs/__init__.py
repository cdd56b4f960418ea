"""What is learned: task families, each a distribution over tasks on one body.

family = envs.make("half_cheetah_dir", protocol="gymnasium")
environment = gymnasium.make("MamlRL/HalfCheetahDir-v0", protocol="gymnasium")
"""

from __future__ import annotations

import dataclasses
import difflib

import gymnasium

from envs.ant import AntDir, AntVel
from envs.family import Column, FamilyError, TaskFamily, Transition, Worlds
from envs.gymnasium_family import GymnasiumFamily, from_gymnasium
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.navigation import Navigation2D
from envs.references import allow_imports, resolve

FAMILIES: dict[str, type[TaskFamily]] = {
    family.name: family for family in (Navigation2D, HalfCheetahVel, HalfCheetahDir, AntVel, AntDir)
}
"""Every family that ships, by name."""

for _family in FAMILIES.values():
    gymnasium.register(
        f"MamlRL/{_family.__name__}-v0",
        entry_point="envs.gymnasium_env:FamilyEnv",
        vector_entry_point="envs.gymnasium_env:FamilyVectorEnv",
        kwargs={"family": _family.name},
    )


def family_class(name: str) -> type[TaskFamily]:
    """Return the family of that name: one that ships, "gymnasium", or "package.module:Class".

    Raises:
        FamilyError: if there is none, naming the nearest, or it may not be imported.
    """
    known = FAMILIES | {GymnasiumFamily.name: GymnasiumFamily}
    if name in known:
        return known[name]
    if ":" in name:
        found = resolve(name)
        if not (isinstance(found, type) and issubclass(found, TaskFamily)):
            raise FamilyError(f"{name} is not a subclass of envs.TaskFamily")
        return found
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
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
    "GymnasiumFamily",
    "HalfCheetahDir",
    "HalfCheetahVel",
    "Navigation2D",
    "TaskFamily",
    "Transition",
    "Worlds",
    "allow_imports",
    "family_class",
    "from_gymnasium",
    "make",
]

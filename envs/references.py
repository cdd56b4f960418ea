"""Code of the user's own, named in a config as "package.module:name".

A config is data, and to run what it names is to run a program. So a name is imported only inside
`allow_imports()`, which the command line enters for --allow-import. What `refer_to` was given, or
an allowed import has found, stays known.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from envs.family import FamilyError

_KNOWN: dict[str, object] = {}
_ALLOWED = ContextVar("allowed", default=False)


@contextmanager
def allow_imports() -> Iterator[None]:
    """Let `resolve` import inside this block."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def imports_allowed() -> bool:
    """Return whether `resolve` may import here."""
    return _ALLOWED.get()


def refer_to(value: Callable[..., object]) -> str:
    """Return the reference "module:qualname" of a function or class, and make it known.

    A lambda, a function inside a function or an object has no name that an import would find: its
    reference holds in this process only, and gets a number if another has taken the name.
    """
    module = getattr(value, "__module__", type(value).__module__)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    plain = reference = f"{module}:{name}"
    number = 1
    while not _importable(value, module, name) and _KNOWN.get(reference, value) is not value:
        number += 1
        reference = f"{plain}#{number}"
    _KNOWN[reference] = value
    return reference


def _importable(value: object, module: str, name: str) -> bool:
    """Whether importing the name would give this very value."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def resolve(reference: str) -> object:
    """Return what a reference names.

    Raises:
        FamilyError: if it is neither known nor may be imported, or there is no such thing.
    """
    if reference in _KNOWN:
        return _KNOWN[reference]
    module, _, name = reference.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise FamilyError(
            f"a reference is package.module:name, which {reference!r} is not "
            "(a lambda or a function inside a function cannot be named)"
        )
    if not _ALLOWED.get():
        raise FamilyError(
            f"{reference} is code of yours: add --allow-import to run it "
            "(in Python: with envs.allow_imports())"
        )
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FamilyError(
            f"{reference}: there is no module {error.name!r}; is it installed, or its folder on "
            "PYTHONPATH?"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1, cutoff=0.4)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise FamilyError(f"{reference}: {module} has no {part!r}{hint}")
        found = getattr(found, part)
    _KNOWN[reference] = found
    return found

"""A function's operations, recorded once and played again: the same bits in half the time.

With a network of some thousand parameters most of an outer gradient's time goes into Python, `vmap`
and the making of graphs, which is the same work every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from maml_rl.adapt import Params
from maml_rl.supervised.tasks import Batch

R = TypeVar("R")


class Recorded(Generic[R]):
    """Plays what a function of meta-parameters and a batch did with tensors of the same shapes.

    The function must be pure, and do the same operations whatever the numbers are.
    """

    def __init__(self, function: Callable[[Params, Batch], R]) -> None:
        self._function = function
        self._recordings: dict[object, Callable[[Params, Batch], R]] = {}

    def __call__(self, meta: Params, batch: Batch) -> R:
        """Return what the function would."""
        leaves, structure = _pytree.tree_flatten((meta, batch))
        key = (structure, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        plain = {name: p.detach() for name, p in meta.items()}
        played = self._recordings.get(key)
        if played is None:
            # Of a method make_fx would count `self`.
            graph = make_fx(lambda meta, batch: self._function(meta, batch))(plain, batch)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            played = self._recordings[key] = graph
        with torch.no_grad():
            return played(plain, batch)

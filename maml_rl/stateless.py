"""Any torch module as a pure function of its parameters."""

from __future__ import annotations

import copy
import threading

from torch import Tensor, nn
from torch.func import functional_call

from maml_rl.adapt import Params


class StatelessModule:
    """A module as a function of parameters and inputs.

    `functional_call` puts parameters into the module while it runs, so two threads must never
    share one: each works on a copy of its own, and the module that was given is left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._copies = threading.local()

    def _copy(self) -> nn.Module:
        """Return this thread's copy."""
        copied: nn.Module | None = getattr(self._copies, "module", None)
        if copied is None:
            copied = self._copies.module = copy.deepcopy(self.module)
        return copied

    def parameters(self) -> Params:
        """Return copies of the module's own parameters by name."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def __call__(self, params: Params, inputs: Tensor) -> Tensor:
        """Return what the module makes of inputs with these parameters in place of its own."""
        module = self._copy()
        # Where the parameters are, which is not where the module was made if that is no GPU.
        buffers = {name: b.to(inputs.device) for name, b in module.named_buffers()}
        outputs: Tensor = functional_call(module, {**buffers, **params}, (inputs,))
        return outputs

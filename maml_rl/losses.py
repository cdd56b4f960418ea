"""Inner losses, as functions of one task's log-probabilities.

All three have the same gradient at the point where the episodes were sampled, and different
Hessians there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from maml_rl.episodes import Steps

InnerLoss = Callable[[Tensor, Steps], Tensor]


def log_prob_loss(log_probs: Tensor, steps: Steps) -> Tensor:
    """-mean over live steps of log pi(a|s) A, the paper's own code. (S,) to a scalar."""
    return -(steps.weights * log_probs * steps.advantages).sum(-1)


def likelihood_ratio_loss(log_probs: Tensor, steps: Steps) -> Tensor:
    """-mean of pi / pi_sampled A (Rothfuss et al. 2019, arXiv:1810.06784, eq. 12)."""
    ratios = torch.exp(log_probs - steps.log_probs)
    return -(steps.weights * ratios * steps.advantages).sum(-1)


def dice_loss(log_probs: Tensor, steps: Steps) -> Tensor:
    """-mean over live steps of [exp(S_t) - exp(S_t-1)] A_t.

    S_t is the sum to t of log pi - stop(log pi), starting at 0 in every episode. Loaded DiCE
    (Farquhar et al. 2019, arXiv:1909.10549), whose Hessian is unbiased.
    """
    differences = log_probs - log_probs.detach()
    total = differences.cumsum(-1)
    sums = total - (total - differences).gather(-1, steps.first)
    return -(
        steps.weights * (torch.exp(sums) - torch.exp(sums - differences)) * steps.advantages
    ).sum(-1)


INNER_LOSSES: Mapping[str, InnerLoss] = {
    "log-prob": log_prob_loss,
    "likelihood-ratio": likelihood_ratio_loss,
    "dice": dice_loss,
}

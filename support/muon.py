"""Muon (Keller Jordan, 2024) in float32, for the warm-up of the toy model.

torch.optim.Muon computes in bfloat16. Many CPUs have no fast bfloat16: there, a product of the
toy's matrices takes 35 times as long as in float32.
"""

import math
from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration, as in torch.optim.Muon
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, for 2-D parameters.

    Nesterov momentum and decoupled weight decay. The update is scaled by 0.2 sqrt(larger side), so
    that AdamW's learning rates fit. Parameters of equal shape share their matrix products.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step, from the gradients."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self.step_together(parameters, group)

    def step_together(self, parameters: list[torch.Tensor], group: dict) -> None:
        """Update parameters of one shape."""
        updates = torch.stack([self.momentum_of(p, group["momentum"]) for p in parameters])
        scale = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonalize(updates)):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-scale)

    def momentum_of(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Add the gradient of a parameter to its momentum. Returns the Nesterov update."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximately the nearest orthogonal matrix to each, [B, M, N] -> [B, M, N].

    The Newton-Schulz iteration moves every singular value close to 1.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x

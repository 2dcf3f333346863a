"""Test-time counter-attack (TTC; Xing, Zhao and Sebe, CVPR 2025): images that noise hardly moves are pushed away."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.search import check_steps
from fastmat.errors import UserError
from fastmat.guards.base import Encode


class TTC:
    """An attacked image is taken to be one whose embedding random noise moves little (its section 3.2, "false
    stability"); ascent of the distance to that embedding is to carry it out again. Others keep the noise alone.

    eps 4/255, steps 2, step_size 1/255, threshold (tau) 0.2 and beta 2, as published (step_size: the authors' code).
    Of an image whose embedding moves by less than the share `threshold`, the noise and the iterates are averaged with
    weights exp(beta * step); the others get the noise.

    Gradient: the counter-perturbation is held constant, that is the identity where pixels are not clamped. It is the
    derivative almost everywhere: noise, signs of gradients and the decision do not change with the image.
    Costs 2 + steps forwards and `steps` backwards more than the model; all rows of a batch are pushed.
    Raises UserError for steps below 1, a negative step_size, eps, threshold or beta.
    """

    random = True

    def __init__(
        self,
        *,
        eps: float = 4 / 255,
        steps: int = 2,
        step_size: float = 1 / 255,
        threshold: float = 0.2,
        beta: float = 2.0,
    ) -> None:
        check_steps(steps, step_size)
        for name, value in (("eps", eps), ("threshold", threshold), ("beta", beta)):
            if not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        self.eps = eps
        self.steps = steps
        self.step_size = step_size
        self.threshold = threshold
        self.beta = beta

    def __call__(self, images: Tensor, *, encode: Encode, draws: Draws) -> Tensor:
        return (images + self.counter(images.detach(), encode, draws)).clamp(0, 1)

    @torch.enable_grad()
    def counter(self, x: Tensor, encode: Encode, draws: Draws) -> Tensor:
        """The perturbation that is added, [B, 3, H, W], constant."""
        with torch.no_grad():
            own = encode(x)
        index = torch.arange(len(x), device=x.device)
        delta = self.eps * draws.uniform("ttc", index, x.shape[1:])
        passed = [(x + delta).clamp(0, 1) - x]
        stable = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for step in range(self.steps):
            live = passed[-1].detach().requires_grad_(True)
            moved = encode(x + live) - own
            if not step:
                stable = moved.detach().norm(dim=1) < self.threshold * own.norm(dim=1)
            (gradient,) = torch.autograd.grad(moved.square().sum(), live)
            pushed = (live.detach() + self.step_size * gradient.sign()).clamp(-self.eps, self.eps)
            passed.append((x + pushed).clamp(0, 1) - x)
        weights = (self.beta * torch.arange(self.steps + 1, device=x.device)).softmax(0)
        mean = torch.stack([weight * part for weight, part in zip(weights, passed, strict=True)]).sum(0)
        return torch.where(stable[:, None, None, None], mean, passed[0]).detach()

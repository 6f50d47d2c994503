"""Muon for the matrices inside the layers, AdamW for the rest, over a plain dict of tensors.

Here: the update rules, the schedule and the clipping of gradients. The state is a flat dict, so
that a checkpoint can hold it. Sources: Muon with its quintic Newton-Schulz iteration, K. Jordan et
al. 2024 (kellerjordan.github.io/posts/muon); AdamW, Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """Learning rates at full height and the shape of the schedule.

    `warmup` and `cooldown` are shares of all steps; the rate rises linearly from zero and falls
    linearly to zero. `weight_decay` is Muon's, in units of its learning rate.
    """

    muon_lr: float
    adam_lr: float
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: float = 0.05
    cooldown: float = 0.5


class Optimiser:
    """Updates `weights` in place from their gradients."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: OptimiserConfig,
        iteration_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`iteration_dtype`: type that Newton-Schulz is computed in; bf16 is enough for it."""
        self.weights = weights
        self.config = config
        self.iteration_dtype = iteration_dtype
        self.state: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if uses_muon(name, weight):
                self.state[f"momentum.{name}"] = torch.zeros_like(weight)
            else:
                self.state[f"mean.{name}"] = torch.zeros_like(weight)
                self.state[f"square.{name}"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, index: int, scale: float) -> float:
        """Update all weights and forget their gradients.

        Args:
            index: number of updates made before.
            scale: factor on the learning rates.

        Returns:
            The norm of all gradients before clipping.
        """
        norm = self._clip()
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            if uses_muon(name, weight):
                self._muon(name, weight, weight.grad, self.config.muon_lr * scale)
            else:
                self._adamw(name, weight, weight.grad, self.config.adam_lr * scale, index + 1)
            weight.grad = None
        return norm

    def _clip(self) -> float:
        grads = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor)
        return float(norm)

    def _muon(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> None:
        momentum = self.state[f"momentum.{name}"]
        momentum.lerp_(grad, 1 - self.config.momentum)
        nesterov = torch.lerp(grad, momentum, self.config.momentum)
        update = orthogonalise(nesterov, self.iteration_dtype).to(weight.dtype)
        n_out, n_in = weight.shape
        weight.mul_(1 - lr * self.config.weight_decay)
        weight.add_(update, alpha=-lr * max(1.0, n_out / n_in) ** 0.5)

    def _adamw(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> None:
        mean, square = self.state[f"mean.{name}"], self.state[f"square.{name}"]
        beta_mean, beta_square = self.config.betas
        mean.lerp_(grad, 1 - beta_mean)
        square.lerp_(grad.square(), 1 - beta_square)
        unbiased = mean / (1 - beta_mean**count)
        spread = (square / (1 - beta_square**count)).sqrt_().add_(self.config.eps)
        weight.add_(unbiased / spread, alpha=-lr)


def uses_muon(name: str, weight: Tensor) -> bool:
    """Matrices between hidden states; not the embedding, which is the head too, and not vectors."""
    return weight.ndim == 2 and not name.startswith(("embed_tokens", "lm_head"))


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Roughly U V^T of the singular value decomposition: singular values end in about 0.7 .. 1.2.

    Newton-Schulz iteration X <- aX + b(XX^T)X + c(XX^T)^2 X of the Muon post.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


def schedule(step: int, n_steps: int, config: OptimiserConfig) -> float:
    """Factor on the learning rates in step 0 .. n_steps - 1; above zero in all of them."""
    rising = (step + 1) / max(1.0, config.warmup * n_steps)
    falling = (n_steps - step) / max(1.0, config.cooldown * n_steps)
    return min(1.0, rising, falling)

"""The three optimizers and their schedules, given in fractions of the run and converted here.

The learning rate is a function of the state's one step counter. (Adam's own count, in its state,
only corrects its bias.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from afkd_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step, counted from 0."""

    kind: str  # 'constant', 'steps' or 'cosine'
    initial: float
    changes: tuple[tuple[int, float], ...]  # (step, factor): from that step on, times factor
    steps: int  # of the run; 'cosine' reaches 0 there

    def __call__(self, step: jax.Array) -> Any:
        """Returns the learning rate at `step`."""
        if self.kind == 'cosine':
            return optax.cosine_decay_schedule(self.initial, self.steps)(step)
        factors: dict[int, float] = {}
        for at, factor in self.changes:  # two fractions may fall on one step
            factors[at] = factors.get(at, 1.0) * factor
        return optax.piecewise_constant_schedule(self.initial, factors)(step)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A direction from optax, and the learning rate that scales it."""

    facts: tuple[tuple[str, Any], ...]  # the rule's name and settings, for `--mode describe`
    direction: optax.GradientTransformation
    schedule: Schedule

    def init(self, params: Any) -> Any:
        """Returns the optimizer's state for `params`."""
        return self.direction.init(params)

    def apply(self, gradients: Any, state: Any, params: Any, step: jax.Array) -> tuple[Any, Any]:
        """Returns (params - learning rate(step) * direction, new state)."""
        direction, state = self.direction.update(gradients, state, params)
        rate = self.schedule(step)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """The optimizers that the method uses; the others are None.

    logit updates G_k and C_k (and T_k where a loss between maps is part of the logit loss), feature
    updates G_k and T_k, discriminator D_k.
    """

    logit: Optimizer
    feature: Optimizer | None
    discriminator: Optimizer | None

    def used(self) -> dict[str, Optimizer]:
        """Returns name -> optimizer, in the order in which they are applied."""
        return {name: rule for name, rule in vars(self).items() if rule}


def create(
    config: config_lib.Config, adversarial: bool, run_steps: Callable[[float], int]
) -> Optimizers:
    """Returns the optimizers of a run.

    Logit: SGD, v <- momentum v + (g + decay w), w <- w - rate v. Feature and discriminator: Adam
    with betas 0.9 and 0.999, epsilon 1e-8. Source: settings in docs/method.md; remembered, not
    verified. `run_steps` maps a fraction of the run to steps.
    """

    def optimizer(
        section: config_lib.Optimizer, direction: optax.GradientTransformation, **facts: Any
    ) -> Optimizer:
        fractions = section.boundaries if section.schedule == 'steps' else ()
        changes = tuple((run_steps(fraction), section.factor) for fraction in fractions)
        schedule = Schedule(section.schedule, float(section.learning_rate), changes, run_steps(1))
        # Coupled weight decay, on every parameter, as in related recipes.
        decay = section.weight_decay
        decayed = optax.add_decayed_weights(decay) if decay else optax.identity()
        facts['weight_decay'] = decay
        return Optimizer(tuple(facts.items()), optax.chain(decayed, direction), schedule)

    momentum = config.logit.momentum
    logit = optimizer(config.logit, optax.trace(momentum), rule='SGD', momentum=momentum)
    if not adversarial:
        return Optimizers(logit, None, None)
    sections = config.feature, config.discriminator
    return Optimizers(
        logit, *(optimizer(each, optax.scale_by_adam(), rule='Adam') for each in sections)
    )

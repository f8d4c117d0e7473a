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
    """A learning rate as a function of the step, counted from 0.

    Attributes:
      kind: 'constant', 'steps' or 'cosine'.
      initial: the learning rate of step 0.
      changes: for 'steps', ((step, factor), ...): from that step on, multiplied by factor.
      steps: the length of the run; 'cosine' reaches 0 there.
    """

    kind: str
    initial: float
    changes: tuple[tuple[int, float], ...]
    steps: int

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
    """A direction from optax, and the learning rate that scales it.

    Attributes:
      facts: the rule's name and settings, for `--mode describe`.
    """

    facts: tuple[tuple[str, Any], ...]
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
    verified.

    Args:
      config: the whole config.
      adversarial: whether the method has discriminators.
      run_steps: fraction of the run -> steps.
    """
    sgd = {'rule': 'SGD', 'momentum': config.logit.momentum}
    logit = _optimizer(config.logit, sgd, optax.trace(config.logit.momentum), run_steps)
    if not adversarial:
        return Optimizers(logit, None, None)
    feature, discriminator = (
        _optimizer(section, {'rule': 'Adam'}, optax.scale_by_adam(), run_steps)
        for section in (config.feature, config.discriminator)
    )
    return Optimizers(logit, feature, discriminator)


def _optimizer(
    section: config_lib.Optimizer,
    facts: dict[str, Any],
    direction: optax.GradientTransformation,
    run_steps: Callable[[float], int],
) -> Optimizer:
    changes = ()
    if section.schedule == 'steps':
        changes = tuple((run_steps(fraction), section.factor) for fraction in section.boundaries)
    # Coupled weight decay, on every parameter, as in related recipes.
    decay = section.weight_decay
    decayed = optax.add_decayed_weights(decay) if decay else optax.identity()
    schedule = Schedule(section.schedule, float(section.learning_rate), changes, run_steps(1))
    facts = facts | {'weight_decay': decay}
    return Optimizer(tuple(facts.items()), optax.chain(decayed, direction), schedule)

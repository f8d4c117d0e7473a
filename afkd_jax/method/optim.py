"""The three optimizers and their schedules; given in fractions of the run, converted here.

The learning rate is a function of the state's one step counter. (Adam's own count, in its state,
serves its bias correction alone.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict


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

    def __call__(self, step: jax.Array) -> jax.Array:
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
      facts: what it is, for a reader: ('rule', its name), and what that rule is set to.
      direction: from optax.
      schedule: of the learning rate.
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
    """The logit optimizer moves G_k and C_k, feature G_k and T_k, discriminator D_k.

    Where maps learn by L1, which is part of the logit loss, logit moves T_k too. What the method
    has no use for is None.
    """

    logit: Optimizer
    feature: Optimizer | None
    discriminator: Optimizer | None

    def used(self) -> dict[str, Optimizer]:
        """Returns those that there are, by name, in the order in which they are applied."""
        return {name: rule for name, rule in vars(self).items() if rule}


def _optimizer(
    c: ConfigDict,
    facts: dict[str, Any],
    direction: optax.GradientTransformation,
    steps_in: Callable[[float], int],
) -> Optimizer:
    changes = ()
    if c.schedule == 'steps':
        changes = tuple((steps_in(fraction), c.factor) for fraction in c.boundaries)
    # Coupled weight decay, on every parameter, as in the neighbours' recipes.
    decay = optax.add_decayed_weights(c.weight_decay) if c.weight_decay else optax.identity()
    schedule = Schedule(c.schedule, float(c.learning_rate), changes, steps_in(1))
    facts = (*facts.items(), ('weight_decay', c.weight_decay))
    return Optimizer(facts, optax.chain(decay, direction), schedule)


def create(config: ConfigDict, adversarial: bool, steps_in: Callable[[float], int]) -> Optimizers:
    """Returns the optimizers of one run.

    Logit: SGD, v <- momentum v + (g + decay w), w <- w - rate v. Feature and discriminator: Adam
    with betas 0.9 and 0.999, epsilon 1e-8. Source: method's settings; remembered, not verified.

    Args:
      config: the whole config.
      adversarial: whether the method has discriminators.
      steps_in: fraction of the run -> steps.
    """
    sgd = {'rule': 'SGD', 'momentum': config.logit.momentum}
    logit = _optimizer(config.logit, sgd, optax.trace(config.logit.momentum), steps_in)
    if not adversarial:
        return Optimizers(logit, None, None)
    return Optimizers(
        logit,
        _optimizer(config.feature, {'rule': 'Adam'}, optax.scale_by_adam(), steps_in),
        _optimizer(config.discriminator, {'rule': 'Adam'}, optax.scale_by_adam(), steps_in),
    )

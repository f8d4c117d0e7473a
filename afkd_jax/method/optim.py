"""The three optimizers and their schedules, given in fractions of the run and converted here.

The learning rate is a function of the state's one step counter. (Adam's own count, in its state,
only corrects its bias.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from afkd_jax import config as config_lib
from afkd_jax.errors import field_error


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the step, counted from 0."""

    kind: str  # 'constant', 'steps' or 'cosine'
    initial: float
    changes: tuple[tuple[int, float], ...]  # (step, factor): from that step on, times factor
    steps: int  # of the run; 'cosine' reaches 0 there
    warm_up: int = 0  # steps in which the rate rises linearly to the schedule's; 0: none

    def __call__(self, step: jax.Array) -> Any:
        """Returns the learning rate at `step`."""
        if self.warm_up:
            whole = dataclasses.replace(self, warm_up=0)
            return whole(step) * jnp.minimum((step + 1) / self.warm_up, 1.0)
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
    per_network: tuple['Optimizer', ...] = ()  # where the networks' differ, instead of this one

    def of(self, network: int) -> 'Optimizer':
        """Returns the optimizer of a network, counted from 0."""
        return self.per_network[network] if self.per_network else self

    def rates(self, step: jax.Array) -> Any:
        """Returns the learning rate at `step`; [K] where the networks' differ."""
        if self.per_network:
            return jnp.stack([own.schedule(step) for own in self.per_network])
        return self.schedule(step)

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

    Logit, by default: SGD, v <- momentum v + (g + decay w), w <- w - rate v. Feature and
    discriminator: Adam with betas 0.9 and 0.999, epsilon 1e-8. Source: settings in docs/method.md;
    remembered, not verified. `run_steps` maps a fraction of the run to steps.

    Raises:
      UserError: learning rates or weight decays are not one per network, or networks are sharded.
    """

    def optimizer(
        section: config_lib.Optimizer,
        direction: optax.GradientTransformation,
        warm_up: float = 0.0,
        **facts: Any,
    ) -> Optimizer:
        fractions = section.boundaries if section.schedule == 'steps' else ()
        changes = tuple((run_steps(fraction), section.factor) for fraction in fractions)
        rate, warm_up_steps = float(section.learning_rate), run_steps(warm_up)
        schedule = Schedule(section.schedule, rate, changes, run_steps(1), warm_up_steps)
        facts['weight_decay'] = section.weight_decay
        if config.accumulate > 1:
            facts['accumulate'] = config.accumulate
            own: Any = None  # the gradients' dtype
            many = optax.MultiSteps(direction, config.accumulate, accumulator_dtype=own)
            direction = many.gradient_transformation()
        return Optimizer(tuple(facts.items()), direction, schedule)

    def of_logits(section: config_lib.LogitOptimizer) -> Optimizer:
        return optimizer(section, _direction(section), section.warm_up, **_facts(section))

    def adam(section: config_lib.Optimizer) -> Optimizer:
        direction = optax.chain(_decay(section.weight_decay), optax.scale_by_adam())
        return optimizer(section, direction, rule='Adam')

    logit = of_logits(config.logit)
    if sections := _sections(config):
        logit = dataclasses.replace(logit, per_network=tuple(map(of_logits, sections)))
    if not adversarial:
        return Optimizers(logit, None, None)
    own = config.adversarial.optimizer == 'own'
    return Optimizers(logit, adam(config.feature) if own else None, adam(config.discriminator))


_NAMES = {'sgd': 'SGD', 'adam': 'Adam', 'adamw': 'AdamW', 'lion': 'Lion'}


def _decay(weight: float, least_axes: int = 0) -> optax.GradientTransformation:
    """Returns what adds weight w to the update of every parameter w of at least so many axes."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, w: u + weight * w if w.ndim >= least_axes else u, updates, params
        )

    return optax.stateless(update) if weight else optax.identity()


def _direction(logit: config_lib.LogitOptimizer) -> optax.GradientTransformation:
    decay = _decay(logit.weight_decay, 0 if logit.decay_all else 2)  # biases and norms have 1
    rule = {
        'sgd': lambda: optax.trace(logit.momentum, logit.nesterov),
        'adam': lambda: optax.scale_by_adam(nesterov=logit.nesterov),
        'adamw': lambda: optax.scale_by_adam(nesterov=logit.nesterov),
        'lion': optax.scale_by_lion,
    }[logit.rule]()
    # Coupled weight decay, as in related recipes, unless the rule is known for the decoupled one.
    parts = [rule, decay] if logit.rule in ('adamw', 'lion') else [decay, rule]
    clip = [optax.clip_by_global_norm(logit.clip_norm)] if logit.clip_norm else []
    return optax.chain(*clip, *parts)


def _facts(logit: config_lib.LogitOptimizer) -> dict[str, Any]:
    """Returns the rule and its settings; of the newer ones those that are not off."""
    facts: dict[str, Any] = {'rule': _NAMES[logit.rule]}
    if logit.rule == 'sgd':
        facts['momentum'] = logit.momentum
    if logit.nesterov and logit.rule != 'lion':
        facts['nesterov'] = True
    if logit.clip_norm:
        facts['clip_norm'] = logit.clip_norm
    if not logit.decay_all:
        facts['decay_all'] = False
    return facts


def _sections(config: config_lib.Config) -> list[config_lib.LogitOptimizer]:
    """Returns the logit optimizer's settings of each network; [] where all have the same."""
    logit, networks, sections = config.logit, len(config.networks), []
    for name, rule in (('learning_rates', 'learning_rate'), ('weight_decays', 'weight_decay')):
        if values := getattr(logit, name):
            if len(values) != networks:
                rule = f'one number per network, that is {networks}, or ()'
                raise field_error(f'logit.{name}', rule, values)
            if config.mesh.peer > 1:
                raise field_error('mesh.peer', f'1 with config.logit.{name}', config.mesh.peer)
            sections = [
                dataclasses.replace(section, **{rule: value})
                for section, value in zip(sections or networks * [logit], values, strict=True)
            ]
    return sections

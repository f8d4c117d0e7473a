"""The objective: a method's losses, as gradients with respect to logits and maps.

The logits of all networks, and their maps after the transfer layers, are stacked on a leading axis
K (this device's networks, where they are sharded). The step pulls the returned gradients back
through the networks. The sum of the losses over the networks has the same gradients as each loss by
itself, because every teacher's gradient is stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.config import Adversarial, Discriminator, Loss
from afkd_jax.data.augment import Mixed
from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.errors import UserError
from afkd_jax.method import losses
from afkd_jax.method.auxiliary import Terms
from afkd_jax.method.presets import Method
from afkd_jax.method.ring import Ring

# A discriminator: (parameters, maps [B, H, W, C], conditions [B, E] or None) -> (outputs [B] or
# [B, h, w], new state).
DiscriminatorFn = Callable[[Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
# An auxiliary module: (parameters, logits [K, B, C], maps) -> (outputs, new batch statistics).
AuxiliaryFn = Callable[[Any, jax.Array, Sequence[jax.Array]], tuple[Any, Any]]
Values = dict[str, jax.Array]
_SWITCH = ('l1_to_labels', 'l1_to_teacher', 'paused')
_ADVERSARIAL = ('adversarial', 'discriminator', 'd_own', 'd_teacher')


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of a method."""

    method: Method
    ring: Ring
    loss: Loss
    kl_ramp_steps: int  # steps in which the KL's weight grows; 0: none
    frozen: tuple[int, ...] = ()  # networks that have no loss, counted from 0
    discriminator: Discriminator = dataclasses.field(default_factory=Discriminator)
    adversarial: Adversarial = dataclasses.field(default_factory=Adversarial)
    adversarial_ramp_steps: int = 0  # steps in which the weight of L_G grows; 0: none

    def value_names(self) -> list[str]:
        """Returns the names of the values [K] that the losses report, each without its weight.

        cross_entropy, with label smoothing; mimicry_kl, with its T^2; l1_to_labels, l1_to_teacher,
        of probabilities, and paused, 1 or 0, where a pair switches; the loss between maps under its
        name (l1); adversarial is L_G and discriminator L_D; d_own and d_teacher are the
        discriminator's mean outputs on the student's ("fake") and the teacher's ("real") maps, from
        0, its goal for fake, to 1, for real. The losses are 0 of a frozen network, but for its
        cross_entropy.
        """
        names = ['cross_entropy']
        if self.method.auxiliary:
            names += self.method.auxiliary.names
        elif self.method.logits != 'nobody':
            names.append('mimicry_kl')
        if self.method.switches:
            names += _SWITCH
        if self.method.map_loss:
            names.append(self.method.maps)
        if self.method.adversarial:
            names += _ADVERSARIAL
        return names

    def step_value_names(self) -> list[str]:
        """Returns the names of the values that are scalars: of the auxiliary module's own loss."""
        return list(self.method.auxiliary.step_names) if self.method.auxiliary else []

    @property
    def balanced(self) -> bool:
        """Whether the weight of L_G follows the gradients."""
        return self.method.adversarial and self.adversarial.balance == 'gradnorm'

    def _of_learners(self, loss_K: jax.Array) -> jax.Array:
        return loss_K.at[np.array(self.frozen)].set(0.0) if self.frozen else loss_K

    def _logit_teachers(self, logits_KxBxC: jax.Array, labels_B: jax.Array) -> list[jax.Array]:
        """Returns the teachers' logits, each [K, B, C], gradient stopped.

        Raises:
          UserError: a logit teacher of one's own returns something else.
        """
        teachers = list(self.method.logit_teacher(self.ring, logits_KxBxC, labels_B))
        shapes = [jnp.shape(teacher) for teacher in teachers]
        none = not shapes and self.method.logits != 'nobody'
        if none or any(shape != logits_KxBxC.shape for shape in shapes):
            raise UserError(
                f'config.method: the logit teacher "{self.method.logits}" must return a list of '
                f'arrays {logits_KxBxC.shape}, the shape of the logits, but returns {shapes}'
            )
        return jax.lax.stop_gradient(teachers)

    def entropy(self, logits: jax.Array, labels_B: jax.Array, mixed: Mixed | None) -> jax.Array:
        """Returns the mean of CE(y, z) of logits [..., B, C], of mixed images by their weights."""
        smoothing = self.loss.label_smoothing
        entropy = losses.cross_entropy(logits, labels_B, smoothing)
        if mixed is not None:
            other = losses.cross_entropy(logits, mixed.labels, smoothing)
            entropy = other + jnp.broadcast_to(mixed.weight, entropy.shape) * (entropy - other)
        return entropy.mean(-1)

    def _kl(self, logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        return losses.mimicry_kl(logits, teacher_logits, self.loss.temperature).mean(-1)

    def _kl_weight(self, step: jax.Array) -> Any:
        weight: Any = self.loss.kl_weight
        if self.kl_ramp_steps:
            weight *= losses.ramp_up(step, self.kl_ramp_steps)
        return weight

    def of_logits(
        self,
        logits_KxBxC: jax.Array,
        labels_B: jax.Array,
        step: jax.Array,
        mixed: Mixed | None = None,
        taught_KxBxC: jax.Array | None = None,
    ) -> tuple[jax.Array, Values]:
        """Returns the gradients of the networks' logit losses to their logits, and values [K].

        The teachers' logits are made of taught_KxBxC, if it is given, in place of the networks'.
        CE(y, z_k) + w mean over k's teachers p of T^2 KL(softmax(z_p / T) || softmax(z_k / T)).
        Where images are mixed, CE is s CE(y, z_k) + (1 - s) CE(other's y, z_k).
        """

        def loss(logits_KxBxC: jax.Array) -> tuple[jax.Array, Values]:
            entropy_K = self.entropy(logits_KxBxC, labels_B, mixed)
            total_K, parts = entropy_K, {'cross_entropy': entropy_K}
            known_KxBxC = logits_KxBxC if taught_KxBxC is None else taught_KxBxC
            teachers = self._logit_teachers(known_KxBxC, labels_B)
            kls = [self._kl(logits_KxBxC, logits) for logits in teachers]
            if kls:
                parts['mimicry_kl'] = self._of_learners(sum(kls[1:], kls[0]) / len(kls))
                total_K += self._kl_weight(step) * parts['mimicry_kl']
            return total_K.sum(), parts

        return jax.grad(loss, has_aux=True)(logits_KxBxC)

    def of_auxiliary(
        self,
        module: AuxiliaryFn,
        params: Any,
        logits_KxBxC: jax.Array,
        maps: Sequence[jax.Array],
        labels_B: jax.Array,
        step: jax.Array,
        mixed: Mixed | None = None,
    ) -> tuple[tuple[Any, jax.Array, Sequence[jax.Array]], tuple[Values, Any]]:
        """Returns the gradients of the logit losses to (parameters, logits, maps), and more.

        The second part is (values, the module's new batch statistics). The losses are those of
        of_logits with the loss of the auxiliary module in place of the KL.
        """
        auxiliary = self.method.auxiliary
        assert auxiliary

        def entropy(logits: jax.Array) -> jax.Array:
            return self.entropy(logits, labels_B, mixed)

        terms = Terms(entropy, self._kl, self.loss.temperature, self._kl_weight(step))

        def loss(params: Any, logits_KxBxC: jax.Array, maps: Sequence[jax.Array]) -> Any:
            outputs, stats = module(params, logits_KxBxC, maps)
            entropy_K = entropy(logits_KxBxC)
            added, parts = auxiliary.loss(outputs, logits_KxBxC, labels_B, terms)
            return entropy_K.sum() + added, ({'cross_entropy': entropy_K} | parts, stats)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, logits_KxBxC, maps)

    def distances(self, logits_KxBxC: jax.Array, labels_B: jax.Array) -> Values:
        """Returns the means [K] on which paused() depends."""
        to_labels_KxB = losses.l1_to_labels(logits_KxBxC, labels_B)
        to_teacher_KxB = losses.l1_to_teacher(logits_KxBxC, self.ring.teachers(logits_KxBxC))
        return {'l1_to_labels': to_labels_KxB.mean(1), 'l1_to_teacher': to_teacher_KxB.mean(1)}

    def paused(self, values: Values) -> jax.Array:
        """Returns which of the pair skip this update, bool [2], of distances() of all images."""
        teacher, student = values['l1_to_labels']
        teacher_pauses = losses.switches(values['l1_to_teacher'][0], teacher, student)
        return jnp.stack([teacher_pauses, jnp.zeros_like(teacher_pauses)])

    def of_maps(
        self,
        maps_KxBxHxWxC: jax.Array,
        labels_B: jax.Array,
        taught_KxBxHxWxC: jax.Array | None = None,
    ) -> tuple[jax.Array, Values]:
        """Returns the gradients of the weighted losses between maps to the maps, and values [K]."""
        map_loss = self.method.map_loss
        assert map_loss

        def loss(maps_KxBxHxWxC: jax.Array) -> tuple[jax.Array, Values]:
            own = at_least_float32(maps_KxBxHxWxC)
            known = maps_KxBxHxWxC if taught_KxBxHxWxC is None else taught_KxBxHxWxC
            teachers = at_least_float32(self.ring.teachers(known))
            loss_K = self._of_learners(map_loss(own, teachers, labels_B).mean(1))
            return self.loss.map_weight * loss_K.sum(), {self.method.maps: loss_K}

        return jax.grad(loss, has_aux=True)(maps_KxBxHxWxC)

    def adversarial_weight(self, step: jax.Array) -> Any:
        """Returns the weight of L_G, before it is balanced."""
        weight: Any = self.loss.adversarial_weight
        if self.adversarial_ramp_steps:
            weight *= losses.ramp_up(step, self.adversarial_ramp_steps)
        return weight

    def conditions(
        self,
        logits_KxBxC: jax.Array,
        taught_KxBxC: jax.Array,
        labels_B: jax.Array,
        mixed: Mixed | None = None,
    ) -> tuple[Any, Any]:
        """Returns the conditions of D on students' and teachers' maps, each [K, B, C] or K None.

        The one-hot label, mixed as the images are; or the softmax of the logits of the network
        whose map it is, gradient stopped.
        """
        kind, (networks, _, classes) = self.discriminator.condition, logits_KxBxC.shape
        if kind == 'none':
            return networks * (None,), networks * (None,)
        if kind == 'label':
            hot_BxC = jax.nn.one_hot(labels_B, classes)
            if mixed is not None:
                other_BxC = jax.nn.one_hot(mixed.labels, classes)
                hot_BxC = other_BxC + mixed.weight[:, None] * (hot_BxC - other_BxC)
            return networks * (hot_BxC,), networks * (hot_BxC,)
        own_KxBxC = jax.lax.stop_gradient(jax.nn.softmax(logits_KxBxC))
        return own_KxBxC, self.ring.teachers(jax.nn.softmax(taught_KxBxC))

    def of_adversaries(
        self,
        discriminators: Sequence[DiscriminatorFn | None],
        params: Sequence[Any],
        maps_KxBxHxWxC: jax.Array,
        taught_KxBxHxWxC: jax.Array | None = None,
        conditions: tuple[Any, Any] | None = None,
        step: Any = 0,
        weight: Any = None,
    ) -> tuple[jax.Array, list[Any], list[Any], Values]:
        """Returns gradients of L_G to the maps, of L_D to the parameters, states and values [K].

        One forward pass of D_k on the student's map serves both losses. L_G reaches only the map,
        L_D only the discriminator.

        Args:
          discriminators: K, None of a frozen network.
          params: of each.
          maps_KxBxHxWxC: the students' after the transfer layers.
          taught_KxBxHxWxC: the networks' as teachers; None: the same.
          conditions: of students and teachers, see conditions(); None: none.
          step: counted from 0.
          weight: of L_G; None: loss.adversarial_weight.
        """
        known = maps_KxBxHxWxC if taught_KxBxHxWxC is None else taught_KxBxHxWxC
        teacher_maps_KxBxHxWxC = self.ring.teachers(known)
        own_conditions, teacher_conditions = conditions or 2 * (len(discriminators) * (None,),)
        adversarial = losses.ADVERSARIAL[self.discriminator.loss]
        weight = self.loss.adversarial_weight if weight is None else weight
        map_gradients, gradients, states, parts = [], [], [], []
        for k, discriminator in enumerate(discriminators):
            if discriminator is None:  # a frozen network's
                map_gradients.append(jnp.zeros_like(maps_KxBxHxWxC[k]))
                gradients.append(None)
                states.append(None)
                parts.append(len(_ADVERSARIAL) * (jnp.float32(0),))
                continue
            pair = _Pair(
                discriminator,
                params[k],
                (maps_KxBxHxWxC[k], teacher_maps_KxBxHxWxC[k]),
                (own_conditions[k], teacher_conditions[k]),
            )
            run = pair.joint if self.discriminator.norm == 'joint' else pair.apart
            d_own, d_teacher, state, to_map, to_params = run()

            generator, to_own_G = jax.value_and_grad(lambda d: adversarial.generator(d).mean())(
                d_own
            )
            loss, (to_own_D, to_teacher_D) = jax.value_and_grad(
                lambda own, teacher: adversarial.discriminator(own, teacher).mean(), argnums=(0, 1)
            )(d_own, d_teacher)

            map_gradients.append(to_map(weight * to_own_G))
            gradient = to_params(to_own_D, to_teacher_D)
            if self.discriminator.r1:
                gradient = jax.tree.map(jnp.add, gradient, self._of_penalty(pair, step))
            gradients.append(gradient)
            states.append(state)
            outputs = (adversarial.between(d).mean() for d in (d_own, d_teacher))
            parts.append((generator, loss, *outputs))
        stacked = map(jnp.stack, zip(*parts, strict=True))
        values: Values = dict(zip(_ADVERSARIAL, stacked, strict=True))
        return jnp.stack(map_gradients), gradients, states, values

    def _of_penalty(self, pair: '_Pair', step: Any) -> Any:
        """Returns the gradient of the penalty on real maps to D's parameters.

        r1 / 2 mean |dD(x)/dx|^2, every r1_every steps and times r1_every; else 0.
        Source: Mescheder et al. 2018; seldom and then more, Karras et al. 2020.
        """
        every, joint = self.discriminator.r1_every, self.discriminator.norm == 'joint'

        def gradient(params: Any) -> Any:
            penalty = jax.grad(lambda params: pair.slope(params, joint))(params)
            return jax.tree.map(lambda g: self.discriminator.r1 / 2 * every * g, penalty)

        if every == 1:
            return gradient(pair.params)
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return jax.lax.cond(step % every == 0, gradient, zeros, pair.params)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A discriminator on the student's and the teacher's maps.

    apart() and joint() return (outputs on the student's maps, on the teacher's, new state, pullback
    of the first to the student's maps, pullback of both to the parameters).
    """

    discriminator: DiscriminatorFn
    params: Any
    maps: tuple[jax.Array, jax.Array]
    conditions: tuple[Any, Any]

    def apart(self) -> tuple[Any, ...]:
        """Each is a batch of its own."""
        (d_own, state, pull_own), (d_teacher, _, pull_teacher) = (
            self._vjp(maps, condition)
            for maps, condition in zip(self.maps, self.conditions, strict=True)
        )

        def to_params(to_own: jax.Array, to_teacher: jax.Array) -> Any:
            return jax.tree.map(jnp.add, pull_own(to_own)[0], pull_teacher(to_teacher)[0])

        return d_own, d_teacher, state, lambda to_own: pull_own(to_own)[1], to_params

    def joint(self) -> tuple[Any, ...]:
        """Both are one batch, which has one mean and one variance."""
        both, size = self._both(self.maps[1]), len(self.maps[0])
        d, state, pull = self._vjp(*both)

        def to_map(to_own: jax.Array) -> jax.Array:
            return pull(jnp.concatenate([to_own, jnp.zeros_like(to_own)]))[1][:size]

        def to_params(*to_both: jax.Array) -> Any:
            return pull(jnp.concatenate(to_both))[0]

        return d[:size], d[size:], state, to_map, to_params

    def _vjp(self, maps: jax.Array, condition: Any) -> tuple[jax.Array, Any, Callable]:
        d, pull, state = jax.vjp(
            lambda params, maps: self.discriminator(params, maps, condition),
            self.params,
            maps,
            has_aux=True,
        )
        return d, state, pull

    def _both(self, teacher_maps: jax.Array) -> tuple[jax.Array, Any]:
        conditions = [condition for condition in self.conditions if condition is not None]
        both = jnp.concatenate([self.maps[0], teacher_maps])
        return both, jnp.concatenate(conditions) if conditions else None

    def slope(self, params: Any, joint: bool) -> jax.Array:
        """Returns the mean over the teacher's maps of the squared norm of D's gradient to them."""

        def total(maps: jax.Array) -> jax.Array:
            given = self._both(maps) if joint else (maps, self.conditions[1])
            d = self.discriminator(params, *given)[0][-len(maps) :]
            return d.sum() * len(d) / d.size  # of 'patch' the mean over locations

        return jnp.square(jax.grad(total)(self.maps[1])).sum((1, 2, 3)).mean()

"""What a cohort's networks are to learn: a method's losses, as gradients to logits and maps.

All networks' logits, and all their maps after the transfer layers, come in stacked on a leading
axis K (where the networks are spread over devices, those of this device). What goes out are the
gradients to them; the step pulls those back through the networks. A sum of the losses over the
networks has the same gradients as each loss alone, because every teacher's gradient is stopped.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from afkd_jax.method import losses
from afkd_jax.method.presets import Method
from afkd_jax.method.ring import Ring
from afkd_jax.models.layers import at_least_float32

# A discriminator: (parameters, maps [B, H, W, C]) -> outputs [B].
Judge = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of a method.

    Attributes:
      method: whom logits and maps learn from.
      ring: who teaches whom.
      temperature: T of the mimicry KL.
      label_smoothing: in [0, 1).
      kl_weight: of the mimicry KL in the logit loss, at the end of its ramp-up.
      kl_ramp_steps: length of the ramp-up; 0: none.
      l1_weight: of the maps' L1 in the logit loss.
      adversarial_weight: of L_G.
    """

    method: Method
    ring: Ring
    temperature: float
    label_smoothing: float
    kl_weight: float
    kl_ramp_steps: int
    l1_weight: float
    adversarial_weight: float

    def value_names(self) -> list[str]:
        """Returns the names of the values [K] that the losses report, each without its weight.

        cross_entropy, with label smoothing; mimicry_kl, with its T^2; l1; adversarial is L_G and
        discriminator L_D; d_own and d_teacher are the discriminator's mean outputs on own
        ("fake") and teacher's ("real") maps.
        """
        names = ['cross_entropy']
        if self.method.logits != 'nobody':
            names += ['mimicry_kl']
        if self.method.maps == 'l1':
            names += ['l1']
        if self.method.maps == 'adversarial':
            names += ['adversarial', 'discriminator', 'd_own', 'd_teacher']
        return names

    def of_logits(
        self,
        logits_KxBxC: jax.Array,
        labels_B: jax.Array,
        step: jax.Array,
        mixed: losses.Mixed | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the gradients of the networks' logit losses to their logits, and values [K].

        CE(y, z_k) + w mean over k's teachers p of T^2 KL(softmax(z_p / T) || softmax(z_k / T)).
        Of images that are mixed, CE is s CE(y, z_k) + (1 - s) CE(other's y, z_k).
        """

        def loss(logits_KxBxC):
            entropy_KxB = losses.cross_entropy(logits_KxBxC, labels_B, self.label_smoothing)
            if mixed is not None:
                other_KxB = losses.cross_entropy(logits_KxBxC, mixed.labels, self.label_smoothing)
                entropy_KxB = other_KxB + mixed.share[None] * (entropy_KxB - other_KxB)
            entropy_K = entropy_KxB.mean(1)
            total_K, parts = entropy_K, {'cross_entropy': entropy_K}
            kls = [
                losses.mimicry_kl(
                    logits_KxBxC, self.ring.teachers(logits_KxBxC, hops), self.temperature
                ).mean(1)
                for hops in self.method.hops(len(self.ring.order))
            ]
            if kls:
                parts['mimicry_kl'] = sum(kls) / len(kls)
                total_K += self._kl_weight(step) * parts['mimicry_kl']
            return total_K.sum(), parts

        return jax.grad(loss, has_aux=True)(logits_KxBxC)

    def _kl_weight(self, step: jax.Array) -> jax.Array | float:
        if self.kl_ramp_steps:
            return self.kl_weight * losses.ramp_up(step, self.kl_ramp_steps)
        return self.kl_weight

    def of_maps(self, maps_KxBxHxWxC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the gradients of the maps' share of the logit losses (L1) to them, and values."""

        def loss(maps_KxBxHxWxC):
            own = at_least_float32(maps_KxBxHxWxC)
            l1_K = losses.absolute_difference(
                own, at_least_float32(self.ring.teachers(maps_KxBxHxWxC))
            ).mean(1)
            return self.l1_weight * l1_K.sum(), {'l1': l1_K}

        return jax.grad(loss, has_aux=True)(maps_KxBxHxWxC)

    def of_adversaries(
        self, judges: list[Judge], params: list[Any], maps_KxBxHxWxC: jax.Array
    ) -> tuple[jax.Array, list, dict[str, jax.Array]]:
        """Returns gradients of L_G to the maps and of L_D to the discriminators, and values [K].

        Each discriminator sees the own map once and the teacher's map once. The own pass is
        pulled back twice: with L_G's cotangent to the map, with L_D's to the discriminator.

        Args:
          judges: K discriminators.
          params: their parameters.
          maps_KxBxHxWxC: after the transfer layers.
        """
        teacher_maps_KxBxHxWxC = self.ring.teachers(maps_KxBxHxWxC)
        map_gradients, gradients, parts = [], [], []
        for k, judge in enumerate(judges):
            d_own_B, pull_own = jax.vjp(judge, params[k], maps_KxBxHxWxC[k])
            d_teacher_B, pull_teacher = jax.vjp(judge, params[k], teacher_maps_KxBxHxWxC[k])

            adversarial, to_own_G = jax.value_and_grad(lambda d: losses.fool(d).mean())(d_own_B)
            discriminator, (to_own_D, to_teacher_D) = jax.value_and_grad(
                lambda own, teacher: losses.discern(own, teacher).mean(), argnums=(0, 1)
            )(d_own_B, d_teacher_B)

            _, to_map = pull_own(self.adversarial_weight * to_own_G)
            by_own, _ = pull_own(to_own_D)
            by_teacher, _ = pull_teacher(to_teacher_D)
            map_gradients.append(to_map)
            gradients.append(jax.tree.map(jnp.add, by_own, by_teacher))
            parts.append(
                {
                    'adversarial': adversarial,
                    'discriminator': discriminator,
                    'd_own': d_own_B.mean(),
                    'd_teacher': d_teacher_B.mean(),
                }
            )
        values = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
        return jnp.stack(map_gradients), gradients, values

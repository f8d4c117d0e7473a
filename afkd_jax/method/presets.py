"""Method name -> two independent choices: what the logits learn from, and what the maps.

Nothing else in the package knows a preset's name.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from afkd_jax.errors import UserError, nearest
from afkd_jax.method.auxiliary import AUXILIARIES, Auxiliary
from afkd_jax.method.teachers import HOPS, LIVE_ONLY
from afkd_jax.registry import LOGIT_TEACHERS, MAP_LOSSES

# ring, logits [K, B, C], labels [B] -> teachers' logits, each [K, B, C]
LogitTeacher = Callable[[Any, Any, Any], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of online distillation.

    Attributes:
      logits: 'nobody' (cross-entropy only), 'ring' (plus the KL to the predecessor's logits), 'all'
        (plus the mean of the KLs to the logits of all other networks), another registered one of
        teachers.py or your own (plus the mean of the KLs to what it returns), or one of
        auxiliary.py (plus its loss).
      maps: 'nothing', 'adversarial' (discriminators) or the name of a loss to the predecessor's map
        that is part of the logit loss ('l1', or a registered one).
    """

    logits: str
    maps: str

    @property
    def adversarial(self) -> bool:
        """Whether there are discriminators, and hence feature and discriminator updates."""
        return self.maps == 'adversarial'

    @property
    def uses_maps(self) -> bool:
        """Whether maps are compared, and hence brought to one shape."""
        return self.maps != 'nothing'

    @property
    def map_loss(self) -> Callable | None:
        """The loss between maps, a function of (maps, teacher's maps, labels); None if none."""
        if self.adversarial or not self.uses_maps:
            return None
        loss = MAP_LOSSES.get(self.maps)
        if len(inspect.signature(loss).parameters) > 2:
            return loss
        return lambda maps, teacher_maps, labels: loss(maps, teacher_maps)

    @property
    def switches(self) -> bool:
        """Whether the first network of a pair, the teacher, skips some of its updates."""
        return self.logits == 'switokd'

    @property
    def averages_can_teach(self) -> bool:
        """Whether config.teacher may be 'ema'."""
        has_teachers = self.logits != 'nobody' or self.uses_maps
        return has_teachers and not self.auxiliary and self.logits not in LIVE_ONLY

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The auxiliary module and its loss; None if there is none."""
        return AUXILIARIES.get(self.logits)

    @property
    def held_out(self) -> bool:
        """Whether it learns from the errors on validation images too."""
        return bool(self.auxiliary and self.auxiliary.held_out)

    @property
    def logit_teacher(self) -> LogitTeacher:
        """What the logits learn from."""
        return LOGIT_TEACHERS.get(self.logits)

    def hops(self, networks: int) -> range | None:
        """Returns how many hops along the ring each teacher of a network's logits is away.

        None if the teacher needs the logits of all networks.
        """
        return HOPS[self.logits](networks) if self.logits in HOPS else None


PRESETS = {
    'vanilla': Method(logits='nobody', maps='nothing'),
    'dml': Method(logits='all', maps='nothing'),
    'kd_ring': Method(logits='ring', maps='nothing'),
    'l1': Method(logits='nobody', maps='l1'),
    'l1_kd': Method(logits='ring', maps='l1'),
    'adversarial': Method(logits='nobody', maps='adversarial'),
    'afd': Method(logits='ring', maps='adversarial'),
    'moments': Method(logits='nobody', maps='moments'),
    **{
        logits: Method(logits, 'nothing')
        for logits in (
            'loo_mean',
            'shuffled',
            'kdcl_naive',
            'kdcl_minlogit',
            'kdcl_mean',
            'kdcl_linear',
            'switokd',
            *AUXILIARIES,
        )
    },
}


def named(name: str) -> Method:
    """Returns the preset called `name`, or the two choices of 'LOGITS+MAPS', e.g. 'all+l1'.

    Raises:
      UserError: there is no such method.
    """
    if name in PRESETS:
        return PRESETS[name]
    logits, maps = (
        [*LOGIT_TEACHERS.names(), *AUXILIARIES],
        ('nothing', 'adversarial', *MAP_LOSSES.names()),
    )
    choice = Method(*name.split('+', 1)) if '+' in name else None
    if choice and choice.logits in logits and choice.maps in maps:
        return choice
    raise UserError(
        f'config.method: there is no method "{name}"{nearest(name, PRESETS)} '
        f'(or LOGITS+MAPS, of {", ".join(logits)} and {", ".join(maps)})'
    )

"""Method name -> two independent choices: whom the logits, and how the maps, learn from.

Nothing else in the package knows a preset's name.
"""

import dataclasses

from afkd_jax.errors import UserError, nearest

LOGITS = ('nobody', 'ring', 'all')
MAPS = ('nothing', 'l1', 'adversarial')


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of online distillation.

    Attributes:
      logits: 'nobody' (cross-entropy alone), 'ring' (and the KL to the predecessor's logits) or
        'all' (and the mean of the KLs to the logits of all others).
      maps: 'nothing', 'l1' (the mean absolute difference to the predecessor's map, in the logit
        loss) or 'adversarial' (fool a discriminator that knows the predecessor's map).
    """

    logits: str
    maps: str

    def hops(self, networks: int) -> range:
        """Returns how many places along the ring the teachers of a network's logits stand."""
        return {'nobody': range(0), 'ring': range(1, 2), 'all': range(1, networks)}[self.logits]


PRESETS = {
    'vanilla': Method(logits='nobody', maps='nothing'),
    'dml': Method(logits='all', maps='nothing'),
    'kd_ring': Method(logits='ring', maps='nothing'),
    'l1': Method(logits='nobody', maps='l1'),
    'l1_kd': Method(logits='ring', maps='l1'),
    'adversarial': Method(logits='nobody', maps='adversarial'),
    'afd': Method(logits='ring', maps='adversarial'),
}


def named(name: str) -> Method:
    """Returns the preset called `name`, or the two choices of 'LOGITS+MAPS', e.g. 'all+l1'.

    Raises:
      UserError: there is no such method.
    """
    logits, plus, maps = name.partition('+')
    if plus and logits in LOGITS and maps in MAPS:
        return Method(logits, maps)
    if name not in PRESETS:
        raise UserError(
            f'config.method: no method is called "{name}"{nearest(name, PRESETS)} '
            f'(or LOGITS+MAPS, of {", ".join(LOGITS)} and {", ".join(MAPS)})'
        )
    return PRESETS[name]

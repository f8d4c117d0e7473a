"""Preset name -> two independent choices: whom the logits, and how the maps, learn from.

Nothing else in the package knows a preset's name.
"""

import dataclasses

from afkd_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of online distillation.

    Attributes:
      logits: 'nobody' (cross-entropy alone) or 'ring' (and the KL to the predecessor's logits).
      maps: 'nothing', or 'adversarial' (fool a discriminator that knows the predecessor's map).
    """

    logits: str
    maps: str

    @property
    def teaches(self) -> bool:
        """Whether any network learns from another."""
        return self.logits != 'nobody' or self.maps != 'nothing'


PRESETS = {
    'vanilla': Method(logits='nobody', maps='nothing'),
    'kd_ring': Method(logits='ring', maps='nothing'),
    'adversarial': Method(logits='nobody', maps='adversarial'),
    'afd': Method(logits='ring', maps='adversarial'),
}


def named(name: str) -> Method:
    """Returns the preset called `name`; an unknown name is a UserError."""
    if name not in PRESETS:
        raise UserError(f'config.method: no method is called "{name}"{nearest(name, PRESETS)}')
    return PRESETS[name]

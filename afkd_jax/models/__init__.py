"""Network name -> network. Every network returns (logits, feature map).

A family is a file with NAMES (for suggestions) and from_name(name, conv, norm) -> trunk or None.
"""

import flax.linen as nn
import jax

from afkd_jax.errors import UserError, nearest
from afkd_jax.models import layers, resnet_cifar

_FAMILIES = (resnet_cifar,)


class Classifier(nn.Module):
    """C_k: mean over height and width, then one dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array) -> jax.Array:
        """Returns the logits, [B, num_classes]."""
        return nn.Dense(self.num_classes)(maps_BxHxWxC.mean((1, 2)))


class Network(nn.Module):
    """Feature extractor G_k (`trunk`) and classifier C_k (`head`).

    The parameters keep the two apart: {'trunk': ..., 'head': ...}.
    """

    trunk: nn.Module
    head: nn.Module

    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (logits [B, num_classes], feature map [B, h, w, c] after its activation).

        Args:
          images: standardised, [B, H, W, C].
          train: whether the norms use, and update, the batch's own statistics.
        """
        maps_BxHxWxC = self.trunk(images, train)
        return self.head(maps_BxHxWxC), maps_BxHxWxC


def build(name: str, num_classes: int, axis_name: str | None = None) -> Network:
    """Returns the network called `name`; no parameters are made and no device is touched.

    Args:
      name: e.g. 'resnet20', 'resnet20x2', 'resnet20-A'.
      num_classes: at least 2.
      axis_name: the mapped axis over which batch statistics are taken, None for no mapping.

    Raises:
      UserError: no network has this name.
    """
    for family in _FAMILIES:
        trunk = family.from_name(name, layers.conv, layers.batch_norm(axis_name))
        if trunk is not None:
            return Network(trunk, Classifier(num_classes))
    known = [known for family in _FAMILIES for known in family.NAMES]
    raise UserError(f'config.networks: no network is called "{name}"{nearest(name, known)}')

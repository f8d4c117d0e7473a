"""The adversary of network k: its discriminator D_k and, where its map does not fit, its T_k."""

import flax.linen as nn
import jax

from afkd_jax.models.layers import Conv, Norm

_HE = nn.initializers.he_normal()


class Discriminator(nn.Module):
    """Tells whose feature map it sees: 1 the teacher's ("real"), 0 the own network's ("fake").

    Conv 3x3 stride 2 - BatchNorm - LeakyReLU 0.2 - Conv over what is left of the map, 1 channel -
    Sigmoid. The layers are remembered from the paper, not verified. Our choice, where it is
    unknown: as many channels as the map, no bias before the norm (it would cancel), He
    initialisation of the first convolution and Flax's default (LeCun) of the last. Real and fake
    maps pass as separate batches, each with its own batch statistics; a discriminator is only
    ever used in training, so it keeps no running ones.

    Attributes:
      norm: makes a batch norm from `use_running_average`.
    """

    norm: Norm

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array) -> jax.Array:
        """Returns one number in (0, 1) per map: [B]."""
        channels = maps_BxHxWxC.shape[-1]
        x = nn.Conv(channels, (3, 3), 2, padding=1, use_bias=False, kernel_init=_HE)(maps_BxHxWxC)
        x = nn.leaky_relu(self.norm(use_running_average=False)(x), 0.2)
        x = nn.Conv(1, x.shape[1:3], padding='VALID')(x)
        return nn.sigmoid(x[:, 0, 0, 0])


class Transfer(nn.Module):
    """Brings a network's map to the shape shared by the cohort: Conv 1x1 - BatchNorm - ReLU.

    It exists only where the map does not fit already (its role is told by a third party, its
    layers are remembered). The shared shape has the largest channel count of the cohort.

    Attributes:
      channels: of the shared shape.
      conv: makes a convolution without bias.
      norm: makes a batch norm from `use_running_average`.
    """

    channels: int
    conv: Conv
    norm: Norm

    @nn.compact
    def __call__(self, maps_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        """Returns the map with `channels` channels."""
        x = self.conv(self.channels, (1, 1))(maps_BxHxWxC)
        return nn.relu(self.norm(use_running_average=not train)(x))

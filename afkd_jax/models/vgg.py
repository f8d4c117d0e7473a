"""VGG with batch norm: `vgg8`, `vgg11`, `vgg13`, `vgg16`, `vgg19`.

Source: Simonyan and Zisserman 2015, table 1, with a norm after every convolution and one linear
layer behind the pooled map, as in the distillation literature (RepDistiller, from which vgg8
comes too). Five stages with 64, 128, 256, 512 and 512 channels; a 2x2 max pool after each of the
first three, on large images after each of the first four. The feature map is the last stage's
output after its ReLU: the last pool of the original is the mean over the map here. No convolution
has a bias (it would cancel in the norm), so the published counts are higher by their number.
"""

import flax.linen as nn
import jax

from afkd_jax.models.layers import ConvNorm, Layers, relu
from afkd_jax.registry import register_network

# Convolutions per stage.
_NETWORKS = {
    'vgg8': (1, 1, 1, 1, 1),
    'vgg11': (1, 1, 2, 2, 2),
    'vgg13': (2, 2, 2, 2, 2),
    'vgg16': (2, 2, 3, 3, 3),
    'vgg19': (2, 2, 4, 4, 4),
}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """The trunk."""

    convolutions: tuple[int, ...]  # per stage
    large: bool
    layers: Layers
    stem: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the stages' maps, the last [B, H / 8, W / 8, 512].

        Of large images it is / 16; sizes are rounded down.
        """
        x, maps = images, []
        for stage, convolutions in enumerate(self.convolutions):
            if 0 < stage < (5 if self.large else 4):
                x = nn.max_pool(x, (2, 2), (2, 2))
            for _ in range(convolutions):
                x = relu(ConvNorm(self.layers, CHANNELS[stage], 3)(x, train))
            maps.append(x)
        return tuple(maps)


@register_network(*_NETWORKS)
def _build(name: str, layers: Layers, large: bool) -> VGG:
    return VGG(_NETWORKS[name], large, layers, f'conv 3x3; {4 if large else 3} max pools')

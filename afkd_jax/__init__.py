"""afkd_jax: online distillation by adversarial feature maps (AFD) in JAX.

For config files: `default_config`, and the decorators `register_network`, `register_logit_teacher`,
`register_map_loss`, `register_source` and `register_tracker` (docs/extending.md), with `Images` and
`Source` for one's own images. `Config` is the checked config, `build_network` makes a network by
its name, `load` loads a trained one from its run, and every error that a user can correct is a
`UserError`. Importing the package imports no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from afkd_jax.config import Config, default_config
from afkd_jax.errors import UserError
from afkd_jax.registry import (
    register_logit_teacher,
    register_map_loss,
    register_network,
    register_source,
    register_tracker,
)
from afkd_jax.studies import Study

if TYPE_CHECKING:
    from afkd_jax.data.dataset import Source
    from afkd_jax.data.examples import Images
    from afkd_jax.models import build as build_network
    from afkd_jax.tools.model import load

__version__ = '0.1.0'
__all__ = [
    'Config',
    'Images',
    'Source',
    'Study',
    'UserError',
    'build_network',
    'default_config',
    'load',
    'register_logit_teacher',
    'register_map_loss',
    'register_network',
    'register_source',
    'register_tracker',
]

# Imported on first use: name -> (module, its name there).
_LAZY = {
    'Images': ('afkd_jax.data.examples', 'Images'),
    'Source': ('afkd_jax.data.dataset', 'Source'),
    'build_network': ('afkd_jax.models', 'build'),
    'load': ('afkd_jax.tools.model', 'load'),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)

"""Registries: what the names in a config stand for. Built-in parts and your own use the same ones.

Register in your own config file, or in a module that it imports; see docs/extending.md. Imports no
JAX, so that a config file stays quick to load.
"""

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from afkd_jax.errors import UserError, nearest

Part = TypeVar('Part', bound=Callable[..., Any])


class Registry(Generic[Part]):
    """Names of one kind of part.

    Args:
      field: the config field whose value is looked up, for error messages.
      noun: what is registered, likewise.
      builtin: imports the modules that register the built-in parts.
    """

    def __init__(self, field: str, noun: str, builtin: Callable[[], Any]):
        self._field, self._noun, self._builtin = field, noun, builtin
        self._parts: dict[str, Part] = {}
        self._patterns: list[tuple[re.Pattern[str], Part]] = []

    def register(self, *names: str, pattern: str | None = None) -> Callable[[Part], Part]:
        """Returns a decorator that registers a part.

        Args:
          names: under which it is found, and which are listed.
          pattern: a regular expression; whole names that match, and are not names of another part,
            are found too.

        Raises:
          UserError: another part has one of the names.
        """

        def decorate(part: Part) -> Part:
            for name in names:
                other = self._parts.get(name, part)
                if (other.__module__, other.__qualname__) != (part.__module__, part.__qualname__):
                    raise UserError(
                        f'{self._noun} "{name}": registered twice, by {other.__module__} and by '
                        f'{part.__module__}; choose another name'
                    )
                self._parts[name] = part
            if pattern:
                self._patterns.append((re.compile(pattern), part))
            return part

        return decorate

    def names(self) -> list[str]:
        """Returns the registered names, in the order of registration."""
        self._builtin()
        return list(self._parts)

    def find(self, name: str) -> Part | None:
        """Returns the part, or None."""
        self._builtin()
        if name in self._parts:
            return self._parts[name]
        return next((part for pattern, part in self._patterns if pattern.fullmatch(name)), None)

    def get(self, name: str, also: str = '') -> Part:
        """Returns the part.

        Args:
          name: to look up.
          also: what else is valid, for the error message.

        Raises:
          UserError: there is no such part.
        """
        part = self.find(name)
        if part is None:
            raise UserError(
                f'config.{self._field}: there is no {self._noun} "{name}"'
                f'{nearest(name, self.names())}{also}'
            )
        return part


def _import(*modules: str) -> Callable[[], Any]:
    def load() -> None:
        import importlib

        for module in modules:
            importlib.import_module(module)

    return load


# name, layers, large -> trunk: see afkd_jax/models/__init__.py.
NETWORKS: Registry = Registry('networks', 'network', _import('afkd_jax.models'))
# maps, teacher's maps [..., B, H, W, C] and, if there is a third parameter, labels [B] -> values
# [..., B]: see afkd_jax.method.losses.
MAP_LOSSES: Registry = Registry('method', 'loss between maps', _import('afkd_jax.method.losses'))
# ring, logits [K, B, C], labels [B] -> list of teachers' logits, each [K, B, C]: see
# afkd_jax.method.teachers.
LOGIT_TEACHERS: Registry = Registry('method', 'logit teacher', _import('afkd_jax.method.teachers'))
# config, argument -> Source: see afkd_jax/data/sources. 'name:' takes an argument.
SOURCES: Registry = Registry('dataset', 'source', _import('afkd_jax.data.dataset'))
# config, workdir -> Tracker: see afkd_jax/report/trackers.py.
TRACKERS: Registry = Registry('trackers', 'tracker', _import('afkd_jax.report.tensorboard'))

register_network = NETWORKS.register
register_map_loss = MAP_LOSSES.register
register_logit_teacher = LOGIT_TEACHERS.register
register_source = SOURCES.register
register_tracker = TRACKERS.register

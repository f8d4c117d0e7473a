"""What training and evaluation share: all that a run needs before its first step."""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict

from afkd_jax import cohort as cohort_lib
from afkd_jax import parallel
from afkd_jax import state as state_lib
from afkd_jax.data import augment, sources


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, brought to its devices.

    Attributes:
      config: valid.
      info: of the images.
      cohort: what is trained.
      devices: where.
      images: all images, on the devices.
    """

    config: ConfigDict
    info: sources.Info
    cohort: cohort_lib.Cohort
    devices: parallel.Devices
    images: augment.Table

    def key(self, use: int) -> jax.Array:
        """Returns the run's random key for a use: 0 initial weights, 1 augmentation."""
        return jax.random.fold_in(jax.random.key(self.config.seed), use)

    def initial_state(self) -> state_lib.TrainState:
        """Returns the state before the first step, on the devices."""
        create = functools.partial(state_lib.create, self.cohort)
        return jax.jit(create, out_shardings=self.devices.replicated)(self.key(0))


def prepare(config: ConfigDict) -> Run:
    """Returns the run of a valid config; whatever is wrong with it is found before any step.

    Raises:
      UserError: images, networks, method or devices do not fit the config, or each other.
    """
    splits = sources.load(config)
    info = splits.info
    cohort = cohort_lib.assemble(
        config, info.image_shape, info.num_classes, info.train, parallel.AXIS
    )
    devices = parallel.Devices.local(config.mapping)
    devices.check_divides('batch_size', config.batch_size)
    devices.check_divides('eval_batch_size', config.eval_batch_size)
    images = devices.replicate(augment.table(splits))
    return Run(config, info, cohort, devices, images)

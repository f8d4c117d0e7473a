"""A config brought to its devices: what training and evaluation share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax import models
from afkd_jax.data import augment
from afkd_jax.data import dataset as sources
from afkd_jax.data import order as batches
from afkd_jax.data import pipelines as feeds
from afkd_jax.devices import mesh as parallel
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import metrics
from afkd_jax.method import presets as methods
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, its images, cohort and devices.

    Attributes:
      config: valid.
      info: of the images.
      devices: where.
      cohort: what is trained.
      feed: its batches.
    """

    config: ConfigDict
    info: sources.Info
    devices: parallel.Devices
    feed: feeds.Feed
    cohort: cohort_lib.Cohort = dataclasses.field(init=False)

    def __post_init__(self):
        info = self.info
        cohort = cohort_lib.assemble(
            self.config,
            info.image_shape,
            info.num_classes,
            info.train,
            parallel.DATA,
            self.devices.peers,
        )
        object.__setattr__(self, 'cohort', cohort)

    @property
    def order(self) -> batches.Order:
        """The order in which the training images come."""
        return self.feed.order

    @property
    def init_key(self) -> jax.Array:
        """The key of the initial weights."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 0)

    @property
    def step_key(self) -> jax.Array:
        """The key of what is random in the steps; each folds in its number."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 1)

    @property
    def spread(self) -> bool:
        """Whether the networks are spread over devices; then the state is stacked."""
        return self.devices.peers > 1

    @property
    def places(self) -> Any:
        """Where the state lives: whole on every device, or its networks spread."""
        if not self.spread:
            return parallel.WHOLE
        return state_lib.TrainState(parallel.WHOLE, parallel.SPREAD, parallel.SPREAD)

    def initial_state(self) -> state_lib.TrainState:
        """Returns the state before the first step, on the devices."""

        def create(key):
            state = state_lib.create(self.cohort, key)
            return state_lib.stacked(state) if self.spread else state

        return jax.jit(create, out_shardings=self.devices.shardings(self.places))(self.init_key)

    def no_sums(self) -> metrics.Sums:
        """Returns empty sums of a step's values, on the devices."""
        return self.devices.replicate(self._host_sums())

    def _host_sums(self) -> metrics.Sums:
        return metrics.zeros(step_lib.value_shapes(self.cohort))

    def abstract(self) -> tuple[state_lib.TrainState, metrics.Sums]:
        """Returns shapes, dtypes and placement of state and sums; no array is made."""
        state = state_lib.abstract(self.cohort)
        if self.spread:
            state = jax.eval_shape(state_lib.stacked, state)
        return self.devices.abstract((state, self._host_sums()), (self.places, parallel.WHOLE))

    def origin(self) -> dict[str, Any]:
        """Returns what makes the run, as JSON: with another config, images or arrays it is another.

        The number of devices is not in it, unless statistics are of each device's share of the
        batch; nor is what a run may go on with (config.of_the_run).
        """
        arrays = state_lib.abstract(self.cohort), self._host_sums()
        shares = {'shares': self.devices.shares} if self.cohort.local_statistics else {}
        return shares | {
            'config': config_lib.of_the_run(self.config),
            'images': {**dataclasses.asdict(self.info), 'fingerprint': self.feed.fingerprint},
            'arrays': state_lib.layout(arrays),
        }

    def fingerprint(self, state: state_lib.TrainState) -> str:
        """Returns the fingerprint of the whole state, the same wherever its networks live.

        Every process must call it: networks that are elsewhere are brought here, to host memory.
        """
        if self.spread:
            fetch = jax.device_get
            if self.devices.processes > 1:
                fetch = functools.partial(multihost_utils.process_allgather, tiled=True)
            state = state_lib.unstacked(jax.tree.map(fetch, state))
        return state_lib.fingerprint(state)

    def compiled_step(self) -> Callable[..., Any]:
        """Returns the compiled training step: (state, sums, table, index) -> (state, sums).

        Compiled ahead of time, so that a second compilation is an error and not a slow step.
        The state's memory is reused.
        """
        key = self.devices.replicate(self.step_key)
        compiled = self.lowered_step(*self.abstract_arguments()).compile()
        return lambda state, sums, table, index: compiled(state, sums, table, index, key)

    def abstract_arguments(self) -> tuple[Any, ...]:
        """Returns the shapes, with placement, of the step's arguments; see lowered_step."""
        key = self.devices.abstract(jax.eval_shape(lambda: self.step_key))
        return *self.abstract(), *self.abstract_batch(self.config.batch_size), key

    def abstract_batch(self, size: int) -> tuple[augment.Table, jax.Array]:
        """Returns the shapes, with placement, of a batch: the images' Table and the indices."""
        placement = self.feed.placement
        table, index = feeds.like(self.info, placement, size), np.zeros(size, np.int32)
        place = feeds.table_place(placement), parallel.SPLIT
        return self.devices.abstract((table, index), place)

    def lowered_step(
        self,
        state: state_lib.TrainState,
        sums: metrics.Sums,
        table: augment.Table,
        index_B: jax.Array,
        key: jax.Array,
    ) -> jax.stages.Lowered:
        """Returns the training step, mapped over the devices and lowered for these arguments.

        Arrays, or their shapes with placement. It may be traced once.
        """
        recipe = augment.Recipe.of(self.config)
        cohort, whole = self.cohort.here, parallel.WHOLE

        def train_step(state, sums, table, index_B, key):
            own = state_lib.unstacked(state) if self.spread else state
            own, sums = step_lib.train_step(cohort, recipe, own, sums, table, index_B, key)
            return state_lib.stacked(own) if self.spread else own, sums

        chex.clear_trace_counter()
        mapped = self.devices.map(
            chex.assert_max_traces(train_step, n=1),
            places=(
                self.places,
                whole,
                feeds.table_place(self.feed.placement),
                parallel.SPLIT,
                whole,
            ),
            out=(self.places, whole) if self.spread else whole,
            donate=(0,),
        )
        return mapped.lower(state, sums, table, index_B, key)


def devices_of(config: ConfigDict, found: Sequence[jax.Device] | None = None) -> parallel.Devices:
    """Returns the devices of a config, of those found; of those at hand if None is given.

    Raises:
      UserError: they, the networks and the batch do not fit each other.
    """
    mesh, found = config.mesh, parallel.available() if found is None else found
    networks = tuple(config.networks)
    devices = parallel.arrange(mesh.peer, mesh.data, networks, config.mapping, found)
    devices.check_divides('batch_size', config.batch_size)
    return devices


def prepare(config: ConfigDict, tell: Callable[[str], None] = lambda words: None) -> Run:
    """Returns the run of a valid config; whatever is wrong with it is found before any step.

    Args:
      config: valid.
      tell: is given a line where one waits, or has to know something of the images.

    Raises:
      UserError: method, networks, devices or images do not fit the config, or each other.
    """
    # Names and devices first: the images may be a long download away.
    methods.named(config.method)
    cohort_lib.ring_of(config)
    for name in config.networks:
        models.build(name, num_classes=2, image_shape=(32, 32, 3))
    devices = devices_of(config)
    devices.check_divides('eval_batch_size', config.eval_batch_size)
    dataset = sources.dataset(config)
    return Run(config, dataset.info, devices, feeds.feed(config, dataset, devices, tell))

"""A config brought to its devices: what training, evaluation and planning share."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
from jax.experimental import multihost_utils

from afkd_jax import config as config_lib
from afkd_jax import models
from afkd_jax.checkpoints import starts as starts_lib
from afkd_jax.checkpoints.artefact import ImageFacts
from afkd_jax.config import Config
from afkd_jax.data import dataset, pipelines
from afkd_jax.data.images import DeviceImages
from afkd_jax.data.order import Order
from afkd_jax.devices import arrays, mesh, xla_cpu
from afkd_jax.devices.mesh import BATCH_SHARDED, PEER_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA
from afkd_jax.errors import field_error
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import metrics
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.method.metrics import Evaluation
from afkd_jax.method.state import StackedState, State, TrainState
from afkd_jax.report.console import log, working

# Compiled programs of this process, the last used last: a study trains the same with other seeds.
_programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_MOST_PROGRAMS = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the state lies on the devices.

    Attributes:
      pack: TrainState -> the state as it is on the devices.
      specs: of that state.
      networks_specs: of its networks.
    """

    pack: Callable[[TrainState], State]
    specs: Any
    networks_specs: Any


# Every device has all networks, or the networks are stacked and sharded along PEER.
_REPLICATED = Layout(TrainState.unstack, REPLICATED, REPLICATED)
_SHARDED = Layout(
    TrainState.stack,
    StackedState(REPLICATED, PEER_SHARDED, PEER_SHARDED),  # pyright: ignore - specs
    PEER_SHARDED,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, its images, cohort and devices."""

    config: Config
    info: dataset.Info
    devices: mesh.Devices
    pipeline: pipelines.Pipeline

    @functools.cached_property
    def cohort(self) -> cohort_lib.Cohort:
        """What is trained."""
        info = self.info
        return cohort_lib.assemble(
            self.config, info.image_shape, info.num_classes, info.train, DATA, self.devices.peers
        )

    @property
    def order(self) -> Order:
        """The order of the training images."""
        return self.pipeline.order

    @property
    def init_key(self) -> jax.Array:
        """The key of the initial weights."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 0)

    @property
    def step_key(self) -> jax.Array:
        """The key of what is random in the steps; each folds in its number."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 1)

    @property
    def layout(self) -> Layout:
        """How the state lies on the devices."""
        return _SHARDED if self.devices.peers > 1 else _REPLICATED

    @property
    def image_facts(self) -> ImageFacts:
        """What is known of the images, for a reader of the run."""
        return ImageFacts.of(self.config, self.info, self.pipeline.mean_std)

    @functools.cached_property
    def starts(self) -> dict[int, Any]:
        """Network, counted from 0 -> the variables that it starts from (config.init_from).

        Raises:
          UserError: they cannot be read, or do not fit.
        """
        if not self.config.init_from:
            return {}
        return starts_lib.read(self.cohort, self.config, self.image_facts, log)

    def initial_state(self, random: bool = False) -> State:
        """Returns the state before the first step, on the devices.

        Args:
          random: all weights, also where config.init_from names some; to time steps.
        """
        options = xla_cpu.init_options(self.devices.first.platform)
        starts = {} if random else self.starts
        state = state_lib.create(self.cohort, self.init_key, starts, options)
        shardings = self.devices.shardings(self.layout.specs)
        return jax.jit(self.layout.pack, out_shardings=shardings)(state)

    def zero_sums(self) -> metrics.Sums:
        """Returns empty sums of a step's values, on the devices."""
        return self.devices.replicate(self._host_sums())

    def _host_sums(self) -> metrics.Sums:
        return metrics.zeros(step_lib.value_shapes(self.cohort))

    def abstract(self) -> tuple[State, metrics.Sums]:
        """Returns shapes, dtypes and shardings of state and sums; makes no array."""
        state = jax.eval_shape(self.layout.pack, state_lib.abstract(self.cohort))
        return self.devices.abstract((state, self._host_sums()), (self.layout.specs, REPLICATED))

    def origin(self) -> dict[str, Any]:
        """Returns what defines the run, as JSON: config, images and arrays.

        The number of devices is not part of it, unless batch statistics are over each device's
        shard; nor are the fields that may change when a run resumes (config.run_fields).
        """
        states = state_lib.abstract(self.cohort), self._host_sums()
        shards = {'shards': self.devices.shards} if self.cohort.local_statistics else {}
        return shards | {
            'config': config_lib.run_fields(self.config),
            'images': {**self.info.sizes(), 'fingerprint': self.pipeline.fingerprint},
            'arrays': arrays.layout(states),
        }

    def with_held_out(self, state: State, validation: Evaluation) -> State:
        """Returns the state after an evaluation: what the method learns from held-out images."""
        auxiliary = self.cohort.method.auxiliary
        if not auxiliary or not auxiliary.held_out or not state.auxiliary:
            return state
        assert validation.counts
        images = int(validation.counts['images'].sum())
        found = auxiliary.held_out(validation.counts['error_products'], images)
        new = state.auxiliary.replace(batch_stats=self.devices.replicate(found))  # pyright: ignore
        return state.replace(auxiliary=new)  # pyright: ignore - of flax.struct

    def fingerprint(self, state: State) -> str:
        """Returns the fingerprint of the whole state, independent of the mesh.

        Every process must call it: networks of other processes are gathered to host memory.
        """
        fetch = jax.device_get
        if self.devices.peers > 1 and self.devices.processes > 1:
            fetch = functools.partial(multihost_utils.process_allgather, tiled=True)
        return arrays.fingerprint(jax.tree.map(fetch, state).unstack())

    def compiled_step(self) -> Callable[..., Any]:
        """Returns the compiled training step: (state, sums, images, index) -> (state, sums).

        Compiled ahead of time, so that a second compilation is an error and not a slow step. The
        state's memory is donated.
        """
        key = self.devices.replicate(self.step_key)

        def compile_step() -> Any:
            with working('compiling the training step'):
                return self.lowered_step(*self.abstract_arguments()).compile()

        compiled = self.compiled('train', compile_step)
        return lambda state, sums, images, index: compiled(state, sums, images, index, key)

    def compiled(self, name: str, build: Callable[[], Any]) -> Any:
        """Returns the program `name` of this run, from an earlier run that differs in seed only.

        Args:
          name: of the program.
          build: returns it compiled, if there is none yet.
        """
        key = name, self.config.replace(seed=0), self.info, self.devices, type(self.pipeline)
        if key not in _programs:
            while len(_programs) >= _MOST_PROGRAMS:
                _programs.popitem(last=False)
            _programs[key] = build()
        _programs.move_to_end(key)
        return _programs[key]

    def abstract_arguments(self) -> tuple[Any, ...]:
        """Returns shapes, dtypes and shardings of the step's arguments; see lowered_step."""
        key = self.devices.abstract(jax.eval_shape(lambda: self.step_key))
        batch = self.pipeline.abstract_batch(self.config.batch_size)
        return *self.abstract(), *batch, key

    def lowered_step(
        self,
        state: State,
        sums: metrics.Sums,
        images: DeviceImages,
        index_B: jax.Array,
        key: jax.Array,
    ) -> jax.stages.Lowered:
        """Returns the training step, mapped over the devices and lowered for these arguments.

        They may be abstract. The step may be traced once.
        """
        cohort, data, layout = self.cohort.local, self.config.data, self.layout

        def train_step(
            state: State,
            sums: metrics.Sums,
            images: DeviceImages,
            index_B: jax.Array,
            key: jax.Array,
        ) -> tuple[State, metrics.Sums]:
            new, sums = step_lib.train_step(
                cohort, data, state.unstack(), sums, images, index_B, key
            )
            return layout.pack(new), sums

        chex.clear_trace_counter()
        mapped = self.devices.map(
            chex.assert_max_traces(train_step, n=1),
            specs=(layout.specs, REPLICATED, self.pipeline.images_spec, BATCH_SHARDED, REPLICATED),
            out=(layout.specs, REPLICATED),
            donate=(0,),
        )
        return mapped.lower(state, sums, images, index_B, key)


def prepare(config: Config, log: Callable[[str], None] = lambda line: None) -> Run:
    """Returns the run of a config; whatever is wrong with it is found before any step.

    Args:
      config: checked.
      log: takes a line where one has to wait, or about the images.

    Raises:
      UserError: method, networks, devices or images do not fit the config, or each other.
    """
    # Names and devices first: the images may be a long download away.
    method = cohort_lib.method_of(config)
    cohort_lib.ring_of(config)
    cohort_lib.frozen_of(config)
    for name in config.networks:
        models.build(name, num_classes=2, image_shape=(32, 32, 3))
    devices = mesh.devices_of(config)
    devices.check_divides('eval_batch_size', config.eval_batch_size)
    with working('loading the images'):
        images = dataset.dataset(config)
        if method.held_out and not images.info.validation:
            rule = f'above 0 with the method "{config.method}", which needs held-out images'
            raise field_error('data.validation_fraction', rule, config.data.validation_fraction)
        for line in images.notes:
            log(line)
        return Run(config, images.info, devices, pipelines.create(config, images, devices, log))

"""Strictness for every test, and the small cohorts they share."""

import os

import forks

os.environ |= forks.environment(devices=8)  # several, to test mapping

import dataclasses
import functools
import shutil
import subprocess
import tempfile

import jax
import numpy as np
import pytest
from tiny import PAIR

from afkd_jax.config import Config
from afkd_jax.devices import mesh
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.training import evaluate
from afkd_jax.training import run as run_lib
from configs import digits

jax.config.update('jax_numpy_rank_promotion', 'raise')

# What was compiled once in this session is loaded after that, also by processes of launch.py.
_WORKER = 'PYTEST_XDIST_WORKER' in os.environ  # it inherits the environment
_CACHE = os.environ['JAX_COMPILATION_CACHE_DIR'] if _WORKER else tempfile.mkdtemp('-afkd_jax-tests')
_LEAST_S = '0.2'
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = _LEAST_S
jax.config.update('jax_compilation_cache_dir', _CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', float(_LEAST_S))


# Whole files go to the processes: the longest first, so that no process is alone at the end.
_LONGEST = (
    'processes',
    'launch',
    'loop',
    'mesh',
    'dtype',
    'models',
    'step',
    'store',
    'describe',
    'similarity',
    'model',
    'experiments',
)


def pytest_collection_modifyitems(items):
    place = {f'{name}_test.py': n for n, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONGEST)))


def pytest_unconfigure():
    if not _WORKER:
        shutil.rmtree(_CACHE, ignore_errors=True)


def tiny_config(networks=PAIR, **fields):
    """Returns the digits config with these networks and (dotted) fields, 'a__b' for a.b."""
    fields = {name.replace('__', '.'): value for name, value in fields.items()}
    return Config.of(digits.get_config()).replace(networks=networks, **fields)


def take_devices(count=1, mapping='shard_map', peers=1):
    """Returns the first `count` devices as a mesh; None: all of them."""
    return mesh.arrange(mesh.available()[:count], mapping, peers)


def tiny_cohort(config, axis_name=None, peers=1):
    """Returns the cohort of a config on 8x8 grey images, 10 classes, 64 images an epoch."""
    return cohort_lib.assemble(config, (8, 8, 1), 10, 64, axis_name, peers)


def random_batch(size, seed=0):
    """Returns standard normal images [size, 8, 8, 1] and labels [size] in 0 .. 9."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((size, 8, 8, 1)).astype(np.float32)
    return images, rng.integers(0, 10, size).astype(np.int32)


@functools.cache  # tests that take steps of one config trace and compile it once
def mapped_update(config, devices, donate=()):
    """Returns update() of the config's cohort, mapped over the devices; cached."""
    cohort = tiny_cohort(config, DATA)

    def update(state, images, labels):
        return step_lib.update(cohort, state, images, labels, jax.random.key(0))

    return devices.map(update, specs=(REPLICATED, BATCH_SHARDED, BATCH_SHARDED), donate=donate)


@functools.cache  # nothing changes it
def initial_state(config, seed=0):
    """Returns the state before the first step, on the host; single precision, also with x64."""
    with jax.enable_x64(False):
        create = jax.jit(functools.partial(state_lib.create, tiny_cohort(config)))
        return jax.device_get(create(jax.random.key(seed)))


def relative_difference(a, b):
    """Returns the largest |a - b| / max |b| over the arrays of two trees, and where it is."""
    worst = (0.0, '')
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(a)),
        jax.tree.leaves(jax.device_get(b)),
        strict=True,
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        difference = np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)
        worst = max(worst, (difference, jax.tree_util.keystr(path)))
    return worst


def softmax(z):
    """Returns the softmax over the last axis, in NumPy."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def as_float64(tree):
    """Returns the tree with its float32 arrays in double precision."""

    def convert(leaf):
        return leaf.astype(np.float64) if np.asarray(leaf).dtype == np.float32 else leaf

    return jax.tree.map(convert, tree)


@pytest.fixture(scope='module')
def compiled_once():
    """Equal runs of a module share their compiled steps: tracing takes half of a short run."""

    def remember(method):
        kept = {}

        def cached(self, *arguments):
            run = getattr(self, '_run', self)
            config = dataclasses.replace(run.config, checkpoint=None, profile=())
            key = (config, run.devices, step_lib.update, *arguments)
            if key not in kept:
                kept[key] = method(self, *arguments)
            return kept[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((run_lib.Run, 'compiled_step'), (evaluate.Evaluator, '_compiled')):
            patch.setattr(owner, name, remember(getattr(owner, name)))
        yield


@pytest.fixture
def x64():
    """Double precision, so that a law holds to many digits or not at all."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='session')
def forked():
    """launch.py, quickly: see forks.run."""
    return forks.run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB and a function that resizes it, where one may be mounted here."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
        return subprocess.run(command, capture_output=True).returncode

    if mount('size=4m'):
        pytest.skip('mounting needs rights that are not there')
    yield folder, lambda size: mount(f'remount,size={size}')
    subprocess.run(['umount', '-l', str(folder)], check=True)

"""Evaluation: every network and the ensemble over a whole split, each image counted once."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from afkd_jax.checkpoints import partial
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.store import Checkpoints, step_of
from afkd_jax.command import Command, number_or
from afkd_jax.config import Config
from afkd_jax.data import augment
from afkd_jax.devices import processes
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.errors import UserError
from afkd_jax.method import similarity
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.method.metrics import Evaluation
from afkd_jax.report import summary
from afkd_jax.report.console import log, log_from_any, print_json, working
from afkd_jax.report.tables import result_tables
from afkd_jax.training import run as run_lib


class Evaluator:
    """The evaluation step of a run, mapped over its devices and compiled once."""

    def __init__(self, run: run_lib.Run):
        self._run = run
        self._step = run.compiled(
            'evaluate', lambda: self._compiled(step_lib.eval_step, (REPLICATED, BATCH_SHARDED))
        )

    def _compiled(self, per_device: Callable[..., Any], out: Any = REPLICATED) -> Any:
        """Returns the compiled (networks, images, indices, mask) -> results of a batch.

        Args:
          per_device: of (cohort, networks, images, labels, mask).
          out: specs of its results.
        """
        run, cohort = self._run, self._run.cohort.local
        size, sharded = run.config.eval_batch_size, run.devices.peers > 1

        def step(networks: Any, images: Any, index_B: jax.Array, mask_B: jax.Array) -> Any:
            networks = state_lib.unstack(networks) if sharded else networks
            batch = augment.evaluation_batch(images, index_B)
            return per_device(cohort, networks, *batch, mask_B)

        specs = run.layout.networks_specs, run.pipeline.images_spec, BATCH_SHARDED, BATCH_SHARDED
        mask = run.devices.abstract(np.zeros(size, bool), BATCH_SHARDED)
        batch = run.pipeline.abstract_batch(size)
        mapped = run.devices.map(step, specs, out)
        with working('compiling the evaluation'):
            return mapped.lower(run.abstract()[0].networks, *batch, mask).compile()

    def __call__(
        self, networks: Any, split: str, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Returns the evaluation on 'train', 'validation' or 'test', once it is complete.

        Args:
          networks: State.networks.
          split: which images.
          stop: called before each batch; True ends the evaluation, and the result is None.
        """
        parts, outputs, indices = [], [], self._run.info.indices(split)
        with working(f'evaluating {split}'), self._run.pipeline.evaluation(indices) as batches:
            for batch in batches:
                if stop():
                    return None
                # One batch is computed while the one before is fetched.
                sums, by_image = self._step(networks, *batch)
                parts.append(sums)
                outputs.append(by_image)
                parts[-2:-1] = jax.device_get(parts[-2:-1])
        parts[-1:] = jax.device_get(parts[-1:])
        counts = {
            name: np.asarray(np.sum([part[name] for part in parts], axis=0, dtype=np.float64))
            for name in parts[0]
        }
        _check_any(counts['images'], split)
        return Evaluation.of(counts, self._fetched(outputs))

    def _fetched(self, outputs: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """Returns the outputs of all images of a split, those that the mask leaves out dropped."""
        fetch = jax.device_get
        if self._run.devices.processes > 1:
            fetch = functools.partial(multihost_utils.process_allgather, tiled=True)
        parts = fetch(outputs)
        columns = len(self._run.cohort.names) + 1
        # pmap splits the images along two axes.
        labels = np.concatenate([part['label'].reshape(-1) for part in parts])
        found = {
            name: np.concatenate([part[name].reshape(-1, columns) for part in parts])
            for name in ('predicted', 'confidence')
        }
        return {name: values[labels >= 0] for name, values in ({'label': labels} | found).items()}

    def edges(self, networks: Any) -> list[dict[str, Any]]:
        """Returns the similarity of each network and its teacher on test (similarity.figures).

        A step of its own, compiled when it is called: the inner products between all images of a
        batch cost too much for every evaluation.
        """
        compare = self._run.compiled('compare', lambda: self._compiled(similarity.sums))
        # In the stored order a batch may hold a single class, which would bias CKA.
        order = np.random.RandomState(0).permutation(self._run.info.indices('test')).tolist()
        with working('comparing the networks'), self._run.pipeline.evaluation(order) as batches:
            parts = [jax.device_get(compare(networks, *batch)) for batch in batches]
        _check_any([part['images'] for part in parts], 'test')
        return similarity.figures(self._run.cohort, parts)


def _check_any(images: Any, split: str) -> None:
    """Rejects counts of evaluated images, of classes or batches, that are all 0."""
    if not np.sum(images):
        raise UserError(
            f'config.data.max_corrupt: none of the images of {split} could be decoded, so there is '
            'nothing to evaluate; repair them'
        )


def evaluate(config: Config, workdir: pathlib.Path, step: int | str | None) -> dict[str, Any]:
    """Returns the evaluation of a checkpoint, as JSON.

    Its `step`, and `classes`, as in classes.json but without confusion matrices; the rest as in
    summary.json.

    Args:
      config: checked, the one the workdir was trained with.
      workdir: of the run.
      step: of the checkpoint; None or 'last' for the last, 'best' for the ensemble's best.

    Raises:
      UserError: there is no such run or checkpoint, or the config is another.
    """
    workdir_lib.check(workdir, config)
    workdir_lib.check_begun(workdir)
    if step == 'best':
        best = processes.raise_on_all(
            lambda: (
                step_of(partial.find(workdir, config, 'best', None)[0])
                if processes.is_primary()
                else None
            )
        )
        step = processes.broadcast(best)
    run = processes.primary_first(lambda: run_lib.prepare(config, log_from_any))
    with Checkpoints(workdir, run.origin()) as checkpoints:
        number = step if isinstance(step, int) else None
        restored = checkpoints.restore(run.abstract(), number)
    if restored is None:
        raise UserError(f'--workdir: {workdir} has no checkpoint yet; train first')
    if line := workdir_lib.moved(workdir, config):
        log(line)
    for path, why in restored.rejected.items():
        log(f'warning: {path}: this checkpoint {why}; an older one is used')
    if processes.is_primary():  # of a version that did not write it
        facts = run.image_facts
        facts.write(workdir, only_missing=True)
    state, progress = restored.snapshot.state, restored.snapshot.progress
    evaluator = Evaluator(run)
    evaluations = {}
    for split in run.info.held_out():
        evaluations[split] = evaluator(state.networks, split)
        if config.ema.decay:
            evaluations[f'{split}_ema'] = evaluator(state_lib.averaged(state.networks), split)
    networks, ensemble = summary.entries(run.cohort, evaluations, progress)
    return {
        'step': int(state.step),
        'networks': networks,
        'ensemble': ensemble,
        'ring': evaluator.edges(state.networks),
        'classes': summary.classes(run.cohort, evaluations['test'], confusion=False),
        'fingerprint': run.fingerprint(state),
    }


def main(command: Command, _: object) -> int:
    """--mode eval: prints tables, or the result as JSON; returns the exit code."""
    step = number_or(command.options.step, 'step', 0, 'last', 'best')
    result = evaluate(command.config, command.workdir, step)
    for table in result_tables(result):
        log(table)
    print_json(result)
    return 0

"""Every network and the ensemble over a whole split, each image counted once."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.store import Checkpoints
from afkd_jax.data import augment
from afkd_jax.data import pipelines as feeds
from afkd_jax.devices import mesh as parallel
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.method import similarity
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.report import metrics_log as writer
from afkd_jax.report import summary
from afkd_jax.training import run as run_lib


class Evaluator:
    """The evaluation step of a run, mapped over its devices and compiled once.

    Args:
      run: what is evaluated, and on what.
    """

    def __init__(self, run: run_lib.Run):
        self._run = run
        self._score = self._compiled(step_lib.eval_step)

    def _compiled(self, per_device: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the compiled (networks, table, indices, mask) -> sums over a batch of a feed.

        Args:
          per_device: of (cohort, networks, images, labels, mask).
        """
        run, cohort = self._run, self._run.cohort.here

        def step(networks, table, index_B, mask_B):
            own = state_lib.unstack(networks) if run.spread else networks
            batch = augment.evaluation_batch(table, index_B)
            return per_device(cohort, own, *batch, mask_B)

        whole, split = parallel.WHOLE, parallel.SPLIT
        place = parallel.SPREAD if run.spread else whole
        tables = feeds.table_place(run.feed.placement)
        mapped = run.devices.map(step, places=(place, tables, split, split))
        size = run.config.eval_batch_size
        mask = run.devices.abstract(np.zeros(size, bool), split)
        networks = run.abstract()[0].networks
        return mapped.lower(networks, *run.abstract_batch(size), mask).compile()

    def __call__(
        self,
        networks: Any,
        split: str,
        stop: Callable[[], bool] = lambda: False,
    ) -> summary.Scores | None:
        """Returns the scores on 'train', 'validation' or 'test'; waits until they are there.

        Args:
          networks: TrainState.networks.
          split: which images.
          stop: asked before each batch; if it says so there are no scores, but None.
        """
        parts = []
        with self._run.feed.evaluation(self._run.info.places(split)) as batches:
            for batch in batches:
                if stop():
                    return None
                # One batch on its way while the one before is fetched.
                parts.append(self._score(networks, *batch))
                parts[-2:-1] = jax.device_get(parts[-2:-1])
        parts[-1:] = jax.device_get(parts[-1:])
        total = {
            name: np.sum([part[name] for part in parts], axis=0, dtype=np.float64)
            for name in parts[0]
        }
        return summary.Scores.of(total)

    def edges(self, networks: Any) -> list[dict[str, Any]]:
        """Returns how alike each network and its teacher are on the test split.

        See similarity.figures. A step of its own, compiled when it is called: the inner products
        between all images of a batch are too dear for every evaluation.
        """
        compare = self._compiled(similarity.sums)
        # Batches of the stored order may hold one class each, of which CKA must know nothing.
        order = np.random.RandomState(0).permutation(self._run.info.places('test'))
        with self._run.feed.evaluation(order) as batches:
            parts = [jax.device_get(compare(networks, *batch)) for batch in batches]
        return similarity.figures(self._run.cohort, parts)


def evaluate(config: ConfigDict, workdir: pathlib.Path, step: int | None) -> dict[str, Any]:
    """Returns the scores of a checkpoint: its `step`, the rest as in summary.json.

    Args:
      config: valid, the one the workdir was trained with.
      workdir: of the run.
      step: which checkpoint; None for the last.

    Raises:
      UserError: there is no such run or checkpoint, or the config is another.
    """
    workdir_lib.check(workdir, config)
    workdir_lib.check_begun(workdir)
    run = processes.in_turn(lambda: run_lib.prepare(config, writer.tell_all))
    with Checkpoints(workdir, run.origin()) as checkpoints:
        restored = checkpoints.restore(run.abstract(), step)
    if restored is None:
        raise UserError(f'--workdir: {workdir} has no checkpoint yet; train first')
    for path, why in restored.rejected.items():
        writer.console.print(f'warning: {path}: this checkpoint {why}; an older one is taken')
    state = restored.point.state
    evaluator = Evaluator(run)
    scores = {split: evaluator(state.networks, split) for split in run.info.held_out()}
    networks, ensemble = summary.entries(run.cohort, scores, restored.point.progress)
    return {
        'step': int(state.step),
        'networks': networks,
        'ensemble': ensemble,
        'ring': evaluator.edges(state.networks),
        'classes': summary.classes(run.cohort, scores['test']),
        'fingerprint': run.fingerprint(state),
    }

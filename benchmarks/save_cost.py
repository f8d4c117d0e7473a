"""Measures what a checkpoint costs the training beside which it is written, and its size.

python -m benchmarks.save_cost CONFIG SECONDS ROUNDS [NETWORK,NETWORK]

Blocks of steps of about SECONDS each, in turn with one checkpoint at their beginning and without;
the same number of steps, in one process. The cost of a checkpoint is the median difference of a
round; of one a minute its share of 60 s. Times end when the steps are done; a save must be
complete by the end of its block. The values of the images do not matter; the config's are used.
"""

import importlib
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from afkd_jax.checkpoints.progress import Progress
from afkd_jax.checkpoints.store import Checkpoints, Snapshot
from afkd_jax.config import Config
from afkd_jax.training import run as run_lib


def main(name, seconds, rounds, *networks):
    config = Config.of(importlib.import_module(f'configs.{name}').get_config(*networks))
    run = run_lib.prepare(config)
    state, zero_sums = run.initial_state(), run.zero_sums()
    step = run.compiled_step()
    count = 0

    def take(steps):
        nonlocal state, count
        for _ in range(steps):
            state, sums = step(state, zero_sums, *run.pipeline.batch(run.order.indices(count)))
            sums.steps.block_until_ready()
            count += 1

    take(3)
    start = time.perf_counter()
    take(5)
    step_s = (time.perf_counter() - start) / 5
    steps = max(2, round(seconds / step_s))
    with tempfile.TemporaryDirectory() as folder:
        metadata = {'versions': {}, 'devices': run.devices.name}
        with Checkpoints(pathlib.Path(folder), run.origin(), metadata, keep=1) as checkpoints:
            progress = Progress.start(len(run.cohort.names))

            def block(save):
                begin = time.perf_counter()
                blocked = 0.0
                if save:
                    checkpoints.save(count, Snapshot(state, zero_sums, progress))
                    blocked = time.perf_counter() - begin
                take(steps)
                taken = time.perf_counter() - begin
                if save:
                    assert checkpoints._writing.done(), 'longer blocks, please'
                return taken, blocked

            block(True)
            pairs = []
            for i in range(rounds):
                halves = {save: block(save) for save in ((True, False), (False, True))[i % 2]}
                pairs.append((halves[True][0] - halves[False][0], halves[True][1]))
            costs, blocked = zip(*pairs, strict=True)
            checkpoints.wait()
            size = sum(
                file.stat().st_size for file in checkpoints.folder.rglob('*') if file.is_file()
            )
            saves, restores = [], []
            for _ in range(5):
                begin = time.perf_counter()
                checkpoints.save(count, Snapshot(state, zero_sums, progress))
                checkpoints.wait()
                saves.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                restored = checkpoints.restore(run.abstract())
                jax.block_until_ready(restored.snapshot.state)
                restores.append(time.perf_counter() - begin)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    cost = statistics.median(costs)
    quartiles = statistics.quantiles(costs, n=4)
    print(
        json.dumps(
            {
                'networks': run.cohort.names,
                'batch': config.batch_size,
                'step_s': step_s,
                'steps_per_block': steps,
                'rounds': rounds,
                'cost_of_a_save_s': cost,
                'quartiles_s': [quartiles[0], quartiles[2]],
                'percent_at_one_a_minute': 100 * cost / 60,
                'blocked_s': statistics.median(blocked),
                'save_alone_s': statistics.median(saves),
                'restore_s': statistics.median(restores),
                'arrays_bytes': arrays,
                'size_per_arrays': size / arrays,
            }
        )
    )


if __name__ == '__main__':
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])

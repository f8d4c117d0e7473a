"""The result of a run: summary.json, and the table a reader sees."""

import dataclasses
import statistics
from typing import Any

import numpy as np
import rich.box
import rich.table

from afkd_jax.checkpoints.progress import Progress
from afkd_jax.method import state as state_lib
from afkd_jax.method.cohort import Cohort
from afkd_jax.training.run import Run

_ACCURACIES = ('validation_accuracy', 'test_accuracy', 'test_accuracy_at_best_validation')


@dataclasses.dataclass(frozen=True)
class Scores:
    """An evaluation on one split; each list holds the K networks and, last, the ensemble.

    Attributes:
      accuracy: top-1, percent.
      cross_entropy: mean over the images, nats.
      top5: percent; None for up to metrics.TOP5_CLASSES classes.
      counts: the sums it is made of, step.eval_step's; None if they are not known any more.
    """

    accuracy: list[float]
    cross_entropy: list[float]
    top5: list[float] | None
    counts: dict[str, np.ndarray] | None = None

    @classmethod
    def of(cls, counts: dict[str, np.ndarray]) -> 'Scores':
        """Returns the scores of the sums over a whole split."""
        images = counts['images'].sum()
        return cls(
            (100 * counts['correct'].sum(1) / images).tolist(),
            (counts['cross_entropy'] / images).tolist(),
            (100 * counts['top5'] / images).tolist() if 'top5' in counts else None,
            counts,
        )

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of them, as JSON: all but the counts."""
        return {name: getattr(self, name) for name in ('accuracy', 'cross_entropy', 'top5')}


def classes(cohort: Cohort, scores: Scores) -> dict[str, Any]:
    """Returns how each class is predicted, as JSON.

    images: of each class. Of each network and the ensemble: accuracy per class in percent, None
    where there is no image; confusion, rows by label and columns by prediction, None above
    metrics.CONFUSION_CLASSES classes.
    """
    images = scores.counts['images'].astype(int)
    entries = []
    for i, name in enumerate((*cohort.names, 'ensemble')):
        correct = scores.counts['correct'][i]
        confusion = scores.counts.get('confusion')
        entries.append(
            {
                'name': name,
                'accuracy': [
                    100 * float(right) / of if of else None
                    for right, of in zip(correct, images.tolist(), strict=True)
                ],
                'confusion': None if confusion is None else confusion[i].astype(int).tolist(),
            }
        )
    return {'images': images.tolist(), 'networks': entries[:-1], 'ensemble': entries[-1]}


def entries(
    cohort: Cohort, scores: dict[str, Scores] | None = None, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the entry of each network, and the ensemble's; accuracies in percent.

    What is not known is None. The ensemble is the mean of the networks' probabilities.

    Args:
      cohort: whose.
      scores: by split.
      progress: of the run, for the accuracies at best validation.
    """
    validation, test = ((scores or {}).get(split) for split in ('validation', 'test'))
    networks = state_lib.abstract(cohort).networks
    counts = [state_lib.parameter_count(network.variables()['params']) for network in networks]
    rows = [
        {'name': name, 'parameters': count, 'feature_map': list(shape)}
        for name, count, shape in zip(cohort.names, counts, cohort.map_shapes, strict=True)
    ]
    rows.append({'name': 'ensemble', 'parameters': sum(counts), 'feature_map': None})
    for i, row in enumerate(rows):
        best = progress and progress.best[i]
        values = (
            validation and validation.accuracy[i],
            test and test.accuracy[i],
            best and best['test'],
        )
        row |= dict(zip(_ACCURACIES, values, strict=True))
        row['test_top5_accuracy'] = test.top5[i] if test and test.top5 else None
        row['best_validation_step'] = best and best['step']
    return rows[:-1], rows[-1]


def build(
    run: Run,
    state: state_lib.TrainState,
    scores: dict[str, Scores],
    edges: list[dict[str, Any]] | None,
    progress: Progress,
    compile_s: float,
) -> dict[str, Any]:
    """Returns the summary of a run, as it stands in summary.json.

    Args:
      run: which.
      state: after its last step so far.
      scores: the last there are, by split.
      edges: of that state's ring (similarity.figures); None if the run is not finished.
      progress: of the run; `images_per_s` is the median over its epochs, None if none was timed;
        in `wall_s` what a killed process did after its last checkpoint is missing.
      compile_s: seconds to compile the training and the evaluation step, in this process.
    """
    networks, ensemble = entries(run.cohort, scores, progress)
    speeds = progress.images_per_s
    return {
        'finished': edges is not None,
        'networks': networks,
        'ensemble': ensemble,
        'ring': edges,
        'steps': int(state.step),
        'steps_skipped': progress.skipped,
        'epochs': run.config.epochs,
        'evaluated': {split: known['step'] for split, known in progress.scores.items()},
        'images_per_s': statistics.median(speeds) if speeds else None,
        'compile_s': compile_s,
        'wall_s': progress.wall_s,
        'device': run.devices.name,
        'fingerprint': run.fingerprint(state),
    }


def table(first: str, columns: tuple[str, ...]) -> rich.table.Table:
    """Returns an empty table whose first column holds words and whose others hold numbers."""
    result = rich.table.Table(box=rich.box.SIMPLE)
    result.add_column(first)
    for column in columns:
        result.add_column(column, justify='right')
    return result


def _number(value: float | None, digits: int) -> str:
    return '-' if value is None else f'{value:.{digits}f}'


def tables(summary: dict[str, Any]) -> list[rich.table.Table]:
    """Returns, for the terminal, the networks with the ensemble, and the edges of the ring."""
    columns = ('parameters', 'map', 'validation %', 'test %', 'test % at best validation')
    five = summary['ensemble']['test_top5_accuracy'] is not None
    networks = table('network', columns + (('test top-5 %',) if five else ()))
    for i, row in enumerate([*summary['networks'], summary['ensemble']]):
        number = '' if row is summary['ensemble'] else f'{i + 1} '
        shape = 'x'.join(map(str, row['feature_map'])) if row['feature_map'] else ''
        keys = _ACCURACIES + (('test_top5_accuracy',) if five else ())
        accuracies = (_number(row[key], 2) for key in keys)
        networks.add_row(number + row['name'], f'{row["parameters"]:,}', shape, *accuracies)
    # Percentages: both predict the same; the network, or its teacher, alone is right.
    columns = ('L1', 'L2', 'cosine', 'CKA', 'agree %', 'only own right %', "only teacher's right %")
    ring = table('teacher -> own', columns)
    for edge in summary['ring']:
        ring.add_row(
            f'{edge["teacher"]} -> {edge["network"]}',
            *(_number(edge[key], 3) for key in ('l1', 'l2', 'cosine', 'cka')),
            *(
                _number(edge[key], 2)
                for key in ('agreement', 'only_network_correct', 'only_teacher_correct')
            ),
        )
    return [networks, ring]

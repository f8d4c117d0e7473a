"""The result of a run as JSON: summary.json and classes.json."""

import statistics
from collections.abc import Mapping
from typing import Any

from afkd_jax.checkpoints.progress import Progress
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.method import state as state_lib
from afkd_jax.method.cohort import Cohort
from afkd_jax.method.metrics import Evaluation


def entries(
    cohort: Cohort,
    evaluations: Mapping[str, Evaluation] | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the entry of each network, and the ensemble's; accuracies in percent, unknown: None.

    The ensemble is the mean of the networks' probabilities.

    Args:
      cohort: of all networks.
      evaluations: by split; with those of averages, rows have their accuracies too.
      progress: of the run, for the accuracies at best validation.
    """
    validation, test = ((evaluations or {}).get(split) for split in ('validation', 'test'))
    networks = state_lib.abstract(cohort).networks
    counts = [scalar_count(network.variables()['params']) for network in networks]
    rows: list[dict[str, Any]] = [
        {
            'name': name,
            'frozen': not cohort.learns(k),
            'parameters': counts[k],
            'feature_map': list(cohort.map_shapes[k]),
        }
        for k, name in enumerate(cohort.names)
    ]
    rows.append({'name': 'ensemble', 'parameters': sum(counts), 'feature_map': None})
    for i, row in enumerate(rows):
        best = progress.best[i] if progress else None
        row['validation_accuracy'] = validation.accuracy[i] if validation else None
        row['test_accuracy'] = test.accuracy[i] if test else None
        row['test_accuracy_at_best_validation'] = best.test if best else None
        row['test_top5_accuracy'] = test.top5[i] if test and test.top5 else None
        row['best_validation_step'] = best.step if best else None
        for split in ('validation_ema', 'test_ema'):
            if averages := (evaluations or {}).get(split):
                row[f'{split}_accuracy'] = averages.accuracy[i]
    return rows[:-1], rows[-1]


def build(
    cohort: Cohort,
    progress: Progress,
    edges: list[dict[str, Any]] | None,
    **facts: Any,
) -> dict[str, Any]:
    """Returns the summary of a run, as in summary.json.

    Args:
      cohort: of all networks.
      progress: of the run; `images_per_s` is the median over its epochs, None if none was timed;
        `wall_s` lacks what a killed process did after its last checkpoint; `seconds` is the same
        by what it was spent on (clock.Spent).
      edges: of the ring (similarity.figures); None if the run is not finished.
      facts: method, seed, images (artefact.ImageFacts), steps, epochs, device and fingerprint.
    """
    evaluations = {split: evaluation for split, (_, evaluation) in progress.evaluations.items()}
    networks, ensemble = entries(cohort, evaluations, progress)
    speeds = progress.images_per_s
    return {
        'finished': edges is not None,
        'networks': networks,
        'ensemble': ensemble,
        'ring': edges,
        'steps_skipped': progress.skipped,
        'extensions': progress.extensions,
        'evaluated': {split: step for split, (step, _) in progress.evaluations.items()},
        'images_per_s': statistics.median(speeds) if speeds else None,
        'wall_s': progress.wall_s,
        'seconds': progress.seconds,
        **facts,
    }


def classes(cohort: Cohort, evaluation: Evaluation, confusion: bool = True) -> dict[str, Any]:
    """Returns the predictions by class, as JSON.

    images: of each class. Per network and the ensemble: accuracy per class in percent, None where
    there is no image; if asked for, confusion, rows by label and columns by prediction, None above
    metrics.CONFUSION_CLASSES classes.
    """
    counts = evaluation.counts
    assert counts
    images = counts['images'].astype(int).tolist()
    matrices, rows = counts.get('confusion'), []
    for i, name in enumerate((*cohort.names, 'ensemble')):
        correct = counts['correct'][i].tolist()
        accuracies = [
            100 * right / of if of else None for right, of in zip(correct, images, strict=True)
        ]
        rows.append({'name': name, 'accuracy': accuracies})
        if confusion:
            matrix = None if matrices is None else matrices[i].astype(int).tolist()
            rows[-1]['confusion'] = matrix
    return {'images': images, 'networks': rows[:-1], 'ensemble': rows[-1]}

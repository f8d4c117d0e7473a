"""The figures of a report, as SVG; an arm has one colour in all of them."""

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from afkd_jax.errors import typed_line
from afkd_jax.report.console import log
from afkd_jax.report.figures import styled
from afkd_jax.report.results import Result, Results
from afkd_jax.report.statistics import MARGIN, Comparison, calibration

# Okabe and Ito's colours, which colour-blind readers can tell apart; presets have fixed ones.
_COLOURS = {
    'vanilla': '#000000',
    'dml': '#E69F00',
    'kd_ring': '#56B4E9',
    'l1': '#999999',
    'l1_kd': '#009E73',
    'adversarial': '#CC79A7',
    'afd': '#0072B2',
}
_MORE = ('#D55E00', '#7F3C8D', '#80BA5A', '#8C564B', '#11A579', '#A5AA99')


def colours(results: Results) -> dict[str, str]:
    """Returns arm -> its colour."""
    more = itertools.cycle(_MORE)
    return {arm: _COLOURS.get(arm) or next(more) for arm in results.study.arms}


def draw(
    results: Results, comparisons: list[Comparison], operations: dict[str, float | None]
) -> dict[str, tuple[str, bytes]]:
    """Returns NAME -> (title, SVG) of each figure for which there are values.

    Args:
      results: of a study.
      comparisons: of its arms.
      operations: arm -> those of a run; None where they are not known.
    """
    figures: dict[str, Callable[[], tuple[str, Any] | None]] = {
        'differences': lambda: _differences(results, comparisons),
        'seeds': lambda: _seeds(results),
        'curves': lambda: _curves(results),
        'cost': lambda: _cost(results, operations),
        'adversary': lambda: _training_values(results),
        'similarity': lambda: _similarity(results),
        'calibration': lambda: _calibration(results),
    }
    found = {}
    # Fonts are those of the reader's browser.
    style = {'axes.spines.top': False, 'axes.spines.right': False, 'svg.fonttype': 'none'}
    style |= {'svg.hashsalt': 'afkd_jax'}
    with styled(**style):
        for name, make in figures.items():
            try:
                if made := make():
                    title, figure = made
                    file = io.BytesIO()
                    figure.savefig(file, format='svg', metadata={'Date': None})
                    found[name] = title, file.getvalue()
            except Exception as error:  # the tables matter more
                log(f'warning: the figure "{name}" cannot be drawn ({typed_line(error)})')
    return found


def _new(columns: int = 1, rows: int = 1, height: float = 3.6) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns + 1.2, height * rows), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def _differences(results: Results, comparisons: list[Comparison]) -> tuple[str, Any] | None:
    shown = [c for c in comparisons if c.interval and c.mean is not None]
    if not shown:
        return None
    figure, axes = _new(height=1.4 + 0.45 * len(shown))
    axis, colour = axes[0, 0], colours(results)
    axis.axvspan(-MARGIN, MARGIN, color='0.9', zorder=0)
    axis.axvline(0, color='0.4', linewidth=1)
    for row, c in enumerate(reversed(shown)):
        assert c.interval
        axis.plot(c.interval, [row, row], color=colour[c.arm], linewidth=2)
        axis.plot(c.mean, row, 'o', color=colour[c.arm], markersize=8)
        axis.plot(c.differences, [row] * len(c.differences), '|', color=colour[c.arm], alpha=0.5)
    axis.set_yticks(range(len(shown)), [f'{c.arm} - {c.against}' for c in reversed(shown)])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel('difference of test accuracy, points')
    title = (
        'Differences by seed (ticks), their mean (dot) and 95 % t interval (line); grey: '
        f'{MARGIN} points'
    )
    return title, figure


def _seeds(results: Results) -> tuple[str, Any] | None:
    outcomes = {arm: results.outcomes(arm) for arm in results.study.arms}
    arms = [arm for arm, found in outcomes.items() if found]
    if len(arms) < 2:
        return None
    figure, axes = _new(2)
    axes[0, 1].remove()
    axis = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    axes[0, 0].remove()
    for seed in sorted(set().union(*outcomes.values())):
        values = [outcomes[arm].get(seed, np.nan) for arm in arms]
        axis.plot(range(len(arms)), values, color='0.75', linewidth=1, zorder=1)
    for column, arm in enumerate(arms):
        values = list(outcomes[arm].values())
        axis.plot([column] * len(values), values, 'o', color=colours(results)[arm], alpha=0.7)
    axis.set_xticks(range(len(arms)), arms, rotation=20, ha='right', rotation_mode='anchor')
    axis.set_ylabel('test accuracy, %')
    return 'Test accuracy of each run; a line joins the runs of one seed', figure


def _curves(results: Results) -> tuple[str, Any] | None:
    splits = [
        split
        for split in ('validation', 'test')
        if any(len(run.evaluations(split)) > 1 for run in results.runs)
    ]
    split = splits[0] if splits else ''
    figure, axes = _new(2)
    drawn = False
    for arm, colour in colours(results).items():
        by_run = [
            _series([(line['epoch'], mean_of(line)) for line in run.evaluations(split)])
            for run in results.of(arm)
        ]
        entropies = [
            _series([(line['epoch'], mean_of(line, 'cross_entropy')) for line in _train_lines(run)])
            for run in results.of(arm)
        ]
        drawn |= _band(axes[0, 0], by_run, colour, arm) | _band(axes[0, 1], entropies, colour, arm)
    if not drawn:
        return None
    axes[0, 0].set(xlabel='epoch', ylabel=f'{split} accuracy, %')
    axes[0, 1].set(xlabel='epoch', ylabel='training cross-entropy, nats', yscale='log')
    _legend(figure, axes[0, 1])
    return 'Mean over networks and seeds; the band is one standard deviation over seeds', figure


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # one per label
    if shown:
        figure.legend(
            shown.values(),
            shown,
            loc='outside upper center',
            ncols=min(len(shown), 5),
            frameon=False,
        )


def _train_lines(run: Result) -> list[dict[str, Any]]:
    return [line for line in run.lines if line['kind'] == 'epoch']


def mean_of(line: dict[str, Any], key: str = 'accuracy') -> float:
    """Returns the mean of a value over the networks of a line of metrics.jsonl; NaN without."""
    values = [
        network.get(key)
        for network in line['networks']
        if network['name'] != 'ensemble' and network.get(key) is not None
    ]
    return float(np.mean(values)) if values else np.nan


def _series(points: list[tuple[float, float]]) -> dict[float, float]:
    return {round(x, 4): y for x, y in points}


def _band(axis: Any, by_run: list[dict[float, float]], colour: str, label: str) -> bool:
    """Draws mean and standard deviation over runs, where all of them have values."""
    shared = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if not shared:
        return False
    ys = np.array([[series[x] for x in shared] for series in by_run])
    if np.isnan(ys).all():
        return False
    mean, sd = ys.mean(0), ys.std(0, ddof=1) if len(ys) > 1 else 0
    marker = 'o' if len(shared) == 1 else ''
    axis.plot(shared, mean, color=colour, marker=marker, linewidth=1.5, label=label)
    axis.fill_between(shared, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
    return True


def _cost(results: Results, operations: dict[str, float | None]) -> tuple[str, Any] | None:
    figure, axes = _new(2)
    drawn = False
    for arm, colour in colours(results).items():
        for run in results.of(arm):
            for axis, x in zip(axes[0], (run.training_s(run.speed), operations[arm]), strict=True):
                if x and run.mean() is not None:
                    axis.plot(x, run.mean(), 'o', color=colour, label=arm, alpha=0.7)
                    drawn = True
    axes[0, 0].set(xlabel='time of the training steps, s', ylabel='test accuracy, %')
    axes[0, 1].set(xlabel='operations of the training steps')
    _legend(figure, axes[0, 0])
    return ('Test accuracy against the cost of each run', figure) if drawn else None


def _training_values(results: Results) -> tuple[str, Any] | None:
    panels = {
        "D(student's map)": 'd_own',
        "D(teacher's map)": 'd_teacher',
        'gradient norm, logit': 'grad_norm_logit',
        'gradient norm, feature': 'grad_norm_feature',
    }
    figure, axes = _new(2, 2, 3.0)
    drawn = False
    for axis, (title, key) in zip(axes.ravel(), panels.items(), strict=True):
        for arm, colour in colours(results).items():
            by_run = [
                _series([(line['epoch'], mean_of(line, key)) for line in _train_lines(run)])
                for run in results.of(arm)
            ]
            drawn |= _band(axis, by_run, colour, arm) and key.startswith('d_')
        axis.set(xlabel='epoch', ylabel=title)
        if key.startswith('d_'):
            axis.set_ylim(0, 1)
        else:
            axis.set_yscale('log')
    _legend(figure, axes[1, 0])
    return ('Discriminator outputs and gradient norms, mean and one SD', figure) if drawn else None


def _similarity(results: Results) -> tuple[str, Any] | None:
    baseline = results.study.reference
    base = {run.seed: run for run in results.of(baseline)}

    def gains(run: Result, key: str) -> Iterator[tuple[float, float]]:
        """Yields (similarity, gain of the student) of each edge of a run."""
        theirs = base[run.seed].summary if run.seed in base else None
        if not (run.summary and theirs):
            return
        mine, theirs = run.summary['networks'], theirs['networks']
        for edge in run.summary['ring'] or []:
            k = edge['network'] - 1
            same = k < len(theirs) and mine[k]['name'] == theirs[k]['name']
            if same and edge[key] is not None and not mine[k]['frozen']:
                yield edge[key], mine[k]['test_accuracy'] - theirs[k]['test_accuracy']

    figure, axes = _new(3)
    drawn = False
    panels = {'cka': 'CKA', 'cosine': 'cosine of maps', 'agreement': 'agreement, %'}
    for axis, (key, title) in zip(axes.ravel(), panels.items(), strict=True):
        for arm, colour in colours(results).items():
            if points := [point for run in results.of(arm) for point in gains(run, key)]:
                drawn = True
                axis.plot(*zip(*points, strict=True), 'o', color=colour, label=arm, alpha=0.7)
        axis.set_xlabel(title)
    axes[0, 0].set_ylabel(f"student's gain over {baseline}, points")
    _legend(figure, axes[0, 0])
    title = 'Similarity of teacher and student, for each edge of the ring, against the gain'
    return (title, figure) if drawn else None


def _calibration(results: Results) -> tuple[str, Any] | None:
    figure, axes = _new(1, height=4.2)
    axis, drawn = axes[0, 0], False
    axis.plot([0, 1], [0, 1], color='0.6', linewidth=1)
    for arm, colour in colours(results).items():
        pooled = pooled_confidence(results, arm)
        if pooled is None:
            continue
        _, confidence, accuracy, fraction = calibration(*pooled)
        shown = fraction > 0.002  # fewer images say little
        if shown.any():
            drawn = True
            axis.plot(confidence[shown], accuracy[shown], 'o-', color=colour, label=arm, ms=4)
    axis.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
    _legend(figure, axis)
    title = 'Reliability: accuracy against confidence, of all networks and seeds'
    return (title, figure) if drawn else None


def pooled_confidence(results: Results, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns confidences and whether the prediction is right, of all networks and seeds."""
    found = [run.predictions for run in results.of(arm) if run.predictions is not None]
    if not found:
        return None
    confidence = [each['confidence'].ravel().astype(float) for each in found]
    correct = [(each['predicted'] == each['label'][:, None]).ravel() for each in found]
    return np.concatenate(confidence), np.concatenate(correct)

"""curves.png: a run's losses, accuracies and discriminator outputs, one colour per network."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from afkd_jax.report import jsonl

# Of every figure; all else is matplotlib's default.
_STYLE = {'font.size': 11, 'axes.grid': True, 'grid.alpha': 0.3}

# Values that share a panel, or have a unit: title, unit, value -> (line style, meaning). Any other
# value of a loss has a panel too, under its own name.
_PANELS: list[tuple[str, str, dict[str, tuple[str, str]]]] = [
    ('Training cross-entropy', 'nats', {'cross_entropy': ('-', '')}),
    ('KL to the teachers', 'nats', {'mimicry_kl': ('-', '')}),
    (
        'Adversarial losses',
        'squared error',
        {'adversarial': ('-', 'network'), 'discriminator': ('--', 'discriminator')},
    ),
    (
        'Discriminator outputs',
        'mean output',
        {'d_own': ('-', "student's map"), 'd_teacher': ('--', "teacher's map")},
    ),
]
_FEW = 10  # points, which are marked
_NOT_LOSSES = {'name', 'accuracy', 'kind', 'step', 'epoch', 'images_per_s', 'skipped', 'networks'}


@contextlib.contextmanager
def styled(**settings: Any) -> Iterator[None]:
    """Draws what is inside in our style and these settings; the user's own do not count.

    matplotlib reads the user's backend and file of settings when it is imported, and fails there if
    it cannot use them. Only Figure objects are drawn, without pyplot, so no backend is needed.
    """
    users = {name: os.environ.pop(name, None) for name in ('MPLBACKEND', 'MATPLOTLIBRC')}
    os.environ['MATPLOTLIBRC'] = os.devnull
    try:
        import matplotlib as mpl
    finally:
        del os.environ['MATPLOTLIBRC']
        os.environ |= {name: value for name, value in users.items() if value is not None}
    with mpl.rc_context(mpl.rcParamsDefault):
        style: dict[Any, Any] = _STYLE | settings
        mpl.rcParams.update(style)
        yield


def draw(workdir: pathlib.Path) -> pathlib.Path:
    """Draws curves.png from metrics.jsonl, and returns its path."""
    lines = jsonl.read(workdir / 'metrics.jsonl')
    train = [line for line in lines if line['kind'] == 'epoch']
    splits: dict[str, dict[int, Any]] = {}
    for line in lines:
        if line['kind'] == 'evaluation':
            splits.setdefault(line['split'], {})[line['step']] = line
    names = [network['name'] for network in train[0]['networks']] if train else []
    panels = _panels(train)

    with styled():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        count = len(panels) + 1
        columns = min(count, 3)
        rows = -(-count // columns)
        figure = Figure(figsize=(5.2 * columns, 3.8 * rows + 0.5), layout='constrained')
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        _draw_accuracies(axes[0], splits, Line2D)
        for axis, (title, unit, values) in zip(axes[1:], panels, strict=False):
            epochs = [line['epoch'] for line in train]
            for name, (style, _) in values.items():
                if name in train[0]:  # one value per step
                    _plot(axis, epochs, [line.get(name) for line in train], style, 'black')
                    continue
                for k in range(len(names)):
                    ys = [line['networks'][k].get(name) for line in train]
                    _plot(axis, epochs, ys, style, f'C{k}')
            _label(axis, title, unit, {word: style for style, word in values.values()}, Line2D)
            if 'd_own' in values:
                axis.set_ylim(0, 1)
        for axis in axes[count:]:
            axis.remove()
        colours = [
            Line2D([], [], color=f'C{k}', label=f'{k + 1} {name}') for k, name in enumerate(names)
        ]
        ensemble = Line2D([], [], color='black', label='ensemble')
        figure.legend(handles=[*colours, ensemble], loc='outside upper center', ncols=6)
        temporary = workdir / 'curves.png.tmp'
        figure.savefig(temporary, dpi=150, format='png')
    return temporary.replace(workdir / 'curves.png')


def _panels(train: list[dict]) -> list[tuple[str, str, dict[str, tuple[str, str]]]]:
    """Returns the panels of what this run reports; a value that is not in _PANELS has its own."""
    reported = {
        name: None  # in their order
        for line in train
        for name in (*line['networks'][0], *line)
        if name not in _NOT_LOSSES and not name.startswith(('grad_norm', 'learning_rate'))
    }
    known = {name for _, _, values in _PANELS for name in values}
    own = [(name, 'mean', {name: ('-', '')}) for name in reported if name not in known]
    return [panel for panel in _PANELS if panel[2].keys() <= reported.keys()] + own


def _draw_accuracies(axis: Any, splits: dict[str, dict[int, Any]], line2d: Any) -> None:
    styles = dict.fromkeys(splits, '-')
    if len(splits) > 1:
        known = {'validation': '-', 'test': '--', 'validation_ema': '-.', 'test_ema': ':'}
        styles = {split: style for split, style in known.items() if split in splits}
    for split, by_step in splits.items():
        evaluations = [by_step[step] for step in sorted(by_step)]
        epochs = [line['epoch'] for line in evaluations]
        for k, network in enumerate(evaluations[0]['networks']):
            accuracies = [line['networks'][k]['accuracy'] for line in evaluations]
            colour = 'black' if network['name'] == 'ensemble' else f'C{k}'
            _plot(axis, epochs, accuracies, styles[split], colour)
    _label(axis, 'Accuracy', 'top-1, %', styles, line2d)


def _plot(axis: Any, epochs: list[float], values: list[Any], style: str, colour: str) -> None:
    marker = 'o' if len(epochs) <= _FEW else ''  # a line of one point cannot be seen
    axis.plot(epochs, values, style, color=colour, marker=marker, markersize=4, linewidth=1.4)


def _label(axis: Any, title: str, unit: str, styles: dict[str, str], line2d: Any) -> None:
    """Labels a panel; a legend of line styles only where there are several meanings."""
    axis.set_title(title)
    axis.set_xlabel('epoch')
    axis.set_ylabel(unit)
    if any(styles):
        handles = [line2d([], [], color='grey', linestyle=s, label=w) for w, s in styles.items()]
        axis.legend(handles=handles)

"""curves.png: a run's losses, accuracies and discriminator outputs, one colour per network."""

import contextlib
import json
import pathlib


def _lines(path: pathlib.Path) -> list[dict]:
    """Returns the lines of a file, without those that a killed process has cut."""
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def draw(workdir: pathlib.Path) -> None:
    """Draws curves.png from metrics.jsonl; of lines that name one step twice the last counts."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    lines = _lines(workdir / 'metrics.jsonl')
    train = list({line['step']: line for line in lines if line['kind'] == 'train'}.values())
    evaluations = {
        (line['split'], line['step']): line for line in lines if line['kind'] == 'evaluation'
    }
    split = 'validation' if any(key[0] == 'validation' for key in evaluations) else 'test'
    evaluated = [line for (name, _), line in evaluations.items() if name == split]
    # Title, lines of metrics.jsonl, their values with a style each, limits of the axis.
    panels = [
        ('logit loss', train, {'cross_entropy': '-', 'mimicry_kl': '--'}, None),
        (f'{split} accuracy, %', evaluated, {'accuracy': '-'}, None),
        ("maps' L1", train, {'l1': '-'}, None),
        ('adversarial losses', train, {'adversarial': '-', 'discriminator': '--'}, None),
        ('discriminator outputs', train, {'d_own': '-', 'd_teacher': '--'}, (0, 1)),
    ]
    # A method draws only what it has.
    panels = [
        panel for panel in panels if panel[1] and panel[2].keys() & panel[1][0]['networks'][0]
    ]

    def label(index: int, name: str) -> str:
        return name if name == 'ensemble' else f'{index + 1} {name}'

    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), layout='constrained', squeeze=False
    )
    for axis, (title, rows, styles, limits) in zip(axes[0], panels, strict=True):
        for k, network in enumerate(rows[0]['networks']):
            for name, style in styles.items():
                if name in network:
                    axis.plot(
                        [row['epoch'] for row in rows],
                        [row['networks'][k][name] for row in rows],
                        style,
                        color='black' if network['name'] == 'ensemble' else f'C{k}',
                        linewidth=1.2,
                        label=f'{label(k, network["name"])}: {name}',
                    )
        axis.set_ylim(limits)
        axis.set_title(title)
        axis.set_xlabel('epoch')
        axis.legend(fontsize='x-small')
        axis.grid(alpha=0.3)
    temporary = workdir / 'curves.png.tmp'
    figure.savefig(temporary, dpi=120, format='png')
    temporary.replace(workdir / 'curves.png')
    plt.close(figure)

"""curves.png: what a run has reported can be seen."""

import json

import pytest
from matplotlib.figure import Figure

from afkd_jax.report import figures


def write_metrics(workdir, points):
    rows = []
    for step in range(1, points + 1):
        where = {'step': step, 'epoch': float(step)}
        values = {'cross_entropy': 2 / step, 'd_own': 0.4, 'd_teacher': 0.6}
        rows.append(where | {'kind': 'train', 'networks': [{'name': 'a'} | values] * 2})
        for split in ('validation', 'test'):
            networks = [{'name': name, 'accuracy': 50 + step} for name in ('a', 'a', 'ensemble')]
            rows.append(where | {'kind': 'evaluation', 'split': split, 'networks': networks})
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.mark.parametrize(('points', 'marked'), [(1, True), (2, True), (30, False)])
def test_few_points_are_marked(points, marked, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig

    def savefig(figure, path, **options):
        drawn.extend(axis.lines for axis in figure.axes)
        save(figure, path, **options | {'dpi': 50})

    monkeypatch.setattr(Figure, 'savefig', savefig)
    write_metrics(tmp_path, points)
    figures.draw(tmp_path)
    assert [len(lines) for lines in drawn] == [6, 2, 4]  # accuracies, cross-entropy, outputs
    assert {line.get_marker() for lines in drawn for line in lines} == {'o' if marked else ''}

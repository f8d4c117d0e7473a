"""curves.png: what a run has reported can be seen."""

import json
import os
import subprocess
import sys

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from afkd_jax.report import figures


def write_metrics(workdir, points):
    rows = []
    for step in range(1, points + 1):
        where = {'step': step, 'epoch': float(step)}
        values = {'cross_entropy': 2 / step, 'd_own': 0.4, 'd_teacher': 0.6}
        rows.append(where | {'kind': 'epoch', 'networks': [{'name': 'a'} | values] * 2})
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


def test_the_users_backend_and_settings_do_not_count(tmp_path):
    # matplotlib reads both when it is imported; the backend's package need not be known here.
    (tmp_path / 'matplotlibrc').write_bytes(b'text.usetex: \xff')
    users = {'MPLBACKEND': 'module://nowhere.backend_inline', 'MATPLOTLIBRC': str(tmp_path)}
    code = 'import os\nfrom afkd_jax.report import figures\nbefore = dict(os.environ)\n'
    code += 'with figures.styled(): pass\nassert os.environ == before'
    subprocess.run([sys.executable, '-c', code], env=os.environ | users, check=True)
    with mpl.rc_context({'text.usetex': True, 'font.size': 40}), figures.styled():
        assert (mpl.rcParams['text.usetex'], mpl.rcParams['font.size']) == (False, 11)


def epoch(number, values):
    """Returns the line of an epoch of two networks with these values."""
    networks = [{'name': 'a', **values}, {'name': 'b', **values}]
    return {'kind': 'epoch', 'step': number, 'epoch': number, 'networks': networks}


def test_every_value_that_is_reported_has_a_panel(tmp_path, monkeypatch):
    # Of a method with discriminators, and of one that this package does not know.
    values = {'cross_entropy': 2.0, 'accuracy': 9.0, 'adversarial': 0.1, 'discriminator': 0.2}
    values |= {'d_own': 0.4, 'd_teacher': 0.6, 'my loss': 3.0, 'grad_norm_logit': 1.0}
    scores = [{'name': name, 'accuracy': 50.0} for name in ('a', 'b', 'ensemble')]
    evaluation = {'kind': 'evaluation', 'step': 1, 'epoch': 1, 'split': 'test', 'networks': scores}
    lines = [epoch(1, values), evaluation]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda f, *a, **k: [drawn.append(f), save(f, *a, **k)])
    assert figures.draw(tmp_path) == tmp_path / 'curves.png'
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    assert list(panels) == [
        'Accuracy',
        'Training cross-entropy',
        'Adversarial losses',
        'Discriminator outputs',
        'my loss',
    ]
    assert [line.get_ydata().tolist() for line in panels['my loss'].lines] == [[3.0], [3.0]]
    assert all(line.get_marker() == 'o' for line in panels['my loss'].lines)  # one epoch is seen


def test_a_value_that_all_steps_of_an_epoch_lack_is_a_gap(tmp_path):
    lines = [epoch(1, {'cross_entropy': 1.0}), epoch(2, {}), epoch(3, {'cross_entropy': 0.5})]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert figures.draw(tmp_path).read_bytes().startswith(b'\x89PNG')

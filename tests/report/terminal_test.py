"""The terminal: every line fits, a bar that moves, and no control codes in a file."""

import io
import re
import time

import pytest
from conftest import tiny_config

from afkd_jax.method.metrics import Evaluation
from afkd_jax.report import console as console_lib
from afkd_jax.report import tables, terminal
from afkd_jax.report.trackers import EpochEnd, EvaluationValues, Start, TrainValues

CONTROL = re.compile(r'\x1b\[[?\d;]*[A-Za-z]')


@pytest.fixture(params=[True, False], ids=['terminal', 'file'])
def screen(request, monkeypatch):
    """Returns (whether it is a terminal, what was printed so far)."""
    file = io.StringIO()
    console = console_lib._Console(
        file=file,
        width=80,
        force_terminal=request.param,
        force_interactive=request.param,
        soft_wrap=True,
        highlight=False,
    )
    monkeypatch.setattr(console_lib, 'console', console)
    monkeypatch.setattr(terminal, 'console', console)
    return request.param, file.getvalue


def show(networks, end=True):
    """Shows the last epoch of a long run of so many networks."""
    config = tiny_config(('tiny-8-2',) * networks, epochs=300)
    losses = {'cross_entropy': [1.25 + k for k in range(networks)]}
    start = Start(1_234_000, 1_234_567, config.networks, config, '1 x cpu', True)
    with terminal.Terminal() as shown:
        shown.handle(start)
        shown.handle(TrainValues(1_234_500, 299.9, losses, 123456.0, 0))
        if end:
            scores = Evaluation([100.0] * (networks + 1), [0.1] * (networks + 1), None)
            shown.handle(EvaluationValues(1_234_567, 300, 'validation', scores))
            shown.handle(EpochEnd(1_234_567, 300, losses, 98765.4, 0))


@pytest.mark.parametrize('networks', [2, 8, 16])
def test_the_terminal_fits_80_columns_with_any_number_of_networks(networks, screen):
    is_terminal, printed = screen
    show(networks)
    text = CONTROL.sub('', printed())
    lines = [line for line in re.split('[\r\n]+', text) if line.strip()]
    accuracies = 'val % ' + '100.00 ' * networks + 'ensemble 100.00'
    losses = 'loss ' + ' '.join(f'{1.25 + k:.3f}' for k in range(networks))
    if not is_terminal:
        assert text == printed()  # no control code
        assert '\r' not in text
        assert lines == [f'epoch 300/300  0 s  98765 img/s  {losses}  {accuracies}']
        return
    assert max(map(len, lines)) <= 80
    bars = [line for line in lines if 'left' in line]
    mean = 1.25 + (networks - 1) / 2
    bar = rf'epoch 299.9/300 [━╸╺]+ *1234500/1234567 +123456 img/s loss {mean:.3f} \S+ left'
    assert re.search(bar, bars[-1]), bars
    words = ' '.join(' '.join(line for line in lines if 'left' not in line).split())
    assert f'epoch 300/300 0 s 98765 img/s {losses} {accuracies}' in words


def test_without_a_terminal_a_long_epoch_prints_a_line_a_minute(screen, monkeypatch):
    is_terminal, printed = screen
    monkeypatch.setattr(terminal, '_QUIET_S', 0.0)
    show(2, end=False)
    if not is_terminal:
        assert printed() == (
            'epoch 299.90/300  step 1234500/1234567  123456 img/s  loss 1.250 2.250\n'
        )


def test_long_work_shows_a_sign_of_life(screen, monkeypatch, capsys):
    is_terminal, printed = screen
    with console_lib.working('thinking'):
        print('{}')  # JSON, where the console writes to stderr
        if is_terminal:
            time.sleep(0.3)  # three pictures
    assert capsys.readouterr().out == '{}\n'
    if is_terminal:
        pictures = set(re.findall('[⠀-⣿] thinking 0 s', CONTROL.sub('', printed())))
        assert len(pictures) > 1
        assert printed().endswith('\x1b[?25h\r\x1b[1A\x1b[2K')  # the cursor is back, the line away
        return
    assert printed() == ''
    monkeypatch.setattr(console_lib, '_SILENT_S', 0.0)
    with console_lib.working('thinking'):
        deadline = time.monotonic() + 10
        while not printed() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert printed() == 'thinking ...\n'


def test_pieces_of_silent_work_add_up(monkeypatch):
    now, delays = [100.0], []

    class Timer:
        def __init__(self, delay, *_):
            delays.append(delay)

        def start(self):
            pass

        cancel = start

    def work(seconds, line=None):
        with console_lib.working('thinking'):
            if line:
                console_lib.log(line)
            now[0] += seconds

    monkeypatch.setattr(console_lib, 'console', console_lib._Console(file=io.StringIO()))
    monkeypatch.setattr(console_lib.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(console_lib.threading, 'Timer', Timer)
    work(2.0)
    work(0.5)
    now[0] += 50.0  # other things
    work(0.25)
    work(1.0, 'a line')
    work(0.0)
    assert delays == [3.0, 1.0, 0.5, 0.25, 2.0]


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_with_json_the_sign_of_life_is_on_stderr(monkeypatch, capsys):
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(console_lib, 'console', console_lib._Console())
    screen = Screen()
    monkeypatch.setattr('sys.stderr', screen)
    with console_lib.working('thinking'):
        console_lib.print_json({})
    assert screen.getvalue() == ''
    console_lib.keep_stdout_for_json()
    with console_lib.working('thinking'):
        console_lib.print_json({})
    assert '⠋ thinking 0 s' in CONTROL.sub('', screen.getvalue())
    assert capsys.readouterr().out == '{}\n'


def test_a_line_ends_between_two_parts():
    parts = ['epoch 1/2', '', 'loss 1 2', 'val % 3 4']
    assert terminal.lines(parts, None) == ['epoch 1/2  loss 1 2  val % 3 4']
    assert terminal.lines(parts, 19) == ['epoch 1/2  loss 1 2', '  val % 3 4']
    assert terminal.lines(parts, 9) == ['epoch 1/2', '  loss 1', '    2', '  val % 3', '    4']


@pytest.mark.parametrize('columns', ['0', '20', None])
@pytest.mark.parametrize('terminal', [True, False])
def test_no_width_cuts_a_table_or_a_line(columns, terminal, monkeypatch):
    environment = {} if columns is None else {'COLUMNS': columns}
    file = io.StringIO()
    shown = type(console_lib.console)(
        file=file, force_terminal=terminal, _environ=environment, soft_wrap=True, color_system=None
    )
    monkeypatch.setattr(console_lib, 'console', shown)
    names = tuple(f'column {n}' for n in range(5 if terminal else 30))
    table = tables.table('network', names)
    table.add_row('resnet32', *(f'{n}.25' for n in range(len(names))))
    console_lib.log(table)
    console_lib.log('a line ' * 30)
    header, _, row = (line for line in file.getvalue().splitlines()[:5] if line.strip())
    assert [*map(str.strip, re.split(r'  +', header.strip()))] == ['network', *names]
    assert row.split() == ['resnet32', *(f'{n}.25' for n in range(len(names)))]
    assert 'a line ' * 30 in file.getvalue()

"""benchmarks/accelerator.py: every part in small, and what it makes of a trace."""

import collections
import functools
import json

import accelerator
import jax
import pytest
from tiny import PAIR

from afkd_jax.tools import benchmark
from configs import digits

Plane = collections.namedtuple('Plane', 'name lines')
Line = collections.namedtuple('Line', 'name events')
Event = collections.namedtuple('Event', 'name start_ns duration_ns stats', defaults=([],))


@pytest.mark.slow  # it compiles seven programs
def test_every_part_runs_in_small(tmp_path, monkeypatch, capsys):
    for name in ('BLOCKS', 'BLOCK_S', 'PRODUCT'):  # which main() changes
        monkeypatch.setattr(benchmark, name, getattr(benchmark, name))
    monkeypatch.setattr(accelerator, 'MIXED', ('tiny-4-2', 'tiny-6-2'))
    monkeypatch.setattr(accelerator, 'SMALL', ((digits, 'tiny-8-2', 2, 16, 'float32'),))
    demo = functools.partial(digits.get_config, ','.join(PAIR))
    monkeypatch.setattr(digits, 'get_config', lambda *names: demo())
    monkeypatch.setattr(accelerator, '_HAS_TORCH', '')
    peer, out = tmp_path / 'peer.py', tmp_path / 'out.json'
    peer.write_text(
        'import json, sys\nassert "--compile" not in sys.argv, "no compiler"\n'
        'print(json.dumps({"images_per_s": 1000.0}))\n'
    )
    assert accelerator.main(['--small', '--out', str(out), '--peer', str(peer)]) == 0
    result = json.loads(out.read_text())
    differences = result['cases']['correctness']['differences']
    assert set(differences) == {'float32', 'float32 exact', f'{jax.device_count()} devices, to one'}
    assert all(0 < max(error.values()) < 1e-5 for error in differences.values())
    assert len(result['cases']['digits']['test_accuracy']) == 2
    speed = result['cases']['2 x tiny-8-2, batch 16, float32']
    assert 'profile_error' not in speed
    assert speed['images_per_s'] > 0
    assert len(speed['to_peer']['eager']) == 2
    assert 'AssertionError: no compiler' in capsys.readouterr().out
    assert speed['profile']['kinds']['convolution']['per_step'] >= 1
    assert 0 < speed['profile']['step_s'] < 1
    assert 0 <= speed['profile']['idle_fraction'] < 1


def test_a_case_that_fails_does_not_end_the_others_but_the_time_does(monkeypatch):
    now, saved = [0], []
    monkeypatch.setattr(accelerator.time, 'monotonic', lambda: now[0])

    def fails(small, peer):
        raise MemoryError('too large')

    def slow(small, peer):
        now[0] += 61
        return {'done': True}

    todo = {'first': fails, 'second': slow, 'third': slow}
    found = accelerator.run(todo, 1, True, None, lambda results: saved.append({*results}))
    assert found == {
        'first': {'error': 'MemoryError: too large', 'ok': False},
        'second': {'done': True},
        'third': {'not_run': 'the time is used up'},
    }
    assert saved == [{'first'}, {'first', 'second'}, set(found)]


def test_kernels_are_those_of_the_first_device_or_of_the_hosts_threads():
    conv = Event('sm90_xmma_fprop_implicit_gemm', 5, 10)
    copy = Event('MemcpyD2D', 2, 1, [('hlo_op', 'copy.1')])
    lines = [Line('Stream #1(Compute)', [conv]), Line('Stream #2(Memcpy)', [copy])]
    ends = [Event('end: MemcpyD2D', 8, 0), Event('end: other', 9, 0)]
    host = Plane('/host:CPU', [Line('a', ends), Line('b', [Event('python', 0, 9), copy])])
    gpu = Plane('/device:GPU:0', [*lines, Line('Steps', [Event('1', 0, 99)])])
    other = Plane('/device:GPU:1', lines)
    found = accelerator.kernels([other, host, gpu])
    assert found == [('MemcpyD2D copy.1', 2e-9, 1e-9), (f'{conv.name} ', 5e-9, 1e-8)]
    ((name, start, seconds),) = accelerator.kernels([host])
    assert (name, start) == ('MemcpyD2D copy.1', 2e-9)
    assert seconds == pytest.approx(6e-9)  # another thread ended it


def test_a_trace_is_summarised_by_kind():
    # Two steps in 10 s: the second kernel overlaps the first by 1 s, and 2 s are idle.
    found = [('dgrad', 0.0, 3.0), ('loop_add_fusion', 2.0, 2.0), ('wgrad', 6.0, 4.0)]
    result = accelerator.summarised(found, 2)
    assert result['step_s'] == 5
    assert result['kernels_per_step'] == 1.5
    assert result['median_kernel_s'] == 3
    assert result['idle_fraction'] == pytest.approx(0.2)
    assert list(result['kinds']) == ['convolution', 'elementwise or sum']
    convolution = {'per_step': 1, 's_per_step': 3.5, 'of_time': pytest.approx(7 / 9)}
    assert result['kinds']['convolution'] == convolution
    table = accelerator.profile_table(result)
    assert 'idles 20 %' in table.caption
    with pytest.raises(ValueError, match='no kernels'):
        accelerator.summarised([], 2)


def test_the_table_has_the_cases_that_were_measured():
    times = {'step_s': 0.002, 'queued_step_s': 0.001, 'host_s': 0.0005}
    case = {'images_per_s': 64_000, 'share_of_matmul': 0.5, 'planned_bytes': 3e6, **times}
    results = {'a': case | {'of_peak': 0.25}, 'b': {'error': 'x'}, 'c': case | {'of_peak': None}}
    columns = [list(column.cells) for column in accelerator.speed_table(results).columns]
    assert columns[0] == ['a', 'c']
    assert [column[0] for column in columns[1:]] == [
        '64,000', '2.00', '1.00', '0.50', '50', '25.0', '3',
    ]  # fmt: skip
    assert columns[6] == ['25.0', '-']

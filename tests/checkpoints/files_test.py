"""Files: JSON that a person can read."""

import errno
import json
import os

import pytest

from afkd_jax.checkpoints.files import created, write_atomic, write_json


def test_the_row_of_a_matrix_is_one_line(tmp_path):
    value = {
        'name': 'a "b" [c,\n d]',
        'confusion': [[1, 2], [3, 4]],
        'none': {},
        'rows': [{'x': None, 'y': [0.5, True]}, []],
        'shape': (8, 8),
    }
    write_json(tmp_path / 'a.json', value)
    text = (tmp_path / 'a.json').read_text()
    assert json.loads(text) == json.loads(json.dumps(value))
    assert text == (
        '{\n  "name": "a \\"b\\" [c,\\n d]",\n  "confusion": [\n    [1, 2],\n    [3, 4]\n  ],\n'
        '  "none": {},\n  "rows": [\n    {\n      "x": null,\n      "y": [0.5, true]\n    },\n'
        '    []\n  ],\n  "shape": [8, 8]\n}\n'
    )
    for bad in (float('nan'), [float('inf')]):
        with pytest.raises(ValueError, match='not JSON compliant'):
            write_json(tmp_path / 'b.json', {'a': bad})
    assert not (tmp_path / 'b.json').exists()


def test_a_file_that_breaks_off_leaves_nothing(tmp_path):
    def breaks_off():
        with created(tmp_path / 'a.csv') as file:
            file.write('half')
            raise BrokenPipeError  # as a warning does where nobody reads the output

    with pytest.raises(BrokenPipeError):
        breaks_off()
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_the_same_file(tmp_path):
    with created(tmp_path / 'a.csv') as one:
        write_atomic(tmp_path / 'a.csv', b'two')
        one.write('one')
    assert [path.name for path in tmp_path.iterdir()] == ['a.csv']
    assert (tmp_path / 'a.csv').read_text() == 'one'


def test_an_error_names_the_file_and_leaves_nothing_of_it(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    for write in (write_atomic, lambda path, _: created(path).__enter__()):
        with pytest.raises(OSError, match=r"/nowhere/a'$") as found:
            write(tmp_path / 'nowhere' / 'a', b'x')
        assert 'tmp' not in found.value.filename.removeprefix(str(tmp_path))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        write_atomic(tmp_path / 'a', b'x')
    assert not list(tmp_path.iterdir())

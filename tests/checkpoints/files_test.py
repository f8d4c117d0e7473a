"""Files: JSON that a person can read."""

import json

import pytest

from afkd_jax.checkpoints.files import created, write_json


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

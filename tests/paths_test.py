"""Paths that the user names."""

import pathlib

import pytest

from afkd_jax import paths
from afkd_jax.errors import UserError


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert paths.local('--output', '~/a b') == tmp_path / 'a b'
    assert paths.directory('--workdir', '~/x') == tmp_path / 'x'
    assert paths.directory('--workdir', pathlib.Path('runs/a:b')) == pathlib.Path('runs/a:b')


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('gs://bucket/runs', '--workdir: gs://bucket/runs is an address, .*mount'),
        ('s3:/bucket', '--workdir: s3:/bucket is an address'),
        ('~nobody_has_this_name/x', 'home directory that is not known; write out'),
        ('runs/\udcff', 'not valid utf-8; name another'),
        ('link', 'link is a link to nowhere, which does not exist; make that'),
    ],
)
def test_what_cannot_be_used_is_rejected(path, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'link').symlink_to('nowhere')
    with pytest.raises(UserError, match=message):
        paths.directory('--workdir', path)

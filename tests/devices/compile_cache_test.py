"""The persistent compilation cache, on by default."""

import os
import pathlib
import re

import pytest

from afkd_jax.devices import compile_cache

NAME = 'JAX_COMPILATION_CACHE_DIR'


@pytest.fixture
def environment(monkeypatch):
    """The environment; its variable is restored afterwards."""
    monkeypatch.setenv(NAME, '')
    monkeypatch.delenv(NAME)
    return monkeypatch


def test_the_directory_is_in_the_users_cache_one_per_kind_of_cpu(environment, tmp_path):
    environment.setenv('XDG_CACHE_HOME', str(tmp_path))
    compile_cache.enable()
    directory = pathlib.Path(os.environ[NAME])
    assert directory.parent == tmp_path / 'afkd_jax'
    environment.setattr(pathlib.Path, 'read_text', lambda path: 'model name : another\n')
    del os.environ[NAME]
    compile_cache.enable()
    assert pathlib.Path(os.environ[NAME]) != directory


def test_without_a_variable_the_directory_is_in_home(environment, tmp_path):
    environment.delenv('XDG_CACHE_HOME', raising=False)
    environment.setenv('HOME', str(tmp_path))
    compile_cache.enable()
    assert pathlib.Path(os.environ[NAME]).parent == tmp_path / '.cache/afkd_jax'


def test_jaxs_own_variable_wins(environment, tmp_path):
    environment.setenv(NAME, str(tmp_path))
    compile_cache.enable()
    assert os.environ[NAME] == str(tmp_path)


@pytest.mark.parametrize('home', [None, 'a file'])
def test_where_there_can_be_no_cache_a_warning_says_so(home, environment, tmp_path):
    environment.delenv('XDG_CACHE_HOME', raising=False)
    if home:
        (tmp_path / home).touch()
        environment.setenv('HOME', str(tmp_path / home))
    else:  # and no entry in passwd

        def unknown():
            raise RuntimeError('Could not determine home directory.')

        environment.setattr(pathlib.Path, 'home', unknown)
    words = 'warning: compiled programs are not cached .*; name a directory by JAX_COMPILATION'
    assert re.match(words, compile_cache.enable())
    assert NAME not in os.environ

"""The versions that a run's numbers depend on."""

import importlib.metadata
import pathlib
import platform
import subprocess

_PACKAGES = (
    *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'),
    *('scikit-learn', 'tensorflow-datasets'),
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {'python': platform.python_version(), **packages}


def git_commit() -> str | None:
    """Returns the commit of this code, with '+' if files differ from it; None outside git."""
    folder = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        run = ['git', '-C', str(folder), *words]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return None

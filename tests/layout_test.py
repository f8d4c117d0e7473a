"""The layout: imports go one way through the folders, and there is no cycle between modules."""

import ast
import functools
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'afkd_jax'

# A module may import from its own folder and from those before it. The top-level modules come
# first, except the command line and the package itself, which come last.
ORDER = (
    ('errors',),
    ('registry', 'config', 'paths'),
    ('studies',),
    ('command',),
    ('devices',),
    ('models', 'data'),  # neither imports the other
    ('method',),
    ('checkpoints',),
    ('report',),
    ('training',),
    ('tools',),
    ('cli', '__init__'),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# What `import afkd_jax` and a config file load must be quick: no JAX, directly or indirectly.
LIGHT = ('__init__', 'errors', 'registry', 'config', 'paths', 'studies', 'command', 'cli')


@functools.cache
def modules():
    return {
        path.relative_to(PACKAGE).with_suffix('').as_posix(): ast.parse(path.read_text())
        for path in PACKAGE.rglob('*.py')
    }


def imported(tree, top_level_only=False):
    """Yields (module, name or None) of the imports of a module."""
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'relative import'
            yield from ((node.module, alias.name) for alias in node.names)


def own(tree, top_level_only=False):
    """Yields the modules of this package that a module imports, as paths."""
    known = modules().keys()
    for module, name in imported(tree, top_level_only):
        if module.split('.')[0] != PACKAGE.name:
            continue
        path = '/'.join(module.split('.')[1:])
        inner = f'{path}/{name}'.strip('/')
        found = (inner, f'{inner}/__init__', path, f'{path}/__init__', '__init__')
        yield next(one for one in found if one in known)


def folder(module):
    return module.split('/')[0]


def wrong_arrows(trees):
    found = []
    for module, tree in trees.items():
        for other in own(tree):
            here, there = folder(module), folder(other)
            if here != there and RANK[there] >= RANK[here]:
                found.append(f'{module} imports {other}')
    return found


def test_every_module_is_in_the_order():
    assert {folder(module) for module in modules()} == RANK.keys()


def test_imports_go_one_way():
    assert wrong_arrows(modules()) == []


@pytest.mark.parametrize(
    'line',
    [
        'import afkd_jax.training.run',
        'from afkd_jax.method import step',
        'from afkd_jax import cli',
    ],
)
def test_an_import_against_the_order_is_found(line):
    assert wrong_arrows({'devices/mesh': ast.parse(f'def f():\n    {line}')})


def test_there_is_no_cycle():
    graph = {module: set(own(tree)) - {module} for module, tree in modules().items()}
    # A package's __init__ runs before its modules; only what it imports itself counts.
    done, path = set(), []

    def visit(module):
        assert module not in path, ' -> '.join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(graph.get(module, ())):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_no_tensorflow_no_pytorch_no_mocks():
    banned = {'tensorflow', 'torch', 'unittest'}
    for module, tree in modules().items():
        names = {name.split('.')[0] for name, _ in imported(tree)}
        assert not names & banned, module


def test_flags_and_configs_load_no_jax():
    trees = modules()
    todo, seen = [*LIGHT], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        for name, _ in imported(trees[module], top_level_only=True):
            assert name.split('.')[0] not in ('jax', 'flax', 'optax', 'orbax'), module
        todo += [other for other in own(trees[module], True) if other not in seen]

"""The documentation: its commands, links, field names, quotations and words are correct.

A command is a line of a ```bash block, or inline code that starts with `python`. It has a comment
that ends in "not run" or "run by hand", or it is checked here.
"""

import copy
import dataclasses
import itertools
import json
import pathlib
import re
import shlex

import forks
import pytest
from absl import flags
from ml_collections import config_flags

import launch  # noqa: F401, it defines the flags
from afkd_jax import cli, models, registry, studies
from afkd_jax import config as config_lib
from afkd_jax.command import Options
from afkd_jax.config import Config
from afkd_jax.method import presets

ROOT = pathlib.Path(__file__).parent.parent
README, EXAMPLE = ROOT / 'README.md', ROOT / 'examples' / 'own_parts.py'
PAGES = [README, ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *(ROOT / 'docs').glob('*.md')]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(PAGES)}

_BLOCK = re.compile(r'^ *```(\w*)\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
_MARK = re.compile(r'#.*\b(not run|run by hand)$')
_INSTALL = 'python -m pip install -r requirements.txt && python -m pip install --no-deps -e . && '
_SET_UP = 'python -m venv .venv && source .venv/bin/activate'
_BY_CI = (f'{_INSTALL}python launch.py --config configs/digits.py', f'{_INSTALL}python -m pytest')

# House words and riddles; the left column of the list of words in the project's style.
_WORDS = re.compile(
    r'\b(rooms?|told|tells?|(one|a|the) sentence|feeds?|judges?|fools?|discern|whom|alike|kept'
    r'|quaint|in turn|not there)\b',
    re.IGNORECASE,
)


def blocks(page, language):
    """Returns the text of a page's code blocks in a language."""
    return [text for name, text in _BLOCK.findall(TEXTS[page]) if name == language]


def prose(page):
    """Returns a page without its code blocks."""
    return _BLOCK.sub('', TEXTS[page])


def inline_code(page):
    """Returns what stands between single backticks, outside code blocks."""
    return re.findall(r'`([^`\n]+)`', prose(page))


def commands(page):
    """Returns the page's commands, each in one line, with their comments."""
    lines = '\n'.join(blocks(page, 'bash')).replace('\\\n', ' ').splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines + [code for code in inline_code(page) if code.startswith('python')]


def launched(command):
    """Returns the arguments of launch.py in a command; None if it does not run launch.py."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    words = list(words)
    if 'launch.py' not in words:
        return None
    arguments = words[words.index('launch.py') + 1 :]
    ends = [i for i, word in enumerate(arguments) if set(word) <= set(';&|')]
    arguments = arguments[: ends[0]] if ends else arguments
    return [argument.replace('$i', '0') for argument in arguments]


COMMANDS = [(page, command) for page in TEXTS for command in commands(page)]
LAUNCHED = {command: launched(command) for _, command in COMMANDS if launched(command) is not None}


@pytest.fixture
def own_registries(monkeypatch):
    """Forgets afterwards what a config file has registered."""
    for parts in (
        registry.NETWORKS,
        registry.LOGIT_TEACHERS,
        registry.MAP_LOSSES,
        registry.SOURCES,
        registry.TRACKERS,
    ):
        parts.names()  # loads the built-in parts, which stay
        for field in ('_parts', '_patterns'):
            monkeypatch.setattr(parts, field, copy.copy(getattr(parts, field)))


def parsed(arguments):
    """Returns (config, options) as launch.py parses them."""
    values, argv = flags.FlagValues(), ['launch.py', *arguments]
    holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    names = [field.name for field in dataclasses.fields(Options)]
    for name in names:
        values[name] = copy.deepcopy(flags.FLAGS[name])
    rest = values(argv)
    assert rest == ['launch.py'], f'not an option: {rest[1:]}'
    options = Options(**{name: values[name].value for name in names})
    if holder.value is None:  # that of the run in the workdir
        assert cli.MODES[options.mode].reads_run or cli.MODES[options.mode].no_config
        assert options.workdir
        return Config(), options
    return Config.of(studies.split(holder.value)[0]), options


def test_there_are_commands():
    assert len(COMMANDS) > 40
    assert any(command.startswith('for ') for _, command in COMMANDS)
    assert all(len(LAUNCHED[command]) >= 2 for command in LAUNCHED)


def test_every_command_is_checked_or_marked():
    unknown = [
        (page, command)
        for page, command in COMMANDS
        if not _MARK.search(command) and command not in (_SET_UP, *_BY_CI, *LAUNCHED)
    ]
    assert not unknown


@pytest.mark.parametrize('arguments', LAUNCHED.values(), ids=LAUNCHED)
@pytest.mark.usefixtures('own_registries')
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_every_launch_command_is_valid(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, options = parsed(arguments)
    cli._check_options(options)
    presets.named(config.method)
    side = config.data.image_size or 32
    for name in itertools.filterfalse(config_lib.names_weights, config.networks):
        models.build(name, 10, (side, side, 3))


def test_every_script_exists():
    scripts = {
        name for _, command in COMMANDS for name in re.findall(r'-m benchmarks\.(\w+)', command)
    }
    assert scripts
    assert all((ROOT / 'benchmarks' / f'{name}.py').is_file() for name in scripts)


def test_the_readme_is_one_screen_with_the_two_commands_of_ci():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if line.startswith(_INSTALL)] == list(_BY_CI)


def headings(path):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r'^#+ (.+)$', _BLOCK.sub('', path.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', TEXTS)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', TEXTS[page]):
        if link.startswith('https://'):
            continue
        name, _, anchor = link.partition('#')
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize('page', TEXTS)
def test_every_file_and_field_that_is_named_exists(page):
    sections = {name.split('.')[0] for name in config_lib.DEFAULTS if '.' in name}
    old = {'loss.l1_weight'}  # in the list of changes
    for code in inline_code(page):
        if re.fullmatch(r'[\w.]+(/[\w.]+)+\.(py|md|cff)', code):
            assert (ROOT / code).is_file() or (ROOT / page).parent.joinpath(code).is_file(), code
        if match := re.match(r'(?:--)?config\.([a-z][\w.]*)', code):
            assert match[1] in {*config_lib.DEFAULTS, *sections, *old, 'json'}, code


def test_the_fields_that_may_change_are_listed():
    _, section = TEXTS['docs/reliability.md'].split('### Fields that may change\n')
    lines = [line for line in section.split('\n#')[0].splitlines() if line.startswith('- ')]
    names = re.findall(r'`([\w.]+)`', '\n'.join(lines))
    listed = [name for name in names if name in config_lib.DEFAULTS]
    may_change = [name for name in config_lib.DEFAULTS if not config_lib.defines_run(name)]
    assert sorted(listed) == sorted(may_change)


@pytest.mark.parametrize('page', TEXTS)
def test_words_are_plain(page):
    assert not [match[0] for match in _WORDS.finditer(prose(page))]
    assert 'PYTHONPATH=' not in TEXTS[page]
    assert all(
        len(line) <= 120 or line.startswith(('|', 'for')) for line in prose(page).split('\n')
    )


def test_no_figures_stand_on_two_pages():
    rows = []  # (page, its numbers with two decimals or more): one may agree by chance, not two
    for page in TEXTS:
        text = re.sub(r'`[^`\n]*`|arXiv.[\d.]+|\]\([^)]*\)', '', prose(page))
        for line in text.splitlines():
            rows.append((page, set(re.findall(r'(?<![\w.])\d+\.\d\d+(?![\w.]*\d)', line))))
    for page, numbers in rows:
        twice = [other for other, others in rows if other != page and len(numbers & others) > 1]
        assert not twice, (page, twice, numbers)


def test_the_example_is_quoted_whole_and_verbatim():
    source, quotations = EXAMPLE.read_text(), blocks('docs/extending.md', 'python')
    assert all(quotation in source for quotation in quotations)
    _, _, code = source.split('"""', 2)
    quoted = set('\n'.join(quotations).splitlines())
    assert set(code.splitlines()) <= quoted | {''}


def test_the_example_trains(tmp_path):
    code, output, errors = forks.run(
        [f'--config={EXAMPLE.relative_to(ROOT)}', '--config.epochs=1', f'--workdir={tmp_path}/run'],
    )
    assert (code, errors) == (0, ''), output + errors
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert [network['name'] for network in summary['networks']] == ['plain', 'resnet8']
    text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    trained = [line for line in lines if line['kind'] == 'train']
    assert trained
    for name in ('mimicry_kl', 'cosine'):
        assert all(name in network for line in trained for network in line['networks'])
    (ended,) = (line for line in lines if line['kind'] == 'epoch')
    header, row = (tmp_path / 'run' / 'losses.csv').read_text().splitlines()
    assert header == 'epoch,images_per_s,plain,resnet8'
    losses = [network['cross_entropy'] for network in ended['networks']]
    assert row.split(',')[2:] == list(map(str, losses))

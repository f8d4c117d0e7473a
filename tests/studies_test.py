"""The grid of a study."""

import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from afkd_jax import studies
from afkd_jax.config import Config
from afkd_jax.errors import UserError
from afkd_jax.method import presets
from afkd_jax.studies import Study


@pytest.mark.parametrize(
    ('words', 'arms', 'seeds'),
    [
        ('method=vanilla,afd;seed=0:3', ['vanilla', 'afd'], [0, 1, 2]),
        ('method=afd;epochs=2,3;seed=4,7:9', ['afd, epochs=2', 'afd, epochs=3'], [4, 7, 8]),
        (
            "networks=('resnet8','resnet8'),('resnet8','resnet20')",
            ['resnet8+resnet8', 'resnet8+resnet20'],
            [0],
        ),
        ('data.flip=true,False', ['data.flip=True', 'data.flip=False'], [0]),
        (
            'logit.learning_rate=0.1,1e-2',
            ['logit.learning_rate=0.1', 'logit.learning_rate=0.01'],
            [0],
        ),
        ('seed=0:2', ['afd'], [0, 1]),
    ],
)
def test_the_grid_of_a_command_line(words, arms, seeds):
    found = studies.parse(words, Config())
    assert list(found.arms) == arms
    assert list(found.seeds) == seeds
    points = found.points(Config())
    assert [(p.seed, p.arm) for p in points] == [(s, a) for s in seeds for a in arms]
    assert len({p.folder for p in points}) == len(points)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('method', "'method' is not understood"),
        ('method=afd;method=dml', "'method=dml' is not understood"),
        ('lr=1', r'config\.lr: there is no such field'),
        ('logit=1', 'logit is a section'),
        ('epochs=x', r'config\.epochs: must be a whole number'),
        ('epochs=0', r'config\.epochs: must be at least 1'),
        ('seed=1,1', 'seeds must be distinct'),
        ('seed=0:9999999999', 'more than 10000 values'),
        ('epochs=1:201;batch_size=1:101', 'more than 10000 arms'),
        ('method=afd,afd', None),
    ],
)
def test_a_wrong_grid(words, message):
    if message is None:
        assert list(studies.parse(words, Config()).arms) == ['afd']
        return
    with pytest.raises(UserError, match=message):
        studies.parse(words, Config()).points(Config())


def test_wrong_studies():
    for arms, more, words in [
        ({}, {}, 'arms must be distinct, at least one'),
        ({'a b': {}, 'a-b': {}}, {}, 'arms must be distinct'),
        ({'a': {'seed': 1}}, {}, 'seeds are a field of the study'),
        ({'a': {}}, {'baseline': 'b'}, 'there is no arm "b"; arms: a'),
        ({'a': {}}, {'comparisons': [('a', 'c')]}, 'there is no arm "c"'),
        ({'': {}}, {}, "a label must have letters or digits, but one is ''"),
        ({'..': {}}, {}, 'a label must have letters'),
        ({'a\nb': {}}, {}, r"but one is 'a\\nb'"),
        ({3: {}}, {}, 'but one is 3'),
        ({'é' * 101: {}}, {}, 'a label must be shorter: é'),
        ({'a': {}}, {'seeds': 3}, 'seeds must be whole numbers in a list, but are 3'),
        ({'a': {}}, {'seeds': ['0']}, 'seeds must be whole numbers'),
        ({'a': {'nets': 1}}, {}, r'config\.nets: there is no such field'),
    ]:
        with pytest.raises(UserError, match=words):
            Study('x', '', **{'arms': arms, 'seeds': [0], **more}).points(Config())
    with pytest.raises(UserError, match=r'config\.study: must be an afkd_jax\.Study, but is 3'):
        studies.split(ConfigDict({'study': 3}))


@pytest.mark.parametrize(
    'values',
    ['{', '[]', {'colour': 1}, {'seeds': 3}, {'seeds': []}, {'arms': {}}, {'baseline': 'gone'}],
)
def test_a_damaged_study_json(values, tmp_path):
    whole = Study('x', '', {'a': {}, 'b': {}}, [0]).to_json()
    (tmp_path / 'study.json').write_text(json.dumps(whole))
    assert studies.read(tmp_path).to_json() == whole
    text = values if isinstance(values, str) else json.dumps(whole | values)
    (tmp_path / 'study.json').write_text(text)
    with pytest.raises(UserError, match=r'study\.json: cannot be read \(.*\); is it of another'):
        studies.read(tmp_path)


def test_arms_are_compared_with_those_that_differ_in_the_method_alone():
    pair = "('a','a')"
    found = studies.parse(f"epochs=2,3;method=vanilla,afd;networks={pair},('a','b')", Config())
    pairs = found.pairs()
    assert len(pairs) == 4
    for arm, against in pairs:
        mine, theirs = found.arms[arm], found.arms[against]
        assert {name for name in mine if mine[name] != theirs[name]} == {'method'}
        assert (mine['method'], theirs['method']) == ('afd', 'vanilla')
    one = studies.parse('epochs=2,3,4', Config())
    assert one.pairs() == [('epochs=3', 'epochs=2'), ('epochs=4', 'epochs=2')]


STUDIES = sorted(path.stem for path in pathlib.Path('configs/studies').glob('*.py'))


@pytest.mark.parametrize('name', STUDIES)
def test_the_studies_of_configs(name):
    config = importlib.import_module(f'configs.studies.{name}').get_config()
    config, study = studies.split(config)
    points = study.points(Config.of(config))
    assert study.name == name
    assert len(points) == len(study.arms) * len(study.seeds)
    assert len(study.pairs()) >= len(study.arms) / 3
    assert study.question.endswith('?')
    for point in points:
        presets.named(point.config.method)
    studies.merged(study, Study(**json.loads(json.dumps(study.to_json()))))

"""A study: arms that are compared, each trained with several seeds. Imports no JAX.

An arm is a set of config fields under a label; the runs of an arm differ in the seed alone, and the
runs of one seed in the arm alone, so that differences between arms are paired by seed.
"""

import ast
import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.config import Config
from afkd_jax.errors import UserError

NAME = 'study.json'
_LONGEST = 200  # bytes of the name of a directory; most file systems end at 255
_MOST = 10_000  # values of a range, and arms: more are a slip


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a study; `folder` is relative to the study's directory."""

    arm: str
    seed: int
    config: Config

    @property
    def folder(self) -> pathlib.PurePath:
        """Where the run is, in the study's directory."""
        return pathlib.PurePath(slug(self.arm), f'seed={self.seed}')


@dataclasses.dataclass(frozen=True)
class Study:
    """The definition of a study, in a config file as `config.study`.

    Attributes:
      name: of its default directory, runs/NAME.
      question: what it asks, in a sentence; '' of a study from the command line.
      arms: label -> config fields (dotted names) in which the arm differs from the config.
      seeds: of every arm.
      baseline: the arm that all others are compared with, and relative to which costs are given.
        '' is the first arm, where there are no `comparisons`.
      comparisons: more pairs of arms to compare, (arm, against).
      paper: what the paper reports for it, in a sentence.
    """

    name: str
    question: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    baseline: str = ''
    comparisons: Sequence[tuple[str, str]] = ()
    paper: str = ''

    def points(self, config: Config) -> list[Point]:
        """Returns the runs, the first seed of every arm first, each with a checked config.

        Raises:
          UserError: a field is unknown or wrong, or labels or seeds are not distinct.
        """
        self.check()
        for fields in self.arms.values():
            config_lib.check_names(fields)
            if 'seed' in fields:
                raise UserError('study: seeds are a field of the study, not of an arm')
        return [
            Point(arm, seed, config.replace(**fields, seed=seed))
            for seed in self.seeds
            for arm, fields in self.arms.items()
        ]

    def check(self) -> None:
        """Raises a UserError if labels or seeds are wrong or not distinct, or an arm is unknown."""
        if not (isinstance(self.seeds, Sequence) and all(type(seed) is int for seed in self.seeds)):
            raise UserError(f'study: seeds must be whole numbers in a list, but are {self.seeds!r}')
        for arm in self.arms:
            if not (isinstance(arm, str) and arm.isprintable() and re.search(r'\w', arm)):
                raise UserError(f'study: a label must have letters or digits, but one is {arm!r}')
            if len(slug(arm).encode()) > _LONGEST:
                raise UserError(f'study: a label must be shorter: {arm}')
        folders = [slug(arm) for arm in self.arms]
        for what, values in (('arms', folders), ('seeds', list(self.seeds))):
            if not values or len(set(values)) < len(values):
                raise UserError(f'study: {what} must be distinct, at least one, but are {values}')
        for arm in [self.reference, *itertools.chain(*self.comparisons)]:
            if arm not in self.arms:
                raise UserError(f'study: there is no arm "{arm}"; arms: {", ".join(self.arms)}')

    def pairs(self) -> list[tuple[str, str]]:
        """Returns the comparisons, (arm, against)."""
        more = [(arm, against) for arm, against in self.comparisons]
        if more and not self.baseline:
            return more
        pairs = [(arm, self.reference) for arm in self.arms if arm != self.reference]
        return list(dict.fromkeys(pairs + more))

    @property
    def reference(self) -> str:
        """The baseline, or the first arm."""
        return self.baseline or next(iter(self.arms))

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        values = dataclasses.asdict(self) | {'seeds': list(self.seeds)}  # also of a range
        return json.loads(json.dumps(values))


def split(config: ConfigDict) -> tuple[ConfigDict, Study | None]:
    """Returns the config of a config file without its study, and the study if it defines one.

    Raises:
      UserError: config.study is no Study.
    """
    if 'study' not in config:
        return config, None
    rest = config.copy_and_resolve_references()
    with rest.unlocked():
        del rest['study']
    if not isinstance(config.study, Study):
        raise UserError(f'config.study: must be an afkd_jax.Study, but is {config.study!r}')
    return rest, config.study


def slug(label: str) -> str:
    """Returns a label as the name of a directory."""
    return re.sub(r'[^\w.=+,-]+', '-', label).strip('-')


def parse(text: str, config: Config) -> Study:
    """Returns the study of --study, e.g. 'method=vanilla,afd;seed=0:10;epochs=20'.

    Every axis is a config field with its values, separated by commas; a:b stands for the whole
    numbers a .. b - 1, and a tuple is written as in Python. Arms are all combinations. With several
    axes, those are compared that differ in the method, or else in the first axis, alone.

    Raises:
      UserError: it is not understood.
    """
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(';'))):
        name, _, values = part.partition('=')
        name = name.strip()
        if not values.strip() or name in axes:
            raise UserError(
                f"--study: '{part}' is not understood; give each field once, as in "
                "'method=vanilla,dml,afd;seed=0:10'"
            )
        config_lib.check_names([name])
        default = config_lib.DEFAULTS.get(name)
        if default is None:
            raise UserError(f'--study: {name} is a section of the config; name one of its fields')
        axes[name] = [
            value for word in _split(values) for value in _values(name, word.strip(), default)
        ]
    seeds = axes.pop('seed', [config.seed])
    if math.prod(map(len, axes.values())) > _MOST:
        raise UserError(f'--study: {text!r} are more than {_MOST} arms')
    arms = {
        label(fields) or config.method: fields
        for values in itertools.product(*axes.values())
        for fields in [dict(zip(axes, values, strict=True))]
    }
    return Study('study', '', arms, seeds, comparisons=_comparisons(arms) if len(axes) > 1 else ())


def _comparisons(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns each arm against that with the first value of the method, or of the first field."""
    first = next(iter(arms.values()))
    axis = 'method' if 'method' in first else next(iter(first))
    against = {arm: label({**fields, axis: first[axis]}) for arm, fields in arms.items()}
    return [(arm, other) for arm, other in against.items() if arm != other]


def _split(values: str) -> list[str]:
    """Returns the values between commas that are not inside parentheses."""
    return re.findall(r'(?:[^,(]|\([^)]*\))+', values)


def _values(name: str, word: str, default: Any) -> Iterator[Any]:
    if isinstance(default, str):
        yield word
        return
    if type(default) is int and (match := re.fullmatch(r'(\d+):(\d+)', word)):
        if int(match[2]) - int(match[1]) > _MOST:
            raise UserError(f'--study: {name}={word} are more than {_MOST} values')
        yield from range(int(match[1]), int(match[2]))
        return
    try:
        value = ast.literal_eval(word.capitalize() if isinstance(default, bool) else word)
    except (ValueError, SyntaxError):
        raise UserError(f'--study: {config_lib.wrong_type(name, word)}') from None
    yield tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value


def planned(
    words: str | None, defined: Study | None, config: Config, workdir: pathlib.Path
) -> Study:
    """Returns the study to be run, with the arms and seeds of study.json.

    Args:
      words: of --study.
      defined: by the config file; --study replaces it.
      config: from which the arms differ.
      workdir: of the study.

    Raises:
      UserError: there is none, or one of its runs has a wrong config.
    """
    if not (study := parse(words, config) if words else defined):
        raise UserError(
            "--study: name the fields and their values, as in 'method=vanilla,afd;seed=0:10', or "
            'a config file that defines a study, as configs/studies/digits.py'
        )
    study = dataclasses.replace(study, name=workdir.name) if words else study
    study.check()
    study = merged(study, read(workdir))
    study.points(config)
    return study


def label(fields: Mapping[str, Any]) -> str:
    """Returns 'afd' of a method, 'afd, epochs=3' with another field."""

    def word(name: str, value: Any) -> str:
        text = '+'.join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        return text if name in ('method', 'networks') else f'{name}={text}'

    return ', '.join(word(name, value) for name, value in fields.items())


def merged(new: Study, old: Study | None) -> Study:
    """Returns the study with the arms and seeds of study.json that are not in it.

    Args:
      new: to be run.
      old: of study.json; None if there is none.

    Raises:
      UserError: an arm has the label of an old one but other fields.
    """
    if old is None:
        return new
    mine, theirs = new.to_json(), old.to_json()
    for arm, fields in mine['arms'].items():
        if theirs['arms'].get(arm, fields) != fields:
            raise UserError(
                f'study: the arm "{arm}" is in {NAME} with other fields '
                f'({theirs["arms"][arm]}, now {fields}); give it another label, or name another '
                '--workdir'
            )
    return dataclasses.replace(
        new,
        arms={**theirs['arms'], **mine['arms']},
        seeds=sorted({*old.seeds, *new.seeds}),
        question=new.question or old.question,
        baseline=new.baseline or old.baseline,
        comparisons=list(
            dict.fromkeys((arm, against) for arm, against in (*old.comparisons, *new.comparisons))
        ),
        paper=new.paper or old.paper,
    )


def read(workdir: pathlib.Path) -> Study | None:
    """Returns the study of a directory; None if it holds none.

    Raises:
      UserError: study.json cannot be read.
    """
    path = workdir / NAME
    try:
        study = Study(**json.loads(path.read_text()))
        study.check()
        return study
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f'{path}: cannot be read ({error}); is it of another version?') from None

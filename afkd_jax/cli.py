"""The command line: flags -> mode, error -> one-line message and exit code.

JAX is imported by the modes only, so that flags and configs are checked at once.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import pathlib
import re
import select
import sys
import threading
import traceback
from types import ModuleType
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from afkd_jax import config as config_lib
from afkd_jax import paths, studies
from afkd_jax.command import Command, Options
from afkd_jax.config import Config
from afkd_jax.devices import compile_cache, environment
from afkd_jax.devices.signals import Cancel, Interrupt
from afkd_jax.errors import (
    EXIT_BUG,
    EXIT_KILLED,
    EXIT_RESUMABLE,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    UserError,
    first_line,
)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode of the command line.

    Attributes:
      module: has the entry function main(command, interrupt) -> exit code.
      options: that only this mode, and those that name them too, accept.
      distributed: whether several processes may run it together.
      cached: whether it uses the persistent compilation cache.
      reads_run: whether it takes the config of the run in --workdir where --config is missing.
      no_config: whether it needs no config, but --workdir.
    """

    module: str
    options: tuple[str, ...] = ()
    distributed: bool = False
    cached: bool = False
    reads_run: bool = False
    no_config: bool = False


_RUN = ('step', 'coordinator_address', 'num_processes', 'process_id')
_MODEL = ('step', 'network', 'output')
MODES = {
    'train': Mode('afkd_jax.training.loop', (*_RUN, 'extend'), distributed=True, cached=True),
    'study': Mode('afkd_jax.tools.study', ('study', 'jobs', 'dry_run'), cached=True),
    'report': Mode('afkd_jax.tools.report', no_config=True),
    'eval': Mode('afkd_jax.training.evaluate', _RUN, distributed=True, cached=True, reads_run=True),
    'predict': Mode('afkd_jax.tools.predict', (*_MODEL, 'images'), cached=True, reads_run=True),
    'export': Mode('afkd_jax.tools.export', (*_MODEL, 'format'), reads_run=True),
    'describe': Mode('afkd_jax.tools.describe', reads_run=True),
    'plan': Mode('afkd_jax.tools.plan', ('topology', 'largest_batch'), cached=True),
    'benchmark': Mode('afkd_jax.tools.benchmark', ('sweep',)),
    'prepare': Mode('afkd_jax.tools.prepare', ('verify',)),
}

_PATH = re.compile(r"""[^'",:=()]*/[^'",:=()]*""")  # in the value of a field
_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]+)')


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, of which --config also runs the config file; exits with a message."""
    _prepare_outputs()
    try:
        config_lib.check_names(filter(None, map(_field, argv[1:])))
        try:
            try:
                rest = flags.FLAGS(_last_values(argv))
            finally:
                sys.stdout.flush()  # what --help prints
        except (Exception, SystemExit) as error:  # a config file is code and may raise anything
            if isinstance(error, SystemExit) and not _of_config_file(error):
                raise  # after --help
            if _unread(error):
                sys.exit(EXIT_UNREAD)
            raise UserError(_flag_message(error)) from error
        if not flags.FLAGS['verbosity'].present:
            # Orbax logs every step of every save, and tracebacks of what it then raises.
            logging.set_verbosity(logging.FATAL)
        if len(rest) > 1:
            if '--' in argv:
                raise UserError(f'{rest[1]}: not read, as it comes after a --; leave out the --')
            raise UserError(f'{rest[1]}: not understood; every option starts with --')
        return rest
    except UserError as error:
        if '--debug' in argv:
            raise
        print(f'error: {_escaped(str(error))}', file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _prepare_outputs() -> None:
    """Lets every character be printed: what the encoding of an output lacks is escaped."""
    for name in ('stdout', 'stderr'):
        output: Any = getattr(sys, name)
        if output is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 - until the end
        else:
            output.reconfigure(errors='backslashreplace')


def _field(argument: str) -> str | None:
    """Returns the field that an argument assigns; None if it assigns none."""
    match = _OVERRIDE.match(argument)
    return match and match[1]


def _last_values(argv: list[str]) -> list[str]:
    """Returns the arguments without values of fields that are assigned again.

    The last value is valid, as for every flag; absl would join those of a tuple.
    """
    last = {name: i for i, argument in enumerate(argv) if (name := _field(argument))}
    result, i = [], 0
    while i < len(argv):
        name, start = _field(argv[i]), i
        apart = name and '=' not in argv[i] and type(config_lib.DEFAULTS.get(name)) is not bool
        i += 2 if apart else 1  # '--config.seed 1'
        if name is None or last[name] == start:
            result += argv[start:i]
    return result


def _flag_message(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if match := re.match(r'flag --config\.([\w.]+)=(.*?): ', lines[0]):
        return config_lib.wrong_type(match[1], match[2])
    if isinstance(error, flags.Error):
        # A config file's own failure comes as a whole traceback; the last line names it.
        words = ' '.join(lines[-1].split())
        if "Unknown command line flag 'config." in words:
            return '--config: fields are assigned to a config file; name it too, by --config FILE'
        failed = '--config: the file cannot be loaded: ' if 'Traceback' in str(error) else ''
        return f'{failed}{words}; see python launch.py --help'
    words = ' '.join(' '.join(lines).split())
    if isinstance(error, AttributeError) and words.startswith('FrozenConfigDict'):
        return '--config: get_config() returns a FrozenConfigDict; return a ConfigDict of it'
    if isinstance(error, UserError):  # e.g. a name that is registered twice
        return words
    return f'--config: the file cannot be loaded ({type(error).__name__}: {words})'


def _of_config_file(error: BaseException) -> bool:
    """Returns whether an error is one of the config file's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename == config_flags.config_flags.__file__ for frame in frames)


def _escaped(message: str) -> str:
    """Returns a message as one line, whatever user input it repeats."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def main(config_flag: flags.FlagHolder, options: Options) -> int:
    """Runs a mode and returns the exit code; every error becomes a one-line message.

    Args:
      config_flag: the holder of --config.
      options: the other flags.
    """
    if not options.debug:
        _hide_tracebacks()
    try:
        code = _run(config_flag, options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if _unread(error):
            _end_others('the output is no longer read', EXIT_UNREAD)
            return EXIT_UNREAD
        message, code = _message(error)
        with contextlib.suppress(BrokenPipeError):
            if options.debug:
                traceback.print_exc()
            else:
                print(f'error: {_escaped(message)}', file=sys.stderr, flush=True)
        _end_others(_escaped(message), code)
        return code


def _run(config_flag: flags.FlagHolder, options: Options) -> int:
    mode, command = MODES[options.mode], _command(config_flag, options)
    _check_options(options)
    environment.check()
    if options.topology:  # the devices need not be attached; those that are stay free
        _set_platform('cpu')
    warning = compile_cache.enable() if mode.cached else None
    from afkd_jax.report.console import console, keep_stdout_for_json, log, working

    if options.json:
        keep_stdout_for_json()
    if warning:
        log(warning)
    # In training a signal is a request from here on, even while JAX is imported.
    with Interrupt() if options.mode == 'train' else Cancel() as interrupt:
        if not mode.distributed:
            with working('starting'):
                module, command = importlib.import_module(mode.module), _resolved(command)
            return module.main(command, None)
        with working('starting'):
            from afkd_jax.devices import mesh, processes

            module = importlib.import_module(mode.module)
        processes.start(options.coordinator_address, options.num_processes, options.process_id)
        command = processes.raise_on_all(lambda: _resolved(command))
        processes.assert_equal(
            {'--mode': options.mode, '--step': options.step, '--extend': options.extend}
            | config_lib.command_fields(command.config)
        )
        # JAX exchanges the devices of all processes here, so they must do it together.
        processes.raise_on_all(mesh.available)
        console.quiet = not processes.is_primary()
        console.needs_reader = options.mode != 'train'
        code = module.main(command, interrupt)
        processes.shutdown()
    return code


def _command(config_flag: flags.FlagHolder, options: Options) -> Command:
    config = config_flag.value
    if MODES[options.mode].no_config:
        if not options.workdir:
            raise UserError(f'--workdir: --mode {options.mode} needs the directory to read')
        return Command(Config(), options, paths.directory('--workdir', options.workdir))
    if config is None and not config_flag.present:
        if options.workdir and MODES[options.mode].reads_run:
            from afkd_jax.checkpoints import artefact

            workdir = paths.directory('--workdir', options.workdir)
            return Command(artefact.read_config(workdir), options, workdir)
        raise UserError(
            '--config: name a config file, e.g. --config configs/digits.py'
            + (', or the directory of a run by --workdir' if MODES[options.mode].reads_run else '')
        )
    flag = flags.FLAGS['config']
    file, _, argument = config_flags.get_config_filename(flag).partition(':')
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f'--config: there is no file {path}; see configs/ for those there are')
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'--config: get_config() must return a ConfigDict, not a {type(config).__name__}'
        )
    config, study = studies.split(config)
    overrides = {
        name: value
        for name, value in config_flags.get_override_values(flag).items()
        if not _equal(value, flags.FLAGS[f'config.{name}'].default)  # the file's own value
    }
    folder = 'runs/studies' if options.mode == 'study' else 'runs'
    workdir = options.workdir or f'{folder}/{_run_name(path.stem, argument, overrides)}'
    command = Command(Config.of(config), options, paths.directory('--workdir', workdir), study)
    if options.mode == 'study':
        study = studies.planned(options.study, study, command.config, command.workdir)
    return dataclasses.replace(command, study=study)


def _resolved(command: Command) -> Command:
    """Returns the command with the architectures of networks that are named by their weights."""
    if command.options.mode == 'study' or not any(  # a study does so for each run
        map(config_lib.names_weights, command.config.networks)
    ):
        return command  # the usual case imports nothing
    from afkd_jax.checkpoints import starts

    config = starts.resolved(command.config, command.workdir)
    return dataclasses.replace(command, config=config)


def _check_options(options: Options) -> None:
    """Rejects options that the mode does not use."""
    for name in sorted({name for mode in MODES.values() for name in mode.options}):
        modes = [name_of for name_of, mode in MODES.items() if name in mode.options]
        value = getattr(options, name)
        if value and options.mode not in modes:
            raise UserError(
                f'--{name}: {value} is only for --mode {" or ".join(modes)}, '
                f'not for --mode {options.mode}'
            )


def _equal(value: Any, other: Any) -> bool:
    return tuple(value) == tuple(other) if isinstance(value, tuple) else value == other


def _run_name(config: str, argument: str, overrides: dict[str, Any]) -> str:
    """Returns the default name of a run: of its config, the config's argument and the overrides.

    So different experiments do not share a workdir, and the same command finds its own:
    'cifar100-resnet32-wrn-16-4-method=dml' of configs/cifar100.py:resnet32,wrn-16-4. Fields that
    may change when a run resumes (config.defines_run) are not part of it. Of a long path only the
    last component is, and a hash of the whole.
    """

    def short(path: re.Match) -> str:
        whole = path[0].rstrip('/')
        return whole if len(whole) <= 20 else f'{whole.rsplit("/", 1)[-1]}-{_hash(whole, 6)}'

    fields = sorted(filter(config_lib.defines_run, overrides))
    words = [config, argument, *(f'{name}={overrides[name]}' for name in fields)]
    words = [_PATH.sub(short, word) for word in words]
    name = re.sub(r'[^\w.=]+', '-', '-'.join(words)).replace('=-', '=').strip('-')
    if len(name) > 200:  # most file systems end at 255
        name = f'{name[:180]}-{_hash(name, 12)}'
    return name


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _set_platform(platform: str) -> None:
    os.environ['JAX_PLATFORMS'] = platform
    if 'jax' in sys.modules:  # the config file has imported it
        sys.modules['jax'].config.update('jax_platforms', platform)


def _hide_tracebacks() -> None:
    """Hides tracebacks that threads and callbacks of libraries print themselves.

    TensorStore prints hundreds on a full disk. The error is raised where the work is waited for.
    """

    def unraisable(hint: Any) -> None:
        if hint.exc_type and issubclass(hint.exc_type, KeyboardInterrupt):
            _interrupted()  # raised inside a callback, after which Python would continue

    sys.excepthook = threading.excepthook = lambda *_: None
    sys.unraisablehook = unraisable


def _interrupted() -> NoReturn:
    print('error: interrupted; what was written before is intact', file=sys.stderr, flush=True)
    # Not sys.exit: threads of the runtime may still use what the interpreter would tear down.
    os._exit(EXIT_KILLED)


def _unread(error: BaseException) -> bool:
    """Returns whether an error means that nobody reads the output, which is discarded from then on.

    A broken pipe to another process, as one that decodes images, is another error.
    """
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    gone = [output for output, event in poll.poll(0) if event & select.POLLERR]
    for output in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(gone)


def _message(error: Exception) -> tuple[str, int]:
    """Returns the message and the exit code of an error."""
    if isinstance(error, UserError):
        return str(error), EXIT_USER_ERROR
    words = first_line(error) if str(error).strip() else ''
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in words:
        return (
            f'memory is exhausted ({words or "of the host"}); lower config.batch_size or '
            'config.eval_batch_size, in a new --workdir, or use more devices',
            EXIT_USER_ERROR,
        )
    if type(error).__name__ == 'JaxRuntimeError' and (processes := _processes()):
        return f'{processes.LOST} ({words})', EXIT_RESUMABLE
    if isinstance(error, UnicodeEncodeError):
        return f'{error.object} is not valid {error.encoding}; use a UTF-8 locale', EXIT_USER_ERROR
    if isinstance(error, OSError):
        where = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        where = where or 'the disk'
        return f'{where}: {error.strerror or error}; mend that, then run this again', (
            EXIT_USER_ERROR
        )
    return (
        f'a fault of this program ({type(error).__name__}: {words}); run the same command with '
        '--debug for a traceback to report',
        EXIT_BUG,
    )


def _processes() -> ModuleType | None:
    """Returns the module of processes, if there are several."""
    processes = sys.modules.get('afkd_jax.devices.processes')
    return processes if processes and processes.count() > 1 else None


def _end_others(message: str, code: int) -> None:
    """Ends the other processes, if there are any, with this message, and then this one."""
    if processes := _processes():
        sys.stdout.flush()
        processes.announce_end(message, code)
        os._exit(code)  # at a normal exit the runtime would wait for the others

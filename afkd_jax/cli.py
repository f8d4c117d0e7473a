"""From the command line to a mode, and from an error to one sentence and an exit code."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
import traceback
from types import ModuleType
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from afkd_jax import config as config_lib
from afkd_jax.devices import compile_cache
from afkd_jax.devices.signals import KILLED, Interrupt
from afkd_jax.errors import UserError

# Exit codes: finished; an input to be corrected, or a run that has diverged; a fault of this
# program; stopped by a signal with a checkpoint, so that the same command continues. KILLED:
# interrupted outside training, or for the second time.
DONE, WRONG, FAULT, CONTINUE = 0, 1, 70, 75

_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]+)')


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, of which --config also runs the config file; ends with one sentence."""
    try:
        names = [match[1] for argument in argv[1:] if (match := _OVERRIDE.match(argument))]
        config_lib.check_names(names)
        for name in names:
            if names.count(name) > 1:  # a tuple's values would be joined
                raise UserError(f'--config.{name}: given {names.count(name)} times; give it once')
        try:
            rest = flags.FLAGS(argv)
        except Exception as error:  # a config file is code and may raise anything
            raise UserError(_flag_sentence(error)) from error
        if not flags.FLAGS['verbosity'].present:
            # Orbax reports every step of every save, and tracebacks of what it then raises.
            logging.set_verbosity(logging.FATAL)
        if len(rest) > 1:
            raise UserError(f'{rest[1]}: not understood; every option starts with --')
        return rest
    except UserError as error:
        if '--debug' in argv:
            raise
        print(f'error: {_in_one_line(str(error))}', file=sys.stderr)
        sys.exit(WRONG)


def _flag_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if match := re.match(r'flag --config\.([\w.]+)=(.*?): ', lines[0]):
        return config_lib.wrong_type(match[1], match[2])
    if isinstance(error, flags.Error):
        # A config file's own failure comes as a whole traceback: its last line says what failed.
        words = ' '.join(lines[-1].split())
        failed = '--config: the file cannot be loaded: ' if 'Traceback' in str(error) else ''
        return f'{failed}{words}; see python launch.py --help'
    words = ' '.join(' '.join(lines).split())
    return f'--config: the file cannot be loaded ({type(error).__name__}: {words})'


def _in_one_line(words: str) -> str:
    """Returns a sentence as one line, whatever the user's own words that it repeats hold."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands on the command line beside the config.

    Attributes:
      mode: 'train', 'eval', 'describe', 'plan', 'benchmark' or 'prepare'.
      workdir: None for runs/<a name made of the config, its argument and the overrides>.
      step: which checkpoint 'eval' takes, or 'train' goes on from; None for the newest.
      coordinator_address: HOST:PORT of process 0; see processes.start.
      num_processes: that run together.
      process_id: which of them this is.
      topology: for 'plan': a TPU's name; None for the devices at hand.
      largest_batch: for 'plan': whether to search it.
      sweep: for 'benchmark': what is varied; see sweep.configs.
      debug: let errors through, with their tracebacks.
    """

    mode: str
    workdir: str | None
    step: int | None
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    topology: str | None
    largest_batch: bool
    sweep: str | None
    debug: bool

    def check(self) -> None:
        """Refuses what the mode has no use for."""
        given = {name for name, value in vars(self).items() if value not in (None, False)}
        for names, modes in (
            (('topology', 'largest_batch'), ('plan',)),
            (('sweep',), ('benchmark',)),
            (('step', 'coordinator_address', 'num_processes', 'process_id'), ('train', 'eval')),
        ):
            for name in names:
                if name in given and self.mode not in modes:
                    raise UserError(
                        f'--{name}: {getattr(self, name)} is only for --mode {" or ".join(modes)}, '
                        f'not for --mode {self.mode}'
                    )


def main(config_flag: flags.FlagHolder, options: Options) -> int:
    """Runs a mode and returns the exit code; whatever goes wrong becomes one sentence.

    Args:
      config_flag: the holder of --config.
      options: the rest.
    """
    if not options.debug:
        _hush()
    try:
        return _run(config_flag, options)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        sentence, code = _sentence(error)
        if options.debug:
            traceback.print_exc()
        else:
            print(f'error: {_in_one_line(sentence)}', file=sys.stderr, flush=True)
        _tell_others(_in_one_line(sentence), code)
        return code


def _hush() -> None:
    """Lets threads and callbacks of libraries print no traceback of their own.

    TensorStore's do, by the hundred, of a disk that is full. What matters of it is raised where the
    work is waited for, and becomes a sentence there.
    """

    def unraisable(hint: Any) -> None:
        if hint.exc_type and issubclass(hint.exc_type, KeyboardInterrupt):
            _interrupted()  # it came inside a callback, which Python would go on after

    sys.excepthook = threading.excepthook = lambda *_: None
    sys.unraisablehook = unraisable


def _interrupted() -> None:
    print('error: interrupted; what was written before is intact', file=sys.stderr, flush=True)
    # Not sys.exit: threads of the runtime may still hold what the interpreter would tear down.
    os._exit(KILLED)


def _sentence(error: Exception) -> tuple[str, int]:
    """Returns what a user is told of an error, and the exit code."""
    if isinstance(error, UserError):
        return str(error), WRONG
    words = ' '.join((str(error).strip().splitlines() or [''])[0].split())
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in words:
        return (
            f'memory is exhausted ({words or "of the host"}); lower config.batch_size or '
            'config.eval_batch_size, in a new --workdir, or use more devices',
            WRONG,
        )
    if type(error).__name__ == 'JaxRuntimeError' and (processes := _others()):
        return f'{processes.LOST} ({words})', CONTINUE
    if isinstance(error, OSError):
        where = error.filename or 'the disk'
        return f'{where}: {error.strerror or error}; mend that, then run this again', WRONG
    return (
        f'a fault of this program ({type(error).__name__}: {words}); run the same command with '
        '--debug for a traceback to report',
        FAULT,
    )


def _others() -> ModuleType | None:
    """Returns the module through which other processes are told, if there are any."""
    processes = sys.modules.get('afkd_jax.devices.processes')
    return processes if processes and processes.count() > 1 else None


def _tell_others(words: str, code: int) -> None:
    """Tells other processes, if there are any, why this one ends, and ends it."""
    if processes := _others():
        sys.stdout.flush()
        processes.end(words, code)
        os._exit(code)  # at a proper exit the runtime would wait for the others


def _run(config_flag: flags.FlagHolder, options: Options) -> int:
    config = config_flag.value
    if config is None and not config_flag.present:
        raise UserError('--config: name a config file, e.g. --config configs/digits.py')
    file, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f'--config: there is no file {path}; see configs/ for those there are')
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'--config: get_config() must return a ConfigDict, not a {type(config).__name__}'
        )
    config_lib.validate(config)
    options.check()
    if options.mode == 'describe':
        return _describe(config)
    if options.mode == 'prepare':
        return _prepare(config)
    if options.mode == 'benchmark':
        return _benchmark(config, options.sweep)
    compile_cache.keep()
    if options.mode == 'plan':
        return _plan(config, options)
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    name = options.workdir or f'runs/{_run_name(path.stem, argument, overrides)}'
    train = options.mode == 'train'
    # From here on a signal asks, also while JAX is imported.
    with Interrupt() if train else contextlib.nullcontext() as interrupt:
        from afkd_jax.devices import mesh as parallel
        from afkd_jax.devices import processes
        from afkd_jax.report import metrics_log as writer

        where = options.coordinator_address, options.num_processes, options.process_id
        processes.start(*where, unmet=WRONG, lost=CONTINUE)
        processes.same(
            {'--mode': options.mode, '--step': options.step} | config_lib.of_the_command(config)
        )
        processes.together(parallel.available)  # they tell each other what each has: at one time
        writer.console.quiet = not processes.leads()
        arguments = config, pathlib.Path(name), options.step
        code = _train(*arguments, interrupt) if train else _eval(*arguments)
        processes.leave()
    return code


def _run_name(config: str, argument: str, overrides: dict[str, Any]) -> str:
    """Returns the default name of a run: of its config, the config's argument and the overrides.

    So the experiments that differ do not meet in one workdir, and the same command finds its own:
    'cifar100-resnet32-wrn-16-4-method=dml' of configs/cifar100.py:resnet32,wrn-16-4. What a run
    may go on with (config.makes_the_run) is not in it.
    """
    fields = sorted(filter(config_lib.makes_the_run, overrides))
    words = [config, argument, *(f'{name}={overrides[name]}' for name in fields)]
    name = re.sub(r'[^\w.=]+', '-', '-'.join(words)).replace('=-', '=').strip('-')
    if len(name) > 200:  # most file systems end at 255
        name = f'{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}'
    return name


def _train(
    config: ConfigDict, workdir: pathlib.Path, step: int | None, interrupt: Interrupt
) -> int:
    from afkd_jax.report import metrics_log as writer
    from afkd_jax.report import summary
    from afkd_jax.training import loop as train

    result = train.train(config, workdir, step, interrupt)
    if result is None:
        return CONTINUE
    writer.console.print(*summary.tables(result))
    writer.console.print(
        f'{result["steps"]} steps, {result["images_per_s"] or 0:.0f} img/s, compiled in '
        f'{result["compile_s"]:.1f} s, {result["wall_s"]:.1f} s in all, {result["device"]}; '
        f'fingerprint {result["fingerprint"][:16]}; written to {workdir}'
    )
    return DONE


def _eval(config: ConfigDict, workdir: pathlib.Path, step: int | None) -> int:
    from afkd_jax.devices import processes
    from afkd_jax.report import metrics_log as writer
    from afkd_jax.report import summary
    from afkd_jax.training import evaluate

    result = evaluate.evaluate(config, workdir, step)
    writer.console.print(*summary.tables(result))
    if processes.leads():
        print(json.dumps(result))
    return DONE


def _describe(config: ConfigDict) -> int:
    from afkd_jax.tools import describe

    facts = describe.describe(config)
    print(describe.text(facts))
    print(json.dumps(facts))
    return DONE


def _prepare(config: ConfigDict) -> int:
    from afkd_jax.tools import prepare

    result = prepare.prepare(config, lambda words: print(words, flush=True))
    print(
        f'{config.dataset}: {result["train"]:,} images to train on, {result["validation"]:,} held '
        f'out, {result["test"]:,} to test, {result["num_classes"]:,} classes'
    )
    print(json.dumps(result))
    return DONE


def _plan(config: ConfigDict, options: Options) -> int:
    if options.topology:
        os.environ['JAX_PLATFORMS'] = 'cpu'  # the TPU need not be there; one that is stays free
    from afkd_jax.report import metrics_log as writer
    from afkd_jax.tools import plan

    tell = writer.console.print
    result = plan.plan(config, options.topology, options.largest_batch, tell)
    tell(*plan.tables(result), sep='\n')
    print(json.dumps(result))
    return DONE


def _benchmark(config: ConfigDict, sweep: str | None) -> int:
    from afkd_jax.report import metrics_log as writer
    from afkd_jax.tools import benchmark
    from afkd_jax.tools import sweep as sweeps

    file = pathlib.Path('runs/benchmark.csv')
    for one in sweeps.configs(config, sweep) if sweep else (config,):
        result = benchmark.benchmark(one)
        writer.console.print(benchmark.table(result))
        if sweep:
            sweeps.append(result, file)
            writer.console.print(f'appended to {file}')
        print(json.dumps(result), flush=True)
    return DONE

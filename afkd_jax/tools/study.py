"""--mode study: trains the runs of a study, alone or together with other workers.

A worker is a process that takes the next run that nobody holds, until none is left. Any number of
workers, on one or many machines, may share the directory of a study; the lock of each run's workdir
keeps them apart.
"""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from afkd_jax import studies
from afkd_jax.checkpoints import files, lock, starts
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.workdir import FAILED, State, finished_summary, state_of
from afkd_jax.command import Command
from afkd_jax.config import Config
from afkd_jax.data import dataset
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, UserError, typed_line
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.report.console import log, print_json, redirected, working
from afkd_jax.report.tables import table
from afkd_jax.studies import Point, Study
from afkd_jax.tools import benchmark, plan, report
from afkd_jax.training import loop

_UNHELD = State.WAITING, State.STOPPED
_WORKER = 'AFKD_JAX_STUDY_WORKER'  # in the environment of the processes of --jobs


@dataclasses.dataclass(frozen=True)
class Worker:
    """Trains runs of a study that nobody else trains.

    Attributes:
      points: of the study.
      workdir: of the study.
      started: time.time(); runs that failed before are tried again.
      interrupt: entered.
    """

    points: Sequence[Point]
    workdir: pathlib.Path
    started: float
    interrupt: Interrupt

    def run(self) -> None:
        """Trains until no run waits, or a signal."""
        left, idle_since = set(self.points), None
        while not self.interrupt.requested:
            states = {p: self._state(p) for p in self.points if p in left}
            point = next((p for p in states if states[p] in _UNHELD), None)
            if point:
                if self._train(point):
                    left.remove(point)
                idle_since = None
                continue
            # The lock of a worker that was killed counts for so long.
            idle_since = idle_since or time.monotonic()
            if State.RUNNING not in states.values() or time.monotonic() - idle_since > lock.LEASE_S:
                return
            time.sleep(1)

    def _state(self, point: Point) -> State:
        return state_of(self.workdir / point.folder, self.started)

    def _train(self, point: Point) -> bool:
        """Trains a run; returns whether this worker need not try it again."""
        folder, name = self.workdir / point.folder, f'{point.arm}, seed {point.seed}'
        log(f'{_counts(self._states())}  starts {name}')
        begin = time.perf_counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with redirected(folder / 'log.txt'):
                result = loop.train(point.config, folder, None, self.interrupt)
        except lock.LockedError:
            return True
        except Exception as error:
            words = str(error) if isinstance(error, UserError) else ''
            message = words or typed_line(error)
            files.write_json(folder / FAILED, {'error': message})
            log(f'{_counts(self._states())}  failed: {name}: {message}')
            return True
        if result is None:
            log(f'{_counts(self._states())}  stopped: {name}')
            return False
        (folder / FAILED).unlink(missing_ok=True)
        accuracies = ' '.join(f'{network["test_accuracy"]:.2f}' for network in result['networks'])
        seconds, states = time.perf_counter() - begin, self._states()
        log(
            f'{_counts(states)}  {name}: test {accuracies} % in {seconds:.0f} s{self._left(states)}'
        )
        return True

    def _states(self) -> list[State]:
        return [self._state(point) for point in self.points]

    def _left(self, states: list[State]) -> str:
        """Returns ', about 5 min left', by the mean time of the finished runs."""
        folders = [self.workdir / point.folder for point in self.points]
        done = [summary['wall_s'] for folder in folders if (summary := finished_summary(folder))]
        running = states.count(State.RUNNING)
        left = sum(map(states.count, _UNHELD)) + running / 2
        if not (done and left):
            return ''
        minutes = sum(done) / len(done) * left / (1 + running) / 60
        return f', about {minutes:.0f} min left' if minutes >= 1 else ', less than 1 min left'


def _counts(states: list[State]) -> str:
    """Returns '[3/50 done, 1 running, 46 waiting]'."""
    done, *others = (states.count(state) for state in State)
    names = [state.value for state in State][1:]
    parts = [f'{count} {name}' for name, count in zip(names, others, strict=True) if count]
    return f'[{done}/{len(states)} done{"".join(f", {part}" for part in parts)}]'


def _together(jobs: int, interrupt: Interrupt) -> None:
    """Runs this command in `jobs` processes, each with its share of the cores or a GPU.

    One that is killed is replaced, at most `jobs` times in all.
    """
    arguments = [word for word in sys.argv[1:] if not word.lstrip('-').startswith('jobs=')]
    if '--jobs' in arguments:
        where = arguments.index('--jobs')
        del arguments[where : where + 2]
    command = [sys.executable, sys.argv[0], *arguments, '--jobs=1']
    cores = sorted(os.sched_getaffinity(0))
    gpus = _gpus()

    def worker(job: int) -> subprocess.Popen:
        environment = os.environ | {_WORKER: '1'}
        if gpus:
            environment['CUDA_VISIBLE_DEVICES'] = gpus[job % len(gpus)]
        share = cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs]
        os.sched_setaffinity(0, share or [cores[job % len(cores)]])  # the child inherits it
        try:  # Ctrl-C reaches this process alone, which passes it on once
            return subprocess.Popen(command, env=environment, start_new_session=True)
        finally:
            os.sched_setaffinity(0, cores)

    workers, replaced, passed = [worker(job) for job in range(jobs)], 0, False
    while any(each.poll() is None for each in workers):
        if interrupt.requested and not passed:
            passed = True
            for each in workers:
                each.terminate()
        for job, each in enumerate(workers):
            if (each.poll() or 0) < 0 and not passed and replaced < jobs:
                log(f'worker {job + 1} was killed by signal {-each.returncode}; it is replaced')
                workers[job], replaced = worker(job), replaced + 1
        time.sleep(0.2)


def _gpus() -> list[str]:
    """Returns the GPUs that this process may use, without JAX, which would reserve their memory."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [word for word in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if word]
    folder = pathlib.Path('/proc/driver/nvidia/gpus')
    return [str(n) for n in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def _points(study: Study, config: Config, workdir: pathlib.Path) -> list[Point]:
    """Returns the runs of a study; a wrong one is found before the first is trained."""
    points = []
    for point in study.points(config):
        resolved = starts.resolved(point.config, workdir / point.folder)
        workdir_lib.check(workdir / point.folder, resolved)
        info = dataset.info(resolved)
        cohort_lib.assemble(resolved, info.image_shape, info.num_classes, info.train)
        points.append(dataclasses.replace(point, config=resolved))
    return points


def _operations(config: Config) -> tuple[float, float]:
    """Returns the operations of a run, with its evaluations, and of one of its steps."""
    info = dataset.info(config)
    cohort = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    per_image, evaluations = plan.image_flops(cohort), math.ceil(config.epochs / config.eval_every)
    held_out = evaluations * (info.validation + info.test)
    run = per_image * info.train * config.epochs + plan.image_flops(cohort, False) * held_out
    return float(run), float(per_image * config.batch_size)


def _dry_run(study: Study, points: Sequence[Point], log: Callable[[Any], None]) -> None:
    """Prints the runs of each arm, and their cost by operations and a measured step."""
    seeds = len({point.seed for point in points})
    arms = {point.arm: point.config for point in points}
    operations = {arm: _operations(config)[0] for arm, config in arms.items()}
    first, config = next(iter(arms.items()))
    with working(f'measuring a step of {first}'):
        rate = _operations(config)[1] / benchmark.step_time(config)
    rows = table('arm', ('runs', 'operations of one', 'hours of one', 'hours of all'))
    for arm in arms:
        hours = operations[arm] / rate / 3600
        rows.add_row(
            arm, str(seeds), f'{operations[arm]:.3g}', f'{hours:.3g}', f'{hours * seeds:.3g}'
        )
    log(rows)
    for words in (study.question, study.paper and f'Paper: {study.paper}'):
        if words:
            log(words)
    log(
        f'{len(points)} runs, about {sum(operations.values()) * seeds / rate / 3600:.3g} hours on '
        f'one machine like this one: operations, with evaluations, at the rate of a step of {first}'
    )


def main(command: Command, _: object) -> int:
    """Trains the study and writes its report; returns the exit code.

    That is 0 if all runs are finished, 1 if some failed, 75 if some are left.
    """
    options, started = command.options, time.time()
    study, workdir = command.study, command.workdir
    assert study
    if finished_summary(workdir) or (workdir / 'config.json').exists():
        raise UserError(f'--workdir: {workdir} holds a run; name another directory for the study')
    points = _points(study, command.config, workdir)
    if options.dry_run:
        _dry_run(study, points, log)
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / studies.NAME, study.to_json())
    jobs = options.jobs or 1
    with Interrupt() as interrupt:
        interrupt.effect = 'each worker stops after its current step, with a checkpoint'
        if jobs > 1:
            _together(jobs, interrupt)
        else:
            Worker(points, workdir, started, interrupt).run()
    states = [state_of(workdir / point.folder, started) for point in points]
    if _WORKER not in os.environ:
        print_json(report.write(workdir))
    if State.FAILED in states:
        return EXIT_USER_ERROR
    if set(states) == {State.DONE}:
        return 0
    if _WORKER not in os.environ:
        done = states.count(State.DONE)
        log(f'{done} of {len(states)} runs are done; the same command continues')
    return EXIT_RESUMABLE

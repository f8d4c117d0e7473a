"""Reading some networks of a checkpoint, without the others, the optimizers and the images."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import record
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.checkpoints.store import check_content, checkpoint_paths, step_of
from afkd_jax.config import Config
from afkd_jax.devices import processes
from afkd_jax.errors import UserError, first_line
from afkd_jax.method.state import TrainState


def find(
    workdir: pathlib.Path, config: Config, step: int | str, network: int | None
) -> tuple[pathlib.Path, dict[pathlib.Path, str]]:
    """Returns the directory of a whole checkpoint, and newer ones with why they are unusable.

    Args:
      workdir: of the run.
      config: of the run.
      step: 'last', 'best' (on validation, of the network) or a number.
      network: counted from 0; None for the ensemble.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    rejected: dict[pathlib.Path, str] = {}
    for path in reversed(checkpoint_paths(workdir)):
        if step not in ('last', 'best', step_of(path)):
            continue
        try:
            progress = _progress(path, config)
        except record.Unusable as error:
            rejected[path] = str(error)
            continue
        if step != 'best':
            return path, rejected
        best = progress.best[-1 if network is None else network]
        if best is None:
            raise UserError(
                f'--step: best needs an evaluation on a validation split, which {workdir} does '
                'not have; use last'
            )
        path, more = find(workdir, config, best.step, network)
        return path, rejected | more
    known = ', '.join(str(step_of(path)) for path in checkpoint_paths(workdir)) or 'none'
    reasons = ''.join(f'; {path} {why}' for path, why in rejected.items())
    raise UserError(
        f'--step: there is no whole checkpoint {step} in {workdir}; there are {known}{reasons}'
    )


def _progress(path: pathlib.Path, config: Config) -> Progress:
    """Returns the progress of a checkpoint whose files are whole and of this run's config."""
    content = record.read(path)
    found, expected = content['origin'].get('config', {}), config_lib.run_fields(config)
    check_content(path, content, {'config': found}, {'config': expected})
    return Progress.from_json(content['progress'])


def read_variables(path: pathlib.Path, abstract: TrainState, wanted: Sequence[int]) -> list[Any]:
    """Returns the variables of networks, params and batch_stats, on the first local device.

    Orbax reads only these; of a cohort of one architecture, which is stored stacked, those of all
    networks.

    Args:
      path: of a whole checkpoint.
      abstract: shapes and dtypes of the run's state.
      wanted: networks, counted from 0.

    Raises:
      UserError: the checkpoint has other arrays.
    """
    stacked = abstract.stackable
    state = jax.eval_shape(TrainState.stack, abstract) if stacked else abstract
    networks = [state.networks] if stacked else state.networks

    def parts(k: int) -> dict[str, Any]:
        network: Any = networks[k]
        params = {name: part for name, part in network.params.items() if name != 'transfer'}
        if not stacked and k not in wanted:
            return {'params': {'head': params['head']}}  # Orbax wants something of each entry
        return {'params': params, 'batch_stats': {'network': network.batch_stats['network']}}

    template = [parts(k) for k in range(len(networks))]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    scalar = jax.ShapeDtypeStruct((), 'int32')  # and of the metric sums, which are the second part
    item: Any = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        [{'networks': template[0] if stacked else template}, {'steps': scalar}],
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    # Each process reads by itself and waits for no other, whose files may be damaged.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=processes.index(), active_processes={processes.index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
        try:
            found = orbax.restore(path / 'arrays', args=args)[0]['networks']
        except (ValueError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise UserError(f'{path}: has other arrays than its config ({reason})') from None

    def variables(k: int) -> dict[str, Any]:
        network = jax.tree.map(lambda leaf: leaf[k], found) if stacked else found[k]
        stats = network.get('batch_stats', {}).get('network') or {}
        return {'params': network['params'], 'batch_stats': stats}

    return [variables(k) for k in wanted]

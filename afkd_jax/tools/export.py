"""--mode export: a trained network for use without this package.

safetensors  the parameters and batch statistics under their Flax names ('trunk/conv/kernel', ...,
             'batch_stats/trunk/norm/mean', ...), kernels as [height, width, in, out].
stablehlo    a program, uint8 images [batch, H, W, C] -> probabilities [batch, classes], with a
             symbolic batch and the preprocessing inside; read by jax.export.deserialize.

Beside the file, FILE.json has architecture, classes, image shape, mean and standard deviation.
"""

import json
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from afkd_jax import paths
from afkd_jax.checkpoints import weights
from afkd_jax.checkpoints.files import write_atomic, write_json
from afkd_jax.command import Command, new_file
from afkd_jax.errors import UserError
from afkd_jax.report.console import log, print_json, working
from afkd_jax.report.tables import size
from afkd_jax.tools.model import Model, load_for

PLATFORMS = ('cpu', 'cuda', 'tpu')


def description(model: Model) -> dict[str, Any]:
    """Returns what a reader of the exported file needs, as JSON."""
    return {
        'network': model.name,
        'architecture': list(model.architectures),
        'step': model.step,
        'classes': list(model.classes),
        'image_shape': list(model.image_shape),
        'mean': model.mean.tolist(),
        'std': model.std.tolist(),
        'input': 'uint8 [batch, height, width, channels]; (pixels / 255 - mean) / std per channel',
    }


def safetensors(model: Model) -> bytes:
    """Returns parameters and batch statistics as safetensors.

    Raises:
      UserError: the package is not installed, or the model is an ensemble.
    """
    if len(model.architectures) > 1:
        raise UserError('--network: safetensors holds one network; export each, or use stablehlo')
    try:
        from safetensors.numpy import save
    except ImportError:
        raise UserError(
            '--format: safetensors needs its package: python -m pip install safetensors'
        ) from None
    tensors = weights.to_tensors(model.variables)
    return save(tensors, {key: json.dumps(value) for key, value in description(model).items()})


def stablehlo(model: Model) -> bytes:
    """Returns the serialised program, for CPUs, CUDA GPUs and TPUs; weights are inside."""
    (batch,) = jax_export.symbolic_shape('batch')
    pixels = jax.ShapeDtypeStruct((batch, *model.image_shape), np.uint8)
    variables = model.all_variables

    def program(pixels: jax.Array) -> jax.Array:
        return model.probabilities(variables, pixels)

    try:
        import flatbuffers as flatbuffers
    except ImportError:
        raise UserError(
            '--format: stablehlo needs a package: python -m pip install flatbuffers'
        ) from None
    return bytes(jax_export.export(jax.jit(program), platforms=PLATFORMS)(pixels).serialize())


_FORMATS = {'safetensors': safetensors, 'stablehlo': stablehlo}


def main(command: Command, _: object) -> int:
    """Writes the file and its JSON; prints its size, or the description as JSON."""
    options = command.options
    if options.format not in _FORMATS:
        raise UserError(f'--format: is missing; give one of {", ".join(_FORMATS)}')
    model = load_for(command)
    name = f'{model.name.replace(" ", "-")}-step{model.step}.{options.format}'
    output = new_file(paths.local('--output', options.output or command.workdir / name))
    json_file = new_file(output.with_name(output.name + '.json'))
    with working('exporting'):
        content = _FORMATS[options.format](model)
    write_atomic(output, content)
    facts = {'format': options.format, 'output': str(output), **description(model)}
    write_json(json_file, facts)
    log(f'{model.name} of step {model.step}: {size(len(content))} written to {output}')
    print_json(facts)
    return 0

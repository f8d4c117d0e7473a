"""predictions.npz: what a finished run predicts for each test image, to compare runs by image."""

import io
import pathlib

import numpy as np

from afkd_jax.checkpoints.files import write_atomic
from afkd_jax.errors import typed_line
from afkd_jax.method.metrics import Evaluation
from afkd_jax.report.console import log

_NAME, _ARRAYS = 'predictions.npz', ('label', 'predicted', 'confidence')


def write(workdir: pathlib.Path, evaluation: Evaluation) -> None:
    """Writes label [N], predicted and confidence [N, K + 1] of the N test images, in order.

    The last column is the ensemble's. Classes are uint16, confidences float16.
    """
    assert evaluation.outputs
    arrays = {
        name: values.astype(np.float16 if name == 'confidence' else np.uint16)
        for name, values in evaluation.outputs.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(workdir / _NAME, file.getvalue())


def read(workdir: pathlib.Path, columns: int) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a run; None if it has none, as a run of an older version.

    Of damaged ones a warning is logged.

    Args:
      workdir: of the run.
      columns: K + 1.
    """
    path = workdir / _NAME
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:  # which leaves no open file
            label, *others = (file[name] for name in _ARRAYS)
            if any(values.shape != (len(label), columns) for values in others):
                raise ValueError('arrays of other shapes')
            return dict(zip(_ARRAYS, (label, *others), strict=True))
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and zlib have errors of their own
        log(f'warning: {path}: cannot be read ({typed_line(error)}); it is left out')
        return None

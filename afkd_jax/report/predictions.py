"""predictions.npz: what a finished run predicts for each test image, to compare runs by image."""

import io
import pathlib

import numpy as np

from afkd_jax.checkpoints.files import write_atomic
from afkd_jax.method.metrics import Evaluation

_NAME = 'predictions.npz'


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


def read(workdir: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a run; None if it has none, as a run of an older version."""
    try:
        with np.load(workdir / _NAME) as file:
            return dict(file)
    except (OSError, ValueError):
        return None

"""Memory: how much a device has, and how much a compiled step needs."""

import contextlib
import dataclasses
import os
from typing import Any

import jax

# Bytes of one absent device; of a TPU, per chip from v4 on, per core before.
ABSENT_BYTES = {
    'TPU v2': 8 * 2**30,
    'TPU v3': 16 * 2**30,
    'TPU v4': 32 * 2**30,
    'TPU v5 lite': 16 * 2**30,
    'TPU v5': 95 * 2**30,
    'TPU v6 lite': 32 * 2**30,
    'NVIDIA A100-SXM4-40GB': 42331013120,
    'NVIDIA H100 80GB HBM3': 84942979072,
    'NVIDIA H200 141GB HBM3e': 151397597184,
    'NVIDIA B200': 191514411008,
}


def device_bytes(device: Any) -> int | None:
    """Returns the bytes of a device's memory; None if unknown. CPU devices share the machine's."""
    if device.platform == 'cpu':
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(Exception):  # an absent device (a topology) has no statistics
        return device.memory_stats()['bytes_limit']
    return ABSENT_BYTES.get(device.device_kind)


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """The bytes that a compiled step needs on one device; outputs exclude donated arguments."""

    arguments: int
    outputs: int
    temporaries: int
    program: int

    @classmethod
    def of(cls, step: jax.stages.Compiled) -> 'StepBytes':
        """Returns the compiler's own analysis."""
        memory = step.memory_analysis()
        assert memory is not None  # every backend of ours reports it
        return cls(
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))

"""GPU names -> devices for ahead-of-time compilation; no GPU need be attached."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from afkd_jax.devices.memory import ABSENT_BYTES
from afkd_jax.errors import UserError

# Name -> (kind, processors, FP32 units of each, bytes per second, bytes of L2 cache, GHz,
# bytes of shared memory per processor and, at most, per block, compute capability)
_GPUS = {
    'a100': ('NVIDIA A100-SXM4-40GB', 108, 64, 1555 * 10**9, 40 << 20, 1.41, 167936, 166912, 8),
    'h100': ('NVIDIA H100 80GB HBM3', 132, 128, 3352 * 10**9, 50 << 20, 1.98, 233472, 232448, 9),
    'h200': ('NVIDIA H200 141GB HBM3e', 132, 128, 4800 * 10**9, 50 << 20, 1.98, 233472, 232448, 9),
    'b200': ('NVIDIA B200', 148, 128, 7672 * 10**9, 126 << 20, 1.965, 233472, 232448, 10),
}
_NAME = re.compile(rf'({"|".join(_GPUS)})(?:-([1-9]\d?))?')
# What the compiler wants to know of a GPU: stream_executor.GpuTargetConfigProto of XLA, as text.
_CONFIG = """
gpu_device_info {{
  core_count: {1} fpus_per_core: {2} memory_bandwidth: {3} l2_cache_size: {4} clock_rate_ghz: {5}
  shared_memory_per_core: {6} shared_memory_per_block_optin: {7} shared_memory_per_block: 49152
  cuda_compute_capability {{ major: {8} }} device_memory_size: {memory}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{0}"
"""


def is_name(name: str) -> bool:
    """Returns whether a topology names GPUs: 'h100', or 'h100-8' for eight in one machine."""
    return _NAME.fullmatch(name) is not None


def devices(name: str) -> Sequence[Any]:
    """Returns GPUs for ahead-of-time compilation.

    Args:
      name: see is_name.

    Raises:
      UserError: their compiler is not installed.
    """
    match = _NAME.fullmatch(name)
    assert match
    gpu, count = _GPUS[match[1]], match[2] or '1'
    config = _CONFIG.format(*gpu, memory=ABSENT_BYTES[gpu[0]])
    try:
        description = topologies.get_topology_desc(
            platform='cuda', target_config=config, topology=f'1x1x{count}'
        )
    except NotImplementedError as error:
        raise UserError(
            f'--topology: {name} needs the compiler for GPUs, which is not installed: '
            f'python -m pip install "jax[cuda13]=={jax.__version__}"'
        ) from error
    return description.devices

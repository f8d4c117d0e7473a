"""The collectives and kernels of a compiled step, read in its optimised HLO."""

import collections
import dataclasses
import re

import jax
import numpy as np

from afkd_jax.devices.spmd import DATA, PEER

_OPERATIONS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'collective-permute',
    'all-to-all',
    'collective-broadcast',
)
_LINE = re.compile(rf' = (?P<type>.*?) (?P<name>{"|".join(_OPERATIONS)})(?P<start>-start)?\(')
_ARRAY = re.compile(r'([a-z]+)(\d+)?(?:[a-z]\w*)?\[([\d,]*)\]')
_GROUPS = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_PAIRS = re.compile(r'source_target_pairs=\{(.*?)\}\}')

_INSTRUCTION = re.compile(r'^  (?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(', re.MULTILINE)
_NO_KERNEL = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all')
# Kind of kernel -> what its names contain; the first that fits.
_KINDS = {
    'collective': 'nccl|all-?reduce|all-?gather|all-to-all|reduce-scatter|collective',
    'copy or transpose': 'copy|transpose|memcpy|memset|nchwto|nhwcto',
    'convolution': 'conv(?!ert)|[fdw](prop|grad)|winograd|cudnn',
    'matrix product': r'gemm|gemv|cublas|cutlass|(\b|_)dot(\b|_)',
    'elementwise or sum': 'fusion|reduce|wrapped|broadcast|concatenate|scatter|gather|select|pad',
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Operations of one kind in one execution of a program.

    Attributes:
      operation: XLA's name, e.g. 'all-reduce'.
      axis: of the mesh, 'peer' or 'data'; 'all' for both.
      bytes: per device and execution, of the results: for an all-reduce what is summed, for a
        collective-permute what a device receives. Hops within the interconnect are not counted.
      largest: the bytes of the largest operation.
    """

    operation: str
    axis: str
    count: int
    bytes: int
    largest: int


def collectives(compiled: jax.stages.Compiled, shape: tuple[int, int]) -> list[Collective]:
    """Returns the collectives of a compiled program, by decreasing bytes.

    Args:
      compiled: for a mesh of several devices.
      shape: of the mesh, (peer, data).
    """
    return parse(compiled.as_text() or '', shape)


def parse(hlo: str, shape: tuple[int, int]) -> list[Collective]:
    """Returns the collectives in a text of optimised HLO; see collectives()."""
    found: dict[tuple[str, str], list[int]] = {}
    for line in hlo.splitlines():
        if match := _LINE.search(line):
            members = _group(line)
            if len(members) > 1:  # else nothing is sent
                arrays = _bytes(match['type'])
                if match['start'] and match['name'] != 'all-reduce':
                    # (operands, results, counters of the transfer)
                    arrays = [size for size in arrays if size > 4] or arrays
                    arrays = arrays[len(arrays) // 2 :]
                key = (match['name'], _axis(members, shape))
                found.setdefault(key, []).append(sum(arrays))
    rows = [
        Collective(operation, axis, len(sizes), sum(sizes), max(sizes))
        for (operation, axis), sizes in found.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def _bytes(types: str) -> list[int]:
    """Returns the size of each array in a type such as '(f32[2,64]{1,0}, bf16[8]{0})'."""
    sizes = []
    for kind, bits, dims in _ARRAY.findall(re.sub(r'\{[^}]*\}|/\*.*?\*/', '', types)):
        count = int(np.prod([int(dim) for dim in dims.split(',') if dim], dtype=np.int64))
        sizes.append(count * (1 if kind == 'pred' else max(1, int(bits) // 8)))
    return sizes


def _group(line: str) -> list[int]:
    """Returns the devices, by index in the mesh, of one group of a collective."""
    if match := _PAIRS.search(line):
        first, second = match[1].lstrip('{').split('}')[0].split(',')
        return [int(first), int(second)]
    if match := _GROUPS.search(line):
        return [int(device) for device in match[1].split(',')] if match[1] else []
    if match := _IOTA.search(line):
        groups, dims, order = (
            [int(x) for x in part.split(',')] if part else [] for part in match.groups()
        )
        devices = np.arange(np.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(groups)[0].tolist()
    raise ValueError(f'no groups are known in: {line[:300]}')


def _axis(members: list[int], shape: tuple[int, int]) -> str:
    peers, shards = np.unravel_index(members, shape)
    along_peer, along_data = len(set(peers)) > 1, len(set(shards)) > 1
    if along_peer and along_data:
        return 'all'
    return PEER if along_peer else DATA


def kind(name: str) -> str:
    """Returns the kind of a kernel by its name: XLA's, or that of a library for GPUs."""
    name = name.lower()
    return next((kind for kind, words in _KINDS.items() if re.search(words, name)), 'other')


def kernels(hlo: str) -> dict[str, int]:
    """Returns how many kernels of each kind a program for GPUs launches, most first.

    Args:
      hlo: its optimised text. Loops count once.
    """
    entry = hlo[hlo.index('\nENTRY ') :]
    names = (
        name
        for name, _, operation in _INSTRUCTION.findall(entry)
        if operation not in _NO_KERNEL and not operation.endswith('-done')
    )
    return dict(collections.Counter(map(kind, names)).most_common())


def convolutions(hlo: str) -> dict[str, int]:
    """Returns 'output type, layouts' -> the number of convolutions in a program for GPUs.

    The layouts are input_kernel->output, as in 'b01f_o01i->b01f' for NHWC.
    """
    found = re.findall(r' = \(?(\w+)\[.* custom-call\(.*dim_labels=([\w>-]+), custom_call_t', hlo)
    return dict(collections.Counter(', '.join(each) for each in found).most_common())

"""Tables for the terminal: how a table looks, and the result of a run in 80 columns."""

from typing import Any

import rich.box
import rich.table


def table(first: str, columns: tuple[str, ...]) -> rich.table.Table:
    """Returns an empty table whose first column holds words and whose others hold numbers."""
    result = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1), pad_edge=False)
    result.add_column(first, overflow='fold')
    for column in columns:
        result.add_column(column, justify='right', overflow='fold')
    return result


def number(value: float | None, digits: int) -> str:
    """Returns the value with so many digits, or '-'."""
    return '-' if value is None else f'{value:.{digits}f}'


def size(count: float | None) -> str:
    """Returns a number of bytes with its unit, or '-'."""
    if count is None:
        return '-'
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= scale:
            return f'{count / scale:,.2f} {unit}'
    return f'{count:,.0f} B'


def shape(dimensions: list[int] | tuple[int, ...] | None) -> str:
    """Returns '8x8x64', or ''."""
    return 'x'.join(map(str, dimensions or ()))


def result_tables(summary: dict[str, Any]) -> list[rich.table.Table]:
    """Returns a run's result: the networks with the ensemble, and the edges of the ring.

    A column without any value is left out, so that the table fits into 80 columns.

    Args:
      summary: as in summary.json.
    """
    rows = [*summary['networks'], summary['ensemble']]
    accuracies = {
        'val %': 'validation_accuracy',
        'test %': 'test_accuracy',
        'at best val %': 'test_accuracy_at_best_validation',
        'top-5 %': 'test_top5_accuracy',
        'EMA test %': 'test_ema_accuracy',
    }
    known = {
        name: key
        for name, key in accuracies.items()
        if any(row.get(key) is not None for row in rows)
    }
    networks = table('network', ('params', 'map', *known))
    for i, row in enumerate(rows):
        label = row['name'] if row is rows[-1] else f'{i + 1} {row["name"]}'
        label += ' (frozen)' if row.get('frozen') else ''
        values = (number(row[key], 2) for key in known.values())
        networks.add_row(label, f'{row["parameters"]:,}', shape(row['feature_map']), *values)

    ring = table('edge', ('L1', 'L2', 'cosine', 'CKA', 'agree %', 'student %', 'teacher %'))
    ring.caption = (
        'teacher -> student on test. agree: both predict the same;\n'
        'student, teacher: only that one is right.'
    )
    ring.caption_justify = 'left'
    for edge in summary['ring']:
        ring.add_row(
            f'{edge["teacher"]} -> {edge["network"]}',
            *(number(edge[key], 3) for key in ('l1', 'l2', 'cosine', 'cka')),
            *(
                number(edge[key], 2)
                for key in ('agreement', 'only_network_correct', 'only_teacher_correct')
            ),
        )
    return [networks, ring]

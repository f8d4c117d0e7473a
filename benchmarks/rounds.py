"""Figures that are measured in turn, so that a machine's drift reaches all of them."""

import json
import statistics

ROUNDS = 5


def measure(ways, digits, name):
    """Prints the median, least and most over ROUNDS of each way, as a JSON line.

    Args:
      ways: what -> function that returns the figure of one round.
      digits: of the figures.
      name: of the figure.
    """
    figures = {what: [] for what in ways}
    for _ in range(ROUNDS):
        for what, way in ways.items():
            figures[what].append(way())
    for what, found in figures.items():
        row = {name: statistics.median(found), 'least': min(found), 'most': max(found)}
        print(json.dumps({'what': what} | {key: round(one, digits) for key, one in row.items()}))

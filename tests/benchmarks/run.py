"""The benchmarks of the loop, the callbacks, the saves and of many trainings at once in one go, and one
table: figure, spread, target.

    python tests/benchmarks/run.py [--only NAME ...] [--rounds N] [--quick | --full] [--no-peers]
                                   [--json FILE] [--plot FILE]

An hour on two cores, a few minutes with ``--quick``. Peers that are not installed are left out and named; for
all of them: ``pip install keras jax torch pytorch-ignite lightning orbax-checkpoint requests joblib ray``.
Every benchmark can be run by itself too, and three have tables of their own: ``model.py`` (beside torch and
Keras), ``files.py`` (bytes to disk) and ``records.py`` (TensorBoard and CSV). Keep the machine quiet
meanwhile; what is to be compared was measured in turns, so quote the ratios, with the spread.
"""

from __future__ import annotations

import importlib
import time
from typing import TYPE_CHECKING

from harness import machine, parser, save, scale_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import Figure, Result

BENCHMARKS = (
    "imports",
    "overhead",
    "event_age",
    "isolation",
    "whole_fit",
    "stall",
    "memory",
    "many",
    "fairness",
    "queued",
    "service",
    "adapters",
)
LEAST, MOST = 0.01, 1_000.0
"""Parts of a target that the plot shows; what lies outside is drawn at its rim."""


def show_table(results: Sequence[Result]) -> None:
    print(f"\n{'The one table':62}{'median':>10}{'least':>10}{'most':>10}{'':14}{'target':>8}")
    for result in results:
        print(f"-- {result.name}")
        for figure in result.claims:
            print(figure.line())


def plot(path: str, results: Sequence[Result]) -> None:
    """Every figure that has a target above 0, as a part of it, on a logarithmic axis: left of 1 is met."""
    from matplotlib.figure import Figure as Canvas

    figures = [figure for result in results for figure in result.claims if figure.target]
    canvas = Canvas(figsize=(11, 1.2 + 0.28 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    for row, figure in enumerate(reversed(figures)):
        assert figure.target
        seen = (min(figure.values), figure.median, max(figure.values))
        shares = [min(max(value / figure.target, LEAST), MOST) for value in seen]
        color = "tab:green" if figure.median <= figure.target else "tab:red"
        axes.plot([shares[0], shares[2]], [row, row], color=color, linewidth=4, alpha=0.35)
        axes.plot(shares[1], row, "o", color=color)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(figures)), [_label(figure) for figure in reversed(figures)], fontsize=8)
    axes.set_xlabel(f"figure / target: median, least and most; {LEAST:g} and {MOST:g} stand for all beyond")
    canvas.savefig(path, dpi=120)


def _label(figure: Figure) -> str:
    return f"{figure.what} (<= {figure.target:g} {figure.unit})"


def main() -> None:
    commands = parser(__doc__)
    commands.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME")
    commands.add_argument("--plot", metavar="FILE", help="draw the table; needs matplotlib")
    given = commands.parse_args()
    print(machine())
    results: list[Result] = []
    for name in given.only:
        began = time.perf_counter()
        results.append(importlib.import_module(name).measure(scale_of(given)))
        results[-1].show()
        print(f"({time.perf_counter() - began:.0f} s)")
        if given.json:
            save(given.json, results)
    show_table(results)
    if given.plot:
        plot(given.plot, results)


if __name__ == "__main__":
    main()

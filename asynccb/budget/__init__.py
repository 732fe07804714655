"""What is process-wide, counted and restored in one place: the threads of linear algebra, the compute tokens,
the interpreter's switch interval.

A value is saved by the first that holds it and restored by the last that lets go. To save and restore by each
for itself would leak: of two runs that overlap, the one that began later would restore the first one's value
after that has put back the original.

There are as many compute tokens as CPUs divided by threads. A training computes with a token in hand and
gives it back while it waits for anything else; where there are more trainings than tokens they take turns
between two batches, in shares of the time that follow their weights.
"""

from asynccb.budget.blas import blas_threads
from asynccb.budget.cpus import usable_cpus
from asynccb.budget.interval import SwitchInterval
from asynccb.budget.priority import check_priority, weight_of
from asynccb.budget.shares import Budget, BudgetStatistics, Share, Wish, budget, cpu_budget

__all__ = [
    "Budget",
    "BudgetStatistics",
    "Share",
    "SwitchInterval",
    "Wish",
    "blas_threads",
    "budget",
    "check_priority",
    "cpu_budget",
    "usable_cpus",
    "weight_of",
]

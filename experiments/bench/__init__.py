"""The benchmark: `python -m experiments.bench` times our engines, a bare loop, Flower's simulation and pfl.

Everybody trains the same model on the same clients in the same order of batches, each run in a process of its own,
in turn, several times over. Before anything is timed, one round of every contestant must give the same weights.
"""

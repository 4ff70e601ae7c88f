"""``python -m experiments.retrieval``: see ``experiment.py``."""

import tyro

from experiments.retrieval import experiment
from experiments.run import command_line

if __name__ == "__main__":
    with command_line.one_line():
        experiment.main(
            tyro.cli(experiment.Config, prog="python -m experiments.retrieval", description=experiment.__doc__)
        )

"""``python -m experiments.atlas``: see ``experiment.py``."""

import tyro

from experiments.atlas import experiment
from experiments.run import command_line

if __name__ == "__main__":
    with command_line.one_line():
        experiment.main(tyro.cli(experiment.Config, prog="python -m experiments.atlas", description=experiment.__doc__))

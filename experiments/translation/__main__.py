"""``python -m experiments.translation`` trains (``experiment.py``); ``... translate RUN`` uses a run."""

import sys

import tyro

from experiments.run import command_line
from experiments.translation import experiment, translate

PROGRAM = "python -m experiments.translation"

if __name__ == "__main__":
    with command_line.one_line():
        if sys.argv[1:2] == ["translate"]:
            program, arguments = f"{PROGRAM} translate", sys.argv[2:]
            config = tyro.cli(translate.Config, prog=program, description=translate.__doc__, args=arguments)
            translate.main(config)
        else:
            experiment.main(tyro.cli(experiment.Config, prog=PROGRAM, description=experiment.__doc__))

"""``python -m experiments.language`` trains (``experiment.py``); ``... generate RUN`` uses a run (``generate.py``)."""

import sys

import tyro

from experiments.language import experiment, generate, presets
from experiments.run import command_line

PROGRAM = "python -m experiments.language"

if __name__ == "__main__":
    with command_line.one_line():
        if sys.argv[1:2] == ["generate"]:
            options = {"prog": f"{PROGRAM} generate", "description": generate.__doc__, "args": sys.argv[2:]}
            generate.main(tyro.cli(generate.Config, **options))
        else:
            description = f"{experiment.__doc__}\nThe presets:\n\n{presets.overview()}"
            experiment.main(tyro.cli(experiment.Config, prog=PROGRAM, description=description))

"""``python -m fwt_jax.convert SRC DST``."""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax
from flax import nnx

from fwt_jax.convert.files import load, parse_json, read_file, save

DESCRIPTION = "Converts weights of the authors' toolkit to a file of fwt_jax, and a file of fwt_jax to the toolkit's."


def main(args: list[str] | None = None):
    """The command line. An error of its user is one line on stderr, with exit code 2."""
    parser = argparse.ArgumentParser("python -m fwt_jax.convert", description=DESCRIPTION)
    parser.add_argument("source", type=pathlib.Path, help=".npz, .safetensors or (with PyTorch) .pt, of either kind")
    parser.add_argument("destination", type=pathlib.Path, help=".npz or .safetensors; .pt cannot be written")
    parser.add_argument("--config", type=pathlib.Path, help="JSON of the toolkit's arguments, if SRC has none")
    options = parser.parse_args(args)
    try:
        print(convert(options.source, options.destination, options.config))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error


def convert(source: pathlib.Path, destination: pathlib.Path, config: pathlib.Path | None) -> str:
    """Converts a file, and returns a sentence for the user."""
    arguments = None
    if config is not None:
        arguments = parse_json(config.read_bytes().decode("utf-8", "replace"), str(config))
    if destination.exists() and destination.samefile(source):
        raise ValueError(f"{destination} would be overwritten with itself; name another destination")
    model = load(source, arguments)
    to_toolkit = "vocab_size" in (arguments or read_file(source)[1])  # Only our configs have it.
    save(model, destination, toolkit=to_toolkit)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return f"wrote {destination}: {count:,} parameters, {'of the toolkit' if to_toolkit else 'of fwt_jax'}"


if __name__ == "__main__":
    main()

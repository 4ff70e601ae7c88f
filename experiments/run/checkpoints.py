"""The checkpoints of a run: each is complete or not there, and damage to one is noticed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments.run import devices, files
from experiments.run.command_line import in_short

DIGESTS = "digests.json"  # in each checkpoint: {path of a file: its SHA-256}


# --- which checkpoints there are -------------------------------------------------------------------------------------


def manager(out: pathlib.Path, keep: int, saves: Callable[[int], bool]) -> ocp.CheckpointManager:
    """The checkpoints of a run that trains. The last ``keep`` of the regular ones stay, the best, and the newest.

    A checkpoint that was written on interruption is deleted as soon as a regular one exists, so that averages of
    checkpoints do not depend on interruptions.

    Args:
      out: the folder of the run.
      keep: how many regular checkpoints stay.
      saves: whether the run saves a regular checkpoint after a step.
    """
    _replace_damaged_losses(out / "checkpoints")
    best = preservation_policy.BestN(get_metric_fn=_loss, reverse=True, n=1)
    write_digests = functools.partial(_write_digests, out / "checkpoints")
    options = ocp.CheckpointManagerOptions(
        best_fn=_loss,
        best_mode="min",
        preservation_policy=preservation_policy.AnyPreservationPolicy([_Last(keep, saves), best]),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=write_digests),
    )
    return ocp.CheckpointManager(out / "checkpoints", options=options)


def reader(out: pathlib.Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, to be read only. A run may train in the folder at the same time."""
    _replace_damaged_losses(out / "checkpoints")
    silent = {"create": False, "save_interval_steps": 0}  # orbax warns if these are not set
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_loss, best_mode="min", **silent)
    return ocp.CheckpointManager(out / "checkpoints", options=options)


@dataclasses.dataclass
class _Last(preservation_policy.PreservationPolicy):
    keep: int
    saves: Callable[[int], bool]

    def should_preserve(self, checkpoints, *, context):
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = {*[step for step in steps if self.saves(step)][-self.keep :], *steps[-1:]}
        return [step in preserved for step in steps]


def steps_by_loss(manager: ocp.CheckpointManager) -> list[int]:
    """The steps of all checkpoints, the smallest loss first; of equal losses, the latest step first."""
    return sorted(manager.all_steps(), key=lambda step: (_loss(manager.metrics(step)), -step))


def _loss(metrics):
    """∞ for a loss that was not measured, and for NaN, which cannot be sorted."""
    return metrics["loss"] if metrics and math.isfinite(metrics["loss"]) else math.inf


# --- damage ----------------------------------------------------------------------------------------------------------


def _replace_damaged_losses(folder):
    """Replaces a damaged loss by ∞; otherwise orbax raises when it sorts checkpoints."""
    for path in sorted(folder.glob("[0-9]*/metrics/metrics")) if jax.process_index() == 0 else ():
        if not path.parents[1].name.isdigit():
            continue  # a run is writing this checkpoint
        try:
            loss = float(json.loads(path.read_bytes())["loss"])
            intact = loss == math.inf or _digests_of(path.parents[1]).get("metrics/metrics") in (None, _sha256(path))
        except FileNotFoundError:
            continue  # a run has just deleted this checkpoint
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            print(f"{path} is damaged; the loss of that checkpoint is taken as not measured")
            files.write(path, json.dumps({"loss": math.inf}))
    devices.wait_for_all("losses of checkpoints")


def _write_digests(folder):
    """For the newest checkpoint. Orbax calls this in the background, when all files of the checkpoint are there."""
    names = [path for path in folder.iterdir() if path.name.split(".")[0].isdigit()]
    checkpoint = max(names, key=lambda path: int(path.name.split(".")[0]))
    paths = sorted(path for item in ("model", "rest", "host", "metrics") for path in checkpoint.glob(f"{item}/**/*"))
    digests = {str(path.relative_to(checkpoint)): _sha256(path) for path in paths if path.is_file()}
    files.write(checkpoint / DIGESTS, json.dumps(digests, indent=1))


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests_of(checkpoint):
    """{} for a checkpoint without digests, as older versions wrote them."""
    path = checkpoint / DIGESTS
    return files.read_json(path) if path.exists() else {}


def _damage(checkpoint):
    """The first file of a checkpoint that differs from its digest, in words; "" if there is none."""
    words = ""
    if jax.process_index() == 0:
        try:
            for name, digest in _digests_of(checkpoint).items():  # a checkpoint is good without its loss
                if not name.startswith("metrics/") and _sha256(checkpoint / name) != digest:
                    words = f"{name} is not what was written"
        except (OSError, ValueError) as error:
            words = in_short(error)
    return devices.of_first_process(words.encode()).rstrip(b"\0").decode()


def _try_to_read(manager, step, read):
    """(``read(step)``, ""), or (None, the reason why the checkpoint cannot be read)."""
    if words := _damage(pathlib.Path(manager.directory) / str(step)):
        return None, words
    try:
        return read(step), ""
    # For a damaged file, orbax and tensorstore raise Exception itself, AttributeError and others. The reason is
    # reported. If no checkpoint can be read, the callers raise a ValueError.
    except Exception as error:
        return None, in_short(error)


# --- reading and writing ---------------------------------------------------------------------------------------------


def read_first(manager: ocp.CheckpointManager, steps: list[int], read: Callable[[int], Any], count: int) -> dict:
    """``{step: read(step)}`` for the first ``count`` of ``steps`` that can be read. It prints which cannot be read.

    Raises:
      ValueError: none can be read.
    """
    results, broken = {}, []
    for step in steps:
        if len(results) == count:
            break
        result, reason = _try_to_read(manager, step, read)
        if reason:
            broken.append(f"{step} ({reason})")
            print(f"checkpoint {broken[-1]} of {manager.directory} cannot be read; another one is taken")
        else:
            results[step] = result
    if not results:
        raise ValueError(f"no checkpoint of {manager.directory} can be read: {'; '.join(broken)}. Put back a copy")
    return results


def restore(manager: ocp.CheckpointManager, abstract: Any) -> tuple[Any, Any]:
    """The newest checkpoint that can be read, as (state, host); (None, None) where there is none.

    Broken checkpoints that are newer are moved aside, so that the run can write these steps again.

    Args:
      abstract: the state as ``ShapeDtypeStruct`` with shardings.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    model, rest = _model_and_rest(abstract)
    items = {"model": ocp.args.StandardRestore(model), "rest": ocp.args.StandardRestore(rest)}
    args = ocp.args.Composite(**items, host=ocp.args.JsonRestore())
    broken, restored = {}, None
    for step in sorted(manager.all_steps(), reverse=True):
        restored, reason = _try_to_read(manager, step, lambda step: manager.restore(step, args=args))
        if not reason:
            break
        broken[step] = reason
    if broken and restored is None:
        reasons = "; ".join(f"{step} ({reason})" for step, reason in broken.items())
        raise ValueError(
            f"no checkpoint of {manager.directory} can be read: {reasons}. Put back a copy, or delete the folder of "
            "the run to start again"
        )
    if broken:
        _move_aside(manager, broken)
    if restored is None:
        return None, None
    return type(abstract)(**restored["model"], **restored["rest"]), restored["host"]


def _model_and_rest(state):
    """The arrays of a state, as the two trees of a checkpoint."""
    rest = state._asdict()
    model = {name: rest.pop(name) for name in ("params", "constants")}
    return model, rest


def _move_aside(manager, broken):
    """Renames broken checkpoints, {step: reason}."""
    for step, reason in broken.items():
        aside = manager.directory.parent / f"broken-checkpoint-{step}-{int(time.time())}"
        print(f"checkpoint {step} of {manager.directory} cannot be read; it is now {aside.name}. {reason}")
        if jax.process_index() == 0:
            shutil.move(manager.directory / str(step), aside)
    devices.wait_for_all("broken checkpoints")
    manager.reload()


def save(manager: ocp.CheckpointManager, state: Any, host: Any, loss: float = math.inf):
    """Writes a checkpoint in the background.

    Args:
      state: a named tuple of arrays, with "step", "params" and "constants".
      host: the values of the host that belong to the checkpoint, as JSON can hold them.
      loss: by which the best checkpoint is chosen; ∞ where it was not measured.

    Raises:
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    model, rest = _model_and_rest(state)
    items = {"model": ocp.args.StandardSave(model), "rest": ocp.args.StandardSave(rest)}
    args = ocp.args.Composite(**items, host=ocp.args.JsonSave(host))
    _as_os_error(manager, lambda: manager.save(int(state.step), args=args, metrics={"loss": loss}))


def finish(manager: ocp.CheckpointManager):
    """Waits until the last checkpoint is complete.

    Raises:
      OSError: it cannot be written.
    """
    _as_os_error(manager, manager.wait_until_finished)


def check(manager: ocp.CheckpointManager):
    """Raises an ``OSError`` if the last checkpoint could not be written, as far as that is known yet."""
    if not manager.is_saving_in_progress():
        finish(manager)


def _as_os_error(manager, action):
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises a ValueError for a full disk
        raise OSError(
            f"a checkpoint cannot be written to {manager.directory}: {in_short(error)}. The complete ones stay; "
            "make space, and the same command goes on from the last of them"
        ) from error

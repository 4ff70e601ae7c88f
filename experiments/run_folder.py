"""The folder of a run: checkpoints that are complete or not there, metrics that people read, and what the run is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy
from tensorboardX import SummaryWriter
from tqdm import tqdm

# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(
    out: pathlib.Path, keep: int = 2, saves: Callable[[int], bool] = lambda step: True, *, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of a run, of which the last ``keep`` and the best stay. They appear whole or not at all.

    That of an interruption, of a step that the run does not save otherwise, stays until the next is written: what is
    averaged must not depend on it. With ``read_only`` none is written or deleted, so that a run may be at work there.
    """
    _mend_losses(out / "checkpoints")
    if read_only:
        quiet = {"create": False, "save_interval_steps": 0}  # else it warns of them
        options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_loss, best_mode="min", **quiet)
        return ocp.CheckpointManager(out / "checkpoints", options=options)
    best = preservation_policy.BestN(get_metric_fn=_loss, reverse=True, n=1)
    kept = preservation_policy.AnyPreservationPolicy([_Last(keep, saves), best])
    options = ocp.CheckpointManagerOptions(
        best_fn=_loss, best_mode="min", preservation_policy=kept, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(out / "checkpoints", options=options)


@dataclasses.dataclass
class _Last(preservation_policy.PreservationPolicy):
    keep: int
    saves: Callable[[int], bool]

    def should_preserve(self, checkpoints, *, context):
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*[step for step in steps if self.saves(step)][-self.keep :], *steps[-1:]}
        return [step in kept for step in steps]


def _loss(metrics):
    """∞ for what was not measured, and for NaN, with which nothing can be sorted."""
    return metrics["loss"] if metrics and math.isfinite(metrics["loss"]) else math.inf


def _mend_losses(folder):
    """A loss that cannot be read, which orbax would fail of, is as one that was not measured."""
    for path in sorted(folder.glob("[0-9]*/metrics/metrics")) if jax.process_index() == 0 else ():
        if not path.parents[1].name.isdigit():
            continue  # a run writes it just now
        try:
            float(json.loads(path.read_text(encoding="utf-8"))["loss"])
        except FileNotFoundError:
            continue  # a run has just deleted it
        except (ValueError, KeyError, TypeError):
            print(f"{path} cannot be read; the loss of that checkpoint is taken as not measured")
            write_atomically(path, json.dumps({"loss": math.inf}))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("losses of checkpoints")


def steps_by_loss(manager: ocp.CheckpointManager) -> list[int]:
    """The steps of all checkpoints, that of the smallest loss first, and the latest of those that are equal."""
    return sorted(manager.all_steps(), key=lambda step: (_loss(manager.metrics(step)), -step))


def read_first(manager: ocp.CheckpointManager, steps: list[int], read: Callable[[int], Any], count: int) -> dict:
    """What ``read`` makes of the first ``count`` of ``steps`` that can be read, by step; the others are named.

    Raises:
      ValueError: none can be read.
    """
    found, broken = {}, []
    for step in steps:
        if len(found) == count:
            break
        try:
            found[step] = read(step)
        except UNREADABLE as error:
            broken.append(f"{step} ({_reason(error)})")
            print(f"checkpoint {broken[-1]} of {manager.directory} cannot be read; another one is taken")
    if not found:
        raise ValueError(f"no checkpoint of {manager.directory} can be read: {'; '.join(broken)}. Put back a copy")
    return found


def _reason(error):
    return f"{type(error).__name__}: {(str(error) or 'no message').strip().splitlines()[0][:200]}"


def save(manager: ocp.CheckpointManager, state: Any, host: Any, loss: float = math.inf):
    """Begins to write a checkpoint; the arrays may be donated after it returns.

    Args:
      state: a named tuple of arrays, with "step", "params" and "constants".
      host: what else to keep, as JSON has it.
      loss: on which the best is chosen; ∞ where it was not measured.
    """
    arrays = state._asdict()
    model = {name: arrays.pop(name) for name in ("params", "constants")}
    items = {name: ocp.args.StandardSave(tree) for name, tree in (("model", model), ("rest", arrays))}
    items["host"] = ocp.args.JsonSave(host)
    manager.save(int(state.step), args=ocp.args.Composite(**items), metrics={"loss": loss})


def restore(manager: ocp.CheckpointManager, abstract: Any) -> tuple[Any, Any]:
    """The newest checkpoint that can be read, as (state, host); (None, None) where there is none at all.

    Broken ones that are newer are moved out of the way, so that the run can write theirs again.

    Args:
      abstract: the state as ``ShapeDtypeStruct`` with shardings.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    broken, found = {}, (None, None)
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _read(manager, step, abstract)
            break
        except UNREADABLE as error:
            broken[step] = _reason(error)
    if broken and found[0] is None:
        reasons = "; ".join(f"{step} ({reason})" for step, reason in broken.items())
        raise ValueError(
            f"no checkpoint of {manager.directory} can be read: {reasons}. Put back a copy, or delete the folder of "
            "the run to begin anew"
        )
    for step, reason in broken.items():
        aside = manager.directory.parent / f"broken-checkpoint-{step}-{int(time.time())}"
        print(f"checkpoint {step} of {manager.directory} cannot be read; it is now {aside.name}. {reason}")
        if jax.process_index() == 0:
            shutil.move(manager.directory / str(step), aside)
    if broken and jax.process_count() > 1:
        multihost_utils.sync_global_devices("broken checkpoints")
    if broken:
        manager.reload()
    return found


# what orbax and tensorstore raise for files that are missing, cut off, or of another model
UNREADABLE = (OSError, ValueError, KeyError)


def _read(manager, step, abstract):
    arrays = abstract._asdict()
    model = {name: arrays.pop(name) for name in ("params", "constants")}
    items = {name: ocp.args.StandardRestore(tree) for name, tree in (("model", model), ("rest", arrays))}
    items["host"] = ocp.args.JsonRestore()
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    return type(abstract)(**restored["model"], **restored["rest"]), restored["host"]


# --- what people read ------------------------------------------------------------------------------------------------


def folder(path: pathlib.Path) -> pathlib.Path:
    """The absolute path of the folder of a run.

    Raises:
      ValueError: the address of a bucket, which would become a folder of that name on each machine; a file.
    """
    if re.match("[a-z0-9]{2,}:/", str(path)):
        raise ValueError(f"the folder of a run must be on a file system, got {path}; mount the bucket (gcsfuse) first")
    if path.is_file():
        raise ValueError(f"the folder of a run must be one, and {path} is a file; name another")
    return path.absolute()


def check_that_all_see(path: pathlib.Path):
    """What the first process wrote, of several.

    Raises:
      ValueError: in a process that does not find it within a minute.
    """
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices("the folder of a run")
    end = time.monotonic() + 60  # network file systems may take a while
    while not path.exists():
        if time.monotonic() > end:
            raise ValueError(
                f"process {jax.process_index()} does not see {path}, which the first one wrote; the folder of a run "
                "must be on storage that all machines share"
            )
        time.sleep(1)


def check_identity(path: pathlib.Path, identity: dict[str, Any]):
    """Writes down the settings of a new run; of one that goes on, they must be what they were.

    Raises:
      ValueError: other settings, with each that differs.
    """
    identity = json.loads(json.dumps(identity))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
        if names:
            changes = "; ".join(_difference(name, before.get(name), identity.get(name)) for name in names)
            raise ValueError(f"{path.parent} holds another run: {changes}. Name another folder, or delete this one")
        return
    write_atomically(path, json.dumps(identity, indent=1))


def _difference(name, before, now):
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        return "; ".join(_difference(f"{name}.{key}", before.get(key), now.get(key)) for key in keys)
    return f"{name} was {before!r} and is {now!r}"


def write_atomically(path: pathlib.Path, text: str):
    """Writes a file whole and then puts it in place, so that at any moment there is a complete one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Log:
    """The metrics of a run: progress bar, JSON lines, TensorBoard. Only the first process writes."""

    def __init__(self, out, step, config, host):
        self.config, self.out, self.step = config, out, step
        self.window, self.tokens, self.seconds = list(host["window"]), host["tokens"], host["seconds"]
        self.first = jax.process_index() == 0
        self.started = self.logged = time.perf_counter()
        self.logged_tokens = self.tokens

    def __enter__(self):
        if self.first:
            path = self.out / "metrics.jsonl"
            lines = [line for line in read_metrics(path) if line["step"] <= self.step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step + 1)
        self.bar = tqdm(
            total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not self.first
        )
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.first:
            self.file.close()
            self.board.close()

    def host(self):
        """What a checkpoint keeps of it."""
        seconds = self.seconds + time.perf_counter() - self.started
        return {"window": self.window, "tokens": self.tokens, "seconds": seconds}

    def read(self, step, metrics):
        """Waits for the metrics of a step, unless it was read."""
        if step <= self.step:
            return
        metrics = {name: float(x) for name, x in metrics.items()}
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(metrics[name])]
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is {metrics[bad[0]]} in step {step}; the last checkpoint in {self.out} is from before it. "
                "A lower learning rate, more warmup or a normalisation of the features may help"
            )
        self.step, self.tokens = step, self.tokens + metrics["tokens"]
        self.window = [self.window[0] + metrics["loss"], self.window[1] + metrics["gradient_norm"], self.window[2] + 1]
        self.bar.update(step - self.bar.n)
        if step % self.config.log_every and step != self.config.steps:
            return
        now, (loss, norm, count) = time.perf_counter(), self.window
        speed = (self.tokens - self.logged_tokens) / (now - self.logged)
        self.bar.set_postfix_str(f"loss {loss / count:.4f}, {speed:,.0f} tokens/s")
        line = {"loss": loss / count, "gradient_norm": norm / count, "learning_rate": metrics["learning_rate"]}
        line |= {"tokens": self.tokens, "tokens_per_second": round(speed, 1)}
        self._write(step, line | {"seconds": round(self.host()["seconds"], 2)})
        self.window, self.logged, self.logged_tokens = [0.0, 0.0, 0], now, self.tokens

    def write_evaluation(self, step, measured):
        self._write(step, {f"validation_{name}": value for name, value in measured.items()})
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.bar.write(f"step {step}: validation {numbers}")
        self.logged, self.logged_tokens = time.perf_counter(), self.tokens

    def _write(self, step, line):
        if not self.first:
            return
        self.file.write(json.dumps({"step": step} | line) + "\n")
        self.file.flush()
        for name, value in line.items():
            self.board.add_scalar(name, value, step)


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics file, without a last one that was cut off; none if there is no file."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines

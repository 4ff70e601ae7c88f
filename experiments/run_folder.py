"""The folder of a run: checkpoints that are complete or not there, metrics that people read, and what the run is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
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
    seal = functools.partial(_write_digests, out / "checkpoints")
    options = ocp.CheckpointManagerOptions(
        best_fn=_loss,
        best_mode="min",
        preservation_policy=kept,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=seal),
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
    """A loss that is damaged, which orbax would fail of, is as one that was not measured."""
    for path in sorted(folder.glob("[0-9]*/metrics/metrics")) if jax.process_index() == 0 else ():
        if not path.parents[1].name.isdigit():
            continue  # a run writes it just now
        try:
            loss = float(json.loads(path.read_bytes())["loss"])
            whole = loss == math.inf or _digests_of(path.parents[1]).get("metrics/metrics") in (None, _sha256(path))
        except FileNotFoundError:
            continue  # a run has just deleted it
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            print(f"{path} is damaged; the loss of that checkpoint is taken as not measured")
            write_atomically(path, json.dumps({"loss": math.inf}))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("losses of checkpoints")


def steps_by_loss(manager: ocp.CheckpointManager) -> list[int]:
    """The steps of all checkpoints, that of the smallest loss first, and the latest of those that are equal."""
    return sorted(manager.all_steps(), key=lambda step: (_loss(manager.metrics(step)), -step))


DIGESTS = "digests.json"  # in each checkpoint: {path of a file: its SHA-256}


def _write_digests(folder):
    """Of the checkpoint that was written last. Orbax calls it when all files are there, in the background."""
    names = [path for path in folder.iterdir() if path.name.split(".")[0].isdigit()]
    checkpoint = max(names, key=lambda path: int(path.name.split(".")[0]))
    paths = sorted(path for part in ("model", "rest", "host", "metrics") for path in checkpoint.glob(f"{part}/**/*"))
    digests = {str(path.relative_to(checkpoint)): _sha256(path) for path in paths if path.is_file()}
    write_atomically(checkpoint / DIGESTS, json.dumps(digests, indent=1))


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests_of(checkpoint):
    """{} for a checkpoint without, as older versions wrote them."""
    path = checkpoint / DIGESTS
    return read_json(path) if path.exists() else {}


def _damage(checkpoint):
    """Which file of a checkpoint is not what was written, as far as the first process can tell; else ""."""
    words = ""
    if jax.process_index() == 0:
        try:
            for name, digest in _digests_of(checkpoint).items():  # without its loss a checkpoint is as good as any
                if not name.startswith("metrics/") and _sha256(checkpoint / name) != digest:
                    words = f"{name} is not what was written"
        except (OSError, ValueError) as error:
            words = _reason(error)
    return of_first_process(words.encode()).rstrip(b"\0").decode()


def _read(manager, step, read):
    """What ``read`` makes of a checkpoint, and why it could not: (result, "") or (None, reason)."""
    checkpoint = pathlib.Path(manager.directory) / str(step)
    if words := _damage(checkpoint):
        return None, words
    try:
        return read(step), ""
    # Orbax and tensorstore raise Exception itself, AttributeError, ... of a damaged file. The reason is reported, and
    # an error of ours in between would be that of every checkpoint, of which the callers raise a ValueError.
    except Exception as error:
        return None, _reason(error)


def read_first(manager: ocp.CheckpointManager, steps: list[int], read: Callable[[int], Any], count: int) -> dict:
    """What ``read`` makes of the first ``count`` of ``steps`` that can be read, by step; the others are named.

    Raises:
      ValueError: none can be read.
    """
    found, broken = {}, []
    for step in steps:
        if len(found) == count:
            break
        result, reason = _read(manager, step, read)
        if reason:
            broken.append(f"{step} ({reason})")
            print(f"checkpoint {broken[-1]} of {manager.directory} cannot be read; another one is taken")
        else:
            found[step] = result
    if not found:
        raise ValueError(f"no checkpoint of {manager.directory} can be read: {'; '.join(broken)}. Put back a copy")
    return found


def _reason(error):
    words = (str(error) or "no message").strip().splitlines()[0]
    words = words if len(words) <= 300 else f"{words[:80]} … {words[-200:]}"  # tensorstore's cause is at the end
    return f"{type(error).__name__}: {words}"


def save(manager: ocp.CheckpointManager, state: Any, host: Any, loss: float = math.inf):
    """Begins to write a checkpoint; the arrays may be donated after it returns.

    Args:
      state: a named tuple of arrays, with "step", "params" and "constants".
      host: what else to keep, as JSON has it.
      loss: on which the best is chosen; ∞ where it was not measured.

    Raises:
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    arrays = state._asdict()
    model = {name: arrays.pop(name) for name in ("params", "constants")}
    items = {name: ocp.args.StandardSave(tree) for name, tree in (("model", model), ("rest", arrays))}
    items["host"] = ocp.args.JsonSave(host)
    step, metrics = int(state.step), {"loss": loss}
    _say_what_failed(manager, lambda: manager.save(step, args=ocp.args.Composite(**items), metrics=metrics))


def finish(manager: ocp.CheckpointManager):
    """Waits until the last checkpoint is complete.

    Raises:
      OSError: it cannot be written.
    """
    _say_what_failed(manager, manager.wait_until_finished)


def check(manager: ocp.CheckpointManager):
    """Raises an ``OSError`` if the last checkpoint could not be written, as far as that is known yet."""
    if not manager.is_saving_in_progress():
        finish(manager)


def _say_what_failed(manager, action):
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:  # of tensorstore, a full disk is a ValueError
        raise OSError(
            f"a checkpoint cannot be written to {manager.directory}: {_reason(error)}. Those that are complete stay; "
            "make space, and the same command goes on from the last of them"
        ) from error


def restore(manager: ocp.CheckpointManager, abstract: Any) -> tuple[Any, Any]:
    """The newest checkpoint that can be read, as (state, host); (None, None) where there is none at all.

    Broken ones that are newer are moved out of the way, so that the run can write theirs again.

    Args:
      abstract: the state as ``ShapeDtypeStruct`` with shardings.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    arrays = abstract._asdict()
    model = {name: arrays.pop(name) for name in ("params", "constants")}
    items = {name: ocp.args.StandardRestore(tree) for name, tree in (("model", model), ("rest", arrays))}
    args = ocp.args.Composite(**items, host=ocp.args.JsonRestore())
    broken, found = {}, None
    for step in sorted(manager.all_steps(), reverse=True):
        found, reason = _read(manager, step, lambda step: manager.restore(step, args=args))
        if not reason:
            break
        broken[step] = reason
    if broken and found is None:
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
    return (None, None) if found is None else (type(abstract)(**found["model"], **found["rest"]), found["host"])


def of_first_process(data: bytes) -> bytes:
    """What the first process has, in all of them; the others may give b""."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return multihost_utils.broadcast_one_to_all(np.frombuffer(data.ljust(size, b"\0"), np.uint8)).tobytes()


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


def check_identity(
    path: pathlib.Path, identity: dict[str, Any], free: Collection[str] = (), words: Mapping[str, str] | None = None
):
    """Writes down the settings of a new run; of one that goes on, they must be what they were.

    Args:
      path: the file.
      identity: by name, as far as JSON can say it; a dict in it has names "of.this.kind".
      free: names of settings that may change.
      words: what the user calls a setting, by its name.

    Raises:
      ValueError: other settings, with each that differs; a number that is not finite, which would differ from itself.
    """
    bad = [f"{name} is {x}" for name, x in _leaves(identity) if isinstance(x, float) and not math.isfinite(x)]
    if bad:
        raise ValueError(f"the settings of a run must be finite numbers: {'; '.join(bad)}")
    if not path.exists():
        write_atomically(path, json.dumps(identity, indent=1))
        return
    before, now, words = dict(_leaves(read_json(path))), dict(_leaves(json.loads(json.dumps(identity)))), words or {}
    names = [name for name in sorted({*before, *now} - {*free}) if before.get(name) != now.get(name)]
    if names:
        changes = [f"{words.get(name, name)} was {before.get(name)!r} and is {now.get(name)!r}" for name in names]
        raise ValueError(
            f"{path.parent} holds another run: {'; '.join(changes)}. Name another folder, or delete this one"
        )


def words(config: Any, identity: dict[str, Any], options: Mapping[str, str]) -> dict[str, str]:
    """What the user calls each setting of a program: an option, or what its preset has.

    Args:
      config: of training.
      identity: the other settings.
      options: what the program calls those that are not its preset's, by their names in run.json.
    """
    names = [name for name, _ in _leaves({"training": dataclasses.asdict(config), **identity})]
    return {name: f"{name.rpartition('.')[2]} of --preset" for name in names} | dict(options)


def results(folder: pathlib.Path, mark: str, table: Callable[[list[dict]], str]) -> list[dict]:
    """The results of all runs in a folder that have ``mark``, by which experiments tell theirs.

    Raises:
      ValueError: a file that is damaged, or from which ``table`` cannot make a row.
    """
    rows = []
    for path in sorted(folder.glob("**/results.json")):
        row = read_json(path)
        if mark in row:
            try:
                table([row])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not whole ({_reason(error)}); run its command again") from error
            rows.append(row)
    return rows


def _leaves(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: a file that holds something else, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding, too
        raise ValueError(f"{path} is not whole JSON: {error}; put back a copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; put back a copy")
    return content


def write_atomically(path: pathlib.Path, text: str):
    """Writes a file whole and then puts it in place, so that at any moment there is a complete one.

    Raises:
      OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # which does not name the file, of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


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
            # Not its SummaryWriter: that writes in a thread, which dies of a full disk while others wait for it.
            (self.out / "tensorboard").mkdir(exist_ok=True)
            self.board = event_file_writer.EventsWriter(str(self.out / "tensorboard" / "events"))
            restart = SessionLog(status=SessionLog.START)  # hides what is there of this step and later ones
            self.board.write_event(Event(step=self.step + 1, session_log=restart))
        self.bar = tqdm(
            total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not self.first
        )
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        if self.first:
            for file in (self.file, self.board):
                with contextlib.suppress(*[OSError] if error else []):  # of a full disk, once more
                    file.close()

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
        self.logged, self.logged_tokens = now, self.tokens
        if step % self.config.log_every == 0:  # else a run with more steps, which goes on here, has a part of a line
            self.window = [0.0, 0.0, 0]

    def write_evaluation(self, step, measured):
        self._write(step, {f"validation_{name}": value for name, value in measured.items()})
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.bar.write(f"step {step}: validation {numbers}")
        self.logged, self.logged_tokens = time.perf_counter(), self.tokens

    def _write(self, step, line):
        if not self.first:
            return
        try:
            self.file.write(json.dumps({"step": step} | line) + "\n")
            self.file.flush()
            for name, value in line.items():
                self.board.write_event(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))
            self.board.flush()
        except OSError as error:
            raise OSError(
                f"metrics cannot be written to {self.out}: {error}. The checkpoints stay; make space, and the same "
                "command goes on from the last of them"
            ) from error


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics file, without a last one that was cut off; none if there is no file.

    Raises:
      ValueError: a file with a line that is none.
    """
    *content, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, text in enumerate([*content, last], 1):
        try:
            line = json.loads(text.decode("utf-8"))
            if not isinstance(line["step"], int) or not all(isinstance(x, int | float) for x in line.values()):
                raise ValueError("it must be an object of numbers, with a step")
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number <= len(content):
                raise ValueError(
                    f"line {number} of {path} is not a line of metrics ({_reason(error)}); mend or delete that line"
                ) from error
    return lines

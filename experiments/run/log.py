"""The metrics of a run: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time

import jax
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from experiments.run import files
from experiments.run.command_line import in_short


class Log:
    """Shows and writes the metrics of a run. Only the first process writes.

    Args:
      out: the folder of the run.
      step: after which the run goes on; later lines of an earlier attempt are deleted.
      config: the ``TrainConfig`` of the run.
      host: the numbers of ``Log.host`` from the checkpoint.
    """

    def __init__(self, out, step, config, host):
        self.config, self.out, self.step = config, out, step
        self.window, self.tokens, self.seconds = list(host["window"]), host["tokens"], host["seconds"]
        self.first = jax.process_index() == 0
        self.started = self.logged = time.perf_counter()
        self.logged_tokens = self.tokens
        self.numbers = ""  # beside the bar

    def __enter__(self):
        if self.first:
            path = self.out / "metrics.jsonl"
            lines = [line for line in read_metrics(path) if line["step"] <= self.step]
            files.write(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.file = path.open("a", encoding="utf-8")
            # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the program waits for it forever.
            (self.out / "tensorboard").mkdir(exist_ok=True)
            self.board = event_file_writer.EventsWriter(str(self.out / "tensorboard" / "events"))
            restart = SessionLog(status=SessionLog.START)  # hides earlier points of this step and later ones
            self.board.write_event(Event(step=self.step + 1, session_log=restart))
        self.bar = tqdm(
            total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not self.first
        )
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        if self.first:
            for file in (self.file, self.board):
                with contextlib.suppress(*[OSError] if error else []):  # a full disk raises once more
                    file.close()

    def host(self):
        """The numbers that a checkpoint holds, so that the log can go on."""
        seconds = self.seconds + time.perf_counter() - self.started
        return {"window": self.window, "tokens": self.tokens, "seconds": seconds}

    def show(self, words):
        """Says beside the bar what the program does, until the next step or the end of the evaluation."""
        self.bar.set_postfix_str(words)

    def read(self, step, metrics):
        """Waits for the metrics of a step, unless they were read before.

        Raises:
          FloatingPointError: the loss or the gradient is not finite.
          OSError: the metrics cannot be written.
        """
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
        self.bar.set_postfix_str(self.numbers, refresh=False)
        self.bar.update(step - self.bar.n)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write_window(step, metrics["learning_rate"])

    def _write_window(self, step, learning_rate):
        now, (loss, norm, count) = time.perf_counter(), self.window
        speed = (self.tokens - self.logged_tokens) / (now - self.logged)
        self.numbers = f"loss {loss / count:.4f}, {speed:,.0f} tokens/s"
        self.show(self.numbers)
        line = {"loss": loss / count, "gradient_norm": norm / count, "learning_rate": learning_rate}
        line |= {"tokens": self.tokens, "tokens_per_second": round(speed, 1)}
        self._write(step, line | {"seconds": round(self.host()["seconds"], 2)})
        self.logged, self.logged_tokens = now, self.tokens
        if step % self.config.log_every == 0:  # the last line may be shorter; a run with more steps completes it
            self.window = [0.0, 0.0, 0]

    def write_evaluation(self, step, measured):
        self._write(step, {f"validation_{name}": value for name, value in measured.items()})
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.bar.write(f"step {step}: validation {numbers}")
        self.show(self.numbers)
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
    """The lines of a metrics file, without a last line that was cut off; none if there is no file.

    Raises:
      ValueError: a line that is not an object of numbers with a step.
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
                    f"line {number} of {path} is not a line of metrics ({in_short(error)}); mend or delete that line"
                ) from error
    return lines

"""Training: one loop for every experiment. It survives interruption at any moment, and goes on bit for bit.

    state, run folder:  train(make_model, loss, batches, config, out, ...)
    out/checkpoints/    the last few and the best, by orbax: model, optimizer, memory, position in the data; each has
                        the SHA-256 of its files. If one is damaged, the checkpoint before it is taken.
    out/metrics.jsonl   one line for every ``log_every`` steps and every evaluation; out/tensorboard/ has the same
    out/run.json        the settings of the run. A run with other settings is refused. Only settings that change no
                        number may differ: FREE, and ``steps`` where the schedule has no end.

Step n is dispatched before the loss of step n − 1 is read, so that the device does not wait for the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from experiments.run import checkpoints, devices, folder, signals
from experiments.run.log import Log

Metrics = dict[str, float]


class Batches(Protocol):
    """An iterator over batches, dicts of NumPy arrays, that can say where it is, like the iterators of grain."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...  # as JSON can hold it

    def set_state(self, state: Any) -> None: ...


# (model, batch, memory, rngs) -> the sum of the losses of all tokens, the number of tokens, the memory of the next step
Loss = Callable[[nnx.Module, Any, Any, nnx.Rngs], tuple[jax.Array, jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's small language models (section 6.3): Adam, clipped, without decay."""

    steps: int = 500_000
    """Updates of the parameters."""
    learning_rate: float = 2.5e-4
    """The highest learning rate."""
    schedule: Literal["authors", "cosine", "inverse_sqrt", "constant"] = "authors"
    """After warmup: a cosine to 0 ("authors": as their toolkit has it, see ``learning_rate``), 1/√step, or constant."""
    warmup: int = 2000
    """Updates in which the learning rate rises linearly."""
    clip: float = 0.25
    """Largest norm of the gradient; 0: no limit."""
    b1: float = 0.9
    """Adam's decay of the mean of gradients."""
    b2: float = 0.999
    """Adam's decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Adam's ε."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices and embeddings; biases and normalisations have none."""
    accumulate: int = 1
    """Into how many pieces a batch is cut to need less memory; the update is the same."""
    eval_every: int = 4000
    """Steps between evaluations, each followed by a checkpoint."""
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 100
    """Steps that are averaged in a line of the metrics."""
    keep: int = 2
    """How many of the last checkpoints stay, beside the best."""
    seed: int = 1111
    """The seed of the parameters and of dropout."""

    def __post_init__(self):
        for name in ("steps", "accumulate", "eval_every", "save_every", "log_every", "keep"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup", "clip", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number that is not negative, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after a step, without any interruption."""
        return step == self.steps or step % self.eval_every == 0 or step % self.save_every == 0


SCHEDULES = ("authors", "cosine", "inverse_sqrt", "constant")
FREE = ("log_every", "save_every", "eval_every", "keep")  # may change when a run goes on


def learning_rate(config: TrainConfig) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of update number t = 0, 1, ... ``[]`` -> ``[]``.

    In the warmup it is rate · (t + 1)/warmup. "cosine" then falls as a half cosine that would be 0 at t = steps, one
    update after the last.

    "authors" is the authors' toolkit, which sets the rate after each update. The first update has the full rate, the
    warmup then has rate · t/warmup, and from t = warmup on the rate is rate · (1 + cos(πt/steps))/2, as if there had
    been no warmup.
    """
    rate, warmup, steps = config.learning_rate, config.warmup, config.steps
    first = max(warmup, 1)  # updates until the highest rate

    def authors(t):
        cosine = rate / 2 * (1 + jnp.cos(jnp.pi * t / steps))
        return jnp.where(t == 0, rate, jnp.where(t < warmup, rate * t / max(warmup, 1), cosine))

    def inverse_sqrt(t):
        t = t + 1
        return rate * jnp.minimum(t / first, jnp.sqrt(first / t))

    def constant(t):
        return rate * jnp.minimum(1.0, (t + 1) / first)

    return {
        "authors": authors,
        "cosine": optax.warmup_cosine_decay_schedule(rate / first, rate, first - 1, max(steps, first)),
        "inverse_sqrt": inverse_sqrt,
        "constant": constant,
    }[config.schedule]


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping, Adam, and decay of the matrices."""

    def is_matrix(path, _):
        return str(getattr(path[-1], "key", "")) in MATRICES

    matrices = functools.partial(jax.tree_util.tree_map_with_path, is_matrix)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, matrices) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


MATRICES = ("kernel", "embedding", "cluster_kernel", "head", "gate", "up", "down")  # the last three: of experts


# --- one step --------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """The arrays that a step changes, and the arrays of the model that are not trained."""

    step: jax.Array
    params: Any
    constants: Any
    optimizer: Any
    memory: Any


def initial_state(make_model: Callable[[], nnx.Module], config: TrainConfig, memory: Any = None) -> State:
    """The state of a new model. ``memory`` is the argument of the loss in the first step."""
    params, constants = _variables(make_model())
    return State(jnp.zeros((), jnp.int32), params, constants, optimizer(config).init(params), memory)


def _variables(model) -> tuple[Any, Any]:
    """The arrays of a model that are trained, and its other arrays."""
    _, params, constants = nnx.split(model, nnx.Param, ...)
    return nnx.to_pure_dict(nnx.as_pure(params)), nnx.to_pure_dict(nnx.as_pure(constants))


def graph_of(make_model: Callable[[], nnx.Module]) -> nnx.GraphDef:
    """The model without its arrays."""
    graph, _, _ = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)
    return graph


def model_of(graph: nnx.GraphDef, state: State) -> nnx.Module:
    """The model with the parameters of a state."""
    return nnx.merge(graph, nnx.State(state.params), nnx.State(state.constants))


def make_step(graph: nnx.GraphDef, loss: Loss, config: TrainConfig):
    """The function (state, batch) -> (state, metrics), to be jitted; the first argument may be donated."""
    update, rate = optimizer(config).update, learning_rate(config)
    gradient = functools.partial(_gradient, graph, loss)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.accumulate == 1:
            gradients, losses, count, memory = gradient(state, batch, state.memory, key)
        else:
            gradients, losses, count, memory = _accumulated(gradient, state, batch, key, config.accumulate)
        denominator = jnp.maximum(count, 1)  # a batch may have no target that counts; then its gradient is 0
        gradients = jax.tree.map(lambda x: x / denominator, gradients)
        updates, moments = update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": losses / denominator,
            "tokens": count,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, state.constants, moments, memory), metrics

    return step


def _gradient(graph, loss, state, batch, memory, key):
    """The gradient of the sum of the losses, that sum, the number of tokens, and the next memory."""

    def total(params):
        model = model_of(graph, state._replace(params=params))
        losses, count, after = loss(model, batch, memory, nnx.Rngs(key))
        return losses, (count, after)

    (losses, (count, after)), gradients = jax.value_and_grad(total, has_aux=True)(state.params)
    return gradients, losses, count.astype(jnp.float32), after


def _accumulated(gradient, state, batch, key, count):
    """``_gradient`` of a batch that is cut into ``count`` pieces."""

    def add_piece(sums, inputs):
        *sums_of_piece, memory = gradient(state, *inputs)
        return jax.tree.map(jnp.add, sums, tuple(sums_of_piece)), memory

    inputs = (*_pieces((batch, state.memory), count), jax.random.split(key, count))
    zeros = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros(()))
    sums, memory = jax.lax.scan(add_piece, zeros, inputs)
    return *sums, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), memory)


def _pieces(tree, count):
    """Every count-th row makes a piece, so that rows stay on their devices. A number goes into all pieces."""

    def split(x):
        if not x.ndim:
            return jnp.broadcast_to(x, (count,))
        if x.shape[0] % count:
            raise ValueError(f"accumulate must divide the batch of {x.shape[0]} rows, got {count}")
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


# --- the loop --------------------------------------------------------------------------------------------------------


def train(
    make_model: Callable[[], nnx.Module],
    loss: Loss,
    batches: Batches,
    config: TrainConfig,
    out: pathlib.Path,
    *,
    pretrained: Callable[[], nnx.Module] | None = None,
    memory: Any = None,
    evaluate: Callable[[nnx.Module], Metrics] | None = None,
    identity: dict[str, Any] | None = None,
    words: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
) -> nnx.Module:
    """Trains a model, or goes on where ``out`` ends.

    Args:
      make_model: makes the model, the same in every call.
      loss: takes the model, a batch, the memory after the step before, and random streams. It returns the sum of the
        losses, the number of tokens, and the memory. An evaluation has no random streams.
      batches: the training data; the position in it is saved.
      config: how to train.
      out: the folder of the run.
      pretrained: loads the model that training begins from, called once and not where a run goes on; make_model then
        only gives the shapes. Without it, training begins from make_model().
      memory: the memory of the first step, a tree of arrays whose first axis is the batch; None for losses that need
        none.
      evaluate: takes the model and returns numbers by name. The smallest "loss" makes the best checkpoint.
      identity: the other settings of this run, as JSON can hold them: the model, the vocabulary, ...
      words: the user's name for a setting, by its name in ``out``/run.json, as "model.d_model" or "training.steps".
      mesh: of ``fwt_jax.sharding.make_mesh``; one device if not given.

    Returns:
      The model after the last step; ``load`` has the best.

    Raises:
      ValueError: the folder holds another run, or one with more than config.steps steps, or is in use; the mesh does
        not divide the batch.
      OSError: a checkpoint or the metrics cannot be written; the complete checkpoints stay.
      FloatingPointError: a loss or gradient that is not finite; the last checkpoint is from before it.
      KeyboardInterrupt: SIGINT or SIGTERM asked to stop; a checkpoint of the last step was written. If one of several
        processes gets SIGTERM, all stop; SIGINT interrupts them without a new checkpoint.
    """
    out = folder.folder(pathlib.Path(out))
    with contextlib.ExitStack() as stack:
        # Several processes must stop at the same step: jax.distributed handles SIGTERM then, and orbax knows of it.
        several = jax.process_count() > 1
        stop = threading.Event() if several else stack.enter_context(signals.stop_request())
        if jax.process_index() == 0:
            stack.enter_context(_lock(out))
            _check_settings(out, config, identity or {}, words or {})
        folder.check_that_all_see(out / "run.json")
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        manager = stack.enter_context(checkpoints.manager(out, config.keep, config.saves))
        init = functools.partial(initial_state, make_model, config, memory)
        load = None if pretrained is None else functools.partial(_pretrained_state, pretrained, config, memory)
        state, host = _start(manager, init, load, batches, mesh)
        if int(state.step) > config.steps:
            raise ValueError(
                f"the run in {out} has made {int(state.step)} steps already, more than the {config.steps} asked for; "
                "ask for at least as many, or name another folder"
            )
        batches.set_state(host["batches"])
        log = stack.enter_context(Log(out, int(state.step), config, host))
        return _loop(graph_of(make_model), loss, batches, config, evaluate, mesh, manager, state, log, stop)


def _lock(out):
    """The lock of a run's folder, which is released at the end of a ``with``."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(out / "lock", timeout=0).acquire()
    except filelock.Timeout as error:
        raise ValueError(f"another run trains in {out}: wait for its end, or name another folder") from error


def _check_settings(out, config, identity, words):
    free = {f"training.{name}" for name in FREE}
    names = {f"training.{name}": name for name in dataclasses.asdict(config)} | dict(words)
    if config.schedule in ("constant", "inverse_sqrt"):
        free.add("training.steps")
    else:
        names["training.steps"] += f" (on which the schedule {config.schedule!r} depends)"
    settings = {"training": dataclasses.asdict(config), **identity}
    folder.check_identity(out / "run.json", settings, free, names)


def _start(manager, init, load, batches, mesh):
    """The state and the host's values to go on from: of the newest checkpoint, or new ones."""
    abstract = State(**devices.abstract(jax.eval_shape(init)._asdict(), mesh))
    state, host = checkpoints.restore(manager, abstract)
    if state is None:
        shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract)
        state = jax.jit(init, out_shardings=shardings)() if load is None else load(shardings)
        host = {"batches": batches.get_state(), "window": [0.0, 0.0, 0], "tokens": 0.0, "seconds": 0.0}
    return state, host


def _pretrained_state(pretrained, config, memory, shardings) -> State:
    """``initial_state`` of a model that is loaded, without a second copy of its parameters."""
    params, constants = _variables(pretrained())
    moments = jax.jit(optimizer(config).init, out_shardings=None if shardings is None else shardings.optimizer)(params)
    state = State(jnp.zeros((), jnp.int32), params, constants, moments, memory)
    return state if shardings is None else jax.device_put(state, shardings)


def _loop(graph, loss, batches, config, evaluate, mesh, manager, state, log, stop):
    # The sharding is given, because the compiler may choose another one, and then compile the second step again.
    split = None if mesh is None else (jax.tree.map(lambda x: x.sharding, state), None)
    step_function = jax.jit(make_step(graph, loss, config), donate_argnums=0, out_shardings=split)
    pending = None  # the metrics of the last step, which are read when the next step runs

    def save(step, measured):
        host = {"batches": batches.get_state(), **log.host()}
        checkpoints.save(manager, state, host, measured.get("loss", math.inf))

    if int(state.step) < config.steps:
        log.show("compiling")
    for step in range(int(state.step) + 1, config.steps + 2):  # one more, to stop after the last evaluation
        if manager.reached_preemption(step) if jax.process_count() > 1 else stop.is_set():
            if pending is not None:
                log.read(*pending)
                save(step - 1, {})
            checkpoints.finish(manager)
            words = f"stopped after step {step - 1}, which is saved" if step > 1 else "stopped before the first step"
            raise KeyboardInterrupt(f"{words}; the same command goes on from there")
        if step > config.steps:
            break
        checkpoints.check(manager)
        batch = devices.place(next(batches), mesh)
        state, metrics = step_function(state, batch)
        if pending is not None:
            log.read(*pending)
        pending = (step, metrics)
        if config.saves(step):
            log.read(*pending)  # raises if the loss is not finite; such a state is not saved
            pending, measured = None, {}
            if evaluate is not None and (step == config.steps or step % config.eval_every == 0):
                log.show("evaluating")
                measured = evaluate(model_of(graph, state))
                log.write_evaluation(step, measured)
            save(step, measured)
            if step == config.steps:
                checkpoints.finish(manager)
    return model_of(graph, state)


def perplexity(nats: float) -> float:
    """exp(nats); at most 1e304, which JSON can hold. NaN stays NaN."""
    return math.exp(min(nats, 700.0))


def load(
    out: pathlib.Path,
    make_model: Callable[[], nnx.Module],
    *,
    best: bool = True,
    average: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> tuple[nnx.Module, int]:
    """The best model of a run (the last, where nothing was evaluated, or if not ``best``), and its step.

    With ``average`` it is the mean of the checkpoints of these steps, and the last of them. Without, a checkpoint that
    cannot be read is named, and the next one takes its place. No checkpoint is written or deleted, so a run may train
    in the folder at the same time.

    Raises:
      ValueError: a folder without checkpoints, or without one that is to be averaged.
    """
    out = pathlib.Path(out).absolute()
    if not (out / "checkpoints").is_dir():
        raise ValueError(f"{out} has no checkpoints; train first, or name the folder of a run")
    with checkpoints.reader(out) as manager:
        state = jax.eval_shape(lambda: initial_state(make_model, TrainConfig(steps=1)))
        state = State(**devices.abstract(state._asdict(), mesh))
        model = {"params": state.params, "constants": state.constants}
        args = ocp.args.Composite(model=ocp.args.StandardRestore(model))
        steps = checkpoints.steps_by_loss(manager) if best else sorted(manager.all_steps())[::-1]
        if not steps:
            raise ValueError(f"{out / 'checkpoints'} is empty; train first, or name the folder of a run")
        steps = [step for step in steps if step in average or not average]
        read = {}
        if steps:
            restore = functools.partial(manager.restore, args=args)
            read = checkpoints.read_first(manager, steps, lambda step: restore(step)["model"], len(average) or 1)
        if len(read) < len(average):
            raise ValueError(
                f"of the checkpoints {list(average)}, which are to be averaged, {out / 'checkpoints'} has "
                f"{sorted(read)}; a run keeps the last so many as it is started with, and the best"
            )
        restored = read[max(read)]
        restored["params"] = jax.tree.map(lambda *x: sum(x) / len(x), *(tree["params"] for tree in read.values()))
    return model_of(graph_of(make_model), state._replace(**restored)), max(read)

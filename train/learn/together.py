"""The steps of several runs taken in one program: small models leave most of an accelerator idle."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from train.launch.host import say
from train.launch.preemption import notice

Step = Callable[..., tuple[Any, Any]]
# Of tuples of states, batches and factors, one of each for a run, the pairs of state and metrics.
Steps = Callable[..., list[tuple[Any, Any]]]


def alone(program: Hashable, step: Step) -> Step:
    """The compiled step of a run that has its program for itself; a step's state is given up for the next one's."""
    return jax.jit(step, donate_argnums=0)


@dataclasses.dataclass
class _Call:
    """A step that a run waits for: its program and arguments, then what came of it."""

    name: str
    program: Hashable
    step: Step
    given: tuple[Any, ...]
    result: tuple[Any, Any] | None = None
    error: Exception | None = None


class Together:
    """Runs as many threads, which meet at every step: those of one program go through it as one batch (`jax.vmap`).

    Each run has its own loop, stream, checkpoints and log, and may end, go back or fail alone; the others go on. Steps
    come to the same as alone but for the rounding of sums. A branch of a step becomes a choice between both its sides:
    empty microbatches cost as much as full ones.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work = 0
        self._stopped = False
        self._waiting: list[_Call] = []
        self._programs: dict[Hashable, Steps] = {}

    def __call__(self, works: Mapping[str, Callable[[], None]]) -> None:
        """Does all works, by name, and returns when the last has ended.

        Each failure is told when it happens; raises the first. On Ctrl-C the works end before their next step.
        """
        errors: list[BaseException] = []
        self._at_work = len(works)

        def thread(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                if isinstance(error, Exception):
                    say(f'ended: {error}')
            finally:
                with self._changed:
                    self._at_work -= 1
                    self._changed.notify_all()

        threads = [threading.Thread(target=thread, args=(work,), name=name) for name, work in works.items()]
        with notice():  # of SIGTERM, which this thread alone is told of
            try:
                for each in threads:
                    each.start()
                self._wait()
            except BaseException:
                with self._changed:
                    self._stopped = True
                    self._at_work -= sum(each.ident is None for each in threads)
                    self._changed.notify_all()
                self._wait()
                raise
        if errors:
            raise errors[0]

    def _wait(self) -> None:
        """Returns when all works have ended. Not by `join`: interrupted, Python 3.11 takes a thread for dead."""
        with self._changed:
            self._changed.wait_for(lambda: self._at_work <= 0)

    def compiled(self, program: Hashable, step: Step) -> Step:
        """For `train.loop.Plan.compiled`: a run's step. Steps of one `program` differ in their arguments alone."""

        def take(*given: Any) -> tuple[Any, Any]:
            leaves, tree = jax.tree.flatten(given)
            shapes = tuple((x.shape, x.dtype) for x in leaves)
            call = _Call(threading.current_thread().name, (program, shapes, tree), step, given)
            with self._changed:
                self._waiting.append(call)
                self._changed.notify_all()
                while call.result is None and call.error is None:
                    if self._stopped:
                        raise KeyboardInterrupt
                    # In the thread of a run that waits, whose mesh is set.
                    if len(self._waiting) == self._at_work:
                        self._take()
                    else:
                        self._changed.wait()
            if call.error is not None:
                raise call.error
            assert call.result is not None
            return call.result

        return take

    def _take(self) -> None:
        """Takes all steps that are waited for."""
        calls, self._waiting = sorted(self._waiting, key=lambda call: call.name), []
        for program in dict.fromkeys(call.program for call in calls):
            several = [call for call in calls if call.program == program]
            key = (program, len(several))
            try:
                if key not in self._programs:
                    self._programs[key] = _several(several[0].step) if len(several) > 1 else _one(several[0].step)
                results = self._programs[key](*zip(*(call.given for call in several), strict=True))
                for call, result in zip(several, results, strict=True):
                    call.result = result
            except Exception as error:  # each run ends with it
                for call in several:
                    call.error = error
        self._changed.notify_all()


def _one(step: Step) -> Steps:
    only = alone('', step)
    return lambda *given: [only(*(argument for (argument,) in given))]


def _several(step: Step) -> Steps:
    def steps(*given: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        stacked = (jax.tree.map(lambda *each: jnp.stack(each), *several) for several in given)
        results = jax.vmap(step)(*stacked)
        return [jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(given[0]))]

    return jax.jit(steps, donate_argnums=0)

"""Spikes: updates that would do harm are skipped inside the compiled step, and what the host makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import InputError, did_you_mean
from data.mixture import as_dict
from model.config import ModelConfig

Settings = Mapping[str, Any]
# Names of what is watched, and the least deviation from the median that counts as one: loss in nats, the gradient's
# norm as a logarithm, as it varies by factors.
WATCHED = {'loss': 0.01, 'gradient_norm': 0.05}
FINE, SPIKE, NOT_FINITE = range(3)
POLICIES = ('skip', 'stop', 'rewind')
LIMIT: dict[str, Any] = {'above': math.inf, 'below': -math.inf, 'then': 'alarm'}


class Rewind(Exception):
    """The stage is to go back to the newest checkpoint at or before `step`, and then to leave out the steps `skip`."""

    def __init__(self, step: int, reason: str, skip: tuple[int, ...] = ()):
        super().__init__(reason)
        self.step, self.reason, self.skip = step, reason, skip


def limit_of(given: Any) -> dict[str, Any]:
    """A limit with all of LIMIT's fields: a number stands for what is not to be exceeded."""
    return {**LIMIT, **(as_dict(given) if hasattr(given, 'keys') else {'above': float(given)})}


def check_guard(settings: Settings, alarms: Settings) -> None:
    """Raises InputError for settings of a guard, or limits of metrics, that mean nothing."""
    for name, given in as_dict(alarms).items():
        limit = limit_of(given)
        for field in limit.keys() - LIMIT.keys():
            raise InputError(f'alarms.{name}: no field {field!r}{did_you_mean(field, LIMIT)}')
        if limit['then'] not in ('alarm', 'stop', 'rewind'):
            raise InputError(f"alarms.{name}.then is {limit['then']!r}: expected 'alarm', 'stop' or 'rewind'")
        if limit['then'] == 'rewind' and not settings['sigma']:
            raise InputError(f"alarms.{name}.then is 'rewind': expected a guard.sigma above 0, as it leaves out a step")
    for field, least in (('sigma', 0), ('window', 8), ('patience', 1), ('back', 0)):
        if not settings[field] >= least:
            raise InputError(f'guard.{field} is {settings[field]}: expected {least} or more')
    if settings['policy'] == 'rewind' and not settings['sigma']:
        raise InputError("guard.policy is 'rewind': expected a guard.sigma above 0, as it leaves out steps")
    if settings['policy'] not in POLICIES:
        raise InputError(f'guard.policy is {settings["policy"]!r}: expected one of {", ".join(POLICIES)}')


def check_clip(stage: Settings, model: ModelConfig) -> None:
    """Raises InputError where a stage's `qk_clip` cannot be."""
    if not stage['qk_clip'] >= 0:
        raise InputError(f'qk_clip is {stage["qk_clip"]}: expected a logit above 0, or 0 for none')
    if stage['qk_clip'] and (stage['trainable'] or model.lora_rank):
        raise InputError('qk_clip is set: expected a stage in which all weights learn, without adapters')


def first_health(settings: Settings) -> dict[str, np.ndarray]:
    """What the guard knows before the first step: for each number watched, its last values in accepted steps; how many
    steps were accepted, and how many before this one were not fine in a row."""
    windows = {name: np.zeros(settings['window'], np.float32) for name in WATCHED}
    return {**windows, 'accepted': np.zeros((), np.int32), 'row': np.zeros((), np.int32)}


def saved_health(health: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The same as JSON; float32 survives that to the last bit."""
    return {name: np.asarray(x).tolist() for name, x in jax.device_get(dict(health)).items()}


def restored_health(settings: Settings, saved: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """From what `saved_health` gave; new where a checkpoint has none, or one of another window."""
    new = first_health(settings)
    if not saved or len(saved['loss']) != settings['window']:
        return new
    return {name: np.asarray(saved[name], x.dtype) for name, x in new.items()}


def guard(settings: Settings) -> Callable[..., Any] | None:
    """Says of a step whether its update is skipped: where loss or gradient are out of the ordinary. None for sigma 0.

    That is where a number is not finite, or is above the median of its last `window` accepted values by more than
    `sigma` standard deviations, these estimated as 1.4826 times the median absolute deviation (Hampel 1974), which a
    few outliers do not move. After `patience` such steps in a row, finite ones are accepted: what lasts is no spike.
    A factor on the update that is not finite skips the step as well.

    It is a pure function of the health so far, a step's metrics and that factor, and gives whether to skip, the health
    after the step, and what is to be told: the `verdict` (FINE, SPIKE or NOT_FINITE) and the `row` of steps so far that
    were not fine.
    """
    sigma, window, patience = settings['sigma'], settings['window'], settings['patience']
    if not sigma:
        return None

    def judge(health: Mapping[str, jax.Array], metrics: Mapping[str, jax.Array], rate: Any) -> Any:
        values = {'loss': metrics['loss'], 'gradient_norm': jnp.log(jnp.maximum(metrics['gradient_norm'], 1e-12))}
        finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm']) & jnp.isfinite(rate)
        spike = jnp.zeros((), bool)
        for name, least in WATCHED.items():
            median = jnp.median(health[name])
            deviation = jnp.maximum(1.4826 * jnp.median(jnp.abs(health[name] - median)), least)
            spike |= (health['accepted'] >= window) & (values[name] > median + sigma * deviation)
        skip = ~finite | (spike & (health['row'] < patience))
        place = health['accepted'] % window
        now = {name: jnp.where(skip, health[name], health[name].at[place].set(values[name])) for name in WATCHED}
        now['accepted'] = health['accepted'] + ~skip
        now['row'] = jnp.where(finite & ~spike, 0, health['row'] + 1)
        verdict = jnp.where(finite, jnp.where(skip, SPIKE, FINE), NOT_FINITE)
        return skip, now, {'verdict': verdict, 'row': now['row']}

    return judge


class Watch:
    """What the host makes of the metrics of steps: events, and the end where nothing else helps.

    Args:
        settings: of the guard; without one, what is not finite is noted here. After `patience` steps in a row that were
            not fine, the policy 'skip' goes on (but not where they were not finite), 'stop' ends the run, 'rewind' goes
            `back` steps and leaves those batches out.
        alarms: limits of metrics by name (see `limit_of`), the stream's among them. There is an event when one is
            first overstepped, and again after a step that kept it.
        tell: is told the step, kind and detail of each event.
    """

    def __init__(self, settings: Settings, alarms: Settings, tell: Callable[[int, str, str], None]):
        self._settings, self._tell = settings, tell
        self._limits = {name: limit_of(limit) for name, limit in as_dict(alarms).items()}
        self._raised: set[str] = set()
        self._bad: list[int] = []  # steps in a row that were not fine

    def __call__(self, step: int, verdict: int, row: int, metrics: Mapping[str, float], asked: bool) -> None:
        """Looks at a step's metrics; `asked` says that it was skipped on purpose.

        Raises:
            Rewind: the policy is to go back.
            InputError: the policy is to stop, there or of an alarm; or nothing finite comes any more.
        """
        self._alarms(step, metrics, asked)
        if asked:
            self._tell(step, 'batch left out', 'as a spike had come of it before')
            return
        guarded = bool(self._settings['sigma'])
        if not guarded and not all(math.isfinite(metrics[name]) for name in WATCHED):
            verdict, row = NOT_FINITE, len(self._bad) + 1
        self._bad = [*self._bad, step] if row else []
        if verdict:
            said = ', '.join(f'{name.replace("_", " ")} {metrics[name]:.4g}' for name in WATCHED)
            done = 'the update was skipped' if guarded else 'the update was made, as there is no guard'
            self._tell(step, 'spike' if verdict == SPIKE else 'not finite', f'{said}: {done}')
        if row == self._settings['patience']:
            self._lasting(step, verdict, metrics)

    def _alarms(self, step: int, metrics: Mapping[str, float], asked: bool) -> None:
        for name, limit in self._limits.items():
            if name not in metrics:  # such as those of a rollout, in steps that go on with the last one
                continue
            high = metrics[name] > limit['above']
            if not (high or metrics[name] < limit['below']):
                self._raised.discard(name)
                continue
            said = (
                f'{name} is {metrics[name]:.3g}, {"above" if high else "below"} {limit["above" if high else "below"]:g}'
            )
            if name not in self._raised:
                self._tell(step, 'alarm', said)
            self._raised.add(name)
            if limit['then'] == 'stop':
                raise InputError(f'step {step}: {said}')
            if limit['then'] == 'rewind' and not asked:
                first = max(step - self._settings['back'], 1)
                raise Rewind(first - 1, f'step {step}: {said}', tuple(range(first, step + 1)))

    def _lasting(self, step: int, verdict: int, metrics: Mapping[str, float]) -> None:
        policy, bad = self._settings['policy'], tuple(self._bad)
        if policy == 'rewind':
            raise Rewind(bad[0] - 1 - self._settings['back'], f'spikes in a row up to step {step}', bad)
        if policy == 'stop' or verdict == NOT_FINITE:
            said = f'the last with loss {metrics["loss"]:.4g} and gradient norm {metrics["gradient_norm"]:.4g}'
            raise InputError(f'{len(bad)} steps in a row up to step {step} were not fine, {said}')
        self._tell(step, 'spikes last', f'{len(bad)} in a row: from here they are taken for what is usual')

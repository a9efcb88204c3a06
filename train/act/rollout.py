"""The on-policy stream: problems of tasks, answered by the model in training, judged, packed with their advantages."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data.errors import InputError, did_you_mean
from data.packing import Batch, Segment, empty_batch, pack
from data.sources import ENDLESS
from data.stream import State
from data.tasks import DRAWS, Prompt, Task, different
from data.tokenizer import Tokenizer
from model.transformer import Model
from train.act.algorithms import ALGORITHMS, Groups, Trajectory, adapted, overlong_penalty, returns
from train.act.answers import Answers
from train.act.curriculum import Levels
from train.act.episodes import Episode, Sample, chat_prompt, play
from train.act.rewards import REWARDS, Answer, step_rewards
from train.act.signs import signs
from train.measure.scoring import Other, Scorer
from train.sampler import Completion, row_keys, sample_tokens

STAMPS = ('old_logprob', 'reference_logprob', 'old_value', 'value_target')  # beyond advantage and behavior_logprob
WEIGHTS = ('token', 'answer', 'constant')


class Problem(NamedTuple):
    """A problem to be answered: its number, its level of difficulty, the task, and what is asked."""

    number: int
    level: int
    task: Task
    prompt: Prompt


@dataclasses.dataclass
class Drawn:
    """What was sampled for some problems.

    Attributes:
        groups: trajectories that are compared with each other; episodes: all that they came from.
        example: one of them, to be looked at; metrics: what they show.
        read: tokens that models have read, those that they wrote themselves included.
    """

    groups: list[list[Trajectory]]
    episodes: list[Episode]
    example: dict[str, Any]
    metrics: dict[str, float]
    read: int


class RolloutStream:
    """Batches of freshly sampled answers. One rollout serves `epochs` passes over `minibatches` batches each."""

    work = 'sampling'

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        tasks: Sequence[Task],
        config: Mapping[str, Any],
        seed: int,
        others: Mapping[str, Other] | None = None,
        stamps: Sequence[str] = (),
        strict: Sequence[Task] = (),
        folder: Path | None = None,
    ):
        """
        Args:
            tasks: levels of difficulty, of which `curriculum` chooses; most often one.
            config: of the stage (see `train.stages`).
            seed: folded into every random choice, with the number of the problem and of the sample.
            others: reference, reward model and teachers, by role ('reference', 'reward', 'teacher...').
            stamps: names of STAMPS that batches hold.
            strict: for each level a stricter task, whose verifier is asked as well, for the gap to the reward.
            folder: of the stage, where `records` of its answers go.

        Raises:
            InputError: an unknown reward, algorithm, weighting or kind of records; fewer rows than trajectories in a
                batch.
        """
        c = config
        for field, known in (('reward', REWARDS), ('algorithm', ALGORITHMS), ('weighting', WEIGHTS)):
            if c[field] not in known:
                raise InputError(f'{field} is {c[field]!r}{did_you_mean(c[field], known)}')
        rows = -(-self.most(c) // c['minibatches'])
        if c['batch_size'] < rows:
            raise InputError(
                f'batch_size is {c["batch_size"]}: expected at least {rows}, as many as answers in one of '
                f'{c["minibatches"]} minibatches, so that answers of any length fit'
            )
        self._model, self._tokenizer, self._config, self._seed = model, tokenizer, config, seed
        self._folder, self._answers = folder, Answers(folder, c['records'])
        self._given: list[dict[str, Any]] = []  # answers of this rollout that are kept
        self._others, self._stamps = dict(others or {}), tuple(stamps)
        self._strict: Sequence[Task | None] = strict or [None] * len(tasks)
        self._levels = Levels(tasks, seed, c['curriculum'])
        self._pools = [different(task, c['problems']) if c['problems'] else [] for task in tasks]
        self._updates = c['epochs'] * c['minibatches']
        self._scorers = {
            role: Scorer(other.model, tokenizer.pad_id, c)
            for role, other in {'': Other(model, {}), **self._others}.items()
        }
        self.rows = range(c['batch_size'])  # every process has all of them: they come from one sampler
        self._position = 0  # problems posed so far
        self._kl_coefficient = float(c['kl_reward'])
        self._waiting: list[list[Trajectory]] = []  # minibatches of the last rollout that are still to come

    @staticmethod
    def most(c: Mapping[str, Any]) -> int:
        """Answers that a rollout can have."""
        return int(c['prompts'] * c['samples'])

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """The batch of `step`; where it is the first of a rollout, sampled by `variables`. The state after it holds
        metrics and the FLOPs of sampling and scoring."""
        said: dict[str, Any] = {}
        if step % self._updates == 0:
            groups, said = self._rollout(variables)
            self._answers.add(step, self._given)
            self._given = []
            self._waiting = self._minibatches(groups, step // self._updates)
        batch = self._pack(self._waiting.pop(0))
        waiting = [[_plain(t) for t in minibatch] for minibatch in self._waiting]
        state = {'step': step + 1, 'position': self._position, 'levels': self._levels.state(), 'waiting': waiting}
        return batch, {**state, 'kl_coefficient': self._kl_coefficient, **said}

    def restore(self, state: State) -> None:
        """Goes on after the batch that `state` came with."""
        self._position, self._kl_coefficient = state['position'], state['kl_coefficient']
        self._levels.restore(state['levels'])
        self._waiting = [[_trajectory(fields) for fields in minibatch] for minibatch in state['waiting']]

    def close(self) -> None:
        """Makes records of the answers that were kept."""
        self._answers.finish()

    def _rollout(self, variables: Any) -> tuple[list[list[Trajectory]], dict[str, Any]]:
        """Groups of answers with their advantages, and what is to be known of them.

        With `refills`, groups whose answers all earned the same are replaced by further problems, up to so many times
        as many problems again (dynamic sampling; Yu et al. 2025, "DAPO", section 3.2).
        """
        c = self._config
        kept: list[list[Trajectory]] = []
        drawn: list[Drawn] = []
        for _ in range(1 + c['refills']):
            drawn.append(self._draw(variables))
            kept += [group for group in drawn[-1].groups if not c['refills'] or np.ptp(returns(group))]
            if len(kept) >= c['prompts']:
                break
        if c['refills']:
            kept = kept[: c['prompts']]
        passes = self._score(kept, variables)
        earned = [returns(group) for some in drawn for group in some.groups]
        sampled = [e for some in drawn for e in some.episodes]
        metrics = {name: float(np.mean([some.metrics[name] for some in drawn])) for name in drawn[0].metrics}
        metrics |= self._with_kl(kept)
        ALGORITHMS[c['algorithm']](kept, c)
        tokens = sum(len(e.logprobs) for e in sampled)
        metrics |= {
            'reward/mean': float(np.concatenate(earned).mean()),
            'reward/equal_groups': float(np.mean([not np.ptp(group) for group in earned])),
            'rollout/answer_tokens': tokens / len(sampled),
            'rollout/sampled_tokens': float(tokens),
            'rollout/stopped': float(np.mean([e.stopped for e in sampled])),
            **self._levels.metrics(),
        }
        if c['refills']:
            metrics['rollout/problems'] = float(len(earned))
        read = passes + sum(some.read for some in drawn)
        flops = read * self._model.flops_per_token(c['sequence_length'], backward=False)
        return kept, {'flops': flops, 'metrics': metrics, 'sampled': tokens, 'sample': drawn[-1].example}

    def _draw(self, variables: Any) -> Drawn:
        """Answers to the next `prompts` problems."""
        problems = self._pose()
        keys = row_keys(self._seed, [p.number for p in problems], self._config['samples'])
        sample = self._sampler(self._model, variables)
        tasks, prompts = [p.task for p in problems], [p.prompt for p in problems]
        return self._judged(problems, play(tasks, prompts, self._tokenizer, sample, keys))

    def _pose(self) -> list[Problem]:
        """The next `prompts` problems."""
        numbers = self._numbers()
        levels = [self._levels.choose(number) for number in numbers]
        tasks = [self._levels.tasks[level] for level in levels]
        prompts = [self._prompt(level, number) for level, number in zip(levels, numbers, strict=True)]
        return [Problem(*fields) for fields in zip(numbers, levels, tasks, prompts, strict=True)]

    def _prompt(self, level: int, number: int) -> Prompt:
        """Problem `number`, or, where it leaves a row no room for an answer, one that nobody else has in its place."""
        c, pool = self._config, self._pools[level]
        for attempt in range(DRAWS):
            index = number + attempt * ENDLESS
            prompt = pool[index % len(pool)] if pool else self._levels.tasks[level].prompt(index)
            if len(chat_prompt(prompt, self._tokenizer)) + c['max_tokens'] <= c['sequence_length']:
                return prompt
        raise InputError(
            f'sequence_length is {c["sequence_length"]}: {DRAWS} problems left no room in it for answers of max_tokens '
            f'{c["max_tokens"]}: expected a larger one'
        )

    def _numbers(self) -> range:
        """Numbers of the next `prompts` problems, which no other has."""
        first = self._position
        self._position += self._config['prompts']
        return range(first, self._position)

    def _sampler(self, model: Model, variables: Any) -> Sample:
        """Answers of a model, as the stage wants them."""
        c = self._config

        def sample(tokens: list[list[int]], keys: jax.Array) -> list[list[Completion]]:
            return sample_tokens(
                model,
                variables,
                self._tokenizer,
                tokens,
                samples=keys.shape[1],
                temperature=c['temperature'],
                max_tokens=c['max_tokens'],
                keys=keys,
                experts=c['replay_experts'],
            )

        return sample

    def _judged(self, problems: Sequence[Problem], episodes: Sequence[Sequence[Episode]]) -> Drawn:
        """A group of trajectories for each problem, rewarded, and what they show."""
        groups = []
        everything: list[Answer] = []
        earned: list[float] = []
        for p, group in zip(problems, episodes, strict=True):
            answers = [Answer(p.task, p.prompt, e.verdict, e.text, s, e.stopped) for s, e in enumerate(group)]
            rewards = [REWARDS[self._config['reward']](answer) for answer in answers]
            self._levels.record(p.level, rewards)
            everything += answers
            self._keep(p, group)
            earned += rewards
            groups.append([self._rewarded(e, p.number, s, rewards[s]) for s, e in enumerate(group)])
        score = float(groups[0][0].rewards.sum())
        example = {'prompt': problems[0].prompt.text, 'completion': episodes[0][0].text, 'score': score}
        flat = [e for group in episodes for e in group]
        strict = [self._strict[p.level] for p, group in zip(problems, episodes, strict=True) for _ in group]
        metrics = signs(everything, earned, [e.said for e in flat], strict)
        read = sum(len(group[0].prompt) for group in episodes) + sum(len(e.tokens) for e in flat)
        return Drawn(groups, flat, example, metrics, read)

    def _keep(self, p: Problem, group: Sequence[Episode]) -> None:
        """Notes the answers to a problem that become records."""
        for sample, e in enumerate(group):
            score = e.verdict.score if e.stopped else 0.0
            if self._answers.wants(score):
                origin = {'task': p.task.name, 'key': p.prompt.key, 'problem': p.number, 'sample': sample}
                self._given.append({'messages': e.messages, 'score': score, 'provenance': origin})

    def _rewarded(self, e: Episode, group: int, sample: int, reward: float) -> Trajectory:
        """An answer with its rewards: what it earned on its last token, and before that the scores of its steps."""
        c, count = self._config, len(e.logprobs)
        rewards, judged = np.zeros(count), np.zeros(count, bool)
        if c['process_coefficient']:
            rewards, judged = step_rewards(e.verdict.parts, e.said, self._tokenizer)
            rewards *= c['process_coefficient']
        rewards[-1] += reward + overlong_penalty(count, c['max_tokens'], c['overlong_buffer'])
        judged[-1] = True
        return Trajectory(
            e.prompt, e.tokens, e.learnt, e.logprobs, group, sample, rewards, judged, e.stopped, e.expert_ids
        )

    def _score(self, groups: Groups, variables: Any) -> int:
        """Stamps what passes of this model and of others say of the answers; gives how many tokens they read."""
        c, trajectories = self._config, [t for group in groups for t in group]
        wanted: dict[str, tuple[str, ...]] = {}  # of each model
        if 'old_logprob' in self._stamps or self._kl_coefficient:
            wanted[''] = ('logprob',)
        if c['algorithm'] == 'gae':
            wanted[''] = (*wanted.get('', ()), 'value')
        if 'reference' in self._others:
            wanted['reference'] = ('logprob',)
        if 'reward' in self._others:
            wanted['reward'] = ('value',)
        teachers = [role for role in self._others if role.startswith('teacher')]
        wanted |= dict.fromkeys(teachers, ('logprob',))
        segments = [_segment(t, {}) for t in trajectories] if wanted else []
        said: dict[str, list[dict[str, np.ndarray]]] = {}
        for role, names in wanted.items():
            weights = self._others[role].variables if role else variables
            said[role] = self._scorers[role](weights, segments, names)
        for i, t in enumerate(trajectories):
            own = np.asarray(t.learnt)
            start = len(t.prompt)
            if 'logprob' in wanted.get('', ()):
                t.stamps['old_logprob'] = said[''][i]['logprob'][start:][own]
            if 'value' in wanted.get('', ()):  # of the state before a token: after the one before it
                t.stamps['old_value'] = said[''][i]['value'][start - 1 : -1][own]
            if 'reference' in wanted:
                t.stamps['reference_logprob'] = said['reference'][i]['logprob'][start:][own]
            if 'reward' in wanted:
                t.rewards[-1] += said['reward'][i]['value'][-1] if t.stopped else 0.0
            if teachers:
                t.stamps['teacher_logprob'] = np.mean([said[role][i]['logprob'][start:][own] for role in teachers], 0)
        return len(wanted) * sum(len(t.prompt) + len(t.tokens) for t in trajectories)

    def _with_kl(self, groups: Groups) -> dict[str, float]:
        """Takes the KL penalty off the rewards, token by token (estimator k1; Ouyang et al. 2022, equation 2), and
        adapts its coefficient where a target is given."""
        c, trajectories = self._config, [t for group in groups for t in group]
        if not self._kl_coefficient or not trajectories:
            return {}
        total = 0.0
        for t in trajectories:
            gap = t.stamps['old_logprob'] - t.stamps['reference_logprob']
            t.rewards = t.rewards - self._kl_coefficient * gap
            total += float(gap.sum())
        kl = total / len(trajectories)
        metrics = {'kl/answer': kl, 'kl/coefficient': self._kl_coefficient}
        if c['kl_target']:
            self._kl_coefficient = adapted(self._kl_coefficient, kl, c['kl_target'], len(trajectories), c['kl_horizon'])
        return metrics

    def _minibatches(self, groups: Groups, turn: int) -> list[list[Trajectory]]:
        """The rollout's answers for each update; where there are several, in an order drawn anew for each epoch."""
        c, parts = self._config, self._config['minibatches']
        trajectories = [t for group in groups for t in group]
        if self._updates == 1:
            return [trajectories]
        updates = []
        for epoch in range(c['epochs']):
            rng = random.Random(f'{self._seed} minibatches {turn} {epoch}')
            order = rng.sample(range(len(trajectories)), len(trajectories))
            updates += [[trajectories[i] for i in order[part::parts]] for part in range(parts)]
        return updates

    def _pack(self, trajectories: Sequence[Trajectory]) -> Batch:
        """Answers with their stamps. Those without an advantage have no gradient, and are left out."""
        c = self._config
        batch = empty_batch(c['batch_size'], c['sequence_length'], self._tokenizer.pad_id)
        names = ('advantage', 'behavior_logprob', *self._stamps)
        batch |= {name: np.zeros_like(batch['loss_weight']) for name in names}
        if c['replay_experts']:
            chosen = (self._model.config.num_moe_layers, self._model.config.num_experts_per_tok)
            batch['expert_ids'] = np.full((*batch['tokens'].shape, *chosen), -1, np.int32)
        some = [t for t in trajectories if t.stamps['advantage'].any() or 'value_target' in t.stamps]
        pack([[_segment(t, self._stamped(t, names))] for t in some], batch)
        if c['weighting'] != 'token':
            batch['answers'] = np.asarray(max(len(trajectories), 1), np.float32)
        batch['temperature'] = np.asarray(c['temperature'], np.float32)
        return batch

    def _stamped(self, t: Trajectory, names: Sequence[str]) -> dict[str, Any]:
        """Everything about the learnt tokens of an answer that a batch with arrays of these names holds."""
        c = self._config
        weight = {'token': 1.0, 'answer': 1.0 / t.count, 'constant': 1.0 / c['max_tokens']}[c['weighting']]
        stamps = {**t.stamps, 'behavior_logprob': np.asarray(t.logprobs), 'loss_weight': np.full(t.count, weight)}
        return {name: stamps[name] for name in ('loss_weight', *names)} | {'expert_ids': t.expert_ids}


def _segment(t: Trajectory, stamps: Mapping[str, Any]) -> Segment:
    """An answer behind its prompt; numbers for learnt tokens are put at their places, with zeros elsewhere."""
    where = len(t.prompt) + np.flatnonzero(t.learnt)
    size = len(t.prompt) + len(t.tokens)

    def placed(values: np.ndarray) -> np.ndarray:
        whole = np.zeros(size, np.float32)
        whole[where] = values
        return whole

    arrays = {name: placed(x) for name, x in stamps.items() if name != 'expert_ids'}
    weight = arrays.pop('loss_weight', placed(np.ones(t.count)))
    if (chosen := stamps.get('expert_ids')) is not None:
        ids = np.full((size, *chosen.shape[1:]), -1, np.int32)
        ids[: len(chosen)] = chosen
        arrays['expert_ids'] = ids
    return Segment([*t.prompt, *t.tokens], weight, arrays)


def _plain(t: Trajectory) -> dict[str, Any]:
    """A trajectory as JSON has it."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: plain(value) for name, value in x.items()}
        return x.tolist() if isinstance(x, np.ndarray) else x

    return {field.name: plain(getattr(t, field.name)) for field in dataclasses.fields(t)}


def _trajectory(fields: Mapping[str, Any]) -> Trajectory:
    """What `_plain` took apart."""
    arrays = {name: np.asarray(fields[name]) for name in ('rewards', 'judged')}
    ids = fields['expert_ids']
    stamps = {name: np.asarray(x) for name, x in fields['stamps'].items()}
    whole = {**fields, **arrays, 'stamps': stamps, 'expert_ids': None if ids is None else np.asarray(ids, np.int32)}
    return Trajectory(**whole)

"""The on-policy stream: problems of a task, answered by the model in training, judged, packed with their advantages."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data.chat import render_chat
from data.errors import InputError, did_you_mean
from data.packing import Batch, RowWriter, empty_batch
from data.stream import State
from data.tasks import Prompt, Task, final_answer
from data.tokenizer import Tokenizer
from model.transformer import Model, Variables
from train.algorithms import Trajectory, group_relative, rejection
from train.host import fetch
from train.sampler import Completion, row_keys, sample_tokens

Reward = Callable[[Task, Prompt, Completion, int], float]


def verifier_reward(task: Task, prompt: Prompt, completion: Completion, number: int) -> float:
    """The verifier's score; an answer that did not end by itself earns nothing."""
    return task.verify(prompt, completion.text).score if completion.stopped else 0.0


def format_reward(task: Task, prompt: Prompt, completion: Completion, number: int) -> float:
    """A control arm: 1 for any answer in the right form, right or wrong."""
    return float(completion.stopped and final_answer(completion.text) is not None)


def random_reward(task: Task, prompt: Prompt, completion: Completion, number: int) -> float:
    """A control arm: a coin thrown for each problem and sample, blind to the answer."""
    return float(zlib.crc32(f'{prompt.key} {number}'.encode()) & 1)


REWARDS: dict[str, Reward] = {'verifier': verifier_reward, 'format': format_reward, 'random': random_reward}
ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'grpo': lambda rewards: group_relative(rewards, normalize=True),
    'dr_grpo': lambda rewards: group_relative(rewards, normalize=False),
    'rejection': rejection,
}


class RolloutStream:
    """Batches of freshly sampled answers. Every step samples anew; nothing is left over between steps."""

    work = 'sampling'

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        task: Task,
        config: Mapping[str, Any],
        seed: int,
        reference: tuple[Model, Variables] | None = None,
    ):
        """
        Args:
            config: of the stage: `prompts` a step, `samples` a prompt, `max_tokens`, `temperature`, `reward`,
                `algorithm`, `batch_size` (rows), `sequence_length`.
            seed: folded into every random choice, with the number of the problem and of the sample.
            reference: the reference model and its variables, where the objective asks for its log-probabilities.

        Raises:
            InputError: an unknown reward or algorithm; fewer rows than trajectories.
        """
        for field, known in (('reward', REWARDS), ('algorithm', ADVANTAGES)):
            if config[field] not in known:
                raise InputError(f'{field} is {config[field]!r}{did_you_mean(config[field], known)}')
        if config['batch_size'] < config['prompts'] * config['samples']:
            raise InputError(
                f'batch_size is {config["batch_size"]}: expected at least prompts * samples = '
                f'{config["prompts"] * config["samples"]}, so that answers of any length fit'
            )
        self._model, self._tokenizer, self._task, self._config = model, tokenizer, task, config
        self._seed = seed
        self.rows = range(config['batch_size'])  # every process has all of them: they come from one sampler
        self._reference = reference and (jax.jit(functools.partial(_logprobs, reference[0])), reference[1])

    def next(self, step: int, variables: Any = None) -> tuple[Batch, State]:
        """The batch of `step`, sampled by `variables`, and a state with its metrics and the FLOPs of sampling."""
        c = self._config
        indices = range(step * c['prompts'], (step + 1) * c['prompts'])
        prompts = [self._task.prompt(index) for index in indices]
        tokens = [chat_prompt(prompt, self._tokenizer) for prompt in prompts]
        completions = sample_tokens(
            self._model,
            variables,
            self._tokenizer,
            tokens,
            samples=c['samples'],
            temperature=c['temperature'],
            max_tokens=c['max_tokens'],
            keys=row_keys(self._seed, indices, c['samples']),
        )
        reward = REWARDS[c['reward']]
        rewards = np.array(
            [
                [reward(self._task, prompt, completion, number) for number, completion in enumerate(group)]
                for prompt, group in zip(prompts, completions, strict=True)
            ]
        )
        advantages = ADVANTAGES[c['algorithm']](rewards)
        trajectories = [
            (Trajectory(tokens[g], completion.tokens, completion.logprobs, g, rewards[g, s]), advantages[g, s])
            for g, group in enumerate(completions)
            for s, completion in enumerate(group)
        ]
        batch = self._pack([(t, float(a)) for t, a in trajectories if a != 0])
        if self._reference is not None:
            score, weights = self._reference
            batch['reference_logprob'] = fetch(score(weights, batch))
        answers = [completion for group in completions for completion in group]
        sampled = sum(len(answer.tokens) for answer in answers)
        read = sum(len(prompt) for prompt in tokens) + sampled
        metrics = {
            'reward/mean': float(rewards.mean()),
            'reward/equal_groups': float((rewards.min(1) == rewards.max(1)).mean()),
            'rollout/answer_tokens': sampled / len(answers),
            'rollout/stopped': float(np.mean([answer.stopped for answer in answers])),
        }
        flops = read * self._model.flops_per_token(c['sequence_length'], backward=False)
        example = {'prompt': prompts[0].text, 'completion': answers[0].text, 'score': float(rewards[0, 0])}
        return batch, {'step': step + 1, 'flops': flops, 'metrics': metrics, 'sampled': sampled, 'sample': example}

    def restore(self, state: State) -> None:
        """Nothing is kept between steps: a step's prompts and keys follow from its number."""

    def _pack(self, trajectories: list[tuple[Trajectory, float]]) -> Batch:
        """Whole trajectories into rows, longest first, each into the first row with room; the last rows stay empty.

        A group of equal rewards has advantage 0 throughout: it has no gradient, and is left out.
        """
        c = self._config
        batch = empty_batch(c['batch_size'], c['sequence_length'], self._tokenizer.pad_id)
        batch['advantage'] = np.zeros_like(batch['loss_weight'])
        batch['behavior_logprob'] = np.zeros_like(batch['loss_weight'])
        used: list[int] = []
        writers: list[RowWriter] = []
        for trajectory, advantage in sorted(trajectories, key=lambda x: -len(x[0].prompt) - len(x[0].tokens)):
            start, count = len(trajectory.prompt), len(trajectory.tokens)
            length = start + count
            if length > c['sequence_length']:
                raise InputError(f'a prompt and answer of {length} tokens: expected sequence_length of that or more')
            row = next((i for i, n in enumerate(used) if n + length <= c['sequence_length']), len(used))
            if row == len(used):
                used.append(0)
                writers.append(RowWriter(batch, row))
            weight = np.repeat(np.array([0, 1], np.float32), [start, count])
            writers[row].write(np.array(trajectory.prompt + trajectory.tokens, np.int32), weight)
            answer = slice(used[row] + start, used[row] + length)
            batch['advantage'][row, answer] = advantage
            batch['behavior_logprob'][row, answer] = trajectory.logprobs
            used[row] += length
        batch['temperature'] = np.asarray(c['temperature'], np.float32)
        return batch


def _logprobs(model: Model, variables: Variables, batch: Any) -> jax.Array:
    output = model.apply(variables, batch['tokens'], batch['positions'], batch['segments'], batch['temperature'])
    return output.logprob


def chat_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """A task's problem as the user's turn, with the assistant about to speak."""
    return render_chat([{'role': 'user', 'content': prompt.text}], tokenizer, add_generation_prompt=True)[0]

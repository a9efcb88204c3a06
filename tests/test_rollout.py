"""The on-policy stream: rewards, advantages, and batches that do not depend on how answers are packed."""

import copy
import functools
import json
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
import pytest
from small import get_config, model_config, one_device, placed
from text import small_tokenizer

from data.errors import InputError
from data.sources import ENDLESS
from data.tasks import Prompt, Verdict, get_task
from data.tokenizer import Tokenizer
from model.transformer import Model, Variables
from train.act.algorithms import group_relative, rejection
from train.act.episodes import chat_prompt
from train.act.rewards import Answer, format_reward, random_reward, verifier_reward
from train.act.rollout import RolloutStream
from train.act.signs import repetition
from train.learn.health import Watch
from train.learn.objectives import joined, regularizers
from train.learn.policy import policy_gradient
from train.learn.step import initial_state, make_step
from train.measure.scoring import Other
from train.sampler import row_keys, sample_tokens
from train.stages import COMMON, stage_defaults

PROMPTS, SAMPLES = 3, 8
ROWS = PROMPTS * SAMPLES


class Scored:
    """A task of which a random model gets something right: the score of an answer is whether it holds an even number of
    bytes; of problems numbered below `hopeless`, none is right."""

    name = 'scored'

    def __init__(self, hopeless: int = 0):
        self.hopeless = hopeless

    def prompt(self, index: int) -> Prompt:
        return Prompt(f'say {index}', '', f'say {index}', {'index': index})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(float(prompt.info['index'] >= self.hopeless and len(completion.encode()) % 2 == 0))


@functools.cache
def model() -> tuple[Model, Variables]:
    made = Model(model_config(num_hidden_layers=1, initializer_range=1.0))
    return made, made.init(0, one_device())


@functools.cache
def tokenizer() -> Tokenizer:
    """Takes for the stop token what the random model is fond of, so that many of its answers end by themselves."""
    changed = copy.copy(small_tokenizer())
    changed.end_id = -1
    prompts = [chat_prompt(Scored().prompt(index), changed) for index in range(2 * PROMPTS)]
    keys = row_keys(0, range(len(prompts)), SAMPLES)
    settings: dict[str, Any] = {'samples': SAMPLES, 'temperature': 1.3, 'max_tokens': 12, 'keys': keys}
    answers = sample_tokens(*model(), changed, prompts, **settings)
    counts = Counter(token for group in answers for answer in group for token in set(answer.tokens))
    changed.end_id = counts.most_common(1)[0][0]
    return changed


def stream(task: Any = None, **changes: Any) -> RolloutStream:
    settings = get_config().stages.grpo.to_dict()
    settings |= {'prompts': PROMPTS, 'samples': SAMPLES, 'batch_size': ROWS, 'sequence_length': 64, 'max_tokens': 12}
    settings |= {'temperature': 1.3, 'algorithm': 'grpo', 'reward': 'verifier'}
    others = changes.pop('others', {})
    stamps = changes.pop('stamps', ())
    tasks = changes.pop('tasks', [task or Scored()])
    strict = changes.pop('strict', ())
    return RolloutStream(model()[0], tokenizer(), tasks, {**settings, **changes}, 11, others, stamps, strict)


@functools.cache
def batch(
    step: int = 0, hopeless: int = 0, sequence_length: int = 64, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    made = stream(Scored(hopeless), sequence_length=sequence_length, **changes)
    return made.next(step, model()[1])


@functools.cache
def step_function() -> Any:
    losses = {'multi_token': 0.0, 'z_loss': 0.0, 'sequence_balance': 0.0, 'batch_balance': 0.0}
    surrogate = policy_gradient(stage_defaults('grpo')['loss'])
    optimizer = optax.adam(0.1)
    with jax.set_mesh(one_device()):
        state = initial_state(model()[1], optimizer)
    return jax.jit(make_step(model()[0], joined(surrogate, regularizers(losses, 0, True)), optimizer)), state


def stepped(of: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    function, state = step_function()
    with jax.set_mesh(one_device()):
        state, metrics = function(state, placed(of, one_device()))
    return state, {name: float(x) for name, x in metrics.items()}


def test_group_relative_advantages() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    plain = group_relative(rewards, normalize=False)
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-0.25, -0.25, -0.25, 0.75]])
    scaled = group_relative(rewards, normalize=True)
    np.testing.assert_allclose(scaled[2], plain[2] / (np.sqrt(3) / 4), rtol=1e-5)
    assert not scaled[1].any()
    np.testing.assert_array_equal(rejection(np.array([[1.0, 0.5, 0.0]])), [[1.0, 0.0, 0.0]])


def test_rewards_and_their_control_arms() -> None:
    task = get_task('arithmetic', split='train', operations=1)
    problem = task.prompt(0)

    def answer(text: str, stopped: bool = True, number: int = 0, of: Prompt = problem) -> Answer:
        return Answer(task, of, task.verify(of, text), text, number, stopped)

    right, wrong = answer(problem.reference), answer('1 + 1 = 3\nAnswer: 1000000')
    formless, endless = answer('I do not know'), answer(problem.reference, stopped=False)
    assert [verifier_reward(x) for x in (right, wrong, formless, endless)] == [1.0, 0.0, 0.0, 0.0]
    assert [format_reward(x) for x in (right, wrong, formless, endless)] == [1.0, 1.0, 0.0, 0.0]
    problems = [task.prompt(index) for index in range(50)]
    coins = [random_reward(answer('1', True, number, p)) for p in problems for number in range(8)]
    blind = [random_reward(answer('2', False, number, p)) for p in problems for number in range(8)]
    assert coins == blind
    assert set(coins) == {0.0, 1.0} and 0.4 < np.mean(coins) < 0.6
    groups = np.array(coins).reshape(50, 8)
    assert (groups.min(1) < groups.max(1)).mean() > 0.9  # a problem's samples are told apart


def test_answers_are_stamped_and_the_stop_token_is_learnt() -> None:
    arrays, state = batch()
    learnt = arrays['loss_weight'] > 0
    assert learnt.any() and not arrays['advantage'][~learnt].any() and not arrays['behavior_logprob'][~learnt].any()
    assert (arrays['advantage'][learnt] != 0).all() and (arrays['behavior_logprob'][learnt] < 0).all()
    end = tokenizer().end_id
    stopped = 0
    for row in range(ROWS):
        segments = arrays['segments'][row]
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            tokens, weight = arrays['tokens'][row, inside], arrays['loss_weight'][row, inside]
            start = int(weight.argmax())
            assert weight[start:].all() and not weight[:start].any()  # prompt unlearnt, answer learnt to its end
            assert len(set(arrays['advantage'][row, inside][start:])) == 1
            assert end not in tokens[start:-1]
            stopped += int(tokens[-1] == end)
    assert stopped > 0
    assert state['metrics']['rollout/stopped'] > 0 and 0 <= state['metrics']['reward/mean'] <= 1


def test_the_trainer_scores_as_the_sampler_did() -> None:
    """Temperature, routing by the biases and packing included: the stream scores its batch by the sampling weights."""
    arrays, _ = stream(others={'reference': Other(*model())}, stamps=('reference_logprob',)).next(0, model()[1])
    learnt = arrays['loss_weight'] > 0
    np.testing.assert_allclose(arrays['reference_logprob'][learnt], arrays['behavior_logprob'][learnt], atol=1e-4)
    assert float(arrays['temperature']) == np.float32(1.3)
    _, metrics = stepped({name: x for name, x in arrays.items() if name != 'reference_logprob'})
    assert metrics['sampler_difference'] <= metrics['sampler_difference_max'] < 1e-4
    assert metrics['sampler_difference_max'] > 0 and metrics['clipped_share'] == 0.0


def test_groups_of_equal_reward_are_counted_and_have_no_gradient() -> None:
    """Of the first two of three problems no answer is right; these answers leave no trace in the batch."""
    arrays, state = batch(hopeless=2)
    mixed, _ = batch(hopeless=0)
    assert state['metrics']['reward/equal_groups'] == pytest.approx(2 / 3)
    prompt = small_tokenizer().encode('say 2')[-1]
    starts = [arrays['tokens'][row, arrays['segments'][row] == s] for row in range(ROWS) for s in range(1, 9)]
    starts = [x for x in starts if len(x)]
    assert 0 < len(starts) <= SAMPLES and all(prompt in x for x in starts)
    assert (mixed['segments'] > 0).sum() > (arrays['segments'] > 0).sum()


def test_a_reward_that_can_be_gamed_raises_an_alarm() -> None:
    """Coins are thrown for answers of which a verifier finds none right; with the verifier as reward all is quiet."""
    told: list[tuple[int, str, str]] = []
    watch = Watch(COMMON['guard'], stage_defaults('grpo')['alarms'], lambda *event: told.append(event))
    fine = {'loss': 1.0, 'gradient_norm': 1.0}

    _, state = stream().next(0, model()[1])
    assert state['metrics']['reward/gap'] == 0
    watch(1, 0, 0, {**state['metrics'], **fine, 'rollout/repetition': 0.0}, asked=False)
    assert not told
    _, state = stream(Scored(hopeless=PROMPTS), reward='random').next(0, model()[1])
    said = state['metrics']
    assert said['reward/verified'] == 0 and said['reward/gap'] == said['reward/mean'] > 0.25
    watch(2, 0, 0, {**said, **fine}, asked=False)
    assert told[0][:2] == (2, 'alarm') and told[0][2].startswith('reward/gap is')
    strict = stream(strict=[Scored(hopeless=PROMPTS)])
    _, state = strict.next(0, model()[1])
    assert state['metrics']['reward/gap'] == state['metrics']['reward/mean'] > 0.05


def test_repeated_ngrams_are_counted() -> None:
    assert repetition([1, 2, 3]) == 0 and repetition(list(range(20))) == 0
    assert repetition([1, 2, 3, 4] * 5) == 1 - 4 / 17


def test_a_batch_of_nothing_but_equal_rewards_changes_nothing() -> None:
    arrays, state = batch(hopeless=PROMPTS)
    assert state['metrics']['reward/equal_groups'] == 1.0 and state['metrics']['rollout/answer_tokens'] > 0
    assert not arrays['segments'].any()
    before = step_function()[1]
    after, metrics = stepped(arrays)
    assert metrics['loss'] == 0.0 and metrics['gradient_norm'] == 0.0
    for name in ('params', 'balance'):
        for a, b in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def test_loss_does_not_depend_on_how_answers_are_packed() -> None:
    """Rows of 64 hold several answers, the rows of the other batch one each, in another order."""
    packed, _ = batch()
    spread = {name: np.zeros_like(x) if x.ndim else x for name, x in packed.items()}
    place_in = ROWS - 1
    for row in range(ROWS):
        for segment in range(1, packed['segments'][row].max() + 1):
            inside = packed['segments'][row] == segment
            for name, x in packed.items():
                if x.ndim:
                    spread[name][place_in, : inside.sum()] = 1 if name == 'segments' else x[row, inside]
            place_in -= 1
    assert packed['segments'].max() > 1 and spread['segments'].max() == 1
    first, second = stepped(packed)[1], stepped(spread)[1]
    assert first['gradient_norm'] > 0.01
    for name in ('loss', 'entropy', 'gradient_norm'):
        np.testing.assert_allclose(second[name], first[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_steps_pose_new_problems_and_a_step_repeats_itself() -> None:
    """A resumed run has to sample what the killed one did, from the state alone, which JSON has carried."""
    first = stream()
    _, before = first.next(0, model()[1])
    later, state = first.next(1, model()[1])
    resumed = stream()
    resumed.restore(json.loads(json.dumps(before)))
    again, _ = resumed.next(1, model()[1])
    for name, x in later.items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)
    assert state['sample']['prompt'] == f'say {PROMPTS}'
    assert before['sample']['prompt'] == 'say 0'


def test_a_pool_of_problems_is_posed_again_with_other_draws() -> None:
    pool = stream(problems=2)
    (_, first), (_, second) = (pool.next(step, model()[1]) for step in (0, 1))  # three problems a step
    assert [first['sample']['prompt'], second['sample']['prompt']] == ['say 0', 'say 1']
    keys = stream(problems=1)
    said = [keys.next(step, model()[1])[1]['sample']['completion'] for step in (0, 1)]
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('reward', 'verifer', "reward is 'verifer'; did you mean 'verifier'"),
        ('algorithm', 'gpro', "algorithm is 'gpro'; did you mean 'grpo'"),
        ('batch_size', ROWS - 1, 'batch_size is 23: expected at least 24'),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(**{field: value})


def test_problems_that_leave_no_room_are_replaced() -> None:
    class Long(Scored):
        def prompt(self, index: int) -> Prompt:
            text = f'say {"more " * 60}' if index == 1 else f'say {index}'
            return Prompt(text, '', text, {'index': index})

    assert [p.prompt.text for p in stream(Long())._pose()] == ['say 0', f'say {1 + ENDLESS}', 'say 2']
    with pytest.raises(InputError, match='sequence_length is 8: .* no room in it for answers of max_tokens 12'):
        stream(sequence_length=8).next(0, model()[1])

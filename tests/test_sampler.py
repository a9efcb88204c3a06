"""The sampler: the distribution it draws from, what a row depends on, and the log-probabilities it reports."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import model_config, one_device
from text import small_tokenizer

from data.errors import InputError
from model.adapters import merge_adapters
from model.transformer import Model, Variables, subtree
from tests.tiny import randomized
from train import sampler
from train.act.decoding import BLOCK, decode, draw
from train.sampler import Completion, row_keys, sample_tokens

PROMPTS = ([1, 30, 40], [1, 99, 98, 97, 96, 95, 94], [1, 7], [1, 300, 301, 302, 303])
MAX_TOKENS = 12


class Stopping:
    """A tokenizer with another stop token."""

    pad_id = small_tokenizer().pad_id

    def __init__(self, end_id: int):
        self.end_id = end_id

    def decode(self, ids: Sequence[int]) -> str:
        return ' '.join(map(str, ids))


@functools.cache
def model() -> tuple[Model, Variables]:
    """A model whose random weights are large enough for distributions that are not flat."""
    made = Model(model_config(num_hidden_layers=1, initializer_range=0.5))
    variables = made.init(0, one_device())
    # A router bias that is not zero: the sampler has to route by it as the trainer does.
    variables['balance'] = jax.tree.map(lambda x: x + jnp.linspace(-0.3, 0.3, x.shape[-1])[None], variables['balance'])
    return made, variables


def answers(
    prompts: Sequence[Sequence[int]] = PROMPTS,
    samples: int = 2,
    temperature: float = 1.0,
    rows: int = 256,
    first: int = 0,
) -> list[list[Completion]]:
    made, variables = model()
    keys = row_keys(5, range(first, first + len(prompts)), samples)
    return sample_tokens(
        made,
        variables,
        small_tokenizer(),
        prompts,
        samples=samples,
        temperature=temperature,
        max_tokens=MAX_TOKENS,
        keys=keys,
        rows=rows,
    )


def scored(prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> tuple[np.ndarray, ...]:
    """What the trainer's full forward pass says of an answer: log-probabilities, and the likeliest tokens; and of the
    experts that its prompt and itself choose."""
    made, variables = model()
    row = np.zeros((1, 32), np.int32)
    text = [*prompt, *tokens]
    row[0, : len(text)] = text
    segments = (np.arange(32)[None] < len(text)).astype(np.int32)
    logprob, best, experts = (np.asarray(x)[0] for x in full_forward(variables, row, segments, temperature))
    start = len(prompt)
    return logprob[start : len(text)], best[start - 1 : len(text) - 1], experts[: len(text)]


@jax.jit
def full_forward(
    variables: Variables, tokens: jax.Array, segments: jax.Array, temperature: float
) -> tuple[jax.Array, ...]:
    output = model()[0].apply(variables, tokens, segments=segments, temperature=temperature)
    return output.logprob, output.logits.argmax(-1), output.expert_ids


def test_draws_follow_the_distribution() -> None:
    """Ten thousand draws over more than one block, against the exact probabilities by a chi-square bound."""
    count, vocabulary = 10_000, 2 * BLOCK + 7
    logits = np.random.default_rng(0).normal(size=vocabulary).astype(np.float32) * 1.5
    logits[[3, BLOCK, vocabulary - 1]] = -np.inf
    keys = jax.random.split(jax.random.key(1), count)
    tokens, logprobs = jax.jit(draw)(jnp.broadcast_to(logits, (count, vocabulary)), keys)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    np.testing.assert_allclose(np.asarray(logprobs), np.log(exact[np.asarray(tokens)]), atol=1e-5)
    seen = np.bincount(np.asarray(tokens), minlength=vocabulary)
    assert len(seen) == vocabulary
    expected = exact * count
    assert not seen[expected == 0].any()
    common = expected > 5
    chi_square = ((seen - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 5 * np.sqrt(2 * common.sum())


@pytest.mark.parametrize('vocabulary', [2, BLOCK, 3 * BLOCK + 1])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary: int) -> None:
    """One possible token, wherever it stands; and impossible ones at both ends."""
    places = sorted({0, 1, vocabulary // 2, vocabulary - 1})
    logits = np.full((len(places), vocabulary), -np.inf, np.float32)
    logits[np.arange(len(places)), places] = 1.0
    many = jnp.repeat(jnp.asarray(logits), 500, axis=0)
    tokens, logprobs = jax.jit(draw)(many, jax.random.split(jax.random.key(2), len(many)))
    np.testing.assert_array_equal(
        np.asarray(tokens).reshape(len(places), 500), np.repeat(np.array(places)[:, None], 500, 1)
    )
    assert not np.asarray(logprobs).any()


def test_sampled_log_probabilities_are_those_of_the_full_forward_pass() -> None:
    """At temperatures 1 and not 1: what divides the logits in sampling divides them in scoring."""
    for temperature in (1.0, 0.6):
        for prompt, group in zip(PROMPTS, answers(temperature=temperature), strict=True):
            for answer in group:
                full, _, _ = scored(prompt, answer.tokens, temperature)
                np.testing.assert_allclose(answer.logprobs, full, atol=1e-4)
    spread = np.concatenate([answer.logprobs for group in answers() for answer in group])
    assert spread.min() < -4 and spread.max() > -1  # the comparison is not one of flat distributions


def test_temperature_sharpens() -> None:
    cold, warm = answers(temperature=0.1, samples=2), answers(temperature=1.0, samples=2)
    assert np.mean([x for group in cold for a in group for x in a.logprobs]) > np.mean(
        [x for group in warm for a in group for x in a.logprobs]
    )


def test_greedy_takes_the_likeliest_token_and_needs_no_key() -> None:
    first, second = answers(temperature=0.0), answers(temperature=0.0, first=50)
    assert [[a.tokens for a in group] for group in first] == [[a.tokens for a in group] for group in second]
    for prompt, group in zip(PROMPTS, first, strict=True):
        assert group[0].tokens == group[1].tokens
        assert not any(group[0].logprobs)
        _, best, _ = scored(prompt, group[0].tokens, 1.0)
        assert best.tolist() == group[0].tokens


def test_the_stop_token_ends_an_answer_and_is_kept() -> None:
    """Greedy decoding, with the token that came third taken for the stop token: the same answer, cut after it."""
    made, variables = model()

    def answer(end_id: int) -> Completion:
        settings: dict[str, Any] = {
            'samples': 1,
            'temperature': 0.0,
            'max_tokens': MAX_TOKENS,
            'keys': row_keys(0, [0], 1),
        }
        return sample_tokens(made, variables, Stopping(end_id), PROMPTS[:1], **settings)[0][0]  # type: ignore[arg-type]

    whole = answer(-1)  # no token
    assert not whole.stopped and len(whole.tokens) == len(whole.logprobs) == MAX_TOKENS
    place = next(i for i, token in enumerate(whole.tokens) if i >= 2 and token not in whole.tokens[:i])
    cut = answer(whole.tokens[place])
    assert cut.stopped and cut.tokens == whole.tokens[: place + 1] and len(cut.logprobs) == place + 1
    assert cut.text == ' '.join(map(str, whole.tokens[:place]))  # text has no stop token in it


def test_an_answer_depends_on_neither_its_company_nor_the_rows_at_a_time() -> None:
    together = answers()
    for rows in (2, 4):  # one prompt at a time, then two
        for group, other in zip(together, answers(rows=rows), strict=True):
            assert [a.tokens for a in group] == [a.tokens for a in other]
            for a, b in zip(group, other, strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
    alone = answers(PROMPTS[2:3], first=2)[0]
    assert [a.tokens for a in alone] == [a.tokens for a in together[2]]


def test_rows_that_are_done_are_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of many lengths through few rows: as in a pool with a row for all, in fewer steps than by turns.

    The ring of places wraps around more than once, prompts of two padded widths do not meet in one pool, and the last
    prompts leave rows without work.
    """
    made, variables = model()
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 300, size=n).tolist() for n in (3, 9, 2, 31, 7, 5, 1, 12, 4, 40, 33)]
    steps: list[int] = []

    def counted(*given: Any, **settings: Any) -> Any:
        pool = decode(*given, **settings)
        steps.append(int(pool['step']))
        return pool

    monkeypatch.setattr(sampler, 'decode', counted)

    def sampled(rows: int, stop: int) -> list[list[Completion]]:
        steps.clear()
        return sample_tokens(
            made,
            variables,
            Stopping(stop),  # type: ignore[arg-type]
            prompts,
            samples=2,
            temperature=0.5,
            max_tokens=MAX_TOKENS,
            keys=row_keys(9, range(len(prompts)), 2),
            rows=rows,
        )

    # The token that ends answers is one that many of them have.
    endless = [answer.tokens for group in sampled(256, -1) for answer in group]
    stop = Counter(token for tokens in endless for token in set(tokens)).most_common(1)[0][0]
    together, few = sampled(256, stop), sampled(8, stop)
    tops = [a for a, b in zip(steps, [*steps[1:], 0], strict=True) if b < a]  # the last count of each pool
    lengths = [len(answer.tokens) for group in together for answer in group]
    assert min(lengths) < 4 and max(lengths) == MAX_TOKENS and len(set(lengths)) > 4
    assert len(tops) == 2 and tops[0] > MAX_TOKENS
    turns = -(-9 * 2 // 8) + -(-2 * 2 // 8)
    assert sum(tops) < turns * MAX_TOKENS
    for group, other in zip(together, few, strict=True):
        assert [a.tokens for a in group] == [a.tokens for a in other]
        assert [a.stopped for a in group] == [a.stopped for a in other]
        for a, b in zip(group, other, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)


def test_experts_chosen_in_sampling_are_those_of_the_full_forward_pass() -> None:
    made, variables = model()
    settings: dict[str, Any] = {'samples': 2, 'temperature': 1.0, 'max_tokens': MAX_TOKENS, 'experts': True, 'rows': 4}
    keys = row_keys(5, range(len(PROMPTS)), 2)
    for prompt, group in zip(
        PROMPTS, sample_tokens(made, variables, small_tokenizer(), PROMPTS, keys=keys, **settings), strict=True
    ):
        for answer in group:
            size = len(prompt) + len(answer.tokens)
            assert answer.expert_ids is not None and answer.expert_ids.shape == (size, 1, 2)
            read = size - answer.stopped  # a stop token is not
            expected = scored(prompt, answer.tokens, 1.0)[2]
            np.testing.assert_array_equal(np.sort(answer.expert_ids)[:read], np.sort(expected)[:read])
    assert answers()[0][0].expert_ids is None


def test_adapters_are_merged_before_decoding() -> None:
    made, variables = model()
    adapted = Model(dataclasses.replace(made.config, lora_rank=2))
    adapters = subtree(randomized(adapted.declared, seed=3)['params'], re.compile('_lora_').search)
    both = adapted.init(0, one_device(), {**variables, 'params': adapters})  # the rest is as in `model`
    settings: dict[str, Any] = {'samples': 1, 'temperature': 0.0, 'max_tokens': MAX_TOKENS}
    keys = row_keys(5, range(len(PROMPTS)), 1)
    found, expected = (
        [a.tokens for (a,) in sample_tokens(*pair, small_tokenizer(), PROMPTS, keys=keys, **settings)]
        for pair in ((adapted, both), merge_adapters(adapted, both))
    )
    assert found == expected != [a.tokens for (a,) in answers(samples=1, temperature=0.0)]


def test_keys_are_distinct_across_prompts_samples_and_steps() -> None:
    steps = [row_keys(7, range(step * 4, (step + 1) * 4), 8) for step in range(5)]
    keys = np.concatenate(
        [np.asarray(jax.random.key_data(k)).reshape(-1, 2) for k in (*steps, row_keys(8, range(20), 8))]
    )
    assert len(np.unique(keys, axis=0)) == 2 * 5 * 4 * 8
    # A group's samples differ, and so does the same prompt at another step.
    tokens = [tuple(a.tokens) for first in (0, 4) for a in answers(PROMPTS[:1], samples=4, first=first)[0]]
    assert len(set(tokens)) == 8


@pytest.mark.parametrize('length', [0, 245, 300])
def test_a_prompt_that_does_not_fit_is_refused_by_number(length: int) -> None:
    with pytest.raises(InputError, match=rf'prompt 1 has {length} tokens: expected 1 to 244, the context of 256'):
        answers([[1], [1] * length])

"""Held-out measurements that generate nothing: what a model thinks of text, pairs, choices, and of answers given."""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data.errors import InputError
from data.packing import Segment
from data.preferences import pair_segments
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from model.sharding import batch_ways
from model.transformer import Model, Variables
from train.launch.host import fetch
from train.measure.scoring import Scorer
from train.measure.statistics import interval
from train.sampler import prompt_width

Result = dict[str, Any]

ROWS = 8  # segments that a device reads at a time
BINS = 10  # of confidence, for the calibration error


def spread(source: Source, count: int) -> list[Any]:
    """So many records, or all, from everywhere in a source: it may be sorted."""
    return [source[i] for i in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)]


def share(metric: str, values: np.ndarray, details: dict[str, Any]) -> Result:
    """The result of an evaluation that is a mean over items in [0, 1]."""
    low, high = interval(values)
    return {
        'metric': metric,
        'value': float(values.mean()),
        'low': low,
        'high': high,
        'items': len(values),
        'unit': 'share',
        'direction': 'higher',
        'details': details,
    }


def said_of(
    model: Model,
    variables: Variables,
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    name: str = 'logprob',
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Of each segment the field `name` of `model.heads.Output`, [tokens] each."""
    shape = {
        'batch_size': ROWS * batch_ways(),
        'microbatches': 1,
        'sequence_length': prompt_width(max(len(s.tokens) for s in segments)),
        'temperature': temperature,
    }
    return [x[name] for x in Scorer(model, tokenizer.pad_id, shape)(variables, segments, (name,))]


def sums(segments: Sequence[Segment], said: Sequence[np.ndarray]) -> np.ndarray:
    """What was said of the tokens with a loss weight, summed: float [segments]."""
    return np.array([(x * s.loss_weight).sum() for s, x in zip(segments, said, strict=True)], np.float64)


def bits_per_byte(model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int) -> Result:
    """Bits per byte of whole documents, in windows of `length` tokens that overlap by half."""
    source = open_source(spec['source'])
    length, stride = spec['length'], spec['length'] // 2
    count = min(spec['documents'] or len(source), len(source))
    windows, owners, scored, texts = [], [], [], []
    sizes = np.zeros(count)
    for i in range(count):
        text = source[i]['text']
        texts.append(text.encode())
        sizes[i] = len(texts[-1])
        ids = [tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id]
        # Windows overlap by half; a window scores what the one before it did not.
        for start in range(0, max(1, len(ids) - stride), stride):
            window = ids[start : start + length]
            windows.append(window + [tokenizer.pad_id] * (length - len(window)))
            owners.append(i)
            scored.append((0 if start == 0 else stride, len(window)))

    @jax.jit
    def logprobs(variables: Variables, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return model.apply(variables, tokens, segments=segments).logprob

    nats = np.zeros(count)
    rows = -(-max(1, 4096 // length) // batch_ways()) * batch_ways()
    for begin in range(0, len(windows), rows):
        chosen = windows[begin : begin + rows]
        tokens = np.full((rows, length), tokenizer.pad_id, np.int32)
        tokens[: len(chosen)] = chosen
        ends = np.array([end for _, end in scored[begin : begin + rows]] + [1] * (rows - len(chosen)))
        segments = (np.arange(length)[None] < ends[:, None]).astype(np.int32)
        values = np.asarray(fetch(logprobs(variables, tokens, segments)), np.float64)
        for row in range(len(chosen)):
            first, end = scored[begin + row]
            nats[owners[begin + row]] -= values[row, first:end].sum()
    bits = nats / math.log(2) / sizes
    low, high = interval(bits, sizes)
    xz = 8 * len(lzma.compress(b''.join(texts), preset=9)) / sizes.sum()
    return {
        'metric': f'bits per byte (xz -9 on the same files together: {xz:.3f})',
        'value': float(nats.sum() / math.log(2) / sizes.sum()),
        'low': low,
        'high': high,
        'items': count,
        'unit': 'bits/byte',
        'direction': 'lower',
        'details': {
            'bytes': int(sizes.sum()),
            'context': length,
            'xz_bits_per_byte': float(xz),
            'scores': [round(float(x), 6) for x in bits],
            'weights': sizes.astype(int).tolist(),
        },
    }


def pairs_in_order(model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int) -> Result:
    """Share of pairs whose better answer the model puts first: by its value head, or by log-probability a token."""
    records = spread(open_source(spec['source']), spec['items'])
    segments = [segment for record in records for segment in pair_segments(record, tokenizer)]
    name = 'value' if model.config.value_head else 'logprob'
    said = said_of(model, variables, tokenizer, segments, name)
    if model.config.value_head:
        scores = np.array([x[s.last] for s, x in zip(segments, said, strict=True)])
    else:
        scores = sums(segments, said) / np.array([s.loss_weight.sum() for s in segments])
    better = np.sign(scores[0::2] - scores[1::2]) / 2 + 0.5
    return share('pairs put in order', better, {'by': name, 'scores': better.tolist()})


def choices(model: Model, variables: Variables, tokenizer: Tokenizer, spec: dict[str, Any], seed: int) -> Result:
    """Share of questions whose right answer is the likeliest of those given; see `as_choice` for records.

    Details: `per_byte`, the same by log-probability a byte, which long answers do not lose by; `calibration_error`, the
    mean distance between confidence and share right in BINS bins, by questions (Guo et al. 2017, equation 3), where
    confidence is the probability of the choice among those given.
    """
    source = open_source(spec['source'])
    asked = [as_choice(record, i) for i, record in enumerate(spread(source, spec['items'] or len(source)))]
    segments = [continuation(tokenizer, prompt, text) for prompt, texts, _ in asked for text in texts]
    logprobs = sums(segments, said_of(model, variables, tokenizer, segments))
    ends = np.cumsum([len(texts) for _, texts, _ in asked])[:-1]
    right, per_byte, confidence = [], [], []
    for (_, texts, answer), x in zip(asked, np.split(logprobs, ends), strict=True):
        right.append(float(x.argmax() == answer))
        per_byte.append(float((x / [len(text.encode()) for text in texts]).argmax() == answer))
        confidence.append(1 / np.exp(x - x.max()).sum())
    details = {
        'per_byte': float(np.mean(per_byte)),
        'calibration_error': calibration_error(np.array(confidence), np.array(right)),
        'scores': right,
    }
    return share('right answer likeliest', np.array(right), details)


def as_choice(record: Mapping[str, Any], index: int) -> tuple[str, list[str], int]:
    """A question, the answers to choose from and the number of the right one.

    Records are {prompt, choices, answer}, where the prompt may be missing or empty, or a minimal pair {good, bad}.

    Raises:
        InputError: a record of another form.
    """
    if isinstance(record.get('good'), str) and isinstance(record.get('bad'), str):
        record = {'choices': [record['good'], record['bad']], 'answer': 0}
    prompt, texts, answer = record.get('prompt', ''), record.get('choices'), record.get('answer')
    fits = isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) and text for text in texts)
    if not isinstance(prompt, str) or not fits or type(answer) is not int or not 0 <= answer < len(texts or ()):
        raise InputError(
            f'record {index}: expected prompt, choices (two texts or more) and answer (the number of the right one, '
            'from 0), or good and bad'
        )
    return prompt, list(texts or ()), answer


def continuation(tokenizer: Tokenizer, prompt: str, text: str) -> Segment:
    """A prompt and what follows, encoded together, with weights on what follows. White space between them belongs to
    what follows, as its tokens do."""
    kept = prompt.rstrip()
    whole = tokenizer.encode(prompt + text)
    before = len(tokenizer.encode(kept)) if kept else 0
    before = min(before, len(whole) - 1)  # a token across the border counts
    return Segment(
        [tokenizer.begin_id, *whole], np.array([0.0] * (1 + before) + [1.0] * (len(whole) - before), np.float32)
    )


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: see `choices`. Both arrays are [items], in [0, 1]."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(right))

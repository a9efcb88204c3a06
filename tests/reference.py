"""The model again, as straight-line float64 NumPy: one document at a time, one token at a time, from the papers.

Nothing here knows of batches, padding, packing, chunks, scans, blocks of rows or devices: those are what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray
Tree = dict[str, Any]


def float64(tree: Any) -> Any:
    """The arrays of nested dictionaries in float64."""
    return {name: float64(x) for name, x in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def layer_of(tree: Any, index: int) -> Any:
    """One layer out of stacked weights."""
    return {name: layer_of(x, index) for name, x in tree.items()} if isinstance(tree, dict) else tree[index]


def documents(segments: Array) -> Iterator[tuple[int, Array]]:
    """(row, columns) of every document of a batch, in order."""
    for row, line in enumerate(np.asarray(segments)):
        for segment in sorted(set(line.tolist()) - {0}):
            yield row, np.flatnonzero(line == segment)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Zhang and Sennrich 2019: a_i / RMS(a) * g_i."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


# Rotary position embedding and YaRN.


def yarn_ramp(pair: int, dim: int, theta: float, original: int, beta_fast: float, beta_slow: float) -> float:
    """How far pair number `pair` is interpolated, 0 to 1.

    A pair turns original * theta^(-2 pair / dim) / 2 pi times over the original context; the ramp runs over pair
    numbers from where that is beta_fast to where it is beta_slow.
    """
    turns_to_pair = [dim / 2 * math.log(original / (turns * 2 * math.pi), theta) for turns in (beta_fast, beta_slow)]
    low, high = max(math.floor(turns_to_pair[0]), 0), min(math.ceil(turns_to_pair[1]), dim - 1)
    if low == high:
        return float(pair > low)
    return min(max((pair - low) / (high - low), 0.0), 1.0)


def frequencies(c: Any) -> list[float]:
    """theta^(-2i/d), or with YaRN a blend of that and its interpolation by the factor."""
    result = []
    for pair in range(c.rope_dim // 2):
        full = 1 / c.rope_theta ** (2 * pair / c.rope_dim)
        if c.rope_factor > 1:
            given = (c.rope_theta, c.original_max_position_embeddings, c.rope_beta_fast, c.rope_beta_slow)
            ramp = yarn_ramp(pair, c.rope_dim, *given)
            full = (1 - ramp) * full + ramp * full / c.rope_factor
        result.append(full)
    return result


def magnitude(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def rotate(x: Array, position: int, c: Any) -> Array:
    """Turns x [d] by its position; as complex numbers x_i + i x_(i + d/2)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.array(frequencies(c)))
    turned = turned * magnitude(c.rope_factor, c.rope_mscale) / magnitude(c.rope_factor, c.rope_mscale_all_dim)
    return np.concatenate([turned.real, turned.imag])


# Attention.


def attend(query: Array, keys: Array, values: Array, scale: float) -> Array:
    """One query [D] over the keys [n, D] it may see, and what it takes of the values [n, V]."""
    return softmax(keys @ query * scale) @ values


def latent_attention(p: Tree, x: Array, positions: Array, c: Any) -> tuple[Array, Array]:
    """DeepSeek-V2, equations 37 to 47; x [n, hidden]. Returns the output, and what a cache would hold."""
    nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
    scale = 1 / math.sqrt(nope + c.qk_rope_head_dim)
    if c.rope_mscale_all_dim:
        scale *= magnitude(c.rope_factor, c.rope_mscale_all_dim) ** 2
    out, latents, shared_keys = np.zeros_like(x), [], []
    for t, position in enumerate(positions):
        down = x[t] @ p['kv_a_proj_with_mqa']
        latents.append(rms_norm(down[:rank], p['kv_a_layernorm'], 1e-6))
        shared_keys.append(rotate(down[rank:], position, c))
        if c.q_lora_rank:
            query_latent = rms_norm(x[t] @ p['q_a_proj'], p['q_a_layernorm'], 1e-6)
            to_query = p['q_b_proj']
        else:
            query_latent, to_query = x[t], p['q_proj']
        for head in range(c.num_attention_heads):
            query = query_latent @ to_query[:, head]
            query = np.concatenate([query[:nope], rotate(query[nope:], position, c)])
            up = p['kv_b_proj'][:, head]
            keys = np.array([np.concatenate([z @ up[:, :nope], k]) for z, k in zip(latents, shared_keys, strict=True)])
            values = np.array([z @ up[:, nope:] for z in latents])
            out[t] += attend(query, keys, values, scale) @ p['o_proj'][head]
    return out, np.concatenate([np.array(latents), np.array(shared_keys)], axis=-1)


def grouped_query_attention(p: Tree, x: Array, positions: Array, c: Any) -> tuple[Array, Array]:
    """Ainslie et al. 2023; consecutive query heads share a key head."""
    sharing = c.num_attention_heads // c.num_key_value_heads
    heads = range(c.num_key_value_heads)
    keys = np.array([[rotate(x[t] @ p['k_proj'][:, g], m, c) for g in heads] for t, m in enumerate(positions)])
    values = np.array([[x[t] @ p['v_proj'][:, g] for g in heads] for t in range(len(x))])
    out = np.zeros_like(x)
    for t, position in enumerate(positions):
        for head in range(c.num_attention_heads):
            query, g = rotate(x[t] @ p['q_proj'][:, head], position, c), head // sharing
            mixed = attend(query, keys[: t + 1, g], values[: t + 1, g], 1 / math.sqrt(c.head_dim))
            out[t] += mixed @ p['o_proj'][head]
    return out, keys


# Experts.


def route(scores: Array, bias: Array, c: Any) -> tuple[list[int], Array]:
    """One token's experts, best first, and their weights (DeepSeek-V3, equations 12 to 16 and node-limited routing)."""
    biased = [float(s + b) for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // c.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_group)]
    if c.n_group > 1:
        best = 1 if c.topk_method == 'group_limited_greedy' else 2
        groups.sort(key=lambda group: -sum(sorted(biased[i] for i in group)[-best:]))
        groups = groups[: c.topk_group]
    candidates = sorted(i for group in groups for i in group)
    chosen = sorted(candidates, key=lambda i: -biased[i])[: c.num_experts_per_tok]
    weights = np.array([scores[i] for i in chosen])
    if c.norm_topk_prob:
        weights = weights / weights.sum()
    return chosen, weights * c.routed_scaling_factor


def feed_forward(x: Array, gate: Array, up: Array, down: Array) -> Array:
    return (silu(x @ gate) * (x @ up)) @ down


def mixture_of_experts(p: Tree, bias: Array, x: Array, c: Any) -> tuple[Array, Array, list[list[int]]]:
    """x [n, hidden] -> output, scores [n, E], chosen experts of each token."""
    out, all_scores, all_chosen = np.zeros_like(x), [], []
    for t in range(len(x)):
        logits = x[t] @ p['gate']
        scores = 1 / (1 + np.exp(-logits)) if c.scoring_func == 'sigmoid' else softmax(logits)
        chosen, weights = route(scores, bias, c)
        for i, weight in zip(chosen, weights, strict=True):
            matrices = (p[f'experts_{name}_proj'][i] for name in ('gate', 'up', 'down'))
            out[t] += weight * feed_forward(x[t], *matrices)
        if c.n_shared_experts:
            shared = p['shared_experts']
            out[t] += feed_forward(x[t], shared['gate_proj'], shared['up_proj'], shared['down_proj'])
        all_scores.append(scores)
        all_chosen.append(chosen)
    return out, np.array(all_scores), all_chosen


def expert_statistics(routed: list[tuple[Array, list[list[int]]]], c: Any) -> dict[str, Any]:
    """Loads and balance losses of one layer, from (scores, chosen experts) of each document (equations 17 to 20)."""

    def balance(scores: Array, chosen: list[list[int]]) -> float:
        total, n = 0.0, len(scores)
        for i in range(c.n_routed_experts):
            times = sum(line.count(i) for line in chosen)
            f = c.n_routed_experts / (c.num_experts_per_tok * n) * times
            total += f * sum(s[i] / s.sum() for s in scores) / n
        return total

    routed = [(s, i) for s, i in routed if len(s)]
    scores = np.concatenate([s for s, _ in routed])
    chosen = [line for _, lines in routed for line in lines]
    shares = scores / scores.sum(-1, keepdims=True)
    return {
        'load': np.array([sum(line.count(i) for line in chosen) for i in range(c.n_routed_experts)], np.float64),
        'entropy': -(shares * np.log(shares)).sum(),
        'sequence_balance': sum(balance(s, i) for s, i in routed),
        'batch_balance': balance(scores, chosen),
    }


# The whole network.


def block(p: Tree, bias: Array | None, x: Array, positions: Array, c: Any) -> tuple[Array, Array, Any]:
    attention = latent_attention if c.attention == 'mla' else grouped_query_attention
    mixed, entries = attention(p['self_attn'], rms_norm(x, p['input_layernorm'], c.rms_norm_eps), positions, c)
    x = x + mixed
    h = rms_norm(x, p['post_attention_layernorm'], c.rms_norm_eps)
    if bias is None:
        return x + feed_forward(h, *(p['mlp'][name] for name in ('gate_proj', 'up_proj', 'down_proj'))), entries, None
    out, scores, chosen = mixture_of_experts(p['mlp'], bias, h, c)
    return x + out, entries, (scores, chosen)


def forward(variables: Tree, tokens: Array, c: Any) -> dict[str, Any]:
    """One document, tokens [n].

    Returns:
        logits [n, V]; multi_token: for module k the logits [n - k, V] by which places 0 .. n-k-1 predict the token
        k + 1 places on (the last of them has none in the document); entries of each layer's cache; routed: (scores,
        chosen) of each expert layer.
    """
    p, balance = variables['params'], variables['balance']
    head = p['embed_tokens'] if c.tie_word_embeddings else p['lm_head']
    embedded = p['embed_tokens'][tokens]
    positions = np.arange(len(tokens))
    x, entries, routed = embedded, [], []
    for i in range(c.num_hidden_layers):
        dense = not c.n_routed_experts or i < c.first_k_dense_replace
        if dense:
            weights, bias = layer_of(p['dense_layers'], i), None
        else:
            j = i - c.first_k_dense_replace
            weights, bias = layer_of(p['layers'], j), balance['layers']['mlp']['bias'][j]
        x, new, choice = block(weights, bias, x, positions, c)
        entries.append(new)
        routed += [] if dense else [choice]
    x = rms_norm(x, p['norm'], c.rms_norm_eps)
    result: dict[str, Any] = {'logits': x @ head.T, 'multi_token': []}

    # DeepSeek-V3, equations 21 to 23: module k joins what the head reads at i and the embedding of token i + k.
    for k in range(1, c.num_nextn_predict_layers + 1):
        module, n = p[f'multi_token_{k}'], max(len(tokens) - k, 0)
        stream = rms_norm(x[:n], module['hnorm'], c.rms_norm_eps)
        ahead = rms_norm(embedded[k : k + n], module['enorm'], c.rms_norm_eps)
        x = np.concatenate([stream, ahead], axis=-1) @ module['eh_proj']
        if n:
            bias = balance[f'multi_token_{k}']['block']['mlp']['bias'] if c.n_routed_experts else None
            x, _, choice = block(module['block'], bias, x, positions[:n], c)
        else:
            choice = (np.zeros((0, c.n_routed_experts)), [])
        routed += [choice] if c.n_routed_experts else []
        x = rms_norm(x, module['norm'], c.rms_norm_eps)
        result['multi_token'].append(x @ head.T)
    return {**result, 'entries': entries, 'routed': routed}


def batch(variables: Tree, tokens: Array, segments: Array, c: Any, temperature: float = 1.0) -> dict[str, Any]:
    """What a model should say of a batch, put together document by document; places it says nothing of are 0.

    Returns:
        logits [B, T, V]; logprob, entropy, log_partition [B, T]; multi_token_logprob: list of [B, T]; statistics: a
        list with a dictionary for each expert layer.
    """
    rows, length = segments.shape
    out: dict[str, Any] = {name: np.zeros((rows, length)) for name in ('logprob', 'entropy', 'log_partition')}
    out['logits'] = np.zeros((rows, length, c.vocab_size))
    out['multi_token_logprob'] = [np.zeros((rows, length)) for _ in range(c.num_nextn_predict_layers)]
    routed: list[list[Any]] = []
    for row, columns in documents(segments):
        text = np.asarray(tokens)[row, columns]
        one = forward(variables, text, c)
        logits = one['logits'] / temperature
        out['logits'][row, columns] = logits
        logprobs = log_softmax(logits)
        for i in range(1, len(text)):
            out['logprob'][row, columns[i]] = logprobs[i - 1, text[i]]
            out['entropy'][row, columns[i]] = -(np.exp(logprobs[i - 1]) * logprobs[i - 1]).sum()
            out['log_partition'][row, columns[i]] = (logits - logprobs)[i - 1, 0]
        for k, logits in enumerate(one['multi_token'], start=1):
            logprobs = log_softmax(logits / temperature)
            for i in range(k + 1, len(text)):
                out['multi_token_logprob'][k - 1][row, columns[i]] = logprobs[i - k - 1, text[i]]
        routed.append(one['routed'])
    out['statistics'] = [expert_statistics(list(layer), c) for layer in zip(*routed, strict=True)]
    return out

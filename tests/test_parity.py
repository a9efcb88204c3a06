"""Against transformers: the same folder gives the same logits there and here, imported and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

NEEDS = 'needs torch and transformers: pip install -r requirements-parity.txt'
torch = pytest.importorskip('torch', reason=NEEDS)
transformers = pytest.importorskip('transformers', reason=NEEDS)

from tests.test_convert import V3, hub_config, write_hub  # noqa: E402
from train.checkpoint import load  # noqa: E402
from train.convert import export_model, import_model  # noqa: E402

SIZES = dict(
    vocab_size=420,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=2,
    n_routed_experts=8,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_rope_head_dim=8,
    qk_nope_head_dim=6,
    v_head_dim=5,
    first_k_dense_replace=1,
    max_position_embeddings=256,
    rms_norm_eps=1e-2,  # far from that of the latents
    initializer_range=0.3,
    num_nextn_predict_layers=0,
)
GROUPS = dict(n_group=4, topk_group=2)
# In so short a context the ramp covers several pairs; the two multipliers do not cancel.
YARN = dict(
    rope_type='yarn',
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=0.7,
    mscale_all_dim=1.2,
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    'v3': ('DeepseekV3', GROUPS),
    'moonlight': ('DeepseekV3', dict(n_group=1, topk_group=1, q_lora_rank=None)),
    'v3 split halves': ('DeepseekV3', dict(GROUPS, rope_interleave=False, norm_topk_prob=False)),
    'v2': ('DeepseekV2', dict(GROUPS, topk_method='group_limited_greedy', norm_topk_prob=False)),
    'v2 lite': ('DeepseekV2', dict(topk_method='greedy', norm_topk_prob=False, q_lora_rank=None)),
    'glm': ('Glm4MoeLite', dict(n_group=1, topk_group=1)),
}
TOKENS = np.random.default_rng(0).integers(420, size=(2, 40))


def published(folder: Path, tokenizer: str, kind: str, **changes: Any) -> Any:
    """A random model, saved as transformers saves it, with scales and biases that hide nothing."""
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(**{**SIZES, **fields, **changes})
    model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if x.ndim == 1:
                # Router biases so low that other groups' experts would win if they were masked with 0 instead of -inf.
                x.copy_(0.3 * torch.randn(x.shape) + int('norm' in key) - int('bias' in key))
    model.save_pretrained(folder, max_shard_size='60KB')
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return model


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(folder: Path) -> np.ndarray:
    loaded = load(folder)
    run = jax.jit(lambda variables, tokens: loaded.model.apply(variables, tokens).logits)
    return np.asarray(run(loaded.variables, jnp.asarray(TOKENS, jnp.int32)))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize('rope', ['plain', 'yarn'])
@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_those_of_transformers(kind: str, rope: str, tmp_path: Path, tokenizer_path: str) -> None:
    rotary = dict(rope_type='default') if rope == 'plain' else YARN
    model = published(tmp_path / 'hub', tokenizer_path, kind, rope_parameters={**rotary, 'rope_theta': 500.0})
    import_model(tmp_path / 'hub', tmp_path / 'in')
    expected = theirs(model)
    imported = error(ours(tmp_path / 'in'), expected)
    assert imported < 1e-4

    export_model(str(tmp_path / 'in'), tmp_path / 'out')
    again, report = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys']
    exported = error(theirs(again.eval()), expected)
    assert exported < 1e-6
    print(f'{kind} {rope}: imported {imported:.1e}, exported {exported:.1e}')


def test_settings_of_hub_files_mean_the_same(tmp_path: Path, tokenizer_path: str) -> None:
    """`rope_scaling` with `type`, as in DeepSeek's own files; transformers reads it too."""
    published(tmp_path / 'hub', tokenizer_path, 'v3')
    path = tmp_path / 'hub' / 'config.json'
    fields = json.loads(path.read_text())
    del fields['rope_parameters']
    yarn = {name: value for name, value in YARN.items() if name != 'rope_type'}
    path.write_text(json.dumps({**fields, 'rope_scaling': {**yarn, 'type': 'yarn'}, 'rope_theta': 500.0}))
    expected = theirs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hub').eval())
    import_model(tmp_path / 'hub', tmp_path / 'in')
    assert error(ours(tmp_path / 'in'), expected) < 1e-4


def test_multi_token_layer(tmp_path: Path, tokenizer_path: str) -> None:
    """The extra layer of V3's files, as transformers runs it: on the normed stream and the next token's embedding."""
    from transformers.modeling_layers import MtpLayer

    write_hub(tmp_path / 'hub', hub_config(**V3), tokenizer_path)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / 'hub').eval()
    theirs = MtpLayer(model.config.get_mtp_config(), type(model.model.layers[-1]), type(model.model.norm), 0).eval()
    state, experts = {}, {}
    for name, x in load_file(tmp_path / 'hub' / 'model.safetensors').items():
        inner = name.removeprefix('model.layers.3.')
        if 'experts.' in inner and inner != name and 'shared' not in inner:
            experts[inner.removeprefix('mlp.experts.').removesuffix('.weight')] = torch.tensor(x)
        elif inner != name:
            own = inner.split('.')[0] in ('enorm', 'hnorm', 'eh_proj', 'shared_head')
            inner = inner.replace('shared_head.norm', 'post_norm')
            state[inner if own else f'mtp_block.{inner}'] = torch.tensor(x)
    both = [torch.cat([experts[f'{e}.gate_proj'], experts[f'{e}.up_proj']]) for e in range(8)]
    state['mtp_block.mlp.experts.gate_up_proj'] = torch.stack(both)
    state['mtp_block.mlp.experts.down_proj'] = torch.stack([experts[f'{e}.down_proj'] for e in range(8)])
    theirs.load_state_dict(state)
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        positions = torch.arange(1, tokens.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, position_ids=positions)
        ahead = model.model.embed_tokens(tokens[:, 1:])
        expected = theirs(ahead, hidden, rotary, None, positions, None).numpy()
    import_model(tmp_path / 'hub', tmp_path / 'in')
    loaded = load(tmp_path / 'in')
    run = jax.jit(lambda v, tokens: loaded.model.apply(v, tokens, multi_token=True).multi_token[0])
    found = np.asarray(run(loaded.variables, jnp.asarray(TOKENS, jnp.int32)))[:, :-1]
    print(f'multi-token layer: {error(found, expected):.1e}')
    assert error(found, expected) < 1e-4

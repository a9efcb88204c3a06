"""Hugging Face folders in and out: names, layouts, bits, errors; training from an imported model. Without torch."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import train.checkpoint
from data.chat import render_chat
from data.errors import InputError
from data.mixture import as_dict
from data.tokenizer import Tokenizer
from model.adapters import merge_adapters
from model.config import ModelConfig
from model.experts import route
from model.huggingface import config_from_hub, config_to_hub, copies, dequantized, leaves
from model.transformer import Model
from tests import small
from tests.tiny import EVERYTHING, evaluate, packed, randomized, tiny
from train import convert
from train.checkpoint import load
from train.convert import INDEX, export_model, import_model
from train.evaluate import main as evaluate_main
from train.generate import main as generate_main
from train.launch.graph import Run

VOCABULARY = 420
V3 = dict(EVERYTHING, num_nextn_predict_layers=1)
V2 = dict(
    n_group=4,
    topk_group=2,
    scoring_func='softmax',
    topk_method='group_limited_greedy',
    norm_topk_prob=False,
    bias_update_rule='none',
    routed_scaling_factor=2.0,
)
LITE = dict(V2, n_group=1, topk_group=1, topk_method='greedy')
# In the manner of published ones: it cuts an answer at its thoughts, and it refuses what it does not know.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def hub_config(**changes: Any) -> ModelConfig:
    return tiny(vocab_size=VOCABULARY, head_dim=ModelConfig().head_dim, **changes)


def hub_tensors(model: Model, variables: Any) -> dict[str, np.ndarray]:
    """A model's weights by their names on the hub, without the copies in multi-token layers."""
    found = {}
    for leaf in leaves(model):
        array = variables
        for key in leaf.path:
            array = array[key]
        stacked = np.asarray(array).reshape(-1, *leaf.shape[leaf.stacked :])
        found |= {name: leaf.to_hub(x) for name, x in zip(leaf.names, stacked, strict=True)}
    return found


def write_hub(folder: Path, config: ModelConfig, tokenizer: str, architecture: str = '', **changes: Any) -> Any:
    """A hub folder of a random model; returns the model's variables."""
    folder.mkdir()
    model = Model(config)
    variables = randomized(model.declared)
    if config.topk_method != 'noaux_tc':
        variables['balance'] = jax.tree.map(np.zeros_like, variables['balance'])
    save_file(hub_tensors(model, variables), folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps({**config_to_hub(config, architecture), **changes}))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return variables


@pytest.fixture(scope='module')
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Path:
    """A hub folder, as is: a small DeepSeek-V3 with a multi-token layer."""
    folder = tmp_path_factory.mktemp('published') / 'hub'
    write_hub(folder, hub_config(**V3), tokenizer_path)
    return folder


@pytest.fixture(scope='module')
def imported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder, imported; for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp('imported') / 'in'
    import_model(published, folder)
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the hub folder, with fields of its config changed."""

    def write(**changes: Any) -> Path:
        shutil.copytree(published, tmp_path / 'hub')
        fields = json.loads((published / 'config.json').read_text())
        (tmp_path / 'hub' / 'config.json').write_text(json.dumps({**fields, **changes}))
        return tmp_path / 'hub'

    return write


@pytest.mark.parametrize(
    ('changes', 'architecture'),
    [
        (dict(V3, rope_factor=4.0, original_max_position_embeddings=64), ''),
        (dict(V2, tie_word_embeddings=True), ''),
        pytest.param(LITE, '', marks=pytest.mark.slow),
        pytest.param(dict(V3, first_k_dense_replace=2), 'Glm4MoeLiteForCausalLM', marks=pytest.mark.slow),
    ],
)
def test_export_of_an_import_is_the_same_bits(
    tmp_path: Path, tokenizer_path: str, changes: dict[str, Any], architecture: str
) -> None:
    config = hub_config(**changes)
    variables = write_hub(tmp_path / 'hub', config, tokenizer_path, architecture)
    import_model(tmp_path / 'hub', tmp_path / 'in')
    loaded = load(tmp_path / 'in')
    assert loaded.model.config == config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.variables), variables)
    export_model(str(tmp_path / 'in'), tmp_path / 'one', shard_bytes=30_000)
    import_model(tmp_path / 'one', tmp_path / 'again')
    export_model(str(tmp_path / 'again'), tmp_path / 'two', shard_bytes=30_000)
    names = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert sum(name.endswith('.safetensors') for name in names) > 2
    for name in names:
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes(), name

    index = json.loads((tmp_path / 'one' / INDEX).read_text())
    held = {file: load_file(tmp_path / 'one' / file) for file in set(index['weight_map'].values())}
    expected = hub_tensors(Model(config), variables)
    expected |= {copy: expected[original] for copy, original in copies(config).items()}
    assert set(index['weight_map']) == set(expected)
    for name, file in index['weight_map'].items():
        np.testing.assert_array_equal(held[file][name], expected[name])
    assert index['metadata']['total_size'] == sum(x.nbytes for x in expected.values())
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        assert (tmp_path / 'one' / name).read_bytes() == Path(tokenizer_path, name).read_bytes()


def test_adapters_are_merged_into_what_is_exported(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported, tmp_path / 'tuned', ignore=shutil.ignore_patterns('checkpoints'))
    model = Model(hub_config(**V3, lora_rank=2))
    variables = randomized(model.declared)
    record = json.loads((imported / 'config.json').read_text())
    (tmp_path / 'tuned' / 'config.json').write_text(json.dumps({**record, 'model': model.config.to_dict()}))
    checkpoints = train.checkpoint.Checkpoints(tmp_path / 'tuned' / 'checkpoints')
    checkpoints.save(1, {**variables, 'optimizer': {}}, {}, {})
    checkpoints.close()
    export_model(str(tmp_path / 'tuned'), tmp_path / 'out')
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    for name, expected in hub_tensors(*merge_adapters(model, variables)).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


def test_names_and_layout_are_those_of_the_hub() -> None:
    """Spelled out for one weight of each kind, by hand."""
    config = hub_config(**V3)
    model = Model(config)
    variables = randomized(model.declared)
    found = hub_tensors(model, variables)
    p, layer = variables['params'], variables['params']['layers']
    np.testing.assert_array_equal(found['model.embed_tokens.weight'], p['embed_tokens'])
    np.testing.assert_array_equal(
        found['model.layers.2.mlp.experts.5.down_proj.weight'], layer['mlp']['experts_down_proj'][1, 5].T
    )
    np.testing.assert_array_equal(found['model.layers.1.mlp.gate.weight'], layer['mlp']['gate'][0].T)
    bias = variables['balance']['layers']['mlp']['bias'][0]
    np.testing.assert_array_equal(found['model.layers.1.mlp.gate.e_score_correction_bias'], bias)
    dense = p['dense_layers']
    np.testing.assert_array_equal(found['model.layers.0.mlp.up_proj.weight'], dense['mlp']['up_proj'][0].T)
    # Head 2 of four, six plain columns and four rotated ones: pairs (0, 2), (1, 3) here are (0, 1), (2, 3) there.
    head = dense['self_attn']['q_b_proj'][0][:, 2]
    theirs = found['model.layers.0.self_attn.q_b_proj.weight'][20:30]
    np.testing.assert_array_equal(theirs, head[:, [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]].T)
    down = dense['self_attn']['kv_a_proj_with_mqa'][0]
    theirs = found['model.layers.0.self_attn.kv_a_proj_with_mqa.weight']
    np.testing.assert_array_equal(theirs, down[:, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 9, 11]].T)
    out = dense['self_attn']['o_proj'][0]
    np.testing.assert_array_equal(found['model.layers.0.self_attn.o_proj.weight'], out.reshape(20, 16).T)
    # The multi-token layer stands behind the last one; the embedding's half of its projection comes first.
    extra = p['multi_token_1']
    joined = np.concatenate([extra['eh_proj'][16:], extra['eh_proj'][:16]]).T
    np.testing.assert_array_equal(found['model.layers.3.eh_proj.weight'], joined)
    np.testing.assert_array_equal(found['model.layers.3.shared_head.norm.weight'], extra['norm'])
    np.testing.assert_array_equal(found['model.layers.3.input_layernorm.weight'], extra['block']['input_layernorm'])


def test_split_rotary_halves_are_left_as_they_are() -> None:
    """`rope_interleave: false`: the files have halves already."""
    model = Model(hub_config())
    pairs, halves = (
        next(leaf for leaf in leaves(model, interleaved) if leaf.path[-1] == 'q_proj') for interleaved in (True, False)
    )
    tensor = np.random.default_rng(0).normal(size=pairs.hub_shape)
    one, other = (leaf.from_hub(tensor) for leaf in (pairs, halves))
    np.testing.assert_array_equal(other, tensor.T.reshape(16, 4, 10))
    np.testing.assert_array_equal(one, other[..., [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]])
    np.testing.assert_array_equal(pairs.to_hub(one), tensor)


def test_bfloat16_and_fp8_come_in_as_float32(hub: Callable[..., Path], tmp_path: Path) -> None:
    """Block scales of 128 x 128, here 8 x 8, that do not divide the weights; biases and norms in other types."""
    folder = hub(quantization_config={'quant_method': 'fp8', 'weight_block_size': [8, 8]})
    rng = np.random.default_rng(0)
    stored, expected = {}, {}
    for name, x in load_file(folder / 'model.safetensors').items():
        if '.mlp.' in name and name.endswith('proj.weight'):
            stored[name] = (20 * x).astype(ml_dtypes.float8_e4m3fn)
            scale = rng.uniform(0.1, 2, size=[-(-n // 8) for n in x.shape]).astype(np.float32)
            stored[f'{name}_scale_inv'] = scale
            wide = np.kron(scale, np.ones((8, 8), np.float32))[: x.shape[0], : x.shape[1]]
            expected[name] = stored[name].astype(np.float32) * wide
        else:
            stored[name] = x if 'bias' in name else x.astype(ml_dtypes.bfloat16)
            expected[name] = stored[name].astype(np.float32)
    save_file(stored, folder / 'model.safetensors')
    import_model(folder, tmp_path / 'in')
    loaded = load(tmp_path / 'in')
    for name, x in hub_tensors(loaded.model, loaded.variables).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


def test_blocks_of_scales() -> None:
    weight = np.ones((3, 5), ml_dtypes.float8_e4m3fn)
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    expected = [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    np.testing.assert_array_equal(dequantized(weight, scales, (2, 2)), expected)


def test_one_array_is_in_memory_at_a_time(
    hub: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is made twice (fingerprint, file), from tensors read one by one, and let go before the next one."""
    alive: list[Any] = []
    largest = 0
    assembled = convert._assembled

    def watched(*args: Any) -> np.ndarray:
        nonlocal largest
        array = assembled(*args)
        alive.append(weakref.ref(array))
        largest = max(largest, sum(ref() is not None for ref in alive))
        return array

    monkeypatch.setattr(convert, '_assembled', watched)
    import_model(hub(), tmp_path / 'in')
    count = len(leaves(Model(hub_config(**V3))))
    assert len(alive) == 2 * count > 40
    assert largest <= 2

    read: list[tuple[str, ...]] = []
    reader = train.checkpoint.Checkpoints.reader

    def counted(self: Any, *args: Any) -> Any:
        function = reader(self, *args)
        return lambda path: read.append(path) or function(path)

    monkeypatch.setattr(train.checkpoint.Checkpoints, 'reader', counted)
    export_model(str(tmp_path / 'in'), tmp_path / 'out')
    assert len(read) == len(set(read)) == count


def test_group_masks() -> None:
    """DeepSeek's code masks other groups' scores with -inf; 0, as in some ports, beats biased scores below it."""
    config = hub_config(n_group=2, topk_group=1, num_experts_per_tok=3)
    scores = np.array([0.5, 0.4, 0.3, 0.2, 0.9, 0.1, 0.1, 0.1], np.float32)
    bias = np.array([0, 0, -0.6, -0.4, -2, -2, -2, -2], np.float32)
    ids, _ = route(scores, bias, config)
    own_group, biased = np.arange(8) < 4, scores + bias
    assert sorted(np.asarray(ids).tolist()) == [0, 1, 3]
    assert sorted(np.argsort(np.where(own_group, biased, -np.inf))[-3:].tolist()) == [0, 1, 3]
    assert 3 not in np.argsort(np.where(own_group, biased, 0))[-3:]


def test_a_group_is_ranked_by_its_best_in_version_2() -> None:
    scores = np.array([0.5, 0.0, 0.3, 0.25], np.float32)
    for method, chosen in (('group_limited_greedy', [0]), ('noaux_tc', [2])):
        config = hub_config(
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=1,
            topk_method=method,
            bias_update_rule='none',
        )
        assert np.asarray(route(scores, np.zeros(4, np.float32), config)[0]).tolist() == chosen


def test_routers_without_a_bias_refuse_what_they_lack() -> None:
    with pytest.raises(ValueError, match="bias_update_rule is 'sign': expected 'none'"):
        hub_config(topk_method='greedy')
    with pytest.raises(ValueError, match='n_group is 2: expected 1'):
        hub_config(topk_method='greedy', bias_update_rule='none', n_group=2)


@pytest.mark.parametrize('spelling', ['rope_scaling', 'rope_parameters', 'type'])
def test_both_spellings_of_the_rotary_settings(spelling: str) -> None:
    config = hub_config(
        **V3, rope_factor=40.0, rope_theta=50000.0, rope_mscale=0.7, original_max_position_embeddings=77
    )
    fields = config_to_hub(config)
    yarn = {**fields.pop('rope_scaling'), 'rope_type': 'yarn'}
    theta = fields.pop('rope_theta')
    if spelling == 'rope_parameters':
        del yarn['type']
        fields['rope_parameters'] = {**yarn, 'rope_theta': theta}
    else:
        fields |= {'rope_scaling': yarn, 'rope_theta': theta}
        del yarn['type' if spelling == 'rope_scaling' else 'rope_type']
    assert config_from_hub(fields, 1) == config


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(architectures=['LlamaForCausalLM']), ('architectures', 'LlamaForCausalLM', 'DeepseekV3ForCausalLM')),
        (dict(architectures=None), ('architectures', 'DeepseekV3ForCausalLM')),
        (dict(rope_scaling={'type': 'longrope', 'factor': 4}), ('longrope', 'expected default or yarn')),
        (dict(rope_scaling={'type': 'yarn'}), ('factor is missing',)),
        (dict(rope_scaling={'type': 'yarn', 'factor': 4, 'mscale': 0.7}), ('mscale', 'both of them or neither')),
        (dict(rope_scaling={'type': 'yarn', 'factor': 4, 'truncate': False}), ('truncate', 'True')),
        (dict(hidden_size=None), ('hidden_size is missing',)),
        (dict(hidden_size='wide'), ('config.json',)),
        (dict(attention_bias=True), ('attention_bias is True', 'expected False')),
        (dict(hidden_act='gelu'), ('hidden_act', 'silu')),
        (dict(topk_method='greedy'), ('topk_method', 'noaux_tc')),
        (dict(scoring_func='softmax'), ('scoring_func', 'sigmoid')),
        (dict(num_key_value_heads=2), ('num_key_value_heads is 2', 'expected 4')),
        (dict(quantization_config={'quant_method': 'awq'}), ('quant_method', 'awq', 'fp8')),
        (dict(n_group=3), ('n_group', 'divisor')),
        (dict(vocab_size=300), ('model.embed_tokens.weight', '[420, 16]', '[300, 16]')),
        (dict(num_hidden_layers=2), ('layers.2', 'no place')),
        (dict(first_k_dense_replace=0), ('model.layers.0.mlp.', 'no tensor')),
    ],
)
def test_what_a_folder_should_not_say(
    hub: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(hub(**changes), tmp_path, *words)


def refused(folder: Path, tmp_path: Path, *words: str, **options: Any) -> None:
    """An import ends with one line that has these words, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        import_model(folder, tmp_path / 'in', **options)
    line = str(error.value)
    assert '\n' not in line
    assert str(tmp_path) in line
    for word in words:
        assert word in line
    assert sorted(tmp_path.iterdir()) == before


def _without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / 'model.safetensors')
        del tensors[name]
        save_file(tensors, folder / 'model.safetensors')

    return damage


def _replaced(name: str, value: np.ndarray) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file({**load_file(folder / 'model.safetensors'), name: value}, folder / 'model.safetensors')

    return damage


def _cut(folder: Path) -> None:
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:-10])


EXPERT = 'model.layers.2.mlp.experts.3.up_proj.weight'


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (lambda folder: (folder / 'config.json').unlink(), ('config.json', 'no such file')),
        (lambda folder: (folder / 'config.json').write_text('{'), ('config.json', 'not JSON')),
        (lambda folder: (folder / 'config.json').write_text('[]'), ('config.json', 'expected an object')),
        (lambda folder: (folder / 'model.safetensors').unlink(), ('model.safetensors', 'no such file')),
        (lambda folder: (folder / INDEX).write_text('{}'), (INDEX, 'weight_map')),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
            ('b.safetensors', 'no such'),
        ),
        (lambda folder: (folder / 'model.safetensors').write_bytes(b'x' * 100), ('not a safetensors file',)),
        (_cut, ('cut off',)),
        (lambda folder: (folder / 'tokenizer.json').unlink(), ('tokenizer.json', '--tokenizer')),
        (_without(EXPERT), ('no tensor', EXPERT, '[12, 16]')),
        (_without('model.norm.weight'), ('no tensor', 'model.norm.weight')),
        (_without('model.layers.3.hnorm.weight'), ('no tensor', 'model.layers.3.hnorm.weight')),
        (_replaced(EXPERT, np.zeros((12, 15), np.float32)), (EXPERT, '[12, 15]', 'expected [12, 16]')),
        (_replaced(EXPERT, np.zeros((12, 16), np.int32)), (EXPERT, 'I32', 'BF16')),
        (
            _replaced(EXPERT, np.zeros((12, 16), ml_dtypes.float8_e4m3fn)),
            (f'{EXPERT}_scale_inv', 'not there', '[1, 1]'),
        ),
        (_replaced('model.layers.0.self_attn.q_a_proj.bias', np.zeros(7, np.float32)), ('q_a_proj.bias', 'no place')),
    ],
)
def test_damaged_folders(
    hub: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    folder = hub()
    damage(folder)
    refused(folder, tmp_path, *words)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path, tokenizer_path: str) -> None:
    write_hub(tmp_path / 'hub', tiny(vocab_size=399), tokenizer_path)
    refused(tmp_path / 'hub', tmp_path, '400 tokens', 'vocab_size=399')


def test_a_config_without_its_multi_token_layer(tmp_path: Path, tokenizer_path: str) -> None:
    """As transformers writes it: it keeps the field and drops the layer. The tokenizer lies elsewhere."""
    write_hub(tmp_path / 'hub', hub_config(), tokenizer_path, num_nextn_predict_layers=1)
    (tmp_path / 'hub' / 'tokenizer.json').unlink()
    import_model(tmp_path / 'hub', tmp_path / 'in', Path(tokenizer_path))
    assert load(tmp_path / 'in').model.config.num_nextn_predict_layers == 0


def test_nothing_is_overwritten(hub: Callable[..., Path], imported: Path, tmp_path: Path) -> None:
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'precious').write_text('')
    folder = hub()
    refused(folder, tmp_path, 'exists already')
    with pytest.raises(InputError, match='exists already'):
        export_model(str(imported), folder)


@pytest.mark.parametrize(
    ('changes', 'architecture', 'words'),
    [
        (dict(attention='gqa'), '', "model.attention is 'gqa'"),
        (dict(n_routed_experts=0), '', 'model.n_routed_experts is 0'),
        (dict(scoring_func='softmax'), '', 'topk_method'),
        (dict(n_shared_experts=0), '', 'n_shared_experts is 0'),
        (dict(rope_factor=4.0, rope_mscale=0.7, rope_mscale_all_dim=0.0), '', 'mscale'),
        (dict(), 'DeepseekV2ForCausalLM', 'scoring_func'),
    ],
)
def test_what_no_architecture_has(changes: dict[str, Any], architecture: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_to_hub(hub_config(**changes), architecture)


def test_export_finds_broken_checkpoints(imported: Path, tmp_path: Path) -> None:
    shutil.copytree(imported, tmp_path / 'in')
    with pytest.raises(InputError, match='no checkpoint of step 7'):
        export_model(f'{tmp_path / "in"}@7', tmp_path / 'out')
    data = max((tmp_path / 'in' / 'checkpoints' / '0' / 'params').rglob('d/*'), key=lambda path: path.stat().st_size)
    bits = bytearray(data.read_bytes())
    bits[len(bits) // 2] ^= 1
    data.write_bytes(bits)
    with pytest.raises(InputError, match='params/'):
        export_model(str(tmp_path / 'in'), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_the_command(imported: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(['export', str(imported), str(tmp_path / 'out'), '--dtype=bfloat16']) == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    original = load_file(published / 'model.safetensors')
    for name, x in load_file(tmp_path / 'out' / 'model.safetensors').items():
        if name in original:
            assert x.dtype == (np.float32 if 'bias' in name else ml_dtypes.bfloat16)
            np.testing.assert_array_equal(x, original[name].astype(x.dtype))
    assert convert.main(['import', str(tmp_path / 'nowhere'), str(tmp_path / 'in')]) == 1
    assert convert.main(['export', str(tmp_path / 'nowhere'), str(tmp_path / 'other')]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith('train.convert: ') and 'nowhere' in line for line in lines)


def from_folder(parent: str) -> dict[str, Any]:
    """The small config cut down to fine-tuning and reinforcement learning from a folder."""
    config = small.get_config()
    del config.stages.pretrain, config.stages.midtrain
    for stage in config.stages.values():
        stage.update(steps=2, microbatches=1)
        stage.optimizer.update(name='adamw', learning_rate=0.001)
    config.stages.sft.parent = parent
    config.sources = ConfigDict({'arithmetic_chat': config.sources.arithmetic_chat})
    config.stages.grpo.reward = 'random'
    return as_dict(config.to_dict())


@pytest.mark.slow
def test_training_from_an_imported_model(
    tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning and reinforcement learning on top of it, with its tokenizer and template; then out again."""
    own = Tokenizer.load(tokenizer_path)
    own.chat_template = TEMPLATE
    own.save(tmp_path / 'words')
    config = small.model_config(vocab_size=VOCABULARY)
    variables = write_hub(tmp_path / 'hub', config, str(tmp_path / 'words'))
    parent = tmp_path / 'in'
    import_model(tmp_path / 'hub', parent)

    assert generate_main([f'--checkpoint={parent}', '--chat', '--prompt=Hi', '--max_tokens=4']) == 0
    assert evaluate_main([f'--checkpoint={parent}', '--tasks=nothing']) == 1
    run = Run(from_folder(str(parent)), tmp_path / 'run')
    run.mesh = small.one_device()
    run()
    tuned = load(tmp_path / 'run' / 'grpo')
    assert tuned.model.config == load(parent).model.config
    assert tuned.tokenizer.chat_template == TEMPLATE
    assert tuned.tokenizer.fingerprint == load(parent).tokenizer.fingerprint
    chat = [{'role': 'user', 'content': '<|assistant|>?'}, {'role': 'assistant', 'content': 'yes'}]
    ids, mask = render_chat(chat, tuned.tokenizer)
    assert tuned.tokenizer.decode(ids, skip_control=False) == '<|user|><|assistant|>?<|assistant|>yes<|end|>'
    assert sum(mask) == len(tuned.tokenizer.encode('yes')) + 1
    assert np.abs(np.asarray(tuned.variables['params']['norm']) - variables['params']['norm']).max() > 0
    lineage = json.loads((tmp_path / 'run' / 'lineage.json').read_text())
    assert [(stage['name'], stage['parent']) for stage in lineage['stages']] == [('sft', str(parent)), ('grpo', 'sft')]

    run()
    assert 'sft: finished before' in capsys.readouterr().out
    export_model(str(tmp_path / 'run' / 'grpo'), tmp_path / 'out')
    import_model(tmp_path / 'out', tmp_path / 'back')
    back = load(tmp_path / 'back')
    assert back.tokenizer.chat_template == TEMPLATE
    batch = packed(vocabulary=VOCABULARY)
    one, other = (evaluate(config, jax.device_get(x.variables), batch)['logits'] for x in (tuned, back))
    np.testing.assert_array_equal(one, other)


def test_what_a_parent_folder_should_not_be(imported: Path, tmp_path: Path, tokenizer_path: str) -> None:
    with pytest.raises(InputError, match='expected a stage folder'):
        Run(from_folder(str(tmp_path / 'nowhere')), tmp_path / 'run')
    other = Tokenizer.load(tokenizer_path)
    other.chat_template = TEMPLATE
    other.save(tmp_path / 'words')
    config = from_folder(str(imported))
    config['tokenizer']['path'] = str(tmp_path / 'words')
    with pytest.raises(InputError, match='another tokenizer'):
        Run(config, tmp_path / 'run')

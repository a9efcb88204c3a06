"""Models in and out of Hugging Face's folders.

python -m train.convert import HF_DIR OUT            HF_DIR as downloaded: config.json, *.safetensors, tokenizer.json
python -m train.convert export CHECKPOINT HF_DIR     CHECKPOINT: DIR/STAGE, DIR/STAGE@STEP, or what import wrote

An imported model is a folder like a stage's: `train.generate --checkpoint=OUT` and `train.evaluate` take it, and a
stage of a run starts from it with its path as `parent` (--config.stages.sft.parent=./OUT). Architectures:
DeepseekV3ForCausalLM (V3, R1, Moonlight, Kimi K2), DeepseekV2ForCausalLM (V2, V2-Lite), Glm4MoeLiteForCausalLM;
weights in float32, bfloat16, float16 or block-scaled FP8. Nothing is overwritten: the new folder must not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from safetensors.numpy import save_file
from tqdm import tqdm

from data.errors import InputError, json_object
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.huggingface import (
    ARCHITECTURES,
    Leaf,
    architecture_of,
    config_from_hub,
    config_to_hub,
    copies,
    dequantized,
    leaves,
    multi_token_modules,
    scale_block,
)
from model.layers import LORA_A, LORA_B, adapted
from model.sharding import make_mesh
from model.transformer import Model
from train.checkpoint import (
    Checkpoints,
    Lazy,
    read_json,
    split_address,
    stage_folder,
    tokenizer_folder,
    write_json,
)
from train.launch.command import command

INDEX = 'model.safetensors.index.json'
LARGEST_HEADER = 10**8  # bytes, of any safetensors file (the format's own specification)
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')

# By the names that safetensors files give to types. Read here, for the library hands NumPy no FP8.
_DTYPES = {
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
_EXPORTED = {'float32': _DTYPES['F32'], 'bfloat16': _DTYPES['BF16']}


class HubTensors:
    """The tensors of a hub folder, in one safetensors file or in several with an index. They stay on disk until read.

    Raises:
        InputError: a file that is missing, cut off or not of this format, or a tensor of a type we do not read.
    """

    def __init__(self, folder: Path, block: tuple[int, int] = (128, 128)):
        """`block`: rows and columns that share a scale in FP8 weights."""
        self._folder, self._block = folder, block
        self._found: dict[str, tuple[Path, int, np.dtype, tuple[int, ...]]] = {}
        names = ['model.safetensors']
        if (folder / INDEX).is_file():
            try:
                names = sorted(set(read_json(folder / INDEX)['weight_map'].values()))
                inside = all(Path(name).name == name for name in names)
            except (KeyError, TypeError, AttributeError):
                inside = False
            if not inside:
                raise InputError(f'{folder / INDEX}: expected a "weight_map" from tensors to files beside it')
        for name in names:
            self._open(folder / name)

    def _open(self, path: Path) -> None:
        if not os.path.isfile(path):  # unlike pathlib's it takes any name
            raise InputError(f'{path}: no such file; expected the weights in it')
        size = path.stat().st_size
        with path.open('rb') as file:
            # Eight bytes with the length of a JSON header, the header, the data (the format's own specification).
            start = 8 + int.from_bytes(file.read(8), 'little')
            try:
                header = json_object(file.read(start - 8 if start <= min(size, LARGEST_HEADER) else 0), path)
                header.pop('__metadata__', None)
                entries = [(n, str(x['dtype']), tuple(x['shape']), tuple(x['data_offsets'])) for n, x in header.items()]
                numbers = [number for _, _, shape, ends in entries for number in (*shape, *ends)]
                sound = all(type(n) is int and n >= 0 for n in numbers) and all(len(ends) == 2 for *_, ends in entries)
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise InputError(f'{path}: not a safetensors file, or cut off')
        for name, dtype, shape, (begin, end) in entries:
            if dtype not in _DTYPES:
                raise InputError(f'{path}: {name} is of type {dtype}: expected one of {", ".join(_DTYPES)}')
            if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize or start + end > size:
                raise InputError(f'{path}: {name} does not lie within the file, which was perhaps cut off')
            self._found[name] = (path, start + begin, _DTYPES[dtype], shape)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {name: shape for name, (_, _, _, shape) in self._found.items()}

    def check(self, expected: Iterable[Leaf], repeated: Iterable[str]) -> None:
        """Raises InputError unless the folder holds the tensors of the leaves, in their shapes, and no others.

        Allowed are the `repeated` ones, the scales of FP8 weights, and tables of rotary frequencies, which old files
        have.
        """
        allowed = set(repeated)
        for leaf in expected:
            for name in leaf.names:
                if name not in self._found:
                    raise InputError(f'{self._folder}: no tensor {name}: expected one of shape {list(leaf.hub_shape)}')
                path, _, dtype, shape = self._found[name]
                if shape != leaf.hub_shape:
                    raise InputError(f'{path}: {name} has shape {list(shape)}: expected {list(leaf.hub_shape)}')
                allowed.add(name)
                if dtype.itemsize == 1:
                    self._check_scale(name, shape)
                    allowed.add(f'{name}_scale_inv')
        for name, (path, *_) in self._found.items():
            if name not in allowed and not name.endswith('rotary_emb.inv_freq'):
                raise InputError(f'{path}: {name} has no place in this architecture')

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> None:
        scale = f'{name}_scale_inv'
        wanted = tuple(-(-size // part) for size, part in zip(shape, self._block, strict=True))
        if self.names.get(scale) != wanted:
            found = list(self.names[scale]) if scale in self._found else 'not there'
            raise InputError(f'{self._folder}: {scale} is {found}: expected shape {list(wanted)}, for {name} is FP8')

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32; FP8 is multiplied by its scales."""
        value = self._raw(name)
        if value.dtype.itemsize == 1:
            return dequantized(value, self._raw(f'{name}_scale_inv'), self._block)
        return value.astype(np.float32)

    def _raw(self, name: str) -> np.ndarray:
        path, offset, dtype, shape = self._found[name]
        return np.memmap(path, np.uint8, 'r', offset, (math.prod(shape) * dtype.itemsize,)).view(dtype).reshape(shape)


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, and is gone if the body fails.

    Raises InputError where `target` holds anything already.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f'{target}: exists already: expected a new folder')
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    try:
        temporary.chmod(0o755)  # as of any folder; mkdtemp makes it private
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_model(source: Path, target: Path, tokenizer: Path | None = None) -> None:
    """Writes the hub folder `source` as a checkpoint folder `target`.

    One of our arrays, which stacks a weight of all layers and experts, is in memory at a time (up to three times over);
    everything is checked before the first is read. The tokenizer's files are copied as they are.

    Args:
        tokenizer: another folder with the tokenizer, for models that come without `tokenizer.json`.

    Raises:
        InputError: anything in the folder that is missing or not supported; a target that exists.
    """
    path = source / 'config.json'
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise InputError(f'{path}: expected an object')
    try:
        architecture = architecture_of(fields)
        config_from_hub(fields)
        tensors = HubTensors(source, scale_block(fields))
        config = config_from_hub(fields, multi_token_modules(tensors.names, fields))
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f'{path}: {error}') from error
    model = Model(config)
    parts = leaves(model, interleaved=fields.get('rope_interleave') is not False)
    repeated = copies(config)
    if config.tie_word_embeddings:
        repeated['lm_head.weight'] = 'model.embed_tokens.weight'
    tensors.check(parts, repeated)
    if tokenizer is None and not (source / 'tokenizer.json').is_file():
        raise InputError(f'{source / "tokenizer.json"}: no such file; give a folder that has one with --tokenizer')
    origin = tokenizer or source
    words = Tokenizer.load(origin)
    if words.vocab_size > config.vocab_size:
        wanted = f'at most vocab_size={config.vocab_size}'
        raise InputError(f'{origin / "tokenizer.json"}: {words.vocab_size} tokens: expected {wanted}')

    variables: dict[str, Any] = {'params': {}, 'balance': {}, 'optimizer': {}}
    for leaf in parts:
        _put(variables, leaf.path, Lazy(leaf.shape, functools.partial(_assembled, leaf, tensors)))
    if not variables['balance']:  # no biases in the files: ours are zero
        variables['balance'] = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.declared['balance'])
    with written_whole(target) as folder:
        _copy_tokenizer(origin, folder / 'tokenizer')
        record = {'name': target.name, 'model': config.to_dict(), 'stage': {}, 'seed': 0, 'sources': {}}
        record |= {'evaluations': {}, 'mesh': {}, 'tokenizer': words.fingerprint, 'architecture': architecture}
        write_json(folder / 'config.json', record)
        metadata = {'stage': target.name, 'parent': '', 'tokenizer': words.fingerprint, 'tokens': 0, 'flops': 0.0}
        checkpoints = Checkpoints(folder / 'checkpoints')
        try:
            checkpoints.save(0, variables, {}, metadata)
            checkpoints.wait()
        finally:
            checkpoints.close()


def export_model(
    address: str, target: Path, architecture: str = '', dtype: str = 'float32', shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the checkpoint at `address` as a hub folder `target`, which `transformers` loads as it is.

    One of our arrays and one file's worth of tensors are in memory at a time. Router biases stay in float32.

    Args:
        architecture: a name of ARCHITECTURES; '': as imported, or DeepSeek's with the same router.
        dtype: 'float32' (exact: import gives the same bits) or 'bfloat16'.

    Raises:
        InputError: no or a broken checkpoint, a config that the architecture cannot express, a target that exists.
    """
    name, step = split_address(address)
    origin = stage_folder(name)
    record = read_json(origin / 'config.json')
    stored = Model(ModelConfig.from_dict(record['model']))
    config = dataclasses.replace(stored.config, lora_rank=0)  # adapters are merged
    try:
        fields = config_to_hub(config, architecture or record.get('architecture', ''))
    except ValueError as error:
        raise InputError(f'{origin}: {error}') from error
    words = Tokenizer.load(tokenizer_folder(origin))
    fields |= {'bos_token_id': words.begin_id, 'eos_token_id': words.end_id, 'pad_token_id': words.pad_id}
    model = Model(config)
    repeated: dict[str, list[str]] = {}
    for copy, original in copies(config).items():
        repeated.setdefault(original, []).append(copy)

    # What goes into which file is known before anything is read: the names of the files say how many there are.
    plan: list[list[str]] = [[]]
    room, total, parts = shard_bytes, 0, leaves(model)
    for leaf in parts:
        size = math.prod(leaf.hub_shape) * _stored_type(leaf, dtype).itemsize
        for tensor in (copy for name in leaf.names for copy in (name, *repeated.get(name, ()))):
            if room < size and plan[-1]:
                plan.append([])
                room = shard_bytes
            plan[-1].append(tensor)
            room, total = room - size, total + size
    files = ['model.safetensors']
    if len(plan) > 1:
        files = [f'model-{i:05d}-of-{len(plan):05d}.safetensors' for i in range(1, len(plan) + 1)]

    wanted = stored.shapes(make_mesh({}, jax.devices()[:1]))
    checkpoints = Checkpoints(origin / 'checkpoints', read_only=True)
    try:
        read = checkpoints.reader({part: wanted[part] for part in ('params', 'balance')}, step)
        with written_whole(target) as folder:
            pending: dict[str, np.ndarray] = {}
            left = list(zip(files, plan, strict=True))
            for leaf in tqdm(parts, desc='arrays', disable=None):
                array = _read_adapted(read, leaf, stored).reshape(-1, *leaf.shape[leaf.stacked :])
                for name, value in zip(leaf.names, array, strict=True):
                    tensor = leaf.to_hub(value).astype(_stored_type(leaf, dtype), copy=False)
                    for copy in (name, *repeated.get(name, ())):
                        pending[copy] = tensor
                        if len(pending) == len(left[0][1]):  # in the order of the plan, so the file is complete
                            save_file(pending, folder / left.pop(0)[0], metadata={'format': 'pt'})
                            pending = {}
                del array, value  # before the next one is read
            if len(plan) > 1:
                where = {tensor: file for file, names in zip(files, plan, strict=True) for tensor in names}
                write_json(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': where})
            write_json(folder / 'config.json', {**fields, 'torch_dtype': dtype})
            _copy_tokenizer(tokenizer_folder(origin), folder)
    finally:
        checkpoints.close()


def _read_adapted(read: Callable[[Sequence[str]], np.ndarray], leaf: Leaf, model: Model) -> np.ndarray:
    """An array of a checkpoint with its adapter, where the checkpoint's model has one for it, merged."""
    array, (a, b) = read(leaf.path), [(*leaf.path[:-1], leaf.path[-1] + name) for name in (LORA_A, LORA_B)]
    if '/'.join(a) not in model.paths:
        return array
    return np.asarray(adapted(array, read(a), read(b), leaf.stacked, model.config))


def _stored_type(leaf: Leaf, dtype: str) -> np.dtype:
    return _EXPORTED['float32' if leaf.path[0] == 'balance' else dtype]


def _assembled(leaf: Leaf, tensors: HubTensors) -> np.ndarray:
    """One of our arrays, tensor by tensor."""
    array = np.empty(leaf.shape, np.float32)
    flat = array.reshape(-1, *leaf.shape[leaf.stacked :])
    for i, name in enumerate(leaf.names):
        flat[i] = leaf.from_hub(tensors.read(name))
    return array


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files byte by byte: they may say more than we read."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@command('train.convert')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m train.convert', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='direction', required=True, metavar='import | export')
    reading = commands.add_parser('import', help='a Hugging Face folder becomes a checkpoint')
    reading.add_argument('source', metavar='HF_DIR', help='folder with config.json, *.safetensors and a tokenizer')
    reading.add_argument('target', metavar='OUT', help='new folder: --checkpoint and parent take it')
    reading.add_argument('--tokenizer', help='folder with tokenizer.json, for models that come without one')
    writing = commands.add_parser('export', help='a checkpoint becomes a Hugging Face folder')
    writing.add_argument('source', metavar='CHECKPOINT', help='DIR/STAGE, DIR/STAGE@STEP, or what import wrote')
    writing.add_argument('target', metavar='HF_DIR', help='new folder, for transformers and others')
    writing.add_argument('--dtype', choices=list(_EXPORTED), default='float32', help='of the weights (float32: exact)')
    writing.add_argument(
        '--architecture', choices=list(ARCHITECTURES), default='', help="default: as imported, or DeepSeek's"
    )
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder it only reads
    jax.config.update('jax_platforms', 'cpu')  # a matter of files: an accelerator's memory would be in the way
    target = Path(options.target)
    if options.direction == 'import':
        import_model(Path(options.source), target, Path(options.tokenizer) if options.tokenizer else None)
    else:
        export_model(options.source, target, options.architecture, options.dtype)
    print(target)
    return 0


if __name__ == '__main__':
    sys.exit(main())

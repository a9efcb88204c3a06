"""Records of any kind to ArrayRecord shards: what long runs read from, with quick random access.

    python -m data.prepare --input=PATH|TFDS_NAME --output=DIR [--tokenizer=DIR] [--field=NAME] [--split=train]

Records keep their order and their fields, as JSON. With a tokenizer folder they become `{"tokens": [...]}`, with a
`loss_weight` where not everything is learnt, and keep their `provenance`. DIR appears at once and complete, or not at
all, and is never overwritten. `metadata.json` in it says what is there, and from which tokenizer.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import InputError
from data.files import Record
from data.packing import encode_record
from data.sources import Source, open_source
from data.tokenizer import Tokenizer

_SUFFIXES = {'.jsonl': 'jsonl', '.jsonl.gz': 'jsonl', '.parquet': 'parquet', '.arrayrecord': 'arrayrecord'}


def prepare(
    spec: dict[str, Any],
    output: str | Path,
    tokenizer_path: str = '',
    shard_records: int = 100_000,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes all records of the source `spec` into the new folder `output`, and returns what its metadata.json says.

    Metadata: `records`, `tokens` (0 for text), `tokenizer` (its fingerprint, or None), `fingerprint` (SHA-256 over the
    shards'), `source`, and per shard its `name`, `records`, `tokens` and `sha256` of its records; `curated`, where the
    source has been (see `data.curate`). The number of `workers` (processes) changes nothing in the result. Raises
    InputError for a source or record that cannot be used, and where `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f'{output}: exists already; expected the name of a new folder')
    if shard_records < 1 or workers < 1:
        raise InputError(f'shard_records={shard_records}, workers={workers}: expected at least 1 of each')
    opened.cache_clear()  # the files may be others than they were
    source = opened(json.dumps(spec))
    count, history = len(source), getattr(source, 'metadata', {}).get('curated', [])
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else None
    starts = range(0, count, shard_records)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f'.{output.name}.unfinished-{os.getpid()}')
    unfinished.mkdir()
    try:
        write = functools.partial(_write_shard, json.dumps(spec), tokenizer_path)
        names = [f'records-{i:05d}-of-{len(starts):05d}.arrayrecord' for i in range(len(starts))]
        arguments = (
            [str(unfinished / name) for name in names],
            starts,
            [min(start + shard_records, count) for start in starts],
        )
        with tqdm(total=count, unit='record', disable=not progress) as bar:
            shards = []
            for shard in in_processes(write, arguments, min(workers, len(starts))):
                shards.append(shard)
                bar.update(shard['records'])
        if tokenizer is not None:
            tokenizer.save(unfinished / 'tokenizer')
        metadata = {
            'records': count,
            'tokens': sum(shard['tokens'] for shard in shards),
            'tokenizer': tokenizer.fingerprint if tokenizer is not None else None,
            'fingerprint': fingerprint(shards, history),
            'source': spec,
            'shards': shards,
            **({'curated': history} if history else {}),
        }
        (unfinished / 'metadata.json').write_text(json.dumps(metadata, indent=2) + '\n', encoding='utf-8')
        unfinished.rename(output)  # fails if another process has made `output` meanwhile
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return metadata


def source_spec(name: str, split: str, field: str) -> dict[str, Any]:
    """The source that `--input` means, by what is there: a folder or a file by its ending; else a TFDS name."""
    options = {'field': field} if field else {}
    if os.path.isfile(os.path.join(name, 'dataset_info.json')):
        return {'type': 'tfds', 'path': name, 'split': split, **options}
    if os.path.isdir(name):
        kind = 'arrayrecord' if any(Path(name).glob('*.arrayrecord')) else 'text'
        return {'type': kind, 'path': name, **options}
    if not os.path.exists(name) and not any(mark in name for mark in '*?['):
        if name.startswith(('.', '/')) or '.' in os.path.basename(name):
            raise InputError(f'{name}: no such file or folder')
        return {'type': 'tfds', 'name': name, 'split': split, **options}
    kind = next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), 'text')
    return {'type': kind, 'path': name, **options}


def fingerprint(shards: Sequence[dict[str, Any]], history: Sequence[Any] = ()) -> str:
    """SHA-256 over those of the shards, and over the steps of curation behind them where there are any."""
    told = json.dumps(history, sort_keys=True) if history else ''
    return hashlib.sha256((''.join(shard['sha256'] for shard in shards) + told).encode()).hexdigest()


def in_processes(write: Any, arguments: tuple[Any, ...], workers: int) -> Any:
    """Shards in order, made in this process or in several fresh ones (to fork one that has threads may deadlock)."""
    if workers == 1:
        yield from map(write, *arguments)
        return
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(write, *arguments)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.lru_cache(maxsize=1)
def opened(spec: str) -> Source:
    """The source of a spec in JSON. Opened once in each process: indexing a large file takes time."""
    return open_source(json.loads(spec))


def _write_shard(spec: str, tokenizer_path: str, path: str, start: int, end: int) -> dict[str, Any]:
    """Writes records [start, end) and tells what was written."""
    source = opened(spec)
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path else None
    records = ((index, source[index]) for index in range(start, end))
    return write_shard(path, ((i, _tokenised(r, tokenizer, i) if tokenizer else r) for i, r in records))


def write_shard(path: str, records: Iterable[tuple[int, Record]]) -> dict[str, Any]:
    """Writes records, which come with their numbers in the source, to a file, and tells what was written."""
    from array_record.python.array_record_module import ArrayRecordWriter

    digest = hashlib.sha256()
    written = tokens = 0
    writer = ArrayRecordWriter(path, 'group_size:1')  # one record a group: random access reads no neighbours
    for index, record in records:
        try:
            data = json.dumps(record, ensure_ascii=False).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f'record {index}: cannot be written as JSON: {error}') from error
        writer.write(data)
        digest.update(len(data).to_bytes(8, 'little') + data)
        written += 1
        held = record.get('tokens')
        tokens += len(held) if isinstance(held, list) else 0
    writer.close()
    return {'name': os.path.basename(path), 'records': written, 'tokens': tokens, 'sha256': digest.hexdigest()}


def _tokenised(record: Record, tokenizer: Tokenizer, index: int) -> Record:
    try:
        tokens, loss_weight = encode_record(record, tokenizer)
    except InputError as error:
        raise InputError(f'record {index}: {error}') from error
    kept = {'provenance': record['provenance']} if 'provenance' in record else {}
    if (loss_weight[1:] == 1).all():  # the first token's weight is 0 in any case
        return {'tokens': tokens.tolist(), **kept}
    return {'tokens': tokens.tolist(), 'loss_weight': loss_weight.tolist(), **kept}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m data.prepare', description='Records to ArrayRecord shards.')
    parser.add_argument('--input', required=True, help='file, folder, glob, or the name of a TFDS dataset')
    parser.add_argument('--output', required=True, help='folder to make')
    parser.add_argument('--tokenizer', default='', help='tokenizer folder: write tokens rather than text')
    parser.add_argument('--field', default='', help='field that holds the text, if it is not called text')
    parser.add_argument('--split', default='train', help='split of a TFDS dataset')
    parser.add_argument('--shard_records', type=int, default=100_000, help='records in a shard')
    parser.add_argument('--workers', type=int, default=1, help='processes')
    options = parser.parse_args(arguments)
    try:
        spec = source_spec(options.input, options.split, options.field)
        metadata = prepare(
            spec,
            options.output,
            options.tokenizer,
            options.shard_records,
            options.workers,
            progress=sys.stderr.isatty(),
        )
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    counts = f'{metadata["records"]} records, {metadata["tokens"]} tokens, {len(metadata["shards"])} shards'
    print(f'{options.output}: {counts}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""Byte-level BPE: text to token ids and back.

Control tokens (begin, end, roles, padding) are reachable by name only. Text can spell `<|end|>` as often as it likes:
it is always encoded as ordinary bytes, so no document and no user message can end a turn or open another one.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.errors import InputError, json_object

CONTROL_TOKENS = ('<|begin|>', '<|end|>', '<|pad|>', '<|system|>', '<|user|>', '<|assistant|>', '<|tool|>')

# Contractions; a word with one leading mark; a single digit; a run of symbols; line breaks with the indentation that
# follows, up to the one space that belongs to the next word; other blanks. In the manner of GPT-4's split, but for
# indentation: code at a small vocabulary is largely indentation, and one token for "end this line, go in by eight" is
# worth more than purity.
SPLIT_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+| *[\r\n]+(?: +(?= ))?|\s+(?!\S)|\s+"
)

_CONFIG_NAMES = {'begin': 'bos_token', 'end': 'eos_token', 'pad': 'pad_token'}


class Tokenizer:
    """A `tokenizers` model plus the names of its begin, end and padding tokens and its chat template.

    `end_id` is the stop token of documents and of assistant turns. `chat_template` is jinja2 source, or None.
    """

    def __init__(self, model: tokenizers.Tokenizer, begin: str, end: str, pad: str, chat_template: str | None = None):
        """`begin`, `end` and `pad` are names of special tokens of `model`; raises InputError where one is missing."""
        self._model = model
        # Special tokens found in text are spelled out in bytes; they enter a sequence by id alone.
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        self._control = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
        self._names = {'begin': begin, 'end': end, 'pad': pad}
        self.chat_template = chat_template
        self.begin_id, self.end_id, self.pad_id = (self.control(name) for name in (begin, end, pad))
        if self.pad_id in (self.begin_id, self.end_id):
            raise InputError(f'tokenizer: the padding token {pad!r} must differ from the begin and end tokens')
        spellings = sorted(self._control, key=len, reverse=True)  # the longest first, should one begin another
        self._control_pattern = re.compile(f'({"|".join(map(re.escape, spellings))})')
        # One past the largest id: a tokenizer made elsewhere may leave gaps, and an embedding table must cover them.
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: no begin or end token is added, and control tokens are never produced.

        Halves of surrogate pairs, which broken JSON escapes leave behind and no bytes can spell, become question marks.
        """
        try:
            # The batch form skips the character offsets that `encode` computes, which no caller needs.
            return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:  # how the library says that a string is not UTF-8
            return self.encode(text.encode(errors='replace').decode())

    def encode_trusted(self, text: str) -> list[int]:
        """Token ids of text of the program's own, such as a chat template: control tokens in it are recognised."""
        ids: list[int] = []
        for piece in self._control_pattern.split(text):
            if piece in self._control:
                ids.append(self._control[piece])
            elif piece:
                ids += self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def control(self, name: str) -> int:
        """Id of the control token spelled `name`, for instance '<|user|>'. Raises InputError if there is none."""
        if name not in self._control:
            raise InputError(f'tokenizer: no control token {name!r}; it has {", ".join(self._control) or "none"}')
        return self._control[name]

    @property
    def token_names(self) -> dict[str, str]:
        """Spelling of the 'begin', 'end' and 'pad' tokens."""
        return dict(self._names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 hex of everything that decides how text and chats become ids."""
        parts = [json.loads(self._model.to_str()), self._names, self.chat_template]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, in Hugging Face's form, into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, str] = {_CONFIG_NAMES[role]: name for role, name in self._names.items()}
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'
        if self.chat_template is not None:
            config['chat_template'] = self.chat_template
        (folder / 'tokenizer.json').write_text(self._model.to_str(pretty=True), encoding='utf-8')
        (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """Reads any Hugging Face tokenizer folder (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`).

        A tokenizer without a begin token starts documents with its end token. Raises InputError where a file is
        missing or broken, where there is no end token, and where no token can serve as padding.
        """
        folder = Path(path)
        for name in ('tokenizer.json', 'tokenizer_config.json'):
            if not (folder / name).is_file():
                raise InputError(f'{folder / name}: no such file; a tokenizer folder has it')
        try:
            model = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        except BaseException as error:  # the library raises bare Exception; a panic of its Rust code is not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise InputError(f'{folder / "tokenizer.json"}: not a tokenizer: {error}') from error
        config = json_object((folder / 'tokenizer_config.json').read_bytes(), folder / 'tokenizer_config.json')
        names = {role: _token_text(config.get(key)) for role, key in _CONFIG_NAMES.items()}
        end = names['end']
        if end is None:
            raise InputError(f'{folder / "tokenizer_config.json"}: no eos_token, which ends documents and turns')
        begin = names['begin'] or end
        special = [token.content for token in model.get_added_tokens_decoder().values() if token.special]
        pad = _padding_token(names['pad'], {begin, end}, special)
        if pad is None:
            raise InputError(
                f'{folder / "tokenizer_config.json"}: no pad_token of its own (not {end!r}), and no unused '
                'special token to serve as one'
            )
        template = _chat_template(config.get('chat_template'))
        if (folder / 'chat_template.jinja').is_file():
            template = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
        return cls(model, begin, end, pad, template)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE whose digits are single tokens, from `texts`; the same texts give the same tokenizer.

    `vocab_size` counts bytes and control tokens too; little text may yield fewer. Raises InputError below their number.
    """
    smallest = 256 + len(CONTROL_TOKENS)
    if vocab_size < smallest:
        raise InputError(f'vocab_size={vocab_size}: expected at least {smallest} (256 bytes and the control tokens)')
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior='isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return Tokenizer(model, '<|begin|>', '<|end|>', '<|pad|>')


def _token_text(entry: object) -> str | None:
    """A token of tokenizer_config.json is a string, a dict with 'content', or null."""
    if isinstance(entry, dict):
        entry = entry.get('content')
    return entry if isinstance(entry, str) and entry else None


def _padding_token(named: str | None, taken: set[str], special: list[str]) -> str | None:
    """The named padding token unless it is also an end token; else a special token that is meant to stay unused."""
    if named is not None and named not in taken:
        return named
    for hint in ('pad', 'reserved', 'unused', 'unk'):
        for token in special:
            if hint in token.lower() and token not in taken:
                return token
    return None


def _chat_template(entry: object) -> str | None:
    """A chat template is a string, or a list of named ones of which 'default' is meant."""
    if isinstance(entry, list):
        entry = next((x.get('template') for x in entry if isinstance(x, dict) and x.get('name') == 'default'), None)
    return entry if isinstance(entry, str) else None

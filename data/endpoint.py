"""Chat endpoints of the OpenAI-compatible protocol (vLLM, SGLang and others serve it) as generators and scorers.

What an endpoint answered is kept in a file, so that nothing paid for is asked twice. The key comes from an environment
variable, is read anew for each request, and is written nowhere: should a server repeat it, '[key]' takes its place.
"""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from data.chat import check_messages
from data.committee import Messages, fold
from data.errors import InputError

Reply = dict[str, Any]

BACKOFF = 1.0  # seconds; doubled with each try
LONGEST_PAUSE = 300.0  # seconds; a server that asks for more has to be waited for by a person
LARGEST_BODY = 1 << 24  # bytes
OWN_FIELDS = ('model', 'messages', 'n', 'seed', 'stream')


class _Transient(Exception):
    """A failure that may pass; `pause` is how many seconds the server asked for."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


class Endpoint:
    """A generator (see `data.committee`): one request for each sample, so that more samples later cost only themselves.

    Attributes:
        usage: requests sent, answers taken from the cache instead, and the tokens of answers received.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: str,
        key_variable: str = '',
        settings: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        tries: int = 6,
        requests_per_minute: float = 0.0,
        concurrency: int = 8,
    ):
        """
        Args:
            url: what '/chat/completions' is added to, such as 'http://localhost:8000/v1'.
            cache: a JSON Lines file; processes may share it.
            key_variable: the environment variable that holds the key; '' where none is needed.
            settings: sent with each request: temperature, max_tokens and the like.
            timeout: seconds for each wait on the connection, and for a body as a whole.
            tries: of a request that meets a time-out, a broken connection or answer, status 408, 425, 429 or 5xx.
            requests_per_minute: evenly spaced, those of further tries included; 0: no limit.
            concurrency: requests under way at one time.

        Raises:
            InputError: a bad URL, a missing or malformed key, a setting that is not for the user to choose.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ('http', 'https') or not parts.hostname or '@' in parts.netloc or parts.query:
            raise InputError('endpoint: url: expected http(s)://HOST[:PORT]/PATH without password or query')
        for name in settings or {}:
            if name in OWN_FIELDS:
                raise InputError(f'endpoint {url}: settings: {name} is set for each request')
        if min(timeout, tries, concurrency) <= 0 or requests_per_minute < 0:
            raise InputError(f'endpoint {url}: timeout, tries and concurrency: expected more than 0')
        self._name, self._url = f'endpoint {url} ({model})', f'{url.rstrip("/")}/chat/completions'
        self._model, self._settings, self._key_variable = model, dict(settings or {}), key_variable
        self._timeout, self._tries, self._concurrency = timeout, tries, concurrency
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._cache = Cache(cache)
        self.usage: Counter[str] = Counter(requests=0, cached=0, prompt_tokens=0, completion_tokens=0)
        self._key()

    def __call__(self, prompts: Sequence[Messages], n: int, seed: int) -> list[list[str]]:
        """n answers to each prompt; '' for one cut off by the token limit or a filter. Draws depend on the prompt's
        words, the seed and the sample's number alone.

        Raises:
            InputError: names the endpoint, the prompt and the status, once tries are spent or where they cannot help.
        """
        replies = self._all([self._request(prompt, seed=fold(seed, k)) for prompt in prompts for k in range(n)], n)
        texts = ['' if reply['finish'] in ('length', 'content_filter') else reply['text'] for reply in replies]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """A scorer of options of one token each: the log-probability that an answer begins with it, blanks aside, or
        -inf for one that is not among the 20 likeliest. Raises InputError as above, or if the endpoint gives none.
        """
        one = {'max_tokens': 1, 'temperature': 0.0, 'logprobs': True, 'top_logprobs': 20}
        replies = self._all([self._request(prompt, **one) for prompt in prompts], 1)
        if not all(reply['top'] for reply in replies):
            raise InputError(f'{self._name}: expected log-probabilities, got an answer without')
        masses = [Counter[str]() for _ in replies]
        for mass, reply in zip(masses, replies, strict=True):
            for token, logprob in reply['top']:
                mass[token.strip()] += math.exp(logprob)  # type: ignore[assignment]
        return [[math.log(mass[option]) if mass[option] > 0 else -math.inf for option in options] for mass in masses]

    def _request(self, prompt: Messages, **fields: Any) -> dict[str, Any]:
        check_messages(prompt)
        messages = [{'role': message['role'], 'content': message['content']} for message in prompt]
        return {'model': self._model, 'messages': messages, **self._settings, **fields}

    def _all(self, requests: Sequence[dict[str, Any]], n: int) -> list[Reply]:
        """The reply to each; equal requests are sent once, and none is begun after a failure."""
        keys = [request_key(self._url, request) for request in requests]
        todo = {key: i for i, key in enumerate(keys) if self._cache.get(key) is None}
        self.usage['cached'] += len(keys) - len(todo)
        stop = threading.Event()
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(self._ask, keys[i], requests[i], i // n, stop) for i in sorted(todo.values())]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        replies: list[Any] = [self._cache.get(key) for key in keys]
        return replies

    def _ask(self, key: str, request: dict[str, Any], number: int, stop: threading.Event) -> None:
        if self._cache.get(key) is not None:  # another process has asked in the meantime
            return
        for attempt in range(1, self._tries + 1):
            with self._lock:
                now = time.monotonic()
                start = self._next = max(now, self._next)
                self._next += self._interval
                self.usage['requests'] += 1
            if stop.wait(start - now):
                raise CancelledError
            try:
                reply = self._post(request)
                break
            except _Transient as error:
                backoff = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                pause = max(error.pause, min(backoff, LONGEST_PAUSE))
                if attempt == self._tries or pause > LONGEST_PAUSE:
                    asked = f'; it asks to wait {pause:.0f} s' if pause > LONGEST_PAUSE else ''
                    message = f'{self._name}: prompt {number}: {error} (try {attempt} of {self._tries}{asked})'
                    raise InputError(message) from None
            except InputError as error:
                raise InputError(f'{self._name}: prompt {number}: {error}') from None
            if stop.wait(pause):
                raise CancelledError
        self._cache.put(key, reply)
        with self._lock:
            self.usage.update({name: reply[name] for name in ('prompt_tokens', 'completion_tokens')})

    def _post(self, body: dict[str, Any]) -> Reply:
        """Sends one request. Raises _Transient, or InputError where another try would not help."""
        key = self._key()
        request = urllib.request.Request(self._url, json.dumps(body).encode(), {'Content-Type': 'application/json'})
        if key:
            request.add_unredirected_header('Authorization', f'Bearer {key}')
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                data = json.loads(_read(response, time.monotonic() + self._timeout))
            return _parse(json.loads(json.dumps(data).replace(key or '\0', '[key]')))
        except urllib.error.HTTPError as error:
            said = ''
            with error, contextlib.suppress(OSError, http.client.HTTPException, InputError):
                said = _read(error.fp, time.monotonic() + self._timeout).decode(errors='replace')
            # The key is taken out of the whole: a part of it must not be left where the text is cut.
            words = f'status {error.code} {error.reason}: {said}'.replace(key or '\0', '[key]').split()
            message = ' '.join(words)[:300]
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Transient(message, _retry_after(error.headers.get('Retry-After', ''))) from None
            raise InputError(message) from None
        except InputError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, 'reason', error)
            raise _Transient(f'no answer: {reason!r}'.replace(key or '\0', '[key]')) from None
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise _Transient('status 200, but the answer is not a chat completion') from None

    def _key(self) -> str:
        if not self._key_variable:
            return ''
        key = os.environ.get(self._key_variable, '').strip()
        if not re.fullmatch(r'[!#-\[\]-~]+', key):  # what a header can carry and JSON spells as it is
            raise InputError(f'environment variable {self._key_variable} holds no key')
        return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET; a redirection is an error that shows its status."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: Any, end: float) -> bytes:
    """A body piece by piece: the socket's own time-out begins anew with every byte of a slow server."""
    data = bytearray()
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > LARGEST_BODY:
            raise InputError(f'status 200, but an answer of more than {LARGEST_BODY:,} bytes')
        if time.monotonic() > end:
            raise TimeoutError('the answer took too long')
    return bytes(data)


def _parse(body: Any) -> Reply:
    """What is kept of a chat completion; raises one of the errors of a value with another form."""
    choice = body['choices'][0]
    text, usage = choice['message'].get('content') or '', body.get('usage') or {}
    if not isinstance(text, str):
        raise TypeError
    first = (choice.get('logprobs') or {}).get('content') or [{}]
    return {
        'text': text.encode(errors='replace').decode(),  # JSON may escape half a character, which no file can hold
        'finish': choice.get('finish_reason'),
        'top': [(entry['token'], min(0.0, float(entry['logprob']))) for entry in first[0].get('top_logprobs') or ()],
        'prompt_tokens': int(usage.get('prompt_tokens') or 0),
        'completion_tokens': int(usage.get('completion_tokens') or 0),
    }


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date (RFC 9110, section 10.2.3)."""
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def request_key(url: str, request: Mapping[str, Any]) -> str:
    """SHA-256 of a request in canonical form."""
    canonical = json.dumps({'url': url, 'request': request}, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Cache:
    """Replies by key in a JSON Lines file that only ever grows; threads and processes may share it.

    A line that a killed process left torn is passed over. Of two replies with one key the first counts, for everyone.
    """

    def __init__(self, path: str):
        self._path, self._lock, self._end = path, threading.Lock(), 0
        self._places: dict[str, tuple[int, int]] = {}  # offset and size in bytes
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f'{path}: cannot be opened: {error.strerror}') from error

    def __del__(self) -> None:
        if hasattr(self, '_file'):
            os.close(self._file)

    def get(self, key: str) -> Reply | None:
        with self._lock:
            if key not in self._places:
                self._read_on()
            offset, size = self._places.get(key, (0, 0))
        return json.loads(os.pread(self._file, size, offset))['reply'] if size else None

    def put(self, key: str, reply: Reply) -> None:
        line = json.dumps({'key': key, 'reply': reply}).encode() + b'\n'
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                size = os.fstat(self._file).st_size
                if size and os.pread(self._file, 1, size - 1) != b'\n':
                    line = b'\n' + line  # ends what a killed process began
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError as error:
                raise InputError(f'{self._path}: cannot be written: {error.strerror}') from error
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read_on(self) -> None:
        """Takes in what has been added, by whomever; a line without its end may still be on its way."""
        if os.fstat(self._file).st_size == self._end:
            return
        with open(self._file, 'rb', closefd=False) as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b'\n'):
                    break
                try:
                    entry = json.loads(line)
                    if isinstance(entry['reply']['text'], str):
                        self._places.setdefault(entry['key'], (self._end, len(line)))
                except (ValueError, LookupError, TypeError):
                    pass
                self._end += len(line)

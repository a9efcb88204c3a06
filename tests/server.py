"""A chat endpoint that says what a test tells it to (fixture `server`)."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: Any, finish: str = 'stop', **more: Any) -> bytes:
    choice = {'message': {'role': 'assistant', 'content': text}, 'finish_reason': finish, **more}
    return json.dumps({'choices': [choice], 'usage': {'prompt_tokens': 7, 'completion_tokens': 3}}).encode()


class Server(ThreadingHTTPServer):
    """Answers request number i of a prompt with `script(handler, prompt, i)`, or with its words and seed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.script: Callable[[Handler, str, int], Any] = lambda *_: None
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.authorization: set[str | None] = set()
        self.working = self.most = 0
        self.lock = threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'

    def counts(self) -> Counter[str]:
        return Counter(request['messages'][-1]['content'] for request in self.asked)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        prompt = request['messages'][-1]['content']
        with self.server.lock:
            number = self.server.counts()[prompt]
            self.server.asked.append(request)
            self.server.times.append(time.monotonic())
            self.server.authorization.add(self.headers.get('Authorization'))
            self.server.working += 1
            self.server.most = max(self.server.most, self.server.working)
        self.at_work = True
        try:
            if self.path != '/v1/chat/completions':
                self.reply(404, b'no such path')
            elif self.server.script(self, prompt, number) is None:
                self.reply(200, completion(f'{prompt} {request.get("seed")}'))
        finally:
            self.rest()

    def rest(self) -> None:
        """Counts itself out: before the last byte is sent, as the client may ask again as soon as it has it."""
        with self.server.lock:
            self.server.working -= self.at_work
            self.at_work = False

    def reply(self, status: int, body: bytes, **headers: str) -> bool:
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.rest()
        self.wfile.write(body)
        return True

    def log_message(self, *_: Any) -> None:
        pass

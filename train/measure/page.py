"""What pages are made of: text that is safe to show, numbers in words, and the document around them."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any


def document(title: str, body: str) -> str:
    """A self-contained page. It asks the network for nothing, and its content policy forbids it to."""
    style = (Path(__file__).parent / 'page.css').read_text('utf-8')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{safe(title)}</title><style>{style}</style></head>\n<body>{body}</body></html>\n'
    )


def safe(value: Any) -> str:
    """HTML of any text; control characters, which a young model likes to write, become their visible pictures."""
    pictures = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in '\n\t'}
    return escape(str(value).translate(pictures))


def brief(value: Any) -> str:
    """A text, or any value as JSON, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 240 else text[:239] + '…'


def with_unit(value: float, unit: str) -> str:
    """A value of an evaluation; shares are shown in percent."""
    if unit == 'share':
        return f'{100 * value:.1f}%'
    return f'{value:.4g}{unit}' if unit == '%' else f'{value:.4g} {unit}'.strip()


def signed(change: float, unit: str) -> str:
    """A change, with its sign."""
    size = f'{100 * abs(change):.1f}' if unit == 'share' else with_unit(abs(change), unit)
    return ('+' if change >= 0 else '−') + size


def rounded(number: float) -> str:
    """3 significant digits: 12.3M; beyond the names of units, 1.23e15."""
    for size, suffix in ((1e15, ''), (1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g}{suffix}' if suffix else f'{number:.3g}'
    return f'{number:.3g}'


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them; nothing for 0."""
    if seconds <= 0:
        return ''
    return (
        f'{seconds:.0f} s'
        if seconds < 100
        else f'{seconds / 60:.1f} min'
        if seconds < 6000
        else f'{seconds / 3600:.1f} h'
    )

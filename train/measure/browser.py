"""Pages in a browser without a window: a picture of one, and whether it has complaints."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from data.errors import InputError

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
DEADLINE = 120.0  # seconds
COLOURS = 64  # of a picture, which so takes a third of the bytes
WIDTH = 1000  # pixels


def find_browser() -> str:
    """The path of an installed browser; '' where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), '')


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """Opens a page; returns what the browser prints, and the lines of its console.

    Raises:
        InputError: no browser is installed, or it fails.
    """
    browser = find_browser()
    if not browser:
        raise InputError(f'no browser is installed: expected one of {", ".join(BROWSERS)}')
    with tempfile.TemporaryDirectory() as profile:
        always = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--enable-logging=stderr']
        command = [browser, *always, f'--user-data-dir={profile}', *options, page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise InputError(f'{browser}: {error}') from None
    return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


def screenshot(page: Path, path: Path, height: int) -> None:
    """Writes the top of a page as PNG, in few colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / 'page.png'
        browse(page, f'--window-size={WIDTH},{height}', f'--screenshot={taken}')
        picture = Image.open(taken).convert('RGB')
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS).save(path, 'PNG', optimize=True)

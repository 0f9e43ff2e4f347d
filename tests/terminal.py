"""A program on a real pseudo-terminal, as a user sees it."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Sequence

from conftest import cli_environment

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    """`command` with a terminal of its own of 30 lines and 120 columns; `term` "dumb" or a real one."""

    def __init__(self, command: Sequence[object], term: str = "dumb", **environment: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**cli_environment(), "TERM": term, **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.raw = ""
        self.seen = ""

    def wait_for(self, word: str, timeout: float = 40) -> str:
        """Read until `word` has come after what was waited for before; returns what came before it."""
        end = time.monotonic() + timeout
        while word not in self.seen:
            assert time.monotonic() < end, f"no {word!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    came = os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other side has closed
                    assert word in self.seen, self.seen
                    break
                self.raw += came
                if "\x1b[6n" in came:  # where is the cursor?
                    self.type("\x1b[10;1R")
                self.seen = _ESCAPES.sub("", self.seen + came)
        before, _, self.seen = self.seen.partition(word)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self, word: str) -> None:
        """Ctrl-C until `word` comes: one between prompt and readline's wait for a key is noticed with the next key."""
        for _ in range(10):
            self.type("\x03")
            try:
                self.wait_for(word, timeout=3)
                return
            except AssertionError:
                continue
        raise AssertionError(f"no {word!r} in {self.seen!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

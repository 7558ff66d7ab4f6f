from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tlmc.downloads import first_to_answer

DEAD = "http://127.0.0.1:9/a"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on this machine that has the file ``a``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "a").write_bytes(b"content")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_first_address_that_has_the_file_is_taken(address: str) -> None:
    gone = f"{address}/b"
    assert first_to_answer([f"{address}/a", DEAD], 5.0) == (f"{address}/a", {})
    found = first_to_answer([gone, DEAD, f"{address}/a", DEAD], 5.0)
    assert found == (f"{address}/a", {gone: "HTTPError 404", DEAD: "ConnectionError"})
    assert first_to_answer([gone], 5.0) == (None, {gone: "HTTPError 404"})


def test_silent_hosts_are_given_up_together_and_do_not_hold_up_a_good_one(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        silent = [f"http://127.0.0.1:{host.getsockname()[1]}/{k}" for k in range(4)]
        start = time.perf_counter()
        found, reasons = first_to_answer(silent, 0.5)
        assert time.perf_counter() - start < 1.5
        assert found is None
        assert reasons.keys() == set(silent)
        assert set(reasons.values()) <= {"ReadTimeout", "no answer within 0.5 s"}
        start = time.perf_counter()
        assert first_to_answer([f"{address}/a", *silent], 5.0) == (f"{address}/a", {})
        assert time.perf_counter() - start < 3


def test_a_name_lookup_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answered.wait(5) and [])
    start = time.perf_counter()
    assert first_to_answer(["http://hang.invalid/a"], 0.2) == (
        None,
        {"http://hang.invalid/a": "no answer within 0.2 s"},
    )
    assert time.perf_counter() - start < 3
    answered.set()

"""What a download needs before it starts: an address that answers within seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import requests


def first_to_answer(urls: Sequence[str], seconds: float) -> tuple[str | None, dict[str, str]]:
    """Find the first address, in order of preference, that has the file and says so in time.

    Parameters
    ----------
    urls
        Addresses of the same file; all are asked at once.
    seconds
        How long the call may take, name lookups included.

    Returns
    -------
    str or None
        The address, None if there is none.
    dict
        What is wrong with each address preferred to it: ``{url: reason}``.
    """
    reasons = dict.fromkeys(urls, f"no answer within {seconds:g} s")

    def ask(url: str) -> None:
        try:
            with requests.head(url, timeout=seconds, allow_redirects=True) as answer:
                answer.raise_for_status()
            reasons[url] = ""
        except requests.RequestException as error:
            reasons[url] = describe(error)

    # a name lookup has no timeout of its own; a daemon thread can be left to it
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    failed: dict[str, str] = {}
    for url, thread in zip(urls, threads, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        reason = reasons[url]
        if not reason:
            return url, failed
        failed[url] = reason
    return None, failed


def describe(error: requests.RequestException) -> str:
    """Return the kind of a failure and the status of the answer, if there was one: ``HTTPError 404``."""
    return type(error).__name__ + ("" if error.response is None else f" {error.response.status_code}")

"""The token that leads from one page of a listing to the next, and the end of listings that have none.

Source: S3 API reference, ListObjectsV2: a page may be empty and not the last, where much was deleted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import Listing

PAGES_MAX: Final = 10_000  # of one walk: ten million names
EMPTY_PAGES_MAX: Final = 100  # in a row


class PageToken(str):
    """The store's token, opaque, with the number of pages before it, and of empty ones just before it."""

    pages: int
    empty_pages: int

    def __new__(cls, text: str, pages: int = 1, empty_pages: int = 0) -> PageToken:
        made = super().__new__(cls, text)
        made.pages, made.empty_pages = pages, empty_pages
        return made


def followed(prefix: str, token: str | None, page: Listing) -> Listing:
    """`page`, asked for by `token`, with a token that counts the walk. Raises: BadAnswer for a walk without end."""
    if page.next_token is None:
        return page
    if page.next_token == token:
        raise BadAnswer("list", prefix, "the same page again and again")
    before = token if isinstance(token, PageToken) else PageToken("", 0)
    empty_pages = 0 if _tells(page) else before.empty_pages + 1
    if empty_pages > EMPTY_PAGES_MAX:
        raise BadAnswer("list", prefix, f"{empty_pages} empty pages in a row")
    if before.pages >= PAGES_MAX:
        raise BadAnswer("list", prefix, f"more than {PAGES_MAX} pages")
    return replace(page, next_token=PageToken(page.next_token, before.pages + 1, empty_pages))


def place_in_walk(token: str | None, start_after: str) -> dict[str, str]:
    """Options of ListObjectsV2."""
    if token is not None:
        return {"ContinuationToken": token}
    return {"StartAfter": start_after} if start_after else {}


async def next_page(prefix: str, token: str | None, ask: Callable[[str | None], Awaitable[Listing]]) -> Listing:
    """The next page that tells of any key, or the last one: an empty page in between says nothing, least of all that
    something follows. Raises: BadAnswer for a walk without end, and what `ask` raises."""
    while True:
        page = followed(prefix, token, await ask(token))
        if page.next_token is None or _tells(page):
            return page
        token = page.next_token


def _tells(page: Listing) -> bool:
    return bool(page.objects or page.prefixes or page.unreadable)

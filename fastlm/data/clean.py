"""What can be done to a text before it is tokenised; each step optional, and counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from html.parser import HTMLParser
from typing import Literal, get_args

__all__ = ["Cleaner"]

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
NORMAL_FORMS: tuple[NormalForm, ...] = get_args(NormalForm)

_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        """
    address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption figure
    footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main menu nav ol option p pre section select summary
    table tbody td tfoot th thead title tr ul""",
    )
)
_NOT_TEXT = frozenset(("script", "style"))
_LINE_END = re.compile(r"\r\n?")
# Category Cc but for tab and newline, and the Cf characters that show nothing: zero-width space, marks and embeddings
# of direction, word joiner and the invisible operators, byte order mark. U+200C and U+200D change how letters join.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]+")


class Cleaner:
    """Cleans texts one after the other, in this order:

        strip_html      tags, comments and the contents of script and style dropped, entities decoded, block elements
                        (`p`, `div`, `br`, `td`, ...) turned into line ends. Anything that looks like a tag is one.
        normalize       Unicode's normal form of that name
        strip_control   CR LF and CR turned into LF; other control characters but tab, and invisible ones, dropped
        deduplicate     a text that was seen before, byte for byte, dropped; 16 bytes of each are kept in memory

    `counts`: for each step that is on, how many texts it changed (`deduplicate`: dropped).

    Raises ValueError for another normal form.
    """

    def __init__(
        self,
        *,
        strip_html: bool = False,
        normalize: str | None = None,
        strip_control: bool = False,
        deduplicate: bool = False,
    ) -> None:
        form = next((form for form in NORMAL_FORMS if form == normalize), None)
        if form is None and normalize is not None:
            raise ValueError(f"data: normalize must be None or one of {', '.join(NORMAL_FORMS)}, got {normalize!r}")
        self._steps: dict[str, Callable[[str], str]] = {}
        if strip_html:
            self._steps["strip_html"] = _strip_html
        if form is not None:
            self._steps["normalize"] = partial(unicodedata.normalize, form)
        if strip_control:
            self._steps["strip_control"] = _strip_control
        self._seen: set[bytes] | None = set() if deduplicate else None
        self.counts = dict.fromkeys((*self._steps, *(["deduplicate"] if deduplicate else [])), 0)

    def __call__(self, text: bytes) -> bytes | None:
        """The UTF-8 text cleaned, possibly empty; None for one seen before."""
        if self._steps:
            cleaned = text.decode()
            for name, step in self._steps.items():
                before, cleaned = cleaned, step(cleaned)
                self.counts[name] += cleaned != before
            text = cleaned.encode()
        if self._seen is not None and text and not text.isspace():  # a blank one is left out for that reason
            digest = blake2b(text, digest_size=16).digest()
            if digest in self._seen:
                self.counts["deduplicate"] += 1
                return None
            self._seen.add(digest)
        return text


def _strip_html(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden = tag in _NOT_TEXT
        self._end_line(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self._end_line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        self._end_line(tag)

    def handle_data(self, data: str) -> None:
        if data and not self._hidden:
            self.parts.append(data)

    def _end_line(self, tag: str) -> None:
        if tag in _BLOCKS and self.parts and not self.parts[-1].endswith("\n"):
            self.parts.append("\n")


def _strip_control(text: str) -> str:
    return _CONTROL.sub("", _LINE_END.sub("\n", text))

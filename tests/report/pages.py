"""A page as a browser would take it: elements, their attributes and the text."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "wbr", "link", "hr"}
#: tags within a word or a line of words; the others part words
INLINE = {"wbr", "b", "a", "i", "span", "code"}


class Page(HTMLParser):
    """Parse a page; raises where tags are not closed in order.

    Attributes:
        elements: tag and attributes of every element, in order.
        sections: text under every heading, by the heading.
        text: all text that is shown.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._heading = ""
        self.feed(source)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self._heading = ""
        elif tag not in INLINE:
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open[-1] == tag, (self._open, tag, self.getpos())
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            return
        self.text += data
        if any(tag in self._open for tag in ("h1", "h2", "h3")):
            self._heading += data
            self.sections.setdefault(self._heading, "")
        elif self._heading:
            self.sections[self._heading] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of all elements of one kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, heading: str) -> str:
        """Text of a section, each run of white space as one space."""
        return " ".join(self.sections[heading].split())

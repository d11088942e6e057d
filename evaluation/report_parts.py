"""What a report is made of, before it is written as HTML, Markdown or LaTeX. All texts here are plain: no markup."""

from dataclasses import dataclass, field

PUBLISHED_NOTE = (
    "Rows marked as published were computed by the paper's authors and are copied from it. Its corpora, splits and "
    "metrics differ from ours: the rows can be compared only where the same data, split and metric were used."
)


@dataclass
class Table:
    """
    A table of texts.

    Args:
        title: of it.
        header: names of the columns.
        rows: as many cells each as the header has.
        published: so many rows at the end are the paper's.
        names: so many columns at the left hold text; the others hold numbers.
        notes: sentences below it.
        prose: whether its cells are sentences, which LaTeX tables leave out.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    published: int = 0
    names: int = 1
    notes: list[str] = field(default_factory=list)
    prose: bool = False

    def __post_init__(self):
        wrong = next((row for row in self.rows if len(row) != len(self.header)), None)
        if wrong is not None:
            raise ValueError(f"Table {self.title!r}: {len(wrong)} cells below {len(self.header)} columns: {wrong}.")
        if self.published and PUBLISHED_NOTE not in self.notes:
            self.notes = [*self.notes, PUBLISHED_NOTE]

    def is_published(self, row: int) -> bool:
        """Whether the row of this number is the paper's."""
        return row >= len(self.rows) - self.published


@dataclass
class Plot:
    """A plot as an <svg> element, and the sentence below it."""

    caption: str
    svg: str


@dataclass
class Missing:
    """What is not there, why, and how to get it."""

    text: str


@dataclass
class Clip:
    """A clip: `kind` is video or audio, `source` a data URI or a relative link, or None with the reason in `note`."""

    kind: str
    source: str | None
    note: str = ""


@dataclass
class Exchange:
    """
    A conversation and what was replied.

    Args:
        id: of the sample.
        emotion: of the turn answered, where it is labelled.
        messages: (speaker, text) of what was said before.
        clip: of the last message.
        replies: (who, text); the true one first.
    """

    id: str
    emotion: str | None
    messages: list[tuple[str, str]]
    clip: Clip | None
    replies: list[tuple[str, str]]


Part = str | Table | Plot | Missing | Exchange


@dataclass
class Section:
    """A heading and what stands below it, in order. `folded` parts are shown on demand."""

    title: str
    parts: list[Part]
    folded: bool = False

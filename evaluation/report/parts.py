"""The parts of a report, independent of the format (HTML, Markdown or LaTeX). All texts are plain, without markup."""

from dataclasses import dataclass, field

PUBLISHED_NOTE = (
    "Rows marked as published are copied from the paper. Its corpora, splits and metrics differ from ours: the rows "
    "are comparable only if the data, split and metric are the same."
)


@dataclass
class Table:
    """
    A table whose cells are text.

    Args:
        title: title of the table.
        header: names of the columns.
        rows: the cells, one list per row.
        published: number of rows at the end that come from the paper.
        names: number of columns at the left that hold text; the others hold numbers.
        notes: sentences below the table.
        prose: whether the cells are sentences; such tables are not written as LaTeX.
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
        """Whether the row with this index comes from the paper."""
        return row >= len(self.rows) - self.published


@dataclass
class Plot:
    """A plot as an <svg> element, with its caption."""

    caption: str
    svg: str


@dataclass
class Missing:
    """A note on missing content: why it is missing, and how to get it."""

    text: str


@dataclass
class ReportClip:
    """A clip: `kind` is video or audio, `source` a data URI or a relative link, or None with the reason in `note`."""

    kind: str
    source: str | None
    note: str = ""


@dataclass
class Exchange:
    """
    A conversation with the replies of all systems.

    Args:
        id: id of the sample.
        emotion: emotion of the turn answered, if it is labeled.
        messages: (speaker, text) of each message.
        clip: clip of the last message.
        replies: (system, text) of each reply; the true reply first.
    """

    id: str
    emotion: str | None
    messages: list[tuple[str, str]]
    clip: ReportClip | None
    replies: list[tuple[str, str]]


@dataclass
class ClipContrast:
    """
    The same words with several clips, side by side, and the replies of all systems.

    Args:
        id: id of the utterance.
        messages: (speaker, text) of each message; the last has the words of the clips.
        clips: (title, clip) of each clip.
        replies: (system, its reply to each clip); None where there is no reply.
    """

    id: str
    messages: list[tuple[str, str]]
    clips: list[tuple[str, ReportClip | None]]
    replies: list[tuple[str, list[str | None]]]


Part = str | Table | Plot | Missing | Exchange | ClipContrast


@dataclass
class Section:
    """A heading and its parts, in order. A `folded` section is collapsed on the page."""

    title: str
    parts: list[Part]
    folded: bool = False

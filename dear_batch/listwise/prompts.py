"""The prompts of the listwise stage: data files that say how a window of passages is put.

`prompts/*.toml` beside this module are built in; a file of the same shape may come from
anywhere. Knows nothing of tokens, models or windows.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dear_batch.errors import UsageError
from dear_batch.spec_files import load_spec

Role = Literal["text", "system", "user", "assistant"]

BUILT_IN = Path(__file__).parent / "prompts"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_OF_A_WINDOW = ("n", "query")
_OF_A_PASSAGE = (*_OF_A_WINDOW, "identifier", "passage")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or a piece of a plain prompt (role `text`)."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a prompt: `text` of a plain prompt, or the turns of a chat in this order.

    Raises:
        UsageError: there is nothing in it.
    """

    text: str | None = None
    system: str | None = None
    user: str | None = None
    assistant: str | None = None

    def __post_init__(self) -> None:
        """Check that there is something."""
        if not self.messages:
            raise UsageError(
                "A part of the prompt is empty.",
                where="text",
                valid="text, or one or more of system, user, assistant",
            )

    @property
    def messages(self) -> list[Message]:
        """The turns, placeholders not filled in."""
        texts: tuple[tuple[Role, str | None], ...] = (
            ("text", self.text),
            ("system", self.system),
            ("user", self.user),
            ("assistant", self.assistant),
        )
        return [Message(role, text) for role, text in texts if text is not None]


@dataclass(frozen=True, slots=True)
class Answer:
    """How an answer is written: `lead open identifier (between identifier)* close`.

    `lead` is the white space that may come first; nothing at all always may.

    Raises:
        UsageError: the identifiers could not be told from what stands around them.
    """

    open: str
    between: str
    close: str
    lead: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that identifiers end where they end; add the empty lead, which TOML leaves out."""
        for name in ("open", "between"):
            if getattr(self, name)[-1].isdigit():
                _refuse(f"{name!r} ends with a digit.", name, "text that ends with no digit")
        for name in ("between", "close"):
            if getattr(self, name)[0].isdigit():
                _refuse(f"{name!r} begins with a digit.", name, "text that begins with no digit")
        if any(lead.strip() for lead in self.lead):
            _refuse("'lead' holds more than white space.", "lead", 'white space: [" ", "\\n"]')
        object.__setattr__(self, "lead", ("", *filter(None, self.lead)))

    def text(self, identifiers: Sequence[str]) -> str:
        """The whole answer that names these identifiers in this order."""
        return self.open + self.between.join(identifiers) + self.close


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that may come before an answer, and what closes it."""

    close: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as its TOML file says it: `passage` once a passage, between the other parts.

    With roles it is a conversation for the model's chat template, without them plain text in
    one piece. Passages are cut to `passage_characters` or to `passage_words` first.

    Raises:
        UsageError: the parts do not fit together.
    """

    name: str
    first_identifier: int
    before: Part
    passage: Part
    after: Part
    answer: Answer
    reasoning: Reasoning | None = None
    passage_characters: int | None = None
    passage_words: int | None = None

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if self.first_identifier not in {0, 1}:
            _refuse(f"Identifiers begin at {self.first_identifier}.", "first_identifier", "0 or 1")
        if (self.passage_characters is None) == (self.passage_words is None):
            what = "A prompt cuts its passages by characters or by words."
            _refuse(what, f"passage_{self.unit}s", "one of passage_characters, passage_words")
        if self.limit < 1:
            what = f"Passages are cut to {self.limit} {self.unit}s."
            _refuse(what, f"passage_{self.unit}s", "a whole number from 1")
        _check_roles({"before": self.before, "passage": self.passage, "after": self.after})
        _check_placeholders(self)

    @property
    def is_chat(self) -> bool:
        """Whether the model's chat template lays it out."""
        return self.before.text is None

    @property
    def unit(self) -> Literal["character", "word"]:
        """What passages are cut by."""
        return "character" if self.passage_words is None else "word"

    @property
    def limit(self) -> int:
        """The units that a passage may have."""
        return self.passage_words or self.passage_characters or 0

    def units(self, text: str) -> int:
        """The length of a passage."""
        return len(text) if self.passage_words is None else len(text.split())

    def cut(self, text: str) -> str:
        """The first `limit` units of a passage; words come back joined by single spaces."""
        if self.passage_words is None:
            return text[: self.limit]
        return " ".join(text.split()[: self.limit])

    def identifiers(self, n: int) -> list[str]:
        """The identifiers of n passages, as they are written."""
        return [str(self.first_identifier + i) for i in range(n)]

    def messages(self, query: str, passages: Sequence[str]) -> list[Message]:
        """The prompt of a window; the passages are taken as they are."""
        window = {"n": str(len(passages)), "query": query}
        filled = _filled(self.before, window)
        for identifier, passage in zip(self.identifiers(len(passages)), passages, strict=True):
            filled += _filled(self.passage, window | {"identifier": identifier, "passage": passage})
        return filled + _filled(self.after, window)


def passage_text(title: str, text: str) -> str:
    """What a prompt shows of a candidate, before any cut."""
    return f"{title} {text}" if title else text


def load_prompt(name_or_path: str) -> Prompt:
    """A built-in prompt by its name, or the prompt of a TOML file.

    Raises:
        UsageError: there is none, or the file is no valid prompt.
    """
    names = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    if name_or_path in names:
        return load_spec(BUILT_IN / f"{name_or_path}.toml", Prompt)
    if name_or_path.endswith(".toml") and Path(name_or_path).is_file():
        return load_spec(Path(name_or_path), Prompt)
    nearest = difflib.get_close_matches(name_or_path.lower(), names, n=1)
    raise UsageError(
        f"There is no prompt {name_or_path!r}."
        + (f" Did you mean {nearest[0]!r}?" if nearest else ""),
        where="prompt",
        valid=f"{', '.join(names)}, or a file that ends with .toml, from the working directory",
        next_step=f"for a prompt of your own, begin with a copy of {BUILT_IN / 'readme.toml'}",
    )


def _filled(part: Part, values: Mapping[str, str]) -> list[Message]:
    """The turns of a part. One pass: braces in a query or a passage are never read."""
    return [
        Message(m.role, _PLACEHOLDER.sub(lambda found: values[found[1]], m.content))
        for m in part.messages
    ]


def _check_roles(parts: Mapping[str, Part]) -> None:
    roles = {message.role for part in parts.values() for message in part.messages}
    if "text" in roles and len(roles) > 1:
        name = next(name for name, part in parts.items() if part.text is not None)
        _refuse(
            "The prompt mixes plain text with turns of a chat.",
            f"{name}.text",
            "text in every part, or system, user and assistant alone",
        )


def _check_placeholders(prompt: Prompt) -> None:
    window = _placeholders(prompt.before, "before", _OF_A_WINDOW)
    window |= _placeholders(prompt.after, "after", _OF_A_WINDOW)
    passage = _placeholders(prompt.passage, "passage", _OF_A_PASSAGE)
    missing = {"identifier", "passage"} - passage
    if missing:
        _refuse(f"The placeholder {{{min(missing)}}} is missing.", "passage", "both of them")
    if "query" not in window | passage:
        _refuse("The placeholder {query} is missing.", "after", "{query} in any part")


def _placeholders(part: Part, where: str, known: Sequence[str]) -> set[str]:
    """The names of a part's placeholders."""
    found = {name for m in part.messages for name in _PLACEHOLDER.findall(m.content)}
    for name in sorted(found - set(known)):
        _refuse(f"Unknown placeholder {{{name}}}.", where, ", ".join(f"{{{k}}}" for k in known))
    return found


def _refuse(what: str, where: str, valid: str) -> None:
    """Refuse a prompt; the loader adds the file and the table."""
    raise UsageError(what, where=where, valid=valid)

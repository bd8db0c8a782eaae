"""Rows of tokens as coloured text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from data.example_store import TRAINED

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

COLOURS = {"text": "default", "prefix": "cyan", "suffix": "magenta", "middle": "green"}
COLOURS |= {"system": "magenta", "user": "cyan", "assistant": "yellow", "trained": "green"}

END = "⏎"
"""Shown for the EOS of a reply."""


def in_parts(ids: Sequence[int], tokenizer: "Tokenizer") -> list[list[dict[str, str]]]:
    """The documents of a row, each as parts: text, or prefix, suffix and middle; the first may lack its beginning."""
    names = {tokenizer.fim_begin: "prefix", tokenizer.fim_hole: "suffix", tokenizer.fim_end: "middle"}
    before = {tokenizer.fim_hole: "prefix", tokenizer.fim_end: "suffix"}  # where a row begins amid a document
    documents: list[list[dict[str, str]]] = []
    gathered: list[int] = []
    name, open_document = "text", False

    def close() -> None:
        nonlocal gathered
        if gathered or (open_document and name != "text"):
            documents[-1].append({"part": name, "text": tokenizer.decode(gathered)})
        gathered = []

    for index in ids:
        if index == tokenizer.pad:
            continue
        if index == tokenizer.bos or not documents:
            if documents:
                close()
            documents.append([])
            name, open_document = "text", True
        if index in names:
            name = before.get(index, name) if name == "text" else name
            close()
            name = names[index]
        elif index == tokenizer.eos:
            close()
            name, open_document = "text", False
        elif index != tokenizer.bos:
            gathered.append(index)
    if documents:
        close()
    return [document for document in documents if document]


def in_turns(marked: Sequence[int], tokenizer: "Tokenizer") -> list[list[dict[str, str]]]:
    """The documents of a row of conversations, each as parts: system, user, assistant, and what is trained on."""
    names = {tokenizer.bos: "system", getattr(tokenizer, "user", -1): "user", getattr(tokenizer, "assistant", -1): ""}
    documents: list[list[dict[str, str]]] = []
    gathered: list[int] = []
    name = "system"

    def close() -> None:
        nonlocal gathered
        if gathered:
            documents[-1].append({"part": name, "text": tokenizer.decode(gathered)})
        gathered = []

    for each in marked:
        index, is_trained = each % TRAINED, each >= TRAINED
        if index == tokenizer.pad:
            continue
        if index in names:
            if documents:
                close()
            documents += [[]] if index == tokenizer.bos else []
            name = names[index]
        elif name in ("", "assistant", "trained"):
            if (now := "trained" if is_trained else "assistant") != name:
                close()
                name = now
            if index == tokenizer.eos:
                gathered += tokenizer.encode(END)
                close()
                name = ""
            else:
                gathered.append(index)
        else:
            gathered.append(index)
    if documents:
        close()
    return documents


def show(rows: Sequence[dict[str, Any]], length: int) -> None:
    """Print rows: documents between rules, parts in the colours of the legend."""
    console = Console(highlight=False, soft_wrap=True)
    legend = Text(f"rows of {length - 1} tokens and the one after; ")
    found = {part["part"] for row in rows for document in row["documents"] for part in document}
    for name, colour in COLOURS.items():
        if name in found:
            legend.append(f"{name} ", style=colour)
    console.print(legend)
    for row in rows:
        console.rule(f"row {row['row']}, {row['domain']}, {len(row['documents'])} documents", align="left")
        for number, document in enumerate(row["documents"]):
            if number:
                console.print(Text("─ ─ ─", style="dim"))
            text = Text()
            for part in document:
                if part["part"] != "text":
                    text.append(f"[{part['part']}]", style=f"reverse {COLOURS[part['part']]}")
                text.append(part["text"], style=COLOURS[part["part"]])
            console.print(text)

"""Manual pages of the `dfs` command, made from the same text as ``--help``. Pure: commands in, roff (man(7)) out.

What a command's docstring says becomes NAME and DESCRIPTION, its parameters ARGUMENTS and OPTIONS, and the block that
begins with ``Example:`` becomes EXAMPLES.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from typer._click import Command, Context
from typer.core import TyperGroup

# A paragraph whose lines are kept as they are begins with this (click's convention).
VERBATIM = "\b"
EXAMPLE = re.compile(r"Examples?:")


class Help(NamedTuple):
    """The text of a command, taken apart. Examples are lines; paragraphs are (text, kept as it is)."""

    summary: str
    paragraphs: Sequence[tuple[str, bool]]
    examples: Sequence[str]


def read_help(text: str) -> Help:
    summary, *rest = text.strip().split("\n\n")
    paragraphs: list[tuple[str, bool]] = []
    examples: list[str] = []
    for paragraph in rest:
        verbatim = paragraph.startswith(VERBATIM)
        lines = paragraph.removeprefix(VERBATIM).strip("\n").splitlines()
        if lines and EXAMPLE.fullmatch(lines[0].strip()):
            examples += _undented(lines[1:])
        elif lines:
            paragraphs.append(("\n".join(lines), verbatim))
    return Help(" ".join(summary.split()), paragraphs, examples)


def _undented(lines: Sequence[str]) -> list[str]:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[margin:] for line in lines]


def commands(group: TyperGroup) -> Mapping[str, Command]:
    """Those that are shown, by name; those of a group have its name before theirs."""
    found: dict[str, Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found.update({f"{name} {verb}": inner for verb, inner in commands(command).items()})
        elif not command.hidden:
            found[name] = command
    return found


def page_name(verb: str) -> str:
    """``dfs-drain`` for `dfs drain`, ``dfs-trash-list`` for `dfs trash list`, ``dfs`` for all of it."""
    return f"dfs-{verb}".replace(" ", "-") if verb else "dfs"


def overview(group: TyperGroup, description: str, date: str, version: str) -> str:
    """dfs(1): every command with one line."""
    lines = [*_head("dfs", date, version), ".SH NAME", rf"dfs \- {_text(description.rstrip('.'))}"]
    lines += [".SH SYNOPSIS", r".B dfs", r".I COMMAND", _text("[OPTION]... [ARGUMENT]...")]
    lines += [".SH DESCRIPTION", "Starts, stops and looks into a cluster, and changes a running one."]
    lines += ["Every command has a page of its own, and", r".BR \-\-help .", ".SH COMMANDS"]
    for name, command in commands(group).items():
        lines += [".TP", rf".BR {_text(page_name(name))} (1)", _text(read_help(command.help or "").summary)]
    lines += [".SH ENVIRONMENT", *_environment(), ".SH EXIT STATUS", *_exit_status()]
    lines += [".SH FILES", ".TP", r".I /etc/dfs/cluster.key", "The cluster key, where servers run as services."]
    return "\n".join(lines) + "\n"


def page(verb: str, command: Command, context: Context, date: str, version: str) -> str:
    """The page of one command."""
    told = read_help(command.help or "")
    lines = [*_head(page_name(verb), date, version), ".SH NAME"]
    lines += [rf"{_text(page_name(verb))} \- {_text(told.summary.rstrip('.'))}", ".SH SYNOPSIS"]
    lines += [rf".B dfs {_text(verb)}", *(_text(piece) for piece in _usage(command, context))]
    lines += [".SH DESCRIPTION", _text(told.summary)]
    for text, verbatim in told.paragraphs:
        lines += [".PP", *(_verbatim(text.splitlines()) if verbatim else [_text(text)])]
    lines += _parameters(command, context)
    lines += [".SH EXIT STATUS", *_exit_status()]
    if told.examples:
        lines += [".SH EXAMPLES", *_verbatim(told.examples)]
    lines += [".SH SEE ALSO", r".BR dfs (1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, date: str, version: str) -> list[str]:
    return [r".\" Made from the text of --help: `dfs man`.", f'.TH {_text(name.upper())} 1 "{date}" "dfs {version}"']


def _usage(command: Command, context: Context) -> Iterator[str]:
    """Without the braces that Typer puts around arguments that must be given."""
    for piece in command.collect_usage_pieces(context):
        shown = "[OPTION]..." if piece == "[OPTIONS]" else re.sub(r"[{}]", "", piece).replace("......", "...")
        yield re.sub(r"^\[(\[.*\](\.\.\.)?)\]$", r"\1", shown)


def _parameters(command: Command, context: Context) -> Iterator[str]:
    kinds: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            kinds[parameter.param_type_name].append(record)
    for kind, records in kinds.items():
        if records:
            yield f".SH {kind.upper()}S"
        for name, text in records:
            shown = re.sub(r" <[^>]*>$", "", name) if kind == "argument" else name
            yield from (".TP", rf".B {_text(shown)}", _text(re.sub(r"  \[required\]", "", text) or "See above."))


def _environment() -> list[str]:
    return [
        ".TP", ".B DFS_DATA", r"As \fB\-\-data\fR: the data directory of a cluster that `dfs up` started.",
        ".TP", ".BR DFS_METASERVER , \" \" DFS_KEY_FILE", r"As \fB\-\-metaserver\fR and \fB\-\-key\-file\fR.",
    ]  # fmt: skip


def _exit_status() -> list[str]:
    return [
        ".TP", ".B 0", "It was done, and nothing is wrong.",
        ".TP", ".B 1", "It was not done, for the reason that one line on standard error says; or something is wrong.",
        ".TP", ".B 2", "The command line was not understood.",
    ]  # fmt: skip


def _verbatim(lines: Sequence[str]) -> list[str]:
    return [".RS 4", ".nf", *(_line(line) for line in lines), ".fi", ".RE"]


def _text(text: str) -> str:
    """Running text: one line of roff for each line, so that sentences keep their spaces."""
    return "\n".join(_line(line.strip()) for line in text.splitlines() if line.strip())


def _line(line: str) -> str:
    """One line that roff shows as it is. An empty one becomes a blank line that no macro takes for its end."""
    escaped = line.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga").replace("'", r"\(aq")
    escaped = escaped.replace("^", r"\(ha").replace("~", r"\(ti")
    return rf"\&{escaped}" if escaped.startswith(".") or not escaped else escaped

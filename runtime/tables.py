"""Tables of cells that are text already: on a terminal, and as Markdown elsewhere."""

from collections.abc import Container, Sequence
from logging import getLogger

from rich.console import Console
from rich.table import Table

_logger = getLogger(__name__)

Row = dict[str, str]
"""Cells by their columns."""
NOT_YET = "-"


def print_table(console: Console, title: str, rows: Sequence[Row], names: Container[str]) -> None:
    """Print a table; as Markdown where it is no terminal.

    Args:
        names: columns that hold no numbers.
    """
    if not console.is_terminal:
        _logger.info("\n%s\n\n%s", title, markdown(rows, names))
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = columns_of(rows)
    lines = [[row.get(column, NOT_YET) for column in columns] for row in rows]
    for place, column in enumerate(columns):
        is_narrow = max(len(line[place]) for line in lines) < len(column)
        header = column.replace(" ", "\n") if is_narrow else column
        table.add_column(header, justify="left" if column in names else "right", no_wrap=column in names)
    for line in lines:
        table.add_row(*line)
    console.print(table, highlight=False)


def markdown(rows: Sequence[Row], names: Container[str]) -> str:
    """A table with names aligned to the left, and numbers to the right."""
    columns = columns_of(rows)
    widths = {column: max(3, len(column), *(len(row.get(column, NOT_YET)) for row in rows)) for column in columns}

    def line(cells: Row) -> str:
        aligned = (
            text.ljust(widths[column]) if column in names else text.rjust(widths[column])
            for column, text in cells.items()
        )
        return f"| {' | '.join(aligned)} |\n"

    rule = {column: "-" * width if column in names else "-" * (width - 1) + ":" for column, width in widths.items()}
    body = ({column: row.get(column, NOT_YET) for column in columns} for row in rows)
    return "".join(map(line, (dict(zip(columns, columns, strict=True)), rule, *body)))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Of the fullest row."""
    fullest = max(rows, key=len)
    return list(fullest)

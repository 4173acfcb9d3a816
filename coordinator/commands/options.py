"""Options that commands of the owner's end share."""

from typing import Annotated, Literal

import typer

Format = Annotated[Literal["text", "json"], typer.Option(help="For people or for programs.")]
Pages = Annotated[Literal["text", "json", "markdown"], typer.Option(help="For people, programs or documents.")]

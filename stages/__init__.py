"""One file per stage of the pipeline, each a Typer command."""

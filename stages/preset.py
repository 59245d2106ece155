"""Tool `preset`: whole parameter files by name."""

from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, ParamsFile

preset_app = typer.Typer(help="Whole parameter files.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="One of `lgp preset list`.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite edits.")]


@preset_app.command("list")
def preset_list() -> None:
    """List the presets."""
    from lgp.workflow.presets import names

    for name, line in names().items():
        print(f"{name:18} {line}")


@preset_app.command("use")
def preset_use(name: Name, params_file: ParamsFile = DEFAULT_PARAMS, force: Force = False) -> None:
    """Copy a preset over params.yaml."""
    from lgp.workflow.presets import use

    use(name, params_file, force)
    print(f"{params_file} is now the preset {name}; `lgp repro` runs it")

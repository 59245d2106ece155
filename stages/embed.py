"""Tool `embed`: features of any images by an arm's encoder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import encoder_folder

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of images, or any other data source.")]
ArmOption = Annotated[str, typer.Option("--arm", help="The arm whose encoder makes the features.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="A .parquet to write: path and features.")]
DType = Annotated[Literal["float16", "float32"], typer.Option(help="Of the features.")]


def embed(
    source: Source,
    out: Out = Path("embeddings.parquet"),
    arm: ArmOption = "graft",
    dtype: DType = "float32",
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """Write path and features of each image of a folder."""
    from lgp.data.sources.opening import open_images
    from lgp.data.table_writing import table_writer
    from lgp.errors import LgpError
    from lgp.features.similarity import form_of
    from lgp.models.files import present_encoder_digest
    from lgp.params.file import load_params

    params, folder = load_params(params_file), encoder_folder(arm)
    if out.suffix.lower() != ".parquet":
        raise LgpError(f"{out}: features are lists of numbers, give a name that ends in .parquet")
    about = {"arm": arm, "encoder": present_encoder_digest(folder), "features": form_of(params.features)}
    with table_writer(out, about) as write:
        offers = open_images(source)
        from lgp.compute.device import choose_device
        from lgp.data.progress import progress
        from lgp.features.of_source import embeddings, left_out

        device, images = choose_device(params.run), 0
        with progress(len(offers)) as advance:
            for table in embeddings(folder, offers, params.features, device, dtype):
                write(table)
                images += len(table)
                advance(len(table))
    unreadable = len(offers) - images
    print(f"embed: {images} images by {folder}, {unreadable} could not be read, {len(left_out(offers))} are no images")
    print(f"embed: {out} has them")

"""Tools `embed` and `similar`: features of any images by an arm's encoder, and the nearest of them to an image."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import encoder_folder

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of images, or any other data source.")]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")]
ArmOption = Annotated[str, typer.Option("--arm", help="The arm whose encoder makes the features.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="A .parquet to write: path and features.")]
Among = Annotated[Path, typer.Option("--among", metavar="FILE", help="What `lgp embed` wrote.")]
Count = Annotated[int, typer.Option(min=1, help="Number of images to show.")]
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
    from lgp.data.table_files import table_writer
    from lgp.errors import LgpError
    from lgp.params.file import load_params

    params, folder = load_params(params_file), encoder_folder(arm)
    if out.suffix.lower() != ".parquet":
        raise LgpError(f"{out}: features are lists of numbers, give a name that ends in .parquet")
    with table_writer(out, {"arm": arm, "encoder": _digest(folder)}) as write:
        offers = open_images(source)
        from lgp.compute.device import choose_device
        from lgp.data.progress import progress
        from lgp.features.of_source import embeddings, left_out

        device, images = choose_device(params.run), 0
        with progress(len(offers), 0) as advance:
            for table in embeddings(folder, offers, params.features, device, dtype):
                write(table)
                images += len(table)
                for _ in range(len(table)):
                    advance()
    unreadable = len(offers) - images
    print(f"embed: {images} images by {folder}, {unreadable} could not be read, {len(left_out(offers))} are no images")
    print(f"embed: {out} has them")


def _digest(folder: Path) -> str:
    from lgp.errors import LgpError
    from lgp.models.files import WEIGHTS, encoder_digest, no_encoder

    if not (folder / WEIGHTS).exists():
        raise LgpError(no_encoder(folder))
    return encoder_digest(folder)


def similar(
    image: Image,
    among: Among = Path("embeddings.parquet"),
    count: Count = 10,
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """List the images whose features are nearest to an image's, by cosine."""
    from lgp.data.sources.folder import single_image
    from lgp.errors import LgpError
    from lgp.features.similarity import nearest, read_embeddings
    from lgp.params.file import load_params

    params = load_params(params_file)
    known = read_embeddings(among)
    folder = encoder_folder(known.arm)
    if _digest(folder) != known.encoder:
        raise LgpError(f"{among} was made by another encoder of {known.arm}: run `lgp embed` again")
    from lgp.compute.device import choose_device
    from lgp.features.of_source import embeddings

    tables = list(embeddings(folder, single_image(image), params.features, choose_device(params.run)))
    if not tables:
        raise LgpError(f"{image} cannot be read as an image")
    for path, cosine in nearest(known, tables[0]["features"][0], count):
        print(f"{cosine:.4f}  {path}")

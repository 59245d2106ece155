"""Tool `similar`: the images whose features are nearest to an image's."""

from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import encoder_folder

Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")]
Among = Annotated[Path, typer.Option("--among", metavar="FILE", help="What `lgp embed` wrote.")]
Count = Annotated[int, typer.Option(min=1, help="Number of images to show.")]


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
    from lgp.features.similarity import form_of, nearest, read_embeddings
    from lgp.models.files import present_encoder_digest
    from lgp.params.file import load_params

    params = load_params(params_file)
    known = read_embeddings(among)
    folder = encoder_folder(known.arm)
    if present_encoder_digest(folder) != known.encoder:
        raise LgpError(f"{among} was made by another encoder of {known.arm}: run `lgp embed` again")
    if (form := form_of(params.features)) != known.form:
        raise LgpError(f"{among} has features of {known.form}, params.yaml asks for {form}: run `lgp embed` again")
    from lgp.compute.device import choose_device
    from lgp.features.of_source import embeddings

    tables = list(embeddings(folder, single_image(image), params.features, choose_device(params.run)))
    if not tables:
        raise LgpError(f"{image} cannot be read as an image")
    for path, cosine in nearest(known, tables[0]["features"][0], count):
        print(f"{cosine:.4f}  {path}")

"""Tool `predict`: classes and probabilities of any images, by a classifier that an evaluation kept."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import METRICS, MODELS

if TYPE_CHECKING:
    from lgp.params.run import RunParams

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder of images, or any other data source.")]
With = Annotated[
    str | None,
    typer.Option("--with", metavar="CLASSIFIER", help="ARM/TASK, or a classifier's folder; default: the champion."),
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="A .csv or .parquet to write.")]


def predict(
    source: Source,
    out: Out = Path("predictions.csv"),
    classifier: With = None,
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """Write class, probability, runner-up and margin of each image of a folder."""
    from lgp.data.sources.opening import open_images
    from lgp.data.table_writing import table_writer
    from lgp.errors import escaped
    from lgp.evaluate.prediction import find_classifier
    from lgp.params.file import load_params

    settings = load_params(params_file).run
    folder = _champion(settings) if classifier is None else find_classifier(MODELS, classifier)
    with table_writer(out) as write:
        offers = open_images(source)
        from lgp.compute.device import choose_device
        from lgp.data.progress import progress
        from lgp.evaluate.prediction import predictions
        from lgp.features.of_source import left_out
        from lgp.models.classifier_folder import load_classifier

        device = choose_device(settings)
        opened = load_classifier(folder, device)
        counts = dict.fromkeys(opened.classes, 0)
        without = 0
        with progress(len(offers) + len(left_out(offers))) as advance:
            for table in predictions(opened, offers, device):
                write(table)
                without += int((table["reason"] != "").sum())
                for name, number in table["class"].value_counts().items():
                    counts[str(name)] += int(number)
                advance(len(table))
    print(f"predict: {sum(counts.values())} images by {folder}; {without} files without a prediction")
    print(f"predict: {', '.join(f'{escaped(name)} {count}' for name, count in counts.items() if count)}")
    print(f"predict: {out} has them")


def _champion(settings: "RunParams") -> Path:
    """Return the registry's champion among classifiers. Without one, choose on val as far as it can, and say so."""
    from lgp.evaluate.prediction import find_classifier
    from lgp.workflow.mlflow_store import has_store
    from lgp.workflow.tracking import visitor

    root = Path(os.environ.get("DVC_ROOT", "."))
    if has_store(settings.tracking_uri, root):
        champion = visitor(settings.tracking_uri, settings.experiment, root).champion_classifier(MODELS)
        if champion is not None:
            print(f"predict: {champion} is the champion of the registry", flush=True)
            return champion
    small = _small_validation()
    folder = find_classifier(MODELS, None, most_labels=bool(small))
    how = f"the best on val of those with the most labels ({small})" if small else "the best on val"
    print(
        "predict: no champion is registered (`lgp report` crowns a clear winner, `lgp promote ARM` any arm), "
        f"so {folder} is taken, {how}",
        flush=True,
    )
    return folder


def _small_validation() -> str:
    """Return what is said of a validation part that is too small to choose by; nothing of a larger or unknown one."""
    from lgp.compute.intact import read_json
    from lgp.evaluate.validation import small_validation

    file = METRICS / "labels.json"
    counts = read_json(file, dict[str, Any], "run `lgp labels`") if file.exists() else {}
    return small_validation(counts["images/val"]) if "images/val" in counts else ""

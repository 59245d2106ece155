"""A model as a folder for the Hugging Face Hub, with a card that is written from its provenance and its metrics."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lgp.compute.intact import read_record
from lgp.evaluate.results_files import read_metrics
from lgp.models.encoder_folder import normalization_of, read_config
from lgp.models.exporting import load_model
from lgp.models.files import CONFIG, ENCODER, WEIGHTS, check_trained, encoder_digest, read_provenance
from lgp.models.vit import ARCHITECTURE
from lgp.params.arms import how_to_evaluate

CARD = "README.md"
METHOD = "[Layer Grafted Pre-training](https://arxiv.org/abs/2302.14138)"
TRAININGS = {
    "mim": "masked image modelling, as in MAE",
    "cl": "contrastive learning",
    "graft": f"{METHOD}: contrastive learning on top of masked image modelling",
    "joint": f"masked image modelling and contrastive learning at once, a control of {METHOD}",
    "reverse": f"masked image modelling on top of contrastive learning, a control of {METHOD}",
}
MODES = {1: "L", 3: "RGB"}  # Pillow's names of pixels, by the number of channels
MANY = 20  # classes: more are not listed
TASKS = {
    "linear": "linear probe",
    "fewshot": "logistic regression on frozen features",
    "propagate": "logistic regression on labels that spread to all training images",
    "selected": "logistic regression on images that the features chose",
    "finetune": "fine-tuning",
    "semi": "semi-supervised fine-tuning",
}


@dataclass(frozen=True)
class Subject:
    """The model that a card is about, and what is known of it.

    Attributes:
        folder: an encoder folder, or a classifier folder.
        config: its configuration, in timm's layout.
        encoder: the encoder folder that its arm has. It is `folder` itself unless that is a classifier's.
        provenance: of that encoder, empty where there is none.
        metrics: folder of the metric files.
    """

    folder: Path
    config: Mapping[str, Any]
    encoder: Path
    provenance: Mapping[str, Any]
    metrics: Path

    @classmethod
    def read(cls, folder: Path, metrics: Path) -> "Subject":
        """Read what is known of a model. A classifier lies in `ARM/classifiers/TASK`, its encoder in `ARM/encoder`."""
        folder, config = folder.absolute(), read_config(folder)
        encoder = folder.parent.parent / ENCODER if config["num_classes"] else folder
        return cls(folder, config, encoder, read_provenance(encoder), metrics)

    @property
    def is_classifier(self) -> bool:
        """Whether it has a head."""
        return bool(self.config["num_classes"])

    @property
    def arm(self) -> str:
        """The name of its arm."""
        return str(self.provenance.get("arm", self.encoder.parent.name))

    def results(self) -> dict[str, Mapping[str, Any]]:
        """Return the metrics of this encoder by task; a classifier has those of its own task alone.

        A metric file holds the digest of its encoder. Files of an encoder that was trained anew since are left out.
        """
        if not (self.encoder / WEIGHTS).exists():
            return {}
        digest, task = encoder_digest(self.encoder), self.folder.name if self.is_classifier else "*"
        names = [f.stem.partition("-")[2] for f in sorted(self.metrics.glob(f"{self.arm}-{task}.json"))]
        found = {
            name: read_metrics(self.metrics / f"{self.arm}-{name}.json", how_to_evaluate(self.arm, name))
            for name in names
        }
        return {name: values for name, values in found.items() if values.get("encoder") == digest}

    def images(self) -> str:
        """Say on how many prepared images it was trained and measured, as far as that is known, and their digest."""
        digest = self.provenance.get("digests", {}).get("inputs", {}).get("data/prepared")
        prepared = _prepared(self.metrics / "prepare.json")
        if digest is None:
            return "unknown"
        if prepared.get("digest") != digest:
            return f"digest `{digest}`"
        counts = ", ".join(f"{prepared[f'images/{part}']} {part}" for part in ("train", "val", "test"))
        return f"{counts}; digest `{digest}`"


def export_hub_folder(folder: Path, path: Path, metrics: Path) -> str:
    """Write a model as a folder for the Hugging Face Hub, from which timm loads it, and return a sentence on it.

    Configuration and weights are copied. `provenance.json` is not: the card says of it what others may know.

    Args:
        folder: of the model.
        path: the folder to write.
        metrics: folder of the metric files.

    Raises:
        LgpError: there is no model.
    """
    model = load_model(folder)
    subject = Subject.read(folder, metrics)
    path.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, path / name)
    parameters = sum(p.numel() for p in model.parameters())
    (path / CARD).write_text(card(subject, path.name, parameters), encoding="utf-8")
    return (
        f"{CONFIG} and {WEIGHTS} for timm, and {CARD}, in which you fill in the images and the licence; "
        f"push it with `hf upload USER/NAME {path.name}`"
    )


def card(subject: Subject, title: str, parameters: int) -> str:
    """Return the text of a model card. `parameters` is the number of the model's parameters."""
    return f"""---
{yaml.safe_dump(_front_matter(subject), sort_keys=False)}---

# {title}

{_summary(subject)}

To fill in: what the images show, where they come from, what the model is for. The licence (`license` at the head of
this file), which also depends on that of the images.

## Use

```python
{_snippet(subject)}
```

## Model

| | |
|---|---|
{_table(_facts(subject, parameters))}

## Results

{_results(subject)}
"""


def _front_matter(subject: Subject) -> dict[str, Any]:
    kind = "image-classification" if subject.is_classifier else "image-feature-extraction"
    tags = ["timm", kind, "vit", "lgp"]
    if subject.arm in TRAININGS:
        tags += ["self-supervised-learning", "layer-grafted-pretraining"]
    return {"license": "unknown", "library_name": "timm", "pipeline_tag": kind, "tags": tags}


def _summary(subject: Subject) -> str:
    """Return what the model is and how its encoder came about, with a warning where the training failed its checks."""
    config = subject.config
    what = f"An encoder of images, (N, {config['num_features']}) features."
    if subject.is_classifier:
        what = f"A classifier of images, {config['num_classes']} classes."
    if subject.arm in TRAININGS:
        origin = f"The encoder was trained without labels, by {TRAININGS[subject.arm]}."
    elif "layout" in subject.provenance:
        origin = f"The encoder comes from a checkpoint in the layout of {subject.provenance['layout']}."
    elif subject.arm == "random":
        origin = "The encoder is a baseline: its weights are random."
    else:
        origin = "It is not known where the encoder comes from."
    warning = check_trained(subject.encoder)
    return f"{what} {origin}" + (f"\n\n**{warning.replace('warning', 'Warning', 1)}.**" if warning else "")


def _snippet(subject: Subject) -> str:
    """Return the code by which timm uses the model, from an image file where Pillow knows such images."""
    channels, height, width = subject.config["pretrained_cfg"]["input_size"]
    if channels in MODES:
        images = [
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            f'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{MODES[channels]}")',
            "images = transform(image)[None]",
        ]
    else:
        images = [f"images = torch.zeros(1, {channels}, {height}, {width})  # yours: normalised, see below"]
    if subject.is_classifier:
        outputs = [
            "    probabilities = model(images).softmax(dim=1)",
            'names = model.pretrained_cfg["label_names"]',
            "print(names[probabilities[0].argmax()], probabilities[0].max().item())",
        ]
    else:
        outputs = [f"    features = model(images)  # (1, {subject.config['num_features']})"]
    return "\n".join(
        [
            "import timm, torch",
            *(["from PIL import Image, ImageOps"] if channels in MODES else []),
            "",
            'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()',
            *images,
            "with torch.inference_mode():",
            *outputs,
        ]
    )


def _facts(subject: Subject, parameters: int) -> list[tuple[str, ...]]:
    of, known = subject.config["model_args"], subject.provenance
    channels, height, width = subject.config["pretrained_cfg"]["input_size"]
    trained = known.get("params", {}).get(subject.arm, {})
    names = subject.config.get("label_names", [])
    changed = ", with changes that are not committed" if known.get("dirty") else ""
    rows = [
        ("arm", subject.arm),
        ("task", subject.folder.name if subject.is_classifier else ""),
        ("classes", ", ".join(names) if len(names) <= MANY else f"{len(names)}, named in {CONFIG}"),
        ("architecture", f"ViT, width {of['embed_dim']}, depth {of['depth']}, {of['num_heads']} heads"),
        ("timm's name", "" if subject.config["architecture"] == ARCHITECTURE else subject.config["architecture"]),
        ("patches", f"{of['patch_size']} × {of['patch_size']} pixels"),
        ("parameters", f"{parameters:,}"),
        ("input", f"{height} × {width} pixels, {channels} channel(s) in [0, 1], {normalization_of(subject.folder)}"),
        ("epochs", str(trained.get("epochs", ""))),
        ("started from", str(trained.get("start", ""))),
        ("policy", ", ".join(trained.get("policy", []))),
        ("prepared images", subject.images()),
        ("code", f"lgp {known['lgp']}, commit {known['commit']}{changed}" if "commit" in known else "unknown"),
    ]
    return [row for row in rows if row[1]]


def _results(subject: Subject) -> str:
    """Return the table of accuracies, each with its interval."""
    results = subject.results()
    if not results:
        return "No metrics of this encoder were found."
    rows = [(_named(task), str(int(m["labels"])), _accuracy(m), str(int(m["subsets"]))) for task, m in results.items()]
    of_several = subject.is_classifier and any(m["subsets"] > 1 for m in results.values())
    one = " A classifier is fitted to each subset, and this is one of them." if of_several else ""
    return (
        "Top-1 accuracy on test images in percent, as the mean over the subsets of labels. The 95 % interval is "
        f"over these subsets and the test images together.{one}\n\n"
        "| task | labels | top-1 | subsets |\n|---|---:|---:|---:|\n" + _table(rows)
    )


def _named(task: str) -> str:
    kind, _, labels = task.partition("-")
    name, spread = labels.removesuffix("-propagated"), labels.endswith("-propagated")
    return f"{TASKS.get(kind, kind)}{', labels spread' if spread else ''}{f' ({name})' if name else ''}"


def _accuracy(metrics: Mapping[str, Any]) -> str:
    if "test/top1_low" not in metrics:
        return f"{metrics['test/top1']:.1f}"
    return f"{metrics['test/top1']:.1f} [{metrics['test/top1_low']:.1f}, {metrics['test/top1_high']:.1f}]"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _prepared(file: Path) -> dict[str, Any]:
    return read_record(file, dict[str, Any], "run `lgp prepare`") if file.is_file() else {}

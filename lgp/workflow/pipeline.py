"""The stages of the pipeline, and the sections of params.yaml that each reads. `dvc.yaml` lists the same."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("seed", "data"),
    "labels": ("seed", "data.source", "labels"),
    "mim": ("seed", "data", "model", "mim"),
    "cl": ("seed", "data", "model", "contrastive", "cl"),
    "graft": ("seed", "data", "model", "contrastive", "graft"),
    "joint": ("seed", "data", "model", "contrastive", "mim", "joint"),
    "reverse": ("seed", "data", "model", "mim", "reverse"),
    "baseline": ("seed", "data", "model"),
    "import_checkpoint": ("data", "model"),
    "conflict": ("seed", "data", "model", "contrastive", "mim", "conflict"),
    "linear": ("seed", "features", "linear"),
    "fewshot": ("features", "fewshot"),
    "finetune": ("seed", "finetune"),
    "report": ("seed", "arms", "few_labels", "finetuned", "finetuned_arms", "data", "model"),
}

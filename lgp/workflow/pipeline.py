"""The stages of the pipeline, and the sections of params.yaml that each reads. `dvc.yaml` lists the same."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("seed", "data"),
    "labels": ("seed", "data.source", "data.columns", "data.labels", "labels"),
    "mim": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model", "mim"),
    "cl": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model", "contrastive", "cl"),
    "graft": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model", "contrastive", "graft"),
    "joint": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model", "contrastive", "mim", "joint"),
    "reverse": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model", "mim", "reverse"),
    "baseline": ("seed", "data.image_size", "data.channels", "data.eval_crop", "model"),
    "import_checkpoint": ("data.image_size", "data.channels", "data.eval_crop", "model"),
    "conflict": (
        "seed",
        "data.image_size",
        "data.channels",
        "data.eval_crop",
        "model",
        "contrastive",
        "mim",
        "conflict",
    ),
    "linear": ("seed", "features", "linear"),
    "fewshot": ("features", "fewshot"),
    "propagate": ("features", "fewshot", "propagation"),
    "selected": ("seed", "features", "fewshot", "propagation", "selection"),
    "finetune": ("seed", "finetune"),
    "report": ("seed", "arms", "few_labels", "propagated", "selected", "finetuned", "finetuned_arms", "data", "model"),
}

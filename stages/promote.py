"""Tool `promote`: an arm becomes the champion of the registry by hand."""

import os
from pathlib import Path

from stages.options import DEFAULT_PARAMS, Arm, Debug, ParamsFile
from stages.paths import MODELS, encoder_folder


def promote(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False) -> None:
    """Point the alias `champion` of encoders and classifiers at an arm's, whatever the report says."""
    from lgp.errors import LgpError
    from lgp.evaluate.prediction import best_plain_classifier
    from lgp.models.files import check_trained, present_encoder_digest
    from lgp.params.arms import BASELINES
    from lgp.params.file import load_params
    from lgp.workflow import tracking

    run, folder = load_params(params_file).run, encoder_folder(arm)
    if arm in BASELINES:
        raise LgpError(f"the arm {arm} is a baseline: choose another arm")
    digest = present_encoder_digest(folder)
    check_trained(folder)
    root = Path(os.environ.get("DVC_ROOT", "."))
    tags = {"arm": arm, "task": "promote"}
    about = tracking.Description(arm, "promote", tags, {}, run.tracking_uri, run.experiment, f"{arm} / promote")
    classifier = best_plain_classifier(MODELS, arm)
    with tracking.tracked(about, root, root / ".lgp" / "promote.run") as tracker:
        tracker.set_champions(folder, arm, digest, classifier, "promoted by hand")
        if not tracker.answers:
            raise LgpError(f"MLflow failed (see the warning above), so {arm} is not promoted: run it again")
    (root / ".lgp" / "promote.run").unlink(missing_ok=True)
    if classifier is None:
        print(f"promote: {arm} has no classifier that timm loads, so lgp-classifier has no champion: evaluate it first")
    print(f"promote: {arm} is the champion now, until `lgp report` runs again")

"""Stage `report`: all results in one table and one page, the verdict, and the champion of the registry."""

import json
import os

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import (
    LABELS,
    MODELS,
    PREPARED,
    REPORTS,
    arm_folder,
    encoder_folder,
    kept_results,
    metrics_file,
    predictions_file,
)


def report(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Write reports/ from the metrics and predictions of all `arms`."""
    from lgp.params.file import load_params
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    params = load_params(params_file)
    pairs = [(arm, task) for arm in params.arms for task in params.tasks_of(arm)]
    metrics = {(arm, task): metrics_file(arm, task) for arm, task in pairs}
    predictions = {(arm, task): predictions_file(arm, task) for arm, task in pairs}
    folders = {arm: arm_folder(arm) for arm in params.arms}
    # an arm's curves and pictures belong to its encoder, whose digest is in its metrics
    reads = [PREPARED, LABELS, *metrics.values(), *predictions.values(), *folders.values()]
    names = ("results.csv", "verdict.txt", "per_class.csv", "report.md", "report.html", "figures")
    outputs = [REPORTS / name for name in names]
    # unlike the other outputs it is not in git: a fresh clone runs this stage, and its registry gets a champion
    champion = REPORTS / "champion.json"
    writes = [*outputs, champion]
    with stage(StageSpec("report", SECTIONS["report"], reads, writes, "all", "report"), params_file, fresh) as run:
        from lgp.compute.device import choose_device
        from lgp.data.labels import LabelledImages
        from lgp.evaluate.prediction import best_plain_classifier
        from lgp.features.cache import Features
        from lgp.features.of_encoder import encoder_features
        from lgp.models.files import encoder_digest
        from lgp.report.outcomes import Inputs
        from lgp.report.report import Outputs, write_report
        from lgp.workflow.restored import log_restored

        out = Outputs(*(run.out(path) for path in outputs))
        data, device = LabelledImages(PREPARED, LABELS), choose_device(run.params.run)

        def features_of(arm: str) -> Features:
            return encoder_features(encoder_folder(arm), data, run.params, device)

        verdict = write_report(run.params, data, Inputs(metrics, predictions, folders), features_of, out)
        best = verdict.champion
        for picture in sorted(out.figures.iterdir()):
            run.tracker.log_figure(picture)
        digest = None if best is None else encoder_digest(encoder_folder(best))
        run.out(champion).write_text(json.dumps({"arm": best, "encoder_digest": digest}) + "\n", encoding="utf-8")
        if "DVC_EXP_NAME" in os.environ:
            print("report: an experiment moves no alias of the registry: `lgp promote ARM` does", flush=True)
        elif best is None or digest is None:
            run.tracker.remove_champion()
        else:
            classifier = best_plain_classifier(MODELS, best)
            run.tracker.set_champions(encoder_folder(best), best, digest, classifier, verdict.crown)
        log_restored(kept_results(params), run.tracker, params_file)

"""Stage `report`: all results in one table and one page, and the champion of the registry."""

import json

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, REPORTS, arm_folder, encoder_folder, metrics_file, predictions_file


def report(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Write reports/ from the metrics of all `arms`, with raw pixels and a random encoder beside them."""
    from lgp.data.prepared import Prepared
    from lgp.params import load_params
    from lgp.report import Inputs, tasks_of, write_report
    from lgp.stage import StageSpec, encoder_digest, stage

    params = load_params(params_file)
    pairs = [(arm, task) for arm in params.arms for task in tasks_of(params)]
    metrics = {(arm, task): metrics_file(arm, task) for arm, task in pairs}
    predictions = {(arm, task): predictions_file(arm, task) for arm, task in pairs}
    folders = {arm: arm_folder(arm) for arm in params.arms}
    # an arm's curves and pictures belong to its encoder, whose digest is in its metrics
    reads = [PREPARED, *metrics.values(), *predictions.values(), *folders.values()]
    page, html = REPORTS / "report.md", REPORTS / "report.html"
    table, classes = REPORTS / "results.csv", REPORTS / "per_class.csv"
    figures = REPORTS / "figures"
    # not in git, unlike the rest: so a fresh clone runs this stage, and its registry gets a champion
    champion = REPORTS / "champion.json"
    sections = [
        "seed", "arms", "few_labels", "finetuned", "data", "model", "features", "linear", "fewshot", "report"
    ]  # fmt: skip
    spec = StageSpec("report", sections, reads, [table, classes, page, html, figures, champion], "all", "report")
    with stage(spec, params_file, fresh) as run:
        inputs = Inputs(metrics, predictions, folders)
        outs = (run.out(path) for path in (table, classes, page, html, figures))
        best = write_report(run.params, Prepared(PREPARED), inputs, *outs)
        for picture in sorted(run.out(figures).iterdir()):
            run.tracker.log_figure(picture)
        digest = encoder_digest(encoder_folder(best))
        run.out(champion).write_text(json.dumps({"arm": best, "encoder_digest": digest}) + "\n")
        run.tracker.crown(encoder_folder(best), best, digest)

"""Stage `report`: all results in one table and one page, and the champion of the registry."""

import json

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import METRICS, PREPARED, REPORTS, arm_folder, encoder_folder, metrics_file


def report(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Write reports/ from the metrics of all `arms`, with raw pixels and a random encoder beside them."""
    from lgp.data.prepared import Prepared
    from lgp.params import load_params
    from lgp.report import write_report
    from lgp.stage import StageSpec, encoder_digest, stage

    params = load_params(params_file)
    tasks = ["linear", *(f"fewshot-{share}" for share in params.data.few_label_shares)]
    # an arm's curves and pictures belong to its encoder, whose digest is in its metrics
    reads = [PREPARED, *(metrics_file(arm, task) for arm in params.arms for task in tasks)]
    reads += [arm_folder(arm) for arm in params.arms]
    page, table, figures = REPORTS / "report.md", REPORTS / "results.csv", REPORTS / "figures"
    # not in git, unlike the rest: so a fresh clone runs this stage, and its registry gets a champion
    champion = REPORTS / "champion.json"
    sections = ["seed", "arms", "data", "model", "linear", "fewshot", "report"]
    spec = StageSpec("report", sections, reads, [table, page, figures, champion], "all", "report")
    with stage(spec, params_file, fresh) as run:
        folders = {arm: arm_folder(arm) for arm in run.params.arms}
        best = write_report(
            run.params, Prepared(PREPARED), METRICS, folders, run.out(table), run.out(page), run.out(figures)
        )
        for picture in sorted(run.out(figures).iterdir()):
            run.tracker.log_figure(picture)
        digest = encoder_digest(encoder_folder(best))
        run.out(champion).write_text(json.dumps({"arm": best, "encoder_digest": digest}) + "\n")
        run.tracker.crown(encoder_folder(best), best, digest)

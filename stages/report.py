"""Stage `report`: all results in one table and one page, and the champion of the registry."""

import json

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import ARMS, METRICS, PREPARED, RECONSTRUCTIONS, REPORTS, arm_folder, encoder_folder, metrics_file


def report(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Write reports/ from all metrics, with raw pixels and a random encoder beside the arms."""
    from lgp.data.prepared import Prepared
    from lgp.params import load_params
    from lgp.report import write_report
    from lgp.stage import StageSpec, encoder_digest, stage

    shares = list(load_params(params_file).data.few_label_shares)
    tasks = ["pretrain", "linear", *(f"fewshot-{share}" for share in shares)]
    reads = [PREPARED, *(metrics_file(arm, task) for arm in ARMS for task in tasks)]
    reads += [arm_folder(arm) / "curves.csv" for arm in ARMS]
    reads += [arm_folder("mim") / RECONSTRUCTIONS, *(encoder_folder(arm) / "model.safetensors" for arm in ARMS)]
    page, table, figures = REPORTS / "report.md", REPORTS / "results.csv", REPORTS / "figures"
    # not in git, unlike the rest: so a fresh clone runs this stage, and its registry gets a champion
    champion = REPORTS / "champion.json"
    sections = ["seed", "data", "model", "linear", "fewshot", "report"]
    spec = StageSpec("report", sections, reads, [table, page, figures, champion], "all", "report")
    with stage(spec, params_file, fresh) as run:
        folders = {arm: arm_folder(arm) for arm in ARMS}
        best = write_report(
            run.params, Prepared(PREPARED), METRICS, folders, run.out(table), run.out(page), run.out(figures)
        )
        for picture in sorted(run.out(figures).iterdir()):
            run.tracker.log_figure(picture)
        digest = encoder_digest(encoder_folder(best))
        run.out(champion).write_text(json.dumps({"arm": best, "encoder_digest": digest}) + "\n")
        run.tracker.crown(encoder_folder(best), best, digest)

"""Tool `conflict`: do MIM and CL pull an encoder's weights apart, block by block?"""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, conflict_file, encoder_files, encoder_folder


def conflict(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Measure the cosine between the gradients of MIM and CL in each block of an arm's encoder."""
    from lgp.conflict import measure_conflict
    from lgp.data.prepared import Prepared
    from lgp.figures import plot_conflict
    from lgp.pretrain import Session
    from lgp.stage import StageSpec, encoder_digest, stage

    table, picture = conflict_file(arm), conflict_file(arm).with_suffix(".png")
    sections, reads = ["seed", "data", "model", "contrastive", "mim", "conflict"], [PREPARED, *encoder_files(arm)]
    with stage(StageSpec("conflict", sections, reads, [table, picture], arm, "conflict"), params_file, fresh) as run:
        run.tag_upstream(encoder_folder(arm))
        result = measure_conflict(Session(Prepared(PREPARED), run.params, run.store, run.tracker), encoder_folder(arm))
        result.assign(encoder=encoder_digest(encoder_folder(arm))).to_csv(run.out(table), index=False)
        plot_conflict(run.out(picture), result)
        run.tracker.log_conflict(result)
        for part, value in result.groupby("block", sort=False)["cosine"].median().items():
            print(f"{part:8} {value:+.3f}")
    print(f"median cosine of the gradients of MIM and CL; all batches in {table}, drawn in {picture}")

"""Tool `conflict`: the cosine between the gradients of MIM and CL in each block of an encoder."""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, conflict_file, encoder_files, encoder_folder


def conflict(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Measure the cosine between the gradients of MIM and CL in each block of an arm's encoder."""
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    table, picture = conflict_file(arm), conflict_file(arm).with_suffix(".png")
    reads = [PREPARED, *encoder_files(arm)]
    spec = StageSpec("conflict", SECTIONS["conflict"], reads, [table, picture], arm, "conflict")
    with stage(spec, params_file, fresh) as run:
        from lgp.data.storage import Images
        from lgp.models.files import encoder_digest
        from lgp.pretrain.arm import Session
        from lgp.pretrain.conflict import measure_conflict
        from lgp.report.figures import plot_conflict

        run.tag_upstream(encoder_folder(arm))
        result = measure_conflict(Session(Images(PREPARED), run.params, run.store, run.tracker), encoder_folder(arm))
        result.assign(encoder=encoder_digest(encoder_folder(arm))).to_csv(run.out(table), index=False)
        plot_conflict(run.out(picture), result)
        run.tracker.log_conflict(result)
        for part, value in result.groupby("block", sort=False)["cosine"].median().items():
            print(f"{part:8} {value:+.3f}")
    print(f"median cosine of the gradients of MIM and CL; {table} has all batches, {picture} draws them")

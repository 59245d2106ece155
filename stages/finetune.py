"""Stage `finetune`: accuracy of an arm's encoder when all of it learns on, with few labels or all."""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile, Resume
from stages.paths import (
    PREPARED,
    arm_folder,
    encoder_files,
    encoder_folder,
    heads_file,
    metrics_file,
    predictions_file,
)


def finetune(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Fine-tune an arm's encoder on each of the prepared subsets, or with `all` labels."""
    from lgp.checkpoint import check_input_size
    from lgp.data.prepared import Prepared
    from lgp.evaluate.finetune import finetune as fine_tune
    from lgp.evaluate.finetune import recipe_for
    from lgp.evaluate.run import publish_outcome
    from lgp.stage import StageSpec, stage

    encoder, task = encoder_folder(arm), f"finetune-{labels}"
    metrics, predictions = metrics_file(arm, task), predictions_file(arm, task)
    reads, writes = [PREPARED, *encoder_files(arm), heads_file(arm)], [metrics, predictions]
    spec = StageSpec("finetune", ["seed", f"finetune.{labels}"], reads, writes, arm, task, trains=True)
    with stage(spec, params_file, fresh, resume) as run:
        data = Prepared(PREPARED)
        recipe, subsets = recipe_for(labels, run.params), data.labelled(labels)
        check_input_size(encoder, data)
        run.tag_upstream(encoder)
        outcome = fine_tune(arm_folder(arm), data, subsets, recipe, run.params, run.store, run.tracker)
        publish_outcome(run, encoder, metrics, predictions, outcome, data)

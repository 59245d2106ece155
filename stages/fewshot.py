"""Stage `fewshot`: accuracy of an arm's frozen encoder with few labels."""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile
from stages.paths import PREPARED, encoder_files, encoder_folder, metrics_file, predictions_file


def fewshot(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Evaluate an arm's frozen features with few labels, over the prepared subsets."""
    from lgp.data.prepared import Prepared
    from lgp.device import choose_device
    from lgp.evaluate.fewshot import evaluate_fewshot
    from lgp.evaluate.run import encoder_features, publish_outcome
    from lgp.stage import StageSpec, stage

    encoder, task = encoder_folder(arm), f"fewshot-{labels}"
    metrics, predictions = metrics_file(arm, task), predictions_file(arm, task)
    reads = [PREPARED, *encoder_files(arm)]
    spec = StageSpec("fewshot", ["features", "fewshot"], reads, [metrics, predictions], arm, task)
    with stage(spec, params_file, fresh) as run:
        data = Prepared(PREPARED)
        subsets = data.subsets(labels)
        run.tag_upstream(encoder)
        features = encoder_features(encoder, data, run.params, choose_device(run.params.run))
        outcome = evaluate_fewshot(features, subsets, run.params.fewshot)
        publish_outcome(run, encoder, metrics, predictions, outcome, data)

"""Stage `linear`: linear probe and k-NN of an arm's encoder, with all labels."""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, encoder_files, encoder_folder, metrics_file, predictions_file


def linear(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Evaluate an arm's frozen features with all labels."""
    from lgp.data.prepared import Prepared
    from lgp.evaluate.protocol import evaluate_linear
    from lgp.evaluate.run import encoder_features, publish_outcome
    from lgp.stage import StageSpec, stage

    encoder, metrics, predictions = encoder_folder(arm), metrics_file(arm, "linear"), predictions_file(arm, "linear")
    reads = [PREPARED, *encoder_files(arm)]
    spec = StageSpec("linear", ["linear"], reads, [metrics, predictions], arm, "linear")
    with stage(spec, params_file, fresh) as run:
        data = Prepared(PREPARED)
        run.tag_upstream(encoder)
        outcome = evaluate_linear(encoder_features(encoder, data, run.params.run), run.params.linear)
        publish_outcome(run, encoder, metrics, predictions, outcome, data)

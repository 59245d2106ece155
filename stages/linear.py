"""Stage `linear`: linear probe and k-NN of an arm's encoder, with all labels."""

from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, encoder_files, encoder_folder, metrics_file, predictions_file


def linear(
    arm: Arm,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Evaluate an arm's frozen features with all labels."""
    from lgp.data.prepared import Prepared
    from lgp.device import choose_device
    from lgp.evaluate.linear import evaluate_linear, evaluate_linear_augmented
    from lgp.evaluate.run import encoder_features, live_features_of, publish_outcome
    from lgp.stage import StageSpec, stage

    encoder, metrics, predictions = encoder_folder(arm), metrics_file(arm, "linear"), predictions_file(arm, "linear")
    reads = [PREPARED, *encoder_files(arm)]
    spec = StageSpec("linear", ["seed", "features", "linear"], reads, [metrics, predictions], arm, "linear")
    with stage(spec, params_file, fresh, resume) as run:
        data, params, device = Prepared(PREPARED), run.params, choose_device(run.params.run)
        run.tag_upstream(encoder)
        features = encoder_features(encoder, data, params, device)
        if params.linear.method == "sweep":
            outcome = evaluate_linear(features, params.linear, params.seed, device, params.run)
        else:
            encode = live_features_of(encoder, params.features, device)
            outcome = evaluate_linear_augmented(features, encode, data, params, device, run.store, run.tracker)
        publish_outcome(run, encoder, metrics, predictions, outcome, data)

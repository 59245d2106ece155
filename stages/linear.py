"""Stage `linear`: linear probe and k-NN of an arm's encoder, with all labels."""

from stages.evaluation import evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, ParamsFile, Resume
from stages.together import Call, taken


def linear(
    arm: Arm,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Evaluate an arm's frozen features with all labels."""
    from lgp.workflow.pipeline import SECTIONS

    if taken(Call("linear", arm), params_file, fresh):
        return
    with evaluation(arm, "linear", SECTIONS["linear"], params_file, fresh, resume) as task:
        from lgp.compute.device import choose_device
        from lgp.evaluate.linear import evaluate_linear, evaluate_linear_augmented
        from lgp.features.of_encoder import encoder_features

        params, device = task.run.params, choose_device(task.run.params.run)
        features = encoder_features(task.encoder, task.data, params, device)
        if params.linear.method == "sweep":
            outcome = evaluate_linear(features, params.linear, params.seed, device, params.run)
        else:
            outcome = evaluate_linear_augmented(features, task.encoder, task.data, task.session, device)
        task.publish(outcome)

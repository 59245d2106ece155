"""Stage `propagate`: accuracy of an arm's frozen encoder with few labels that spread to unlabelled images."""

from stages.evaluation import check_labels, evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile
from stages.together import Call, taken


def propagate(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Spread few labels over all training images by an arm's frozen features, and evaluate a classifier of these."""
    from lgp.workflow.pipeline import SECTIONS

    check_labels(labels)
    if taken(Call("propagate", arm, labels), params_file, fresh):
        return
    with evaluation(arm, f"propagate-{labels}", SECTIONS["propagate"], params_file, fresh) as task:
        from lgp.compute.device import choose_device
        from lgp.evaluate.few_labels import evaluate_propagation
        from lgp.evaluate.outcome import Outcome
        from lgp.features.of_encoder import encoder_features

        params, device = task.run.params, choose_device(task.run.params.run)

        def evaluate() -> Outcome:
            features = encoder_features(task.encoder, task.data, params, device)
            subsets = task.data.labelled(labels)
            return evaluate_propagation(features, subsets, params.fewshot, params.propagation, device)

        settings = [s.model_dump(mode="json") for s in (params.features, params.fewshot, params.propagation)]
        task.publish(task.outcome(labels, settings, evaluate))

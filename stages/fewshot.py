"""Stage `fewshot`: accuracy of an arm's frozen encoder with few labels."""

from stages.evaluation import check_labels, evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile
from stages.together import Call, taken


def fewshot(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Evaluate an arm's frozen features with few labels, on each of the subsets of that name."""
    from lgp.workflow.pipeline import SECTIONS

    check_labels(labels)
    if taken(Call("fewshot", arm, labels), params_file, fresh):
        return
    with evaluation(arm, f"fewshot-{labels}", SECTIONS["fewshot"], params_file, fresh) as task:
        from lgp.compute.device import choose_device
        from lgp.evaluate.few_labels import evaluate_fewshot
        from lgp.evaluate.outcome import Outcome
        from lgp.features.of_encoder import encoder_features

        params, device = task.run.params, choose_device(task.run.params.run)

        def evaluate() -> Outcome:
            features = encoder_features(task.encoder, task.data, params, device)
            return evaluate_fewshot(features, task.data.labelled(labels), params.fewshot, device)

        settings = [section.model_dump(mode="json") for section in (params.features, params.fewshot)]
        task.publish(task.outcome(labels, settings, evaluate))

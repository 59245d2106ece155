"""Stage `selected`: accuracy of an arm's frozen encoder with few labels of images that were chosen by its features."""

from stages.evaluation import check_labels, evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile
from stages.together import Call, taken


def selected(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Evaluate few labels of images that an arm's features choose: as many as in a subset of that name.

    The same labels are then spread to all training images, and evaluated again.
    """
    from lgp.params.file import selected_tasks
    from lgp.params.selection import Method
    from lgp.workflow.pipeline import SECTIONS

    check_labels(labels)
    if taken(Call("selected", arm, labels), params_file, fresh):
        return
    regression, propagation = selected_tasks(labels)
    with evaluation(arm, regression, SECTIONS["selected"], params_file, fresh) as task:
        from lgp.compute.device import choose_device
        from lgp.evaluate.few_labels import evaluate_fewshot, evaluate_propagation
        from lgp.evaluate.selection import selected_subsets
        from lgp.features.of_encoder import encoder_features

        params, device = task.run.params, choose_device(task.run.params.run)
        features = encoder_features(task.encoder, task.data, params, device)
        random = task.data.labelled(labels)
        subsets = selected_subsets(features, random, Method(params.selection.method), params.seed, params.fewshot)
        task.publish(evaluate_fewshot(features, subsets, params.fewshot, device))
    with evaluation(arm, propagation, SECTIONS["selected"], params_file, fresh) as task:
        task.publish(evaluate_propagation(features, subsets, params.fewshot, params.propagation, device))

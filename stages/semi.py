"""Stage `semi`: accuracy of an arm's encoder after fine-tuning that goes on with unlabelled images."""

from stages.evaluation import check_labels, evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile, Resume
from stages.paths import arm_folder, metrics_file


def semi(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Fine-tune an arm's encoder with few labels, and go on with the unlabelled images, which a teacher labels.

    `lgp finetune` of the same arm and labels comes first: it chooses the rate.
    """
    from lgp.errors import LgpError
    from lgp.params.file import load_params

    params = load_params(params_file)
    supervised, how = params.recipe(labels), params.semi_recipe()
    if arm == "pixels":
        raise LgpError("the arm pixels has no encoder to fine-tune: choose another arm")
    check_labels(labels)
    tuned, sections = metrics_file(arm, f"finetune-{labels}"), ["seed", f"finetune.{labels}", "semi"]
    with evaluation(arm, f"semi-{labels}", sections, params_file, fresh, resume, [tuned]) as task:
        from lgp.evaluate.results_files import read_metrics
        from lgp.evaluate.semi_supervised import Recipe, chosen_rate, semi_supervise
        from lgp.params.arms import how_to_evaluate

        metrics = read_metrics(tuned, how_to_evaluate(arm, f"finetune-{labels}"))
        recipe = Recipe(supervised, chosen_rate(metrics, arm, labels, task.encoder, supervised), how)
        task.publish(semi_supervise(arm_folder(arm), task.data, task.data.labelled(labels), recipe, task.session))

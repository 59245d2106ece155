"""Stage `finetune`: accuracy of an arm's encoder after all its weights are trained on few labels or on all."""

from stages.evaluation import check_labels, evaluation
from stages.options import DEFAULT_PARAMS, Arm, Debug, Fresh, Labels, ParamsFile, Resume
from stages.paths import arm_folder


def finetune(
    arm: Arm,
    labels: Labels,
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Fine-tune an arm's encoder on each of the subsets of that name, or with `all` labels."""
    from lgp.errors import LgpError
    from lgp.params.file import load_params

    recipe = load_params(params_file).recipe(labels)
    if arm == "pixels":
        raise LgpError("the arm pixels has no encoder to fine-tune: choose another arm")
    check_labels(labels)
    sections = ["seed", f"finetune.{labels}"]
    with evaluation(arm, f"finetune-{labels}", sections, params_file, fresh, resume) as task:
        from lgp.evaluate.fine_tuning import finetune as fine_tune
        from lgp.evaluate.outcome import Outcome

        def train() -> Outcome:
            return fine_tune(arm_folder(arm), task.data, task.data.labelled(labels), recipe, task.session)

        settings = [task.run.params.seed, recipe.model_dump(mode="json")]
        task.publish(task.outcome(labels, settings, train))

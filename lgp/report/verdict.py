"""The verdict: who is the champion, or why nobody is."""

from collections.abc import Mapping
from dataclasses import dataclass

from lgp.data.labels import LabelledImages
from lgp.evaluate.statistics import CONFIDENCE, holm, paired_gap
from lgp.evaluate.validation import small_validation
from lgp.report.gains import Gain, answer, gains
from lgp.report.outcomes import ArmOutcomes, correct_by_subset, fewest_labels, leader
from lgp.report.pairs import Pair, compare
from lgp.report.table import task_name

FEW = "fewshot-"  # tasks on frozen features with few labels
SELECTED = "selected-"
KNN, TOP1 = "test/knn_top1", "test/top1"


@dataclass(frozen=True)
class Verdict:
    """What the results show.

    Attributes:
        champion: the leader, if val is large enough to choose it, and it beats every baseline with the fewest labels;
            None: nobody is crowned.
        sentence: who is the champion, or why nobody is.
        answer: how good the leader is; empty where no arm may lead.
        helped: what grafting changes; empty unless `graft` and its start are among the arms, and trained.
        notes: what else a reader must know before the numbers.
        unbeaten: the measures besides the fewest labels in which a baseline is not beaten.
        pairs: the comparisons that it rests on.
        gains: what unlabelled and chosen images add.
        crown: what the registry says of the champion: metric, interval and runner-up; empty without one.
    """

    champion: str | None
    sentence: str
    answer: str
    helped: str
    notes: list[str]
    unbeaten: list[str]
    pairs: list[Pair]
    gains: list[Gain]
    crown: str

    @property
    def lines(self) -> list[str]:
        """What a reader must know before the numbers. The first says in what a baseline is not beaten."""
        but = f" A baseline is not beaten in: {', '.join(self.unbeaten)}." if self.unbeaten else ""
        first = [self.answer + but, self.sentence] if self.champion else [self.sentence, self.answer]
        return [line for line in (*first, self.helped, *self.notes) if line]


def judge(arms: list[ArmOutcomes], data: LabelledImages, start: str) -> Verdict:
    """Crown the leader if it is ahead of every baseline on test with the fewest labels, and no interval holds a tie.

    Validation chooses the leader. Where it has too few images for that, nobody is crowned. Test images choose no arm:
    they may only withhold the crown. The crown needs all of these comparisons to be decided, so it needs no correction
    for their number (intersection-union test, Berger 1982).

    Args:
        arms: outcomes of all arms.
        data: images and labels.
        start: the arm that `graft` starts from.
    """
    repeats = repeated(arms, data)
    # what choosing adds is compared within each arm
    pairs = compare(arms, [*repeats, *(task for a in arms for task in a.tasks if task.startswith(SELECTED))])
    found = gains(arms)
    fewest, best = fewest_labels(arms), leader(arms)
    unbeaten = "" if best is None else _unbeaten_by(best, arms, fewest, pairs)
    warning = small_validation(len(data.ids("val")))
    champion = None if best is None or unbeaten or warning else best.arm
    unbeaten_in = {task: note for task in _compared(arms, fewest, repeats) if (note := _note(arms, task, pairs))}
    notes = list(unbeaten_in.values())
    notes += [f"{a.arm} is not trained: its checks failed. It is never the champion." for a in arms if not a.trained]
    notes += [f"{task_name(task)} has the same images as {task_name(of)}." for task, of in repeats.items()]
    sentence = _sentence(champion, arms, fewest, unbeaten, warning)
    if warning and warning not in sentence:
        notes.append(f"Warning: {warning}.")
    crown = _crown(champion, arms, fewest, pairs) if champion else ""
    helped = _helped({a.arm: a for a in arms}, start, repeats)
    unbeaten_tasks = [task_name(task) for task in unbeaten_in]
    return Verdict(champion, sentence, answer(arms, found), helped, notes, unbeaten_tasks, pairs, found, crown)


def repeated(arms: list[ArmOutcomes], data: LabelledImages) -> dict[str, str]:
    """Return the tasks on frozen features that repeat another, with that other: their subsets are the same images."""
    few = [task for task in arms[0].tasks if task.startswith(FEW)]
    same = {task: [FEW + name for name in data.names_of_same_subsets(task.removeprefix(FEW))] for task in few}
    first = {task: next(other for other in few if other in same[task]) for task in few}
    return {task: other for task, other in first.items() if other != task}


def _helped(arms: Mapping[str, ArmOutcomes], start: str, repeats: Mapping[str, str]) -> str:
    """Say by how much grafting changes the accuracy of frozen features, with few labels and with all of them.

    Whether it helped is one question, so what is decided is corrected for its tasks alone (Holm). Nothing is said of
    arms that are missing or not trained.
    """
    if not all(name in arms and arms[name].trained for name in ("graft", start)):
        return ""
    graft, before = arms["graft"].tasks, arms[start].tasks
    few = sorted((t for t in graft if t.startswith(FEW) and t not in repeats), key=lambda t: graft[t].metrics["labels"])
    tasks = [*few, "linear"]
    gaps = [paired_gap(*correct_by_subset(graft[task], before[task], f"graft and {start} in {task}")) for task in tasks]
    said = [
        f"{task_name(task)} ({graft[task].metrics['labels']:,.0f} labels) {gap.signed()}"
        f"{'' if p < 1 - CONFIDENCE else ', undecided'}"
        for task, gap, p in zip(tasks, gaps, holm([gap.p for gap in gaps]), strict=True)
    ]
    return f"Grafting on {start} changes the accuracy of frozen features, in points: {'; '.join(said)}."


def _sentence(champion: str | None, arms: list[ArmOutcomes], fewest: str, unbeaten: str, small: str) -> str:
    if unbeaten:
        return f"Nobody is crowned. With the fewest labels ({task_name(fewest)}), {unbeaten}."
    if champion is None:
        if all(a.is_baseline for a in arms):
            return "Nobody is crowned. Only baselines are among the arms."
        if not any(a.may_win for a in arms):
            return "Nobody is crowned. No arm has a training that passed its checks."
        return f"Nobody is crowned: {small}. `lgp promote ARM` crowns an arm by hand."
    chosen = f"{champion} is the champion: it has the best validation accuracy with the fewest labels"
    baselines = [a.arm for a in arms if a.is_baseline]
    if not baselines:
        return f"{chosen}. No baseline is among the arms, so nothing shows what the training is worth."
    ahead = f"on test it is ahead of {' and '.join(baselines)} there, and no interval holds a tie"
    return f"{chosen} ({task_name(fewest)}); {ahead}."


def _crown(champion: str, arms: list[ArmOutcomes], task: str, pairs: list[Pair]) -> str:
    """Return the champion's accuracy on test with its interval, and the runner-up: the next trained arm on val."""
    of_task = {a.arm: a.tasks[task].metrics for a in arms}
    others = [a.arm for a in arms if a.may_win and a.arm != champion]
    said = f"{TOP1} of {task}: {_measured(of_task[champion])}"
    if not others:
        return f"{said}; no other trained arm"
    second = max(others, key=lambda arm: of_task[arm]["val/top1"])
    pair = next(p for p in pairs if p.task == task and {p.ahead, p.behind} == {champion, second})
    gap = f"{pair.sentence(pair.gap.decided)} {pair.interval()}"
    return f"{said}; runner-up {second}: {_measured(of_task[second])}; {gap}"


def _measured(metrics: Mapping[str, float], name: str = TOP1) -> str:
    return f"{metrics[name]:.1f} [{metrics[f'{name}_low']:.1f}, {metrics[f'{name}_high']:.1f}]"


def _unbeaten_by(arm: ArmOutcomes, arms: list[ArmOutcomes], task: str, pairs: list[Pair]) -> str:
    """Say that a baseline is not beaten in a task: by any trained arm, or by `arm`; else nothing."""
    measured = {a.arm: a.tasks[task].metrics[TOP1] for a in arms if task in a.tasks}
    baseline, trained = _best_of_both(arms, measured)
    if baseline and trained and measured[baseline] > measured[trained]:
        most = f"{baseline} ({measured[baseline]:.1f} %) is ahead of every trained arm"
        pair = next(p for p in pairs if p.task == task and {p.ahead, p.behind} == {baseline, trained})
        return f"{most}; {pair.sentence(pair.gap.decided)} {pair.interval()}"
    baselines = {a.arm for a in arms if a.is_baseline}
    for pair in pairs:
        met = pair.task == task and arm.arm in (pair.ahead, pair.behind) and baselines & {pair.ahead, pair.behind}
        if met and not (pair.gap.decided and pair.ahead == arm.arm):
            return f"{pair.sentence(pair.gap.decided)} {pair.interval()}"
    return ""


def _best_of_both(arms: list[ArmOutcomes], measured: Mapping[str, float]) -> tuple[str, str]:
    """Return the best baseline and the best trained arm by a measure; an empty name where there is none."""
    baselines = [a.arm for a in arms if a.is_baseline and a.arm in measured]
    trained = [a.arm for a in arms if a.may_win and a.arm in measured]
    return max(baselines, key=measured.__getitem__, default=""), max(trained, key=measured.__getitem__, default="")


def _compared(arms: list[ArmOutcomes], fewest: str, repeats: Mapping[str, str]) -> list[str]:
    """Return the tasks besides `fewest` that a note may be about: k-NN, and those that a baseline was measured in."""
    measured = dict.fromkeys(task for a in arms if a.is_baseline for task in a.tasks)
    left_out = [fewest, *repeats]
    return ["knn", *(t for t in measured if t not in left_out and not t.startswith(SELECTED))]


def _by_knn(arms: list[ArmOutcomes]) -> str:
    """Say that the best trained arm is not ahead of the best baseline by k-NN; else nothing.

    Predictions of k-NN are not kept, so the two are not paired. They are undecided where their intervals meet, which
    says so more often than a paired interval would.
    """
    of_linear = {a.arm: a.tasks["linear"].metrics for a in arms}
    baseline, trained = _best_of_both(arms, {arm: metrics[KNN] for arm, metrics in of_linear.items()})
    if not baseline or not trained:
        return ""
    first, second = of_linear[baseline], of_linear[trained]
    if second[f"{KNN}_low"] > first[f"{KNN}_high"]:
        return ""
    both = f"{baseline}, {_measured(first, KNN)} %, {{}} {trained}, {_measured(second, KNN)} %"
    if first[f"{KNN}_low"] > second[f"{KNN}_high"]:
        return both.format("is ahead of the best trained arm,")
    return f"{both.format('and')}, are undecided: their intervals meet"


def _note(arms: list[ArmOutcomes], task: str, pairs: list[Pair]) -> str:
    """Say of a task what a baseline is not beaten in, or nothing. k-NN is not compared in pairs."""
    if task == "knn":
        said = _by_knn(arms)
        return f"{task_name(task)}: {said}." if said else ""
    trained = [a for a in arms if a.may_win and task in a.tasks]
    if not trained:
        return ""
    best = max(trained, key=lambda a: a.tasks[task].metrics[TOP1])
    unbeaten = _unbeaten_by(best, arms, task, pairs)
    return f"{task_name(task)}: {unbeaten}." if unbeaten else ""

"""Mutation testing: change one operator, number or argument at a time, and see whether a test fails.

mutmut makes the mutants of a module and runs the tests that reach the changed function, the fastest first. The tests of
a module are those that say what it does. A training that merely passes through it does not count.

    python benchmarks/mutants.py                          # every module, for hours; results stay in mutants/
    python benchmarks/mutants.py lgp.training.optimizer   # one module anew
    python benchmarks/mutants.py --survivors MODULE …     # only the mutants that no test killed the last time
    python benchmarks/mutants.py --table                  # what is known: a row per module
    mutmut show NAME                                      # the change of a mutant
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from mutmut.__main__ import _run
from mutmut.configuration import config
from mutmut.state import reset_state

STATS = Path("mutants/mutmut-stats.json")
# a mutant hangs if its tests take four times as long as they should, and half a minute
TIMEOUT_MULTIPLIER, TIMEOUT_CONSTANT_S = 4.0, 8.0
STATUS = {0: "survived", 1: "killed", 3: "killed", 33: "no test", 5: "no test", None: "unknown"}  # else a timeout

# module → its tests
TESTS = {
    "lgp.training.optimizer": ["training/test_optimizer.py"],
    "lgp.data.splits": ["data/test_splits.py"],
    "lgp.data.subsets": ["data/test_splits.py"],
    "lgp.models.moco": ["models/test_moco.py"],
    "lgp.models.simclr": ["models/test_simclr.py"],
    "lgp.models.vicreg": ["models/test_vicreg.py"],
    "lgp.models.heads": ["models/test_moco.py", "models/test_vicreg.py"],
    "lgp.models.contrastive": [
        "models/test_contrastive.py",
        "models/test_moco.py",
        "models/test_roles.py",
        "pretrain/test_handed_over.py",
    ],
    "lgp.models.refine": ["models/test_refine.py"],
    "lgp.models.swav": ["models/test_swav.py"],
    "lgp.models.multi_crop": ["models/test_multi_crop.py"],
    "lgp.models.low_rank": ["models/test_low_rank.py"],
    "lgp.models.averaging": ["models/test_moco.py", "models/test_refine.py", "evaluate/test_semi_supervised.py"],
    "lgp.models.in_parts": ["pretrain/test_memory.py"],
    "lgp.models.joint": ["models/test_roles.py"],
    "lgp.models.roles": ["models/test_roles.py"],
    "lgp.models.mae": ["models/test_mae.py"],
    "lgp.models.vit": [
        "models/test_vit.py",
        "models/test_moco.py",
        "models/test_mae.py",
        "models/test_timm_vits.py",
        "models/test_multi_crop.py",
        "pretrain/test_memory.py",
    ],
    "lgp.data.views": ["data/test_views.py"],
    "lgp.data.loading": ["data/test_loading.py"],
    "lgp.evaluate.statistics": ["evaluate/test_statistics.py"],
    "lgp.evaluate.outcome": [
        "evaluate/test_outcome.py",
        "evaluate/test_statistics.py",
        "evaluate/test_linear_parts.py",
        "evaluate/test_few_labels_parts.py",
        "evaluate/test_calibration.py",
        "evaluate/test_prediction.py",
    ],
    "lgp.evaluate.probe": ["evaluate/test_probe.py"],
    "lgp.evaluate.few_labels": ["evaluate/test_few_labels_parts.py", "evaluate/test_few_labels.py"],
    "lgp.evaluate.logistic": ["evaluate/test_logistic.py"],
    "lgp.evaluate.regression": ["evaluate/test_logistic.py", "evaluate/test_few_labels_parts.py"],
    "lgp.evaluate.ridge": ["evaluate/test_logistic.py"],
    "lgp.pretrain.graft": ["pretrain/test_handed_over.py", "pretrain/test_graft.py", "pretrain/test_lora.py"],
    "lgp.pretrain.mim": ["pretrain/test_handed_over.py", "pretrain/test_mim.py"],
    "lgp.pretrain.cl": ["pretrain/test_handed_over.py", "pretrain/test_cl.py"],
    "lgp.pretrain.controls": ["pretrain/test_handed_over.py", "pretrain/test_controls.py"],
    "lgp.pretrain.arm": ["pretrain/test_arm.py", "pretrain/test_sanity_checks.py"],
    "lgp.pretrain.sanity_checks": ["pretrain/test_sanity_checks.py"],
    "lgp.training.loop": ["training/test_loop.py"],
    "lgp.evaluate.linear": ["evaluate/test_linear_parts.py", "evaluate/test_linear.py"],
    "lgp.evaluate.fine_tuning": ["evaluate/test_fine_tuning_parts.py"],
}


def main() -> None:
    """Test the mutants of the modules, one module after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="default: all")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    modules = arguments.modules or list(TESTS)
    if not arguments.table:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a process is forked per mutant
        for module in modules:
            run(module, arguments.survivors)
    print_table(modules)


def run(module: str, survivors: bool) -> None:
    """Test the mutants of one module."""
    names = [name for name, code in results(module).items() if STATUS.get(code) == "survived"] if survivors else []
    if survivors and not names:
        return
    STATS.unlink(missing_ok=True)  # which test reaches what, of another module's tests
    reset_state()
    settings = config()
    settings.pytest_add_cli_args_test_selection = [f"tests/{name}" for name in TESTS[module]]
    settings.timeout_multiplier, settings.timeout_constant = TIMEOUT_MULTIPLIER, TIMEOUT_CONSTANT_S
    print(f"{module}: its mutants meet {', '.join(TESTS[module])}", flush=True)
    _run(names or [f"{module}.*"], 1)


def results(module: str) -> dict[str, int | None]:
    """Return mutant → exit status of its tests, None where they have not run."""
    path = Path(f"mutants/{module.replace('.', '/')}.py.meta")
    return dict(json.loads(path.read_text())["exit_code_by_key"]) if path.exists() else {}


def print_table(modules: list[str]) -> None:
    """Print how many mutants of each module were killed."""
    columns = ("module", "mutants", "killed", "timeout", "survived", "no test", "killed or timeout")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    whole: Counter[str] = Counter()
    for module in modules:
        counts = Counter(STATUS.get(code, "timeout") for code in results(module).values())
        whole += counts
        print(row(module, counts))
    print(row("all", whole))


def row(name: str, counts: Counter[str]) -> str:
    """Lay out a row of the table."""
    tested = counts.total() - counts["unknown"]
    share = f"{100 * (counts['killed'] + counts['timeout']) / tested:.0f} %" if tested else "–"
    columns = (tested, counts["killed"], counts["timeout"], counts["survived"], counts["no test"], share)
    return "| " + " | ".join(str(value) for value in (name, *columns)) + " |"


if __name__ == "__main__":
    main()

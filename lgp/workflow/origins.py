"""The origin of a result in a few words: how a run is called, and the parameters of the encoder that it evaluates."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgp.errors import LgpError, without_credentials
from lgp.models.files import WEIGHTS, read_provenance
from lgp.params.file import Params, parse_params, section_values

NAMED = {"graft.policy": "policy", "contrastive.objective": "objective", "seed": "seed"}
SHOWN_CHANGES = 3  # in the name of a run
SHOWN_CHARACTERS = 40  # of a value in it


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested values into `{"section.key": "text"}`, without the passwords in addresses."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: without_credentials(str(value))}
    return flat


def committed_values(params_file: Path) -> dict[str, str]:
    """Return the flat values of a parameter file as the last commit has it.

    Nothing where git does not have the file, or has one that this version does not read.
    """
    command = ["git", "show", f"HEAD:./{params_file.name}"]
    try:
        shown = subprocess.run(
            command, cwd=params_file.parent, capture_output=True, check=True, encoding="utf-8", errors="surrogateescape"
        ).stdout
        params = parse_params(shown, params_file)
    except (OSError, UnicodeDecodeError, subprocess.CalledProcessError, LgpError):
        return {}
    return flatten(section_values(params, Params.model_fields))


def values_behind(encoder: Path, later: frozenset[Path] = frozenset()) -> dict[str, str]:
    """Return the flat parameters that made an encoder, with those of the encoders that it started from.

    Args:
        encoder: its folder.
        later: encoders that started from it; they are not followed again.
    """
    record, followed = read_provenance(encoder), later | {encoder}
    starts = [Path(name).parent for name in record.get("digests", {}).get("inputs", {}) if Path(name).name == WEIGHTS]
    values: dict[str, str] = {}
    for start in starts:
        values |= {} if start in followed else values_behind(start, followed)
    return values | flatten(record.get("params", {}))


def encoder_values(behind: Mapping[str, str], digest: str) -> dict[str, str]:
    """Return what an evaluation says of its encoder: digest, policy, objective and seed, as far as it has them.

    An arm without a contrastive loss has the objective `mae`.

    Args:
        behind: the parameters that made the encoder (`values_behind`).
        digest: of the encoder.
    """
    masked = {"encoder.objective": "mae"} if "mim.mask_ratio" in behind else {}
    named = {f"encoder.{name}": behind[key] for key, name in NAMED.items() if key in behind}
    return {"encoder.digest": digest} | masked | named


def run_name(arm: str, task: str, made_with: Mapping[str, str], committed: Mapping[str, str]) -> str:
    """Name a run: arm and task, what differs from the committed parameters, and the seed.

    Args:
        arm: of the run.
        task: of the run.
        made_with: the flat parameters that made its result.
        committed: all flat parameters of the last commit; empty where they are not known.
    """
    changed = [key for key, value in made_with.items() if committed and value != committed.get(key) and key != "seed"]
    shown = [f"{key}={_short(made_with[key])}" for key in changed[:SHOWN_CHANGES]]
    more = [f"{len(changed) - SHOWN_CHANGES} more"] if len(changed) > SHOWN_CHANGES else []
    seed = f"seed {made_with['seed']}" if "seed" in made_with else ""
    return " · ".join(filter(None, [f"{arm} / {task}", ", ".join(shown + more), seed]))


def _short(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[: SHOWN_CHARACTERS - 1]}…"

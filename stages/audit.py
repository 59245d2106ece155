"""Tool `audit`: labels that look wrong."""

from pathlib import Path
from typing import Annotated

import typer

from stages.arm_features import arm_features
from stages.options import DEFAULT_PARAMS, Debug, OptionalArm, ParamsFile

Out = Annotated[Path, typer.Option(help="The CSV to write. A page of the same name shows the images.")]


def audit(
    arm: OptionalArm = None,
    out: Out = Path("audit.csv"),
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """List labels that look wrong, as a CSV to correct them in and a page that shows the images."""
    from lgp.compute.device import choose_device
    from lgp.evaluate.audit import audit as audit_labels
    from lgp.evaluate.audit import check_auditable
    from lgp.params.file import load_params
    from lgp.report.audit import audit_page, audit_table, counted
    from lgp.report.selection import check_unfilled

    params = load_params(params_file)
    check_unfilled(out)
    of = arm_features(arm, params, check_auditable)
    findings = audit_labels(of.features, of.data, params, choose_device(params.run))
    page = out.with_suffix(".html")
    print(f"audit: {counted(findings, of.data)}, by the features of {of.arm}")
    if not findings:
        for before in (out, page):  # of another audit, and not true any more
            before.unlink(missing_ok=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(audit_table(findings, of.data, of.arm, of.encoder), encoding="utf-8")
    page.write_text(audit_page(findings, of.data, of.arm, of.encoder, out), encoding="utf-8")
    print(f"audit: {page} shows them; correct labels in {out}, then `lgp labels add {out}`")

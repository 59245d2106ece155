"""Tool `audit`: labels that look wrong."""

from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, OptionalArm, ParamsFile
from stages.paths import LABELS, PREPARED, default_arm, encoder_folder

Out = Annotated[Path, typer.Option(help="The CSV to write. A page of the same name shows the images.")]


def audit(
    arm: OptionalArm = None,
    out: Out = Path("audit.csv"),
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """List labels that look wrong, as a CSV to correct them in and a page that shows the images."""
    from lgp.compute.device import choose_device
    from lgp.data.labels import LabelledImages
    from lgp.evaluate.audit import audit as audit_labels
    from lgp.evaluate.audit import check_auditable
    from lgp.features.of_encoder import encoder_features
    from lgp.models.files import check_trained, encoder_digest
    from lgp.params.file import load_params
    from lgp.report.audit import audit_page, audit_table, counted
    from lgp.report.selection import check_unfilled

    params = load_params(params_file)
    check_unfilled(out)
    arm = arm or default_arm()
    folder, data, device = encoder_folder(arm), LabelledImages(PREPARED, LABELS), choose_device(params.run)
    check_auditable(data)
    features = encoder_features(folder, data, params, device)
    if warning := check_trained(folder):
        print(warning)
    findings, digest, page = (
        audit_labels(features, data, params, device),
        encoder_digest(folder),
        out.with_suffix(".html"),
    )
    print(f"audit: {counted(findings, data)}, by the features of {arm}")
    if not findings:
        for before in (out, page):  # of another audit, and not true any more
            before.unlink(missing_ok=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(audit_table(findings, data, arm, digest), encoding="utf-8")
    page.write_text(audit_page(findings, data, arm, digest, out), encoding="utf-8")
    print(f"audit: {page} shows them; correct labels in {out}, then `lgp labels add {out}`")

"""Tool `suggest`: where to cut an arm for a graft, and at what rates to go on."""

from stages.options import DEFAULT_PARAMS, Arm, ParamsFile
from stages.paths import LABELS, PREPARED, conflict_file, encoder_folder


def suggest(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Suggest where to cut an arm for a graft, and its rates. It reads what `lgp conflict` measured."""
    from lgp.data.labels import LabelledImages
    from lgp.params.file import load_params
    from lgp.pretrain.cut import advice, knn_by_block, mim_epochs, read_conflict, suggest_cut
    from lgp.report.terminal import print_table

    params, encoder = load_params(params_file), encoder_folder(arm)
    table = read_conflict(conflict_file(arm), encoder)
    knn = knn_by_block(encoder, LabelledImages(PREPARED, LABELS), params)
    found = suggest_cut(table, knn)
    rows = [[str(i), f"{c:+.3f}", f"{k:.1f}"] for i, (c, k) in enumerate(zip(found.cosines, knn, strict=True))]
    print_table(f"Blocks of {arm}", ("block", "median cosine MIM, CL", "k-NN on val, %"), rows)
    for line in advice(found, arm, len(knn), params.graft, mim_epochs(encoder)):
        print(line)

"""A contact sheet of pairs, accepted and rejected, from whatever a workspace holds."""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p.errors import UserError
from ip2p.records import digest
from ip2p.report.page import template
from ip2p.report.pictures import pair_view
from ip2p.report.summary import Row
from ip2p.workspace import Workspace

COLUMNS = ["caption_id", "original_prompt", "edit_prompt", "edited_prompt", "pairs", "rejects"]


def write_sheet(workspace: Workspace, count: int) -> dict[str, int]:
    """Write `pairs.html` into the workspace, up to `count` pairs of either kind; returns how many of each it shows.

    Files are read in the order of a hash until there are enough, so a huge workspace costs no more than a small one,
    and a job may still be writing. Raises `UserError` when there is nothing to show yet.
    """
    accepted: list[dict] = []
    rejected: list[dict] = []
    for row in shuffled_rows(workspace):
        accepted += [pair_view(row, pair, [("accepted", True)]) for pair in row["pairs"][:1]]
        rejected += [pair_view(row, pair, [(pair["verdict"], False)]) for pair in row["rejects"][:1]]
        if min(len(accepted), len(rejected)) >= count:
            break
    if not accepted and not rejected:
        raise UserError(f"{workspace.uri('pairs')} holds no pairs yet: run jobs.generate_pairs, or wait for its first")
    shown = {"accepted": accepted[:count], "rejected": rejected[:count]}
    with workspace.open_out("pairs.html") as file:
        file.write(render(workspace, shown).encode())
    return {name: len(pairs) for name, pairs in shown.items()}


def render(workspace: Workspace, shown: Mapping[str, Sequence[dict]]) -> str:
    sections = [
        ("Accepted", "The best pair of each caption.", shown["accepted"]),
        ("Rejected", "One of each caption that keeps its rejects (pairs.keep_rejects), with why.", shown["rejected"]),
    ]
    return template("pairs.html.j2").render(
        location=workspace.location,
        note="Captions in the order of a hash: chosen by nobody's eye.",
        sections=[section for section in sections if section[2]],
    )


def shuffled_rows(workspace: Workspace) -> Iterator[Row]:
    """Rows of pairs/, file by file and row by row in the order of a hash; a file that is being written is passed by."""
    files = [path for path in workspace.files("pairs") if path.endswith(".parquet")]
    for path in sorted(files, key=lambda path: digest("sheet", path.rpartition("/")[2])):
        try:
            table = pq.ParquetFile(workspace.fs.open_input_file(path)).read(columns=COLUMNS)
        except pa.ArrowInvalid:  # no footer yet
            continue
        yield from sorted(table.to_pylist(), key=lambda row: digest("sheet", row["caption_id"]))

import pyarrow.parquet as pq
import pytest

from ip2p.report.contact_sheet import write_sheet
from ip2p.workspace import Workspace
from jobs import show_pairs
from tests.evaluate.synthetic import make_recipe, make_workspace
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("sheet"), make_recipe())


def read(workspace: Workspace) -> str:
    with workspace.open_in("pairs.html") as file:
        return file.read().decode()


def test_accepted_and_rejected_pairs_are_shown_with_why(workspace):
    assert write_sheet(workspace, 10) == {"accepted": 10, "rejected": 10}
    text = read(workspace)
    page = Page(text)
    assert page.headings == ["Accepted", "Rejected"]
    assert len(page.images) == 2 * 20
    assert all(reference.startswith("data:") for reference in page.references)
    assert text.count('<span class="tag good">accepted</span>') == 10
    assert text.count('<span class="tag bad">') == 10
    rows = workspace.read_table("pairs").to_pylist()
    shown = [row for row in rows if row["edit_prompt"] and f">{row['edit_prompt']}</div>" in text]
    assert 10 <= len(shown) <= 20
    write_sheet(workspace, 10)
    assert read(workspace) == text


def test_it_can_be_asked_for_while_a_job_writes(workspace, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        show_pairs.main(["--workspace", str(tmp_path / "empty")])
    assert "holds no pairs yet" in capsys.readouterr().err
    with workspace.open_out("pairs", "unfinished.parquet") as file:
        file.write(b"PAR1 and then the power went")
    show_pairs.main(["--workspace", workspace.location, "--count", "1000"])
    with workspace.open_in("pairs", "0.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    accepted, rejected = (sum(bool(row[kind]) for row in rows) for kind in ("pairs", "rejects"))
    assert f"{accepted} accepted, {rejected} rejected: {workspace.uri('pairs.html')}" in capsys.readouterr().out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        show_pairs.main(["--help"])
    assert end.value.code == 0
    assert "pairs.keep_rejects" in capsys.readouterr().out

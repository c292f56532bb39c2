"""Write a workspace's report.html anew, from whatever stages have run so far."""

from cluster.job import mistakes_told
from ip2p.cli import load_settings
from ip2p.evaluate.report import write_report


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=("workspace",))
    assert workspace is not None
    with mistakes_told():
        write_report(recipe, workspace)
    print(f"report: {workspace.uri('report.html')} is written")


if __name__ == "__main__":
    main()

"""Write a workspace's report.html anew, from whatever stages have run so far."""

from ip2p.cli import load_settings
from ip2p.report.page import write_report
from runtime.job import job


def main(argv: list[str] | None = None) -> None:
    recipe, workspace, _ = load_settings(__doc__ or "", argv=argv, needs=("workspace",))
    assert workspace is not None
    with job("report", workspace):
        write_report(recipe, workspace)
    print(f"report: {workspace.uri('report.html')} is written")


if __name__ == "__main__":
    main()

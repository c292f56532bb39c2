"""Submit a job to a Ray cluster, follow its log and end with its exit status; the same command again is safe.

    python -m cluster.submit --job train --recipe recipes/sd15.yaml --workspace s3://bucket/run --train.steps 5000

Flags that are not listed here are the job's. A job, a recipe's name and a workspace make one submission with attempts:
one that runs is followed, not doubled; one that is done is told; one that failed or was stopped gets its next attempt.
Ctrl-C ends the following, not the job. The cluster is that of --address, or of RAY_API_SERVER_ADDRESS or RAY_ADDRESS,
or this machine's.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ip2p.cli import read_recipe
from ip2p.errors import UserError
from ip2p.recipe import REPOSITORY
from ip2p.records import digest
from runtime.exit import exit_statuses
from runtime.lease import SUBMISSION

# What jobs do not need of the repository; .gitignore leaves out more. Packages are the image's: nothing is installed.
EXCLUDES = ["/.git", "/.ci", "/.venv", "/tests", "/docs", "/benchmarks", "/requirements", "/cluster/kuberay"]
MODULES = {file.stem: f"jobs.{file.stem}" for file in sorted((REPOSITORY / "jobs").glob("[!_]*.py"))}
MODULES |= {"preflight": "cluster.preflight", "prefetch": "cluster.prefetch"}
PATIENCE = 300.0  # seconds that the server may be unreachable while a job is followed
INTERRUPTED = 130


@dataclass(frozen=True)
class Submission:
    """What is to run. `key` is the same for all attempts."""

    key: str
    entrypoint: str
    recipe: str  # digest of its text

    def attempt_of(self, submission_id: str | None) -> int | None:
        """Which attempt at this an id of Ray's is; None for those of others."""
        key, _, attempt = (submission_id or "").rpartition("-")
        return int(attempt) if key == self.key and attempt.isdigit() else None


def submission(job: str, recipe: Path, workspace: str, flags: Sequence[str]) -> Submission:
    """Raises `UserError` for what could not run on another machine, naming the flag."""
    if job not in MODULES:
        raise UserError(f"--job {job}: there is no such job; there are {', '.join(MODULES)}")
    read_recipe(recipe)
    file = recipe.resolve() if recipe.is_file() else REPOSITORY / recipe
    if not file.is_relative_to(REPOSITORY):
        raise UserError(f"--recipe {recipe}: lies outside {REPOSITORY}, which is what the cluster is sent")
    if "://" not in workspace and not Path(workspace).is_absolute():
        raise UserError(
            f"--workspace {workspace}: means nothing on another machine; give s3://..., gs://..., or the absolute path "
            "of a folder that all machines share"
        )
    place = workspace.rstrip("/")  # its storage is the cluster's to reach, not ours
    sent = file.relative_to(REPOSITORY)
    command = ["python", "-m", MODULES[job], "--recipe", str(sent), "--workspace", workspace, *flags]
    return Submission(
        key=f"{job}-{sent.stem}-{digest(place):016x}"[:200],
        entrypoint=shlex.join(command),
        recipe=f"{digest(file.read_text()):016x}",
    )


def decide(wanted: Submission, known: Sequence[JobDetails], again: bool) -> tuple[str, bool]:
    """(submission id, whether it is to be submitted) given what the cluster knows; else it is there already.

    Raises `UserError` when the same job runs in that workspace with other flags or another recipe.
    """
    attempts = {number: job for job in known if (number := wanted.attempt_of(job.submission_id))}
    if not attempts:
        return f"{wanted.key}-1", True
    number = max(attempts)
    last = attempts[number]
    same = last.entrypoint == wanted.entrypoint and (last.metadata or {}).get("recipe") == wanted.recipe
    if not last.status.is_terminal():
        if not same:
            raise UserError(
                f"{last.submission_id} runs in this workspace as `{last.entrypoint}`, with other flags or another "
                f"recipe: wait for it, or ray job stop {last.submission_id}"
            )
        return f"{wanted.key}-{number}", False
    if last.status == JobStatus.SUCCEEDED and same and not again:
        return f"{wanted.key}-{number}", False
    return f"{wanted.key}-{number + 1}", True


def run(client: JobSubmissionClient, wanted: Submission, again: bool) -> int:
    """Submit or follow; returns the exit status of the job."""
    name, new = decide(wanted, client.list_jobs(), again)
    if new:
        # Two that submit at once choose the same id, and the server takes the first.
        client.submit_job(
            entrypoint=wanted.entrypoint,
            submission_id=name,
            metadata={"recipe": wanted.recipe},
            runtime_env={
                "working_dir": str(REPOSITORY),
                "excludes": EXCLUDES,
                "env_vars": {SUBMISSION: name, "PYTHONUNBUFFERED": "1"},
            },
        )
        say(f"{name} is submitted: {wanted.entrypoint}")
    elif client.get_job_status(name).is_terminal():
        say(f"{name} is done already; --again runs it once more. Its log: ray job logs {name}")
        return 0
    else:
        say(f"{name} runs already, its log:")
    try:
        follow(client, name)
    except KeyboardInterrupt:
        say(f"{name} goes on; the same command follows it again, `ray job stop {name}` ends it")
        return INTERRUPTED
    return outcome(client, name)


def follow(client: JobSubmissionClient, name: str) -> None:
    """Print the log until the job ends, over lost connections as well.

    Raises `UserError` when the server stays away for PATIENCE seconds, as with a head that is gone.
    """
    printed = 0
    heard = time.monotonic()

    async def tail() -> None:
        nonlocal printed, heard
        seen = 0
        async for text in client.tail_job_logs(name):
            heard = time.monotonic()
            # A new connection begins with the first line.
            fresh = text[max(printed - seen, 0) :]
            seen += len(text)
            printed = max(printed, seen)
            print(fresh, end="", flush=True)

    while True:
        trouble: Any = None
        try:
            asyncio.run(tail())
            if client.get_job_status(name).is_terminal():
                return
            heard = time.monotonic()
        except (OSError, RuntimeError) as error:  # aiohttp's and requests' are OSErrors; RuntimeError is the client's
            trouble = error
        if time.monotonic() - heard > PATIENCE:
            raise UserError(
                f"the Jobs server has not answered for {PATIENCE:.0f} s ({trouble}). If the head is lost, so is the "
                "job: the same command, on the new cluster, goes on from the workspace"
            )
        time.sleep(1)


def outcome(client: JobSubmissionClient, name: str) -> int:
    job = client.get_job_info(name)
    if job.status == JobStatus.SUCCEEDED:
        say(f"{name} is done")
        return 0
    say(f"{name}: {job.status.value}: {(job.message or '').splitlines()[0] if job.message else 'no reason given'}")
    say("the same command makes the next attempt, which goes on from the workspace")
    return job.driver_exit_code or 1


def say(text: str) -> None:
    """To standard error: standard output is the job's log."""
    print(f"submit: {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        "python -m cluster.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    arguments.add_argument("--job", required=True, help="a file of jobs/, e.g. generate_pairs; or preflight, prefetch")
    arguments.add_argument("--recipe", required=True, type=Path, help="recipe file, in the repository")
    arguments.add_argument("--workspace", required=True, help="s3://..., gs://..., or a folder that machines share")
    arguments.add_argument("--address", help="of Ray's Jobs server, e.g. http://localhost:8265")
    arguments.add_argument("--again", action="store_true", help="run what is done already once more")
    return arguments


def main(argv: list[str] | None = None) -> None:
    settings, flags = parser().parse_known_args(argv)
    with exit_statuses():
        wanted = submission(settings.job, settings.recipe, settings.workspace, flags)
        try:
            status = run(JobSubmissionClient(settings.address), wanted, settings.again)
        except ConnectionError as error:
            raise UserError(f"no Ray Jobs server: {error}; name it by --address http://HOST:8265") from error
        except AuthenticationError as error:
            raise UserError(
                f"the cluster wants its token ({str(error).splitlines()[0]}): set RAY_AUTH_MODE=token, and put the "
                "token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from error
    sys.exit(status)


if __name__ == "__main__":
    main()

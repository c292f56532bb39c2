"""The report from a whole workspace and from workspaces half way, read as a browser reads it."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from ip2p import images
from ip2p.evaluate.metrics import Estimate
from ip2p.evaluate.report import duration, percent, points, write_report
from ip2p.workspace import Workspace
from tests.evaluate.synthetic import make_recipe, make_workspace

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects headings, images and links; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.headings: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "img":
            assert named["alt"]
            self.images.append(named["src"])
        self.references += [named[key] for key in ("src", "href") if key in named]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(
        evaluate={
            "images": 14,
            "guidance_scale": [1, 2, 4, 8],
            "image_guidance_scale": [1, 1.5, 2, 2.5],
            "fixed_guidance_scale": 4,
        },
        sampling={"guidance_scale": 4, "image_guidance_scale": 1.5},
    )


@pytest.fixture(scope="module")
def workspace(recipe, tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("report"), recipe)


def read(workspace: Workspace) -> str:
    with workspace.open_in("report.html") as file:
        return file.read().decode()


def test_the_numbers_are_those_of_the_tables(recipe, workspace):
    summary = write_report(recipe, workspace)
    metrics = workspace.read_table("evaluation", "metrics.parquet").drop_columns("image").to_pylist()
    shipped = next(result for result in summary.accuracies if result.model == "shipped")
    at_default = [
        row["success"]
        for row in metrics
        if row["model"] == "shipped" and (row["guidance_scale"], row["image_guidance_scale"]) == (4, 1.5)
    ]
    assert shipped.success.mean == pytest.approx(sum(at_default) / len(at_default))
    assert shipped.success.count == len(at_default) == 14
    assert [result.model for result in summary.accuracies] == [
        "workspace",
        "shipped",
        "sdedit",
        "sdedit_instruction",
        "unchanged",
    ]
    assert all(curve.image.monotone for curve in summary.image_guidance)
    assert all(curve.direction.monotone for curve in summary.text_guidance)

    asked = workspace.read_table("instructions").to_pylist()
    ok = [row for row in asked if row["status"] == "ok"]
    assert sum(summary.answers.edit_types.values()) == len(ok)
    assert summary.answers.edit_types["swap"] == sum(row["edit_type"] == "swap" for row in ok)
    assert summary.answers.instruction_words["3–4 words"] == sum(
        len(row["edit_prompt"].split()) in (3, 4) for row in ok
    )
    assert sum(summary.answers.edited_caption_words.values()) == len(ok)
    assert summary.answers.attempts == {"once": len(asked) // 2, "twice": len(asked) // 2}
    assert sum(summary.answers.reasons.values()) == len(asked) - len(ok)

    pairs = workspace.read_table("pairs").to_pylist()
    assert summary.funnel.candidates == sum(len(row["candidates"]) for row in pairs)
    assert summary.funnel.instructions == sum(row["status"] == "ok" for row in pairs)
    truth = workspace.read_table("evaluation", "pair_truth.parquet").to_pylist()
    kept = [c["success"] for row in truth for c in row["candidates"] if c["shared"] and c["verdict"] == "accepted"]
    assert summary.pair_truth.rates["shared, filtered"].mean == pytest.approx(sum(kept) / len(kept))
    assert summary.pair_truth.filter_gain.low > 0

    text = read(workspace)
    for result in summary.accuracies:
        assert percent(result.success.mean) in text
    assert duration(sum(summary.seconds.values())) in text


def test_the_report_is_one_whole_file(recipe, workspace):
    write_report(recipe, workspace)
    page = Page(read(workspace))
    assert page.headings == [
        "From captions to pairs", "What was asked for", "Accepted pairs", "Are the pairs right?",
        "The two guidance scales", "Curves", "Editors compared", "Training", "How it was made",
    ]  # fmt: skip
    assert all(reference.startswith("data:") for reference in page.references)
    assert len(page.images) > 24 * 2 + 3 * 16
    for uri in page.images:
        assert images.decode(base64.b64decode(uri.split(",", 1)[1])).shape == (32, 32, 3)


def test_what_people_wrote_is_escaped(recipe, tmp_path):
    workspace = make_workspace(tmp_path, recipe, captions=12)
    named = recipe.model_copy(update={"name": "<script>alert(1)</script>"})
    write_report(named, workspace)
    assert "<script" not in read(workspace)


@pytest.mark.parametrize("missing", [("evaluation",), ("evaluation", "model", "dataset"), ("evaluation", "pairs")])
def test_a_run_half_way_has_a_report(recipe, tmp_path, missing):
    workspace = make_workspace(tmp_path, recipe, captions=12)
    for folder in missing:
        workspace.fs.delete_dir(workspace.path(folder))
    summary = write_report(recipe, workspace)
    page = Page(read(workspace))
    assert "Editors compared" not in page.headings
    assert ("Accepted pairs" in page.headings) == ("pairs" not in missing)
    assert summary.accuracies == []


def test_without_truth_there_are_clip_metrics_only(recipe, tmp_path):
    workspace = make_workspace(tmp_path, recipe, captions=12)
    workspace.fs.delete_dir(workspace.path("evaluation", "pair_truth.parquet"))
    path = workspace.path("evaluation", "metrics.parquet", "0.parquet")
    rows = pq.read_table(path).to_pylist()
    unknown = dict.fromkeys(("carried_out", "preserved", "valid", "success", "edit_kind"))
    table = pq.read_table(path)
    pq.write_table(table.from_pylist([row | unknown for row in rows], schema=table.schema), path)
    summary = write_report(recipe.model_copy(update={"truth": "none"}), workspace)
    assert summary.accuracies[0].success is None
    assert summary.accuracies[0].clip_sim_dir.count == 14
    text = read(workspace)
    Page(text)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text)


def test_texts_of_numbers():
    assert duration(59.6) == "1 min 00 s"
    assert duration(3725) == "1 h 02 min"
    assert duration(9) == "9 s"
    assert percent(0.456) == "46%"
    assert percent(float("nan")) == "–"
    assert points(Estimate(-0.05, -0.1, 0.02, 9)) == "−5 points (−10 … +2)"


@pytest.mark.parametrize("width", [390, 1200])
def test_a_real_browser_shows_it_without_errors(recipe, workspace, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    write_report(recipe, workspace)
    # A small script in a copy tells what the browser made of it: images that did not load, and sideways scrolling.
    probe = (
        "<script>onload = () => { document.title = JSON.stringify([document.images.length,"
        "[...document.images].filter(i => !i.naturalWidth).length,"
        "document.documentElement.scrollWidth - innerWidth]) }</script></body>"
    )
    copy = tmp_path / "report.html"
    copy.write_text(read(workspace).replace("</body>", probe))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    loaded, broken, overflow = re.search(r"<title>\[(\d+),(\d+),(-?\d+)\]", done.stdout).groups()
    assert int(loaded) > 90
    assert int(broken) == 0
    assert int(overflow) <= 0, f"the page is {overflow} px wider than a window of {width} px"


def test_one_value_of_a_scale_is_no_curve(recipe, workspace):
    sweep = {"guidance_scale": [4], "image_guidance_scale": [1.5]}
    single = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=sweep)})
    summary = write_report(single, workspace)
    assert summary.image_guidance == summary.text_guidance == []
    one = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"guidance_scale": [4]})})
    assert len(write_report(one, workspace).image_guidance) == 2
    summary = write_report(single, workspace)
    assert "Do the scales do" not in read(workspace) and "The two guidance scales" in read(workspace)

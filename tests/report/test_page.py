"""The report from a whole workspace and from workspaces half way, read as a browser reads it."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright
from sklearn.metrics import roc_auc_score

from ip2p import images
from ip2p.evaluate.bootstrap import Estimate
from ip2p.evaluate.judge import JUDGED, MARKS, failed, read_answer
from ip2p.recipe import Judge, ModelRef
from ip2p.records import Answer
from ip2p.report.page import duration, percent, points, write_report
from ip2p.workspace import Workspace
from tests.evaluate.synthetic import make_recipe, make_workspace, write

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
        "From captions to pairs", "What was asked for", "Accepted pairs", "Rejected pairs", "Are the pairs right?",
        "The two guidance scales", "Curves", "Editors compared", "Does CLIP know what is right?", "Training",
        "How it was made",
    ]  # fmt: skip
    assert all(reference.startswith("data:") for reference in page.references)
    assert len(page.images) > 24 * 2 + 3 * 16
    for uri in page.images:
        assert images.decode(base64.b64decode(uri.split(",", 1)[1])).shape == (32, 32, 3)


def test_what_is_preserved_of_each_attribute_and_what_each_seed_gives(recipe, tmp_path):
    twice = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"seeds": 2})})
    workspace = make_workspace(tmp_path, twice, captions=12)
    shipped = next(result for result in write_report(twice, workspace).accuracies if result.model == "shipped")
    rows = workspace.read_table("evaluation", "metrics.parquet").drop_columns("image").to_pylist()
    at = [r for r in rows if (r["model"], r["guidance_scale"], r["image_guidance_scale"]) == ("shipped", 4, 1.5)]
    assert len(at) == 28
    colours = [row["preserved_colour"] for row in at]
    assert shipped.by_attribute["colour"].mean == pytest.approx(sum(colours) / 28)
    assert len(shipped.by_seed) == 2
    for draw, (image, _, success) in enumerate(shipped.by_seed):
        mine = [row for row in at if row["draw"] == draw]
        assert image.count == success.count == 14
        assert image.mean == pytest.approx(sum(row["clip_sim_image"] for row in mine) / 14)
    text = read(workspace)
    assert "What was preserved" in text and "By seed" in text


def test_further_editors_have_curves_and_names_of_their_own(recipe, tmp_path):
    workspace = make_workspace(tmp_path, recipe, captions=12)
    path = workspace.path("evaluation", "metrics.parquet", "0.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows += [row | {"model": name} for name in ("1% of the <data>", "10%") for row in rows if row["model"] == "shipped"]
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    summary = write_report(recipe, workspace)
    models = ["workspace", "shipped", "1% of the <data>", "10%"]
    assert [curve.model for curve in summary.image_guidance] == models
    assert [result.model for result in summary.accuracies][:4] == models
    text = read(workspace)
    Page(text)
    # Two editors, two more and the two ways of SDEdit, in the paper's plane.
    plane = text[text.index("<h2>Curves") :].split("</figure>")[0]
    assert [f'<g class="s{k}">' in plane for k in range(7)] == [True] * 6 + [False]
    assert "1% of the &lt;data&gt;" in plane


def test_how_well_clip_knows_the_truth(recipe, workspace):
    summary = write_report(recipe, workspace)
    found = {(prediction.of, prediction.by): prediction.auc for prediction in summary.predictions}
    truth = workspace.read_table("evaluation", "pair_truth.parquet").to_pylist()
    candidates = [c for row in truth for c in row["candidates"] if c["shared"]]
    expected = roc_auc_score([c["success"] for c in candidates], [c["clip_sim_dir"] for c in candidates])
    assert found["generated pairs", "direction"].mean == pytest.approx(expected)
    assert summary.calibration.direction_auc == pytest.approx(expected)
    assert f"direction: {summary.calibration.thresholds.direction:g}" in read(workspace)
    assert ("edits by the shipped editor", "image similarity") in found


def test_marks_of_a_judge(recipe, tmp_path):
    judged = recipe.model_copy(
        update={"evaluate": recipe.evaluate.model_copy(update={"judge": Judge(model=ModelRef(path="a/judge"))})}
    )
    workspace = make_workspace(tmp_path, judged, captions=12)
    rows = workspace.read_table("evaluation", "metrics.parquet").to_pylist()
    marks = [
        row
        | (
            failed("not json")
            if n % 4 == 0
            else read_answer(
                Answer(json.dumps(dict.fromkeys(MARKS, 4 if row["success"] else 2) | {"reason": "<b>because</b>"}))
            )
        )
        for n, row in enumerate(rows)
    ]
    write(workspace, pa.Table.from_pylist(marks, schema=JUDGED), "evaluation", "judged.parquet", "0.parquet")
    summary = write_report(judged, workspace)
    shipped = next(found for found in summary.marks if found.model == "shipped")
    at = [m for m in marks if (m["model"], m["guidance_scale"], m["image_guidance_scale"]) == ("shipped", 4, 1.5)]
    given = [m["judge_quality"] for m in at if m["judge_status"] == "ok"]
    assert shipped.means["quality"].mean == pytest.approx(sum(given) / len(given))
    assert shipped.failed == len(at) - len(given) > 0
    text = read(workspace)
    Page(text)
    assert "What the judge says" in text and "a/judge" in text
    assert "&lt;b&gt;because" in text and "no marks: not json" in text


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


@pytest.fixture(scope="module")
def browser():
    """A real one, headless; one start for all its tests."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", *quiet], timeout=120_000
        )
        yield browser
        browser.close()


def look(browser, path, width: int, scheme: Literal["light", "dark"]) -> dict:
    """What the browser made of a page: requests, complaints, images that it could not show, sideways scrolling."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(
        """() => ({
            images: document.images.length,
            broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
            overflow: document.documentElement.scrollWidth - innerWidth,
            page: getComputedStyle(document.body).backgroundColor,
            ink: getComputedStyle(document.body).color,
        })"""
    )
    page.close()
    outside = [url for url in requests if url != path.as_uri() and not url.startswith("data:")]
    return found | {"outside": outside, "complaints": complaints}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_real_browser_shows_it_without_errors(recipe, workspace, browser, width, scheme):
    write_report(recipe, workspace)
    found = look(browser, Path(workspace.path("report.html")), width, scheme)
    assert not found["complaints"] and not found["outside"]
    assert found["images"] > 90
    assert found["broken"] == 0
    assert found["overflow"] <= 0, f"the page is {found['overflow']} px wider than a window of {width} px"
    paper, ink = (sum(map(int, re.findall(r"\d+", found[part])[:3])) for part in ("page", "ink"))
    assert (paper > ink) == (scheme == "light")


def test_the_browser_test_sees_what_is_wrong(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><img src='data:image/png;base64,AAAA' alt='x'><img src='http://127.0.0.1:9/x.png' alt='y'>"
        "<div style='width:2000px'>wide</div><script>console.error('oh')</script></body>"
    )
    found = look(browser, page, 390, "light")
    assert found["broken"] == 2 and found["overflow"] > 1000
    assert found["outside"] == ["http://127.0.0.1:9/x.png"] and "oh" in found["complaints"]


def test_one_value_of_a_scale_is_no_curve(recipe, workspace):
    sweep = {"guidance_scale": [4], "image_guidance_scale": [1.5]}
    single = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=sweep)})
    summary = write_report(single, workspace)
    assert summary.image_guidance == summary.text_guidance == []
    one = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"guidance_scale": [4]})})
    assert len(write_report(one, workspace).image_guidance) == 2
    summary = write_report(single, workspace)
    assert "Do the scales do" not in read(workspace) and "The two guidance scales" in read(workspace)

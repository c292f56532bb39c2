"""The page in a real browser against the real service with the shipped editor, clicked through as people would."""

import json
import re
import shutil
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from ip2p import images
from ip2p.cli import read_recipe
from ip2p.miniature.instructions import parse_instruction
from ip2p.miniature.language import parse_caption
from ip2p.miniature.oracle import read_scenes
from ip2p.miniature.render import render
from ip2p.workspace import Workspace
from serve.feedback import image_id
from serve.routers.page import STATIC
from tests.serve.conftest import TOKEN, make_key, saved, served

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
CAPTION = "a large red circle in the top left and a small yellow star in the bottom right, on a teal background"
TEAL, PINK = (38, 184, 184), (255, 143, 186)
SCRIPT = STATIC / "page.js"

expect.set_options(timeout=120_000)  # the cores may be busy


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def address(workspace, local_ray):
    key = make_key("page", TOKEN, edits_per_minute=100_000)
    with served(read_recipe("recipes/miniature.yaml"), workspace, [key]) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the page is not tested: there is no chromium here (on Debian: apt-get install chromium)")
    return path


@pytest.fixture(scope="module")
def browser(chromium, address):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page. At the end no error may have been logged, and no other host contacted.

    `refused`: whether the browser may log that a request was rejected or did not arrive.
    """
    contexts, problems = [], []

    def visit(key: str | None = TOKEN, refused: bool = False, **options) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('key', {json.dumps(key)})")
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _note(message, refused, problems))
        page.on("request", lambda request: _is_ours(request.url, address) or problems.append(request.url))
        page.goto(address)
        if key is not None:
            expect(page.locator("#model")).to_contain_text("shipped")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems, problems


def _note(message, refused: bool, problems: list[str]) -> None:
    if message.type in ("error", "warning") and not (refused and "Failed to load resource" in message.text):
        problems.append(message.text)


def _is_ours(url: str, address: str) -> bool:
    return url.startswith((f"{address}/", "data:", f"blob:{address}/"))


def start_from_example(page: Page, number: int = 0, **fields) -> None:
    page.locator(".example").nth(number).click()
    expect(page.locator("#before")).to_be_visible()
    set_fields(page, **fields)


def set_fields(page: Page, **fields) -> None:
    """Sliders by their arrow keys would take hundreds of presses: set as a drag sets them."""
    page.locator("#more").evaluate("more => { more.open = true }")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))


def edit(page: Page, instruction: str) -> None:
    edits = page.locator("#strip li").count()
    page.locator("#instruction").fill(instruction)
    page.locator("#instruction").press("Enter")
    expect(page.locator("#strip li")).to_have_count(edits + 1)
    expect(page.locator("#result")).to_be_visible()


def downloaded(page: Page) -> np.ndarray:
    with page.expect_download() as download:
        page.locator("#save").click()
    return images.decode(download.value.path().read_bytes())


def shown(page: Page, x: float) -> np.ndarray:
    """The colour on the screen at `x` (0 to 1) of the picture, below its middle, where the scenes are empty."""
    screen = images.decode(page.locator("#pair").screenshot())
    height, width = screen.shape[:2]
    return screen[round(0.62 * height), min(width - 4, max(3, round(x * width)))].astype(int)


def alike(colour: np.ndarray, expected: tuple[int, int, int]) -> bool:
    return bool(np.abs(colour - expected).max() < 40)


def current(page: Page) -> str:
    return page.locator("#strip [aria-current=true]").inner_text()


def at(page: Page) -> str:
    return page.locator("#pair").evaluate("pair => pair.style.getPropertyValue('--at')")


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ---- without a browser


def test_examples_are_rendered_scenes_with_valid_instructions():
    text = SCRIPT.read_text()
    examples = re.findall(r'\{caption: "(.+?)",\s+instructions: (\[.+?\]),\s+png: "(.+?)"\}', text)
    assert len(examples) == 5 == text.count("caption: ")
    for caption, instructions, png in examples:
        scene = parse_caption(caption)
        assert np.array_equal(render(scene), images.decode(b64decode(png)))
        for instruction in json.loads(instructions):
            parse_instruction(instruction, scene)


# ---- clicking through


def test_picture_is_edited_previewed_compared_and_downloaded(visit, tmp_path):
    page = visit()
    file = tmp_path / "scene.png"
    file.write_bytes(images.encode(render(parse_caption(CAPTION))))
    page.locator("#file").set_input_files(file)
    expect(page.locator("#before")).to_be_visible()
    page.evaluate("""() => {
        window.seen = [];
        const after = document.getElementById("after"), bar = document.getElementById("bar");
        const observer = new MutationObserver(() => window.seen.push([after.src.slice(0, 5), bar.value]));
        observer.observe(after, {attributeFilter: ["src"]});
        observer.observe(bar, {attributeFilter: ["value"]});
    }""")
    set_fields(page, seed=1)
    edit(page, "make the background pink")
    seen = page.evaluate("window.seen")
    assert {step for _, step in seen} & set(range(1, 16)), "no progress was shown"
    assert "data:" in {start for start, _ in seen}, "no preview was shown"
    expect(page.locator("#status")).to_contain_text("Seed 1")

    compare = page.locator("#compare")
    assert alike(shown(page, 0.1), TEAL) and alike(shown(page, 0.9), PINK)
    compare.focus()
    compare.press("ArrowLeft")
    assert at(page) == "49%"
    compare.press("Home")
    assert alike(shown(page, 0.1), PINK)
    compare.press("End")
    assert alike(shown(page, 0.9), TEAL)
    box = page.locator("#pair").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 80)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 80)
    assert at(page) == "25%", "it follows the pointer while that is down"

    (reading,) = read_scenes(downloaded(page)[None])
    assert reading.scene is not None and reading.scene.background == "pink"


def test_grid_is_one_request_and_a_cell_sets_its_scales(visit):
    page = visit()
    requests = []
    page.on("request", lambda request: request.method == "POST" and requests.append(request.post_data_json))
    start_from_example(page, seed=5, num_inference_steps=4, image_guidance_scale=2, guidance_scale=4)
    page.locator("#instruction").fill("make it night")
    page.locator("#grid_side").select_option("3")
    page.locator("#make_grid").click()
    expect(page.locator(".cell img")).to_have_count(9)
    (request,) = requests
    scales = [(one["image_guidance_scale"], one["guidance_scale"]) for one in request["edits"]]
    assert scales == [(s_I, s_T) for s_I in (1.5, 2, 2.5) for s_T in (2, 4, 6)]
    assert {one["seed"] for one in request["edits"]} == {5}
    assert page.locator("#strip li").count() == 1, "history has what was chosen"

    page.locator(".cell").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):  # the edge holds
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#result")).to_be_visible()
    assert page.locator("#image_guidance_scale").input_value() == "2"
    assert page.locator("#guidance_scale").input_value() == "6"
    assert current(page) == "make it night"
    page.locator(".cell").first.click()
    expect(page.locator("#strip li")).to_have_count(3)
    assert page.locator("#guidance_scale_value").inner_text() == "2.0"


def test_edits_are_chained_undone_redone_and_rated(visit, workspace):
    page = visit()
    start_from_example(page, seed=1)
    edit(page, "make the background pink")
    first = downloaded(page)
    edit(page, "remove the star")
    assert current(page) == "remove the star"
    expect(page.locator("#before")).to_have_attribute("alt", "the picture")  # another edit of the same picture

    page.locator("#undo").click()
    assert current(page) == "original"
    expect(page.locator("#undo")).to_have_attribute("aria-disabled", "true")
    page.locator("#strip button").nth(1).click()
    page.locator("#further").click()
    edit(page, "make it night")
    expect(page.locator("#before")).to_have_attribute("alt", "after “make the background pink”")
    page.locator("#up").click()
    expect(page.locator("#up")).to_have_attribute("aria-pressed", "true")
    (row,) = workspace.read_table("feedback").to_pylist()
    assert (row["choice"], row["instruction"], row["seed"]) == ("up", "make it night", 1)
    assert row["source_id"] == image_id(first), "the second edit is of the first one's result"
    assert row["result_id"] == image_id(downloaded(page))

    page.locator("#history_title").click()  # out of any text field, where Ctrl+Z is the browser's
    for key, shows in (("Control+z", "background"), ("Control+z", "original"), ("Control+Shift+z", "background"),
                       ("Control+y", "night")):  # fmt: skip
        page.keyboard.press(key)
        assert shows in current(page)
    expect(page.locator("#up")).to_have_attribute("aria-pressed", "true")
    page.locator("#down").click()
    expect(page.locator("#down")).to_have_attribute("aria-pressed", "true")
    rows = sorted(workspace.read_table("feedback").to_pylist(), key=lambda row: row["time"])
    assert [row["choice"] for row in rows] == ["down"], "the later opinion of an edit replaces the earlier"
    assert page.locator("#strip li").count() == 4, "nothing is forgotten"


def test_settings_of_an_edit_reproduce_it(visit):
    page = visit()
    start_from_example(page, num_inference_steps=4)
    edit(page, "add fog")
    drawn = downloaded(page)
    page.locator("#reset").click()
    page.locator("#instruction").fill("something else")
    page.locator("#reuse").click()
    assert page.locator("#instruction").input_value() == "add fog"
    assert page.locator("#num_inference_steps").input_value() == "4"
    edit(page, page.locator("#instruction").input_value())
    assert np.array_equal(downloaded(page), drawn)


def test_errors_are_shown_at_their_field_and_lose_nothing(visit, tmp_path):
    page = visit(refused=True)
    page.locator("#go").click()
    expect(page.locator("#image_error")).to_contain_text("Choose a picture")
    expect(page.locator("#instruction_error")).to_contain_text("Describe the change")
    start_from_example(page)

    bad = tmp_path / "notes.png"
    bad.write_text("not a picture")
    page.locator("#file").set_input_files(bad)
    expect(page.locator("#image_error")).to_contain_text("“notes.png” can't be read as a picture")
    expect(page.locator("#before")).to_be_visible()

    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    moving = tmp_path / "moving.png"
    moving.write_bytes(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    page.locator("#file").set_input_files(moving)
    expect(page.locator("#strip li")).to_have_count(2)
    page.locator("#instruction").fill("make it night")
    page.locator("#go").click()
    expect(page.locator("#image_error")).to_contain_text("animat")

    set_fields(page, seed="-1")
    page.locator("#go").click()
    expect(page.locator("#seed_error")).to_contain_text("whole number")
    set_fields(page, seed="7")
    expect(page.locator("#seed_error")).to_be_empty()

    page.locator("#strip button").first.click()
    page.context.set_offline(True)
    page.locator("#go").click()
    expect(page.locator("#run_error")).to_contain_text("can't be reached. Nothing is lost")
    page.context.set_offline(False)
    assert page.locator("#instruction").input_value() == "make it night"
    page.locator("#go").click()
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#run_error")).to_be_empty()


def test_running_edit_can_be_cancelled(visit):
    page = visit()
    start_from_example(page, num_inference_steps=100)
    page.locator("#instruction").fill("make it night")
    page.locator("#grid_side").select_option("5")
    page.locator("#make_grid").click()
    expect(page.locator("#steps")).to_contain_text("of 2500")
    page.locator("#instruction").press("Enter")
    expect(page.locator("#status")).to_contain_text("already running")
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("Nothing was changed")
    expect(page.locator("#working")).to_be_hidden()
    set_fields(page, num_inference_steps=2)
    edit(page, "make it night")


def test_key_is_asked_for_and_kept(visit):
    page = visit(key=None, refused=True)
    dialog = page.locator("#key_dialog")
    expect(dialog).to_be_visible()
    page.keyboard.type("nonsense")
    page.keyboard.press("Enter")
    expect(page.locator("#key_error")).to_contain_text("Unknown key")
    page.locator("#key").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_contain_text("shipped")
    page.reload()
    expect(page.locator("#model")).to_contain_text("shipped")
    assert not dialog.is_visible()


def test_page_works_by_keyboard_alone(visit):
    page = visit()

    def tab_to(target: str) -> Locator:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            if focused.count() and focused.evaluate("(element, target) => element.matches(target)", target):
                outlined = focused.evaluate("""element => {
                    const around = element.closest(".focus-inside") ?? element;
                    return getComputedStyle(around).outlineStyle !== "none";
                }""")
                assert outlined or target == "#compare", f"{target} has the focus, and nothing shows it"
                return focused
        raise AssertionError(f"Tab does not lead to {target}")

    tab_to("#file")
    tab_to(".example").press("Enter")
    expect(page.locator("#before")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("turn it into night")
    tab_to("#image_guidance_scale").press("ArrowRight")
    assert page.locator("#image_guidance_scale_value").inner_text() == "2.1"
    page.keyboard.press("Enter")  # from any field
    expect(page.locator("#result")).to_be_visible()
    for key in ("Shift+Tab", "Escape"):
        page.keyboard.press(key)
    page.locator("body").evaluate("() => document.activeElement.blur()")
    tab_to("#compare").press("ArrowRight")
    assert at(page) == "51%"
    tab_to("#further").press("Enter")
    expect(page.locator("#instruction")).to_be_focused()
    page.keyboard.type("add fog")
    page.keyboard.press("Enter")
    expect(page.locator("#strip li")).to_have_count(3)
    tab_to("#undo").press("Enter")
    assert current(page) == "turn it into night"
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()


def test_picture_can_be_dropped_and_pasted(visit):
    page = visit()
    examples = re.findall(r'png: "(.+?)"', SCRIPT.read_text())
    give = """([png, kind, submit]) => {
        const bytes = Uint8Array.from(atob(png), letter => letter.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "scene.png", {type: "image/png"}));
        const [Kind, field] = kind === "drop" ? [DragEvent, "dataTransfer"] : [ClipboardEvent, "clipboardData"];
        document.body.dispatchEvent(new Kind(kind, {[field]: data, bubbles: true, cancelable: true}));
        if (submit) document.getElementById("form").requestSubmit();
    }"""
    for count, kind in enumerate(("drop", "paste"), start=1):
        page.evaluate(give, [examples[count], kind, False])
        expect(page.locator("#strip li")).to_have_count(count)
        expect(page.locator("#before")).to_be_visible()
    page.locator("#instruction").fill("add fog")
    page.evaluate(give, [examples[0], "drop", True])  # who is quick gets the edit of the new picture
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#strip li")).to_have_count(4)
    before = page.locator("#strip li:nth-child(3) img").get_attribute("src")
    assert page.locator("#before").get_attribute("src") == before


def test_large_picture_is_scaled_down_and_other_format_is_sent_as_png(visit, tmp_path):
    page = visit()
    requests = []
    page.on("request", lambda request: request.method == "POST" and requests.append(request.post_data_json))
    large, odd = tmp_path / "large.jpg", tmp_path / "odd.bmp"
    large.write_bytes(saved(Image.new("RGB", (3000, 1500), "teal"), "JPEG"))
    odd.write_bytes(saved(Image.new("RGB", (64, 32), "pink"), "BMP"))
    for file, size in ((large, (1024, 2048)), (odd, (32, 64))):
        pictures = page.locator("#strip li").count()
        page.locator("#file").set_input_files(file)
        expect(page.locator("#strip li")).to_have_count(pictures + 1)
        set_fields(page, num_inference_steps=1)
        edit(page, "make it night")
        sent = images.decode(b64decode(requests[-1]["image"].partition(",")[2]))
        assert sent.shape[:2] == size == downloaded(page).shape[:2]


def test_page_fits_a_phone(visit):
    page = visit(**PHONE)
    assert no_sideways_scroll(page)
    start_from_example(page, num_inference_steps=2)
    edit(page, "add a large green triangle in the bottom left")
    page.locator("#make_grid").tap()
    expect(page.locator(".cell img")).to_have_count(16)
    assert no_sideways_scroll(page)
    small = page.locator("button:visible, .button:visible, select:visible, summary:visible").evaluate_all(
        "all => all.map(e => [e.id || e.textContent || e.className, e.getBoundingClientRect()])"
        ".filter(([, box]) => box.height < 44 || box.width < 44).map(([name]) => name)"
    )
    assert not small, f"too small for a finger: {small}"
    page.locator("#pair").scroll_into_view_if_needed()
    box = page.locator("#pair").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    assert at(page).startswith("25")
    assert alike(shown(page, 0.1), TEAL)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_in_light_and_dark(visit, scheme):
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    page.locator("#go").click()  # shows an error
    ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    for name in ("h1", "#model", ".hint", "#image_hint", "#image_error", "#go", "#make_grid", "label[for=instruction]"):
        colours = page.locator(name).evaluate("""element => {
            const colour = getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            return [colour, getComputedStyle(element).backgroundColor];
        }""")
        light, dark = sorted(map(luminance, colours), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, colours)
    assert page.locator("#go").evaluate("go => getComputedStyle(go).transitionDuration") == "0s"


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG defines it."""
    values = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))

"""The page in a real browser: no error, no request, filter, sort and player work, numbers are those of the tables."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest
from small_stage import CLASSES, EXPLAINERS, HOSTILE, METRICS, curves, make_stage, sample_name, value

import labn.report
from labn.report import RunInfo, read_stage, render, run_report

COUNT = 24
TIMEOUT = 300_000  # milliseconds; only a page that hangs ever waits so long
PICTURE = "#cards .card:first-child canvas.map[data-drawn]"
CHECKSUM = """canvas => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return data.reduce((sum, byte, place) => (sum + byte * (place % 9973 + 1)) % 2147483647, 0);
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("browser") / "run"
    made = make_stage(run_dir, COUNT)
    player = {"metric": "pid16", "patch": 16, "size": [64, 64]}
    info = RunInfo("run: test", run_dir, CLASSES, COUNT, {"test/accuracy": 0.9}, player=player)
    (made / "report.html").write_text(render(run_report(read_stage(made), info)), encoding="utf-8")
    return made


@pytest.fixture
def page(browser, folder):
    """An open report; afterwards nothing may have been complained about or asked for."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(TIMEOUT)
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto((folder / "report.html").as_uri())
    opened.wait_for_selector("html[data-ready]")
    yield opened
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [(folder / "report.html").as_uri()]
    opened.close()


def shown(page):
    return page.eval_on_selector_all("#cards .card", "cards => cards.map(card => Number(card.dataset.index))")


@pytest.mark.slow
def test_filter_by_class_prediction_and_name(page):
    assert shown(page) == list(range(20))
    page.click("#more")
    assert shown(page) == list(range(COUNT))
    page.select_option("#filter-class", "1")
    assert shown(page) == list(range(1, COUNT, 2))
    page.select_option("#filter-correct", "0")
    assert shown(page) == [i for i in range(1, COUNT, 2) if i % 3 == 0]
    assert page.inner_text("#status").startswith("4 of 24 pictures")
    page.fill("#filter-name", "alert(1)")
    assert shown(page) == [3]
    assert page.inner_text("#cards h3").startswith("</script>")
    assert page.title() == "run: test"


def test_sort_by_any_score(page):
    page.select_option("#sort-metric", "mass")
    page.select_option("#sort-method", "-lrp")
    expected = sorted(range(COUNT), key=lambda index: value("-lrp", "mass", index))
    assert shown(page) == expected[:20]
    page.select_option("#sort-order", "-1")
    assert shown(page) == expected[::-1][:20]
    first = page.inner_text("#cards .card:first-child figure[data-method='-lrp'] .score")
    assert first == f"{value('-lrp', 'mass', expected[-1]):.3f}"


def test_methods_can_be_hidden_and_maps_are_drawn(page):
    page.wait_for_selector(PICTURE)
    assert page.locator("#cards .card:first-child canvas.map").count() == len(EXPLAINERS)
    before = page.eval_on_selector(PICTURE, CHECKSUM)
    page.fill("#strength", "100")
    page.dispatch_event("#strength", "change")
    page.wait_for_selector(PICTURE)
    assert page.eval_on_selector(PICTURE, CHECKSUM) != before
    page.uncheck("#filter-methods input >> nth=0")
    assert page.locator("#cards .card:first-child canvas.map").count() == len(EXPLAINERS) - 1


def test_the_slider_changes_picture_and_number(page):
    _, insertion, deletion = curves("-lrp", 1)
    page.select_option("#player-card", "1")
    page.select_option("#player-method", "-lrp")
    seen = []
    for step in range(len(insertion)):
        page.focus("#player-step")
        if step:
            page.keyboard.press("ArrowRight")
        assert float(page.inner_text("#insertion-probability")) == pytest.approx(insertion[step], abs=6e-4)
        assert float(page.inner_text("#deletion-probability")) == pytest.approx(deletion[step], abs=6e-4)
        assert f"step {step} of 4" in page.get_attribute("#player-step", "aria-valuetext")
        for name in ("insertion", "deletion"):
            page.wait_for_selector(f"#player-{name}[data-step='{step}']")
        seen.append(tuple(page.eval_on_selector(f"#player-{name}", CHECKSUM) for name in ("insertion", "deletion")))
    # Patches move at points 0 to 3: the picture is whole, or gone, at the last two.
    assert all(a != b for a, b in pairwise(seen[:4]))
    assert seen[3] == seen[4]


def test_playing_ends_at_the_last_step(page):
    page.click("#player-play")
    page.wait_for_selector("#player-play[aria-pressed=false]")
    assert page.input_value("#player-step") == "4"


def test_a_card_leads_to_the_player_by_keyboard(page):
    page.locator("#cards .card").nth(3).get_by_role("button", name="Step through").press("Enter")
    assert HOSTILE.replace("\u2028", "")[:9] in page.inner_text("#player-status")
    assert page.evaluate("document.activeElement.id") == "player-step"


def test_lines_can_be_hidden(page):
    key = page.locator("#curves .key").first
    line = page.locator(f"#curves [data-series='{EXPLAINERS[0]}']").first
    assert line.is_visible()
    key.click()
    assert not line.is_visible()
    assert key.get_attribute("aria-pressed") == "false"


def test_shown_numbers_are_those_of_the_tables(page, folder):
    with open(folder / "summary.csv", newline="") as file:
        rows = {(r["explainer"], r["metric"]): r for r in csv.DictReader(file)}
    for place, explainer in enumerate(EXPLAINERS):
        cells = page.locator(f"#summary-table tbody tr:nth-child({place + 1}) td").all_inner_texts()
        numbers = [[float(rows[explainer, m][c]) for c in ("mean", "ci_low", "ci_high")] for m in METRICS]
        words = [cell.replace("●", "").replace("best:", "").split() for cell in cells]
        n = ["n", str(COUNT)]
        assert words == [[f"{mean:.3f}", f"[{low:.3f},", f"{high:.3f}]", *n] for mean, low, high in numbers]
    card = page.locator("#cards .card").nth(2)
    card.locator("summary").click()
    card.locator("td").first.wait_for()  # rows are made when the card opens
    scores = card.locator("td").all_inner_texts()
    assert scores == [f"{value(explainer, metric, 2):.3f}" for explainer in EXPLAINERS for metric in METRICS]
    assert page.locator("#cards h3").nth(2).inner_text() == sample_name(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.5491, 0.5514, ["0.5491", "0.5514"]),
        (0, 1, ["0", "1"]),
        (-0.123, 0.123, ["-0.12", "0.12"]),
        (0, 0, ["0", "0"]),
        (3.9e-10, 0.000016, ["0", "1.6e-5"]),
        (-4.2e-7, 4.2e-7, ["-4.2e-7", "4.2e-7"]),
        (1.5, 1.5, ["1.5", "1.5"]),
    ],
)
def test_the_limits_of_a_map_are_told_apart(page, low, high, texts):
    source = (Path(labn.report.__file__).parent / "assets" / "data.js").read_text()
    function = source[source.index("const limitsOf") : source.index("};", source.index("const limitsOf")) + 2]
    assert page.evaluate(f"([low, high]) => {{ {function} return limitsOf({{ low, high }}); }}", [low, high]) == texts
    shown = page.eval_on_selector_all("#cards .limits", "bars => bars.map(bar => bar.innerText.split(/\\s+/))")
    assert len(shown) > 20
    assert all(len(set(found)) == len(found) for found in shown)


def test_many_maps_stay_inside_their_card_and_names_break_at_underscores(browser, folder, tmp_path):
    text = (folder / "report.html").read_text(encoding="utf-8")
    columns = f'"columns":{json.dumps(EXPLAINERS, separators=(",", ":"))}'
    assert columns in text
    names = [*EXPLAINERS, "integrated_gradients"]
    many = json.dumps([*names, *EXPLAINERS * 4], separators=(",", ":"))
    path = tmp_path / "report.html"
    path.write_text(text.replace(columns, f'"columns":{many}'), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    edge = page.eval_on_selector("#cards .card", "card => card.getBoundingClientRect().right")
    rights = "all => all.map(e => e.getBoundingClientRect().right)"
    assert max(page.eval_on_selector_all("#cards .card:first-child figure", rights)) <= edge
    name = page.locator("#cards .card:first-child figcaption b", has_text="integrated").first
    assert name.inner_html() == "integrated_<wbr>gradients"
    page.close()


def test_everything_has_a_name_for_screen_readers(page):
    page.wait_for_selector(PICTURE)
    nameless = """elements => elements.filter(e =>
        !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim() || e.ariaHidden)).length"""
    assert page.eval_on_selector_all("canvas, svg[role], input, select, button", nameless) == 0
    # Every place that the keyboard reaches to scroll says what it is.
    page.locator("#cards .card details summary").first.click()
    page.locator("#cards .card td").first.wait_for()
    unnamed = """all => all.filter(e => !(e.getAttribute("role") && (e.ariaLabel ||
        document.getElementById(e.getAttribute("aria-labelledby"))?.textContent))).length"""
    assert page.eval_on_selector_all(".scroll", unnamed) == 0
    assert page.eval_on_selector_all("table[aria-labelledby]", unnamed.replace('e.getAttribute("role") && ', "")) == 0
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(e => Number(e.tagName[1]))")
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_the_names_of_the_rows_stay_in_sight_while_a_table_is_scrolled(browser, folder):
    page = browser.new_page(viewport={"width": 200, "height": 800})
    page.set_default_timeout(TIMEOUT)
    page.goto((folder / "report.html").as_uri())
    places = """table => {
      table.parentElement.scrollLeft = 80;
      return [table.parentElement, table.querySelector("tbody th")].map((e) => e.getBoundingClientRect().left);
    }"""
    region, name = page.eval_on_selector("#summary-table", places)
    assert page.eval_on_selector("#summary-table", "table => table.parentElement.scrollLeft") > 0
    assert name == region
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_both_schemes_are_readable_and_nothing_sticks_out(browser, folder, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(TIMEOUT)
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    contrast = """() => {
      const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
      const page = light(getComputedStyle(document.body).backgroundColor);
      const texts = "h1, td .mean, td .small, .reading, dt, #status, .wrong, .caption, .about";
      return [...document.querySelectorAll(texts)].map((e) => {
        const ink = light(getComputedStyle(e).color);
        return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
      });
    }"""
    # WCAG 2.2, success criterion 1.4.3.
    assert min(page.evaluate(contrast)) >= 4.5
    edges = page.eval_on_selector_all(
        ".caption, .meanings dd, .about",
        "all => all.filter(e => e.offsetParent).map(e => e.getBoundingClientRect().right)",
    )
    assert len(edges) > 5
    assert max(edges) <= width
    page.close()

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import pytest
from matplotlib.figure import Figure
from report_example import BEFORE, full, model, small, with_seeds

from palimpsest.report.differences import differences
from palimpsest.report.evidence import Answer, Evidence
from palimpsest.report.groups import compare
from palimpsest.report.notes import told
from palimpsest.report.page import render, write
from palimpsest.report.plots import label_points, styles

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags, self.loads = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, text in attrs:
            if name == "id":
                self.ids.append(text)
            if name in ("src", "href", "srcset", "action", "data") or name.endswith(":href"):
                self.loads.append(text)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_the_page_has_its_sections_in_order_and_is_well_formed():
    page = render(full())
    reader = read(page)
    order = ["verdict", "h-table", "h-plots", "h-answers", "h-weights", "h-told", "h-cost", "h-caveats", "h-origin"]
    assert [name for name in reader.ids if name in order] == order
    assert len(reader.ids) == len(set(reader.ids))
    assert page.count('<svg class="plot"') == 10
    assert page.count('role="img" aria-label=') >= 10
    assert "more</summary>" in page


def test_what_a_method_noted_is_shown_as_words_curves_and_maps():
    (one,) = told(compare(full()))
    assert one.group.name == "npo"
    assert one.warnings == ("the template answers were hardly learned",)
    assert one.figures == (("share selected, attention", "0.012"), ("share selected, mlp", "0.034"))
    assert [name for name, _ in one.drawings] == ["affinity", "probability"]
    assert "the largest, 1, is in row 0, column 0" in one.drawings[0][1]
    assert "forget: from 0.9 to 0.151; template: from 0.1 to 0.474" in one.drawings[1][1]


def test_a_page_without_notes_has_no_section_for_them():
    assert "h-told" not in render(small())


def test_nothing_is_loaded_from_elsewhere():
    page = render(full())
    assert not re.search(r"https?://", page)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    assert all(target.startswith("#") or target == "data:," for target in read(page).loads)
    assert "@import" not in page
    assert "<script" not in page


def test_text_of_the_evidence_is_escaped_everywhere():
    nasty = "<script>alert(1)</script>\"'&"
    answers = (Answer(role="forget", prompt=nasty, reference=nasty, answer=nasty),)
    models = [
        dataclasses.replace(one, title=f"{one.title} {nasty}", answers=answers, fidelity=nasty, settings={nasty: nasty})
        for one in full().models
    ]
    data = dataclasses.replace(full().data, source=nasty)
    evidence = dataclasses.replace(
        full(), models=tuple(models), data=data, command=nasty, title=nasty, question=nasty, machine=nasty
    )
    page = render(evidence)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    read(page)


def test_mathematics_marks_in_a_title_are_plain_text():
    models = tuple(dataclasses.replace(one, title=f"{one.title} $\\frac$ _x_") for one in full().models)
    read(render(dataclasses.replace(full(), models=models)))


@pytest.mark.parametrize("part", ["before", "erased", "gold", "control"])
def test_any_part_may_be_missing(part):
    kept = tuple(one for one in full().models if one.part != part)
    read(render(dataclasses.replace(full(), models=kept)))


def test_any_probe_may_have_failed():
    for lost in ("rouge-recall", "model-utility", "truth-ratio", "relearning"):
        models = [
            dataclasses.replace(one, readings=tuple(r for r in one.readings if r.probe != lost))
            for one in full().models
        ]
        page = render(dataclasses.replace(full(), models=tuple(models)))
        read(page)
        if lost == "relearning":
            assert "No relearning attack was run." in page
        if lost == "model-utility":
            assert page.count("Needs model utility") == 2


def test_an_empty_page_says_what_is_missing():
    page = render(Evidence(title="Empty", models=()))
    read(page)
    for words in ("could not be measured", "Nothing was measured", "No answers were recorded", "No cost was recorded"):
        assert words in page
    assert "Without any reading: Before" in render(Evidence(title="t", models=(model("before", {}),)))


def test_failures_samples_fidelity_and_blind_spots_are_caveats():
    page = render(full())
    assert "IdkDPO, seed 0: the probe gradient-norm failed (out of memory)." in page
    assert "n = 20, fewer than 30" in page
    assert "reference likelihoods are computed once before training" in page
    assert "ROUGE-L compares wording" in page
    assert "no model that never saw the erased records" in render(small(gold={}))


def test_seeds_are_aggregated_and_said():
    page = render(with_seeds(full(), (-0.01, 0.0, 0.01)))
    assert "means over 3 seeds" in page
    assert page.count('<th scope="col" class="erased judged">') == 1


def test_the_same_evidence_gives_the_same_page_and_no_global_state():
    before = dict(matplotlib.rcParams)
    assert render(full()) == render(full())
    assert dict(matplotlib.rcParams) == before


def test_a_model_has_one_colour_everywhere():
    sides = compare(full())
    found = styles(sides)
    assert len(set(found.values())) == len(sides.all())
    assert found["before"][0] == "--before"
    assert found["gold"][0] == "--gold"
    assert styles(compare(dataclasses.replace(full(), default="idk-dpo"))) == found


def test_labels_of_crowded_points_do_not_cover_each_other():
    axes = Figure(figsize=(5, 3.8)).add_subplot()
    points = [(0.60 + 0.001 * i, 0.30 + 0.002 * (i % 3), f"Method number {i}") for i in range(6)]
    axes.scatter(*zip(*[point[:2] for point in points], strict=True))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    boxes = [text.get_window_extent() for text in label_points(axes, points)]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert not overlaps


@pytest.mark.parametrize(
    ("before", "after"),
    [("born in Lisbon in 1950.", "born in Madrid in 1950"), ("", "new"), ("  two  spaces\n", "two spaces"), ("a", "")],
)
def test_differences_give_back_both_texts(before, after):
    old, new = differences(before, after)
    assert ("".join(text for text, _ in old), "".join(text for text, _ in new)) == (before, after)


def test_only_words_that_differ_are_marked():
    old, new = differences("Born in Lisbon, in 1950.", "born in Madrid, in 1950")
    assert [text for text, differs in old if differs] == ["Lisbon,"]
    assert [text for text, differs in new if differs] == ["Madrid,"]


def test_writing_replaces_the_page(tmp_path):
    path = write(small(), tmp_path / "out" / "report.html")
    assert write(full(), path).read_text(encoding="utf-8") == render(full())
    assert list(path.parent.iterdir()) == [path]


def test_a_wrecked_perplexity_that_is_not_finite_still_renders():
    read(render(small({**BEFORE, "perplexity/general": float("nan"), "forget_quality": 0.0})))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, folder, width=1280):
    """Console lines, and the addresses that the page itself asked for: what Chromium asks for has no origin."""
    log = folder / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--window-size={width},1400",
        f"--screenshot={folder / 'shot.png'}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (folder / "shot.png").stat().st_size > 1_000, done.stderr
    params = [event.get("params", {}) for event in json.loads(log.read_text(errors="replace"))["events"]]
    asked = [(one["initiator"], one["url"]) for one in params if "initiator" in one and "url" in one]
    remote = [url for origin, url in asked if origin != "not an origin" and not url.startswith(("file:", "data:"))]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], remote


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_console_error_or_request(tmp_path, width):
    assert browse(write(full(), tmp_path / "report.html"), tmp_path, width) == ([], [])


@pytest.mark.browser
@needs_chromium
def test_the_browser_check_would_notice(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:8765/x.png"><script>console.error("seen")</script>')
    console, asked = browse(page, tmp_path)
    assert any("seen" in line for line in console)
    assert set(asked) == {"http://127.0.0.1:8765/x.png"}

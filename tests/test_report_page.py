"""The page: what it says of a record, and what of one that holds little, much, or something evil."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from conftest import TINY
from PIL import Image
from test_plots import cut, layer, layers, timeline
from training import build_trainer, config

from hf_compressm import CompreSSMCallback, Record
from hf_compressm.record import RECORD_FILE
from hf_compressm.report_page import write_report_page

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would find: elements, attributes, and the text outside of pictures."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.elements, self.open, self.words = [], [], []
        self.feed(self.source)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"svg", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def headings(self):
        return [tag for tag, _ in self.elements if re.fullmatch("h[1-6]", tag)]

    @property
    def pictures(self):
        return [attributes["aria-label"] for attributes in self.all("svg")]


def report(directory, *cuts, **more):
    Record(list(cuts), **more).save(directory)
    return Page(write_report_page(directory))


def skipped(**more):
    return {"status": "skipped", "step": 50, "scheduled_step": 50, "reason": "too few"} | more


FULL = {
    "step": 100,
    "tokens": 4096,
    "parameters_before": 1000,
    "parameters_after": 600,
    "optimizer_bytes_before": 8192,
    "optimizer_bytes_after": 4096,
    "state_bytes_before": 2048,
    "state_bytes_after": 1024,
    "seconds": {"measure": 0.5, "apply": 0.25},
    "loss_before": 1.25,
    "loss_after": 1.5,
    "kl_divergence": 2e-3,
    "config": {"state_size": 4, "schedule": [100]},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A record that holds everything; the page, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("full")
    entries = timeline()
    for entry in entries:
        entry["step_seconds"] = {0: 0.6, 1: 0.4, 2: 0.1, 3: 0.05}[(entry["step"] - 1) // 50]
    details = {"status": "cut", "criterion": "refit", "refit": "mean field", "realization": "stock"}
    page = report(
        folder,
        skipped(),
        cut(layer("layers.0.mixer", **details), layer("layers.1.mixer", relative_error=0.125, **details), **FULL),
        cut(*layers(1), step=150, status="taken back", metric="eval_loss", metric_before=1.0, metric_after=2.0),
        versions={"torch": "2.13"},
        run={"base_model": "me/model", "seed": 7, "steps": 200, "command": "python train.py --fast"},
        machine="a fine machine",
        timeline=entries,
        evaluations={"uncut": {"loss": 1.5, "accuracy": 0.75}, "healed": {"loss": 1.25}},
        criteria={"refit": [1.0, 0.5, 0.1, 0.05, 0.02, 0, 0, 0, 0], "ghost": [1.0] * 9},
    )
    return page, folder


@pytest.mark.parametrize(
    "words",
    [
        "State size 8 → 4",
        "The state of 2 Mamba layers was cut after step 100 of 200.",
        "A training step takes 75 ms instead of 500 ms: 6.7 times faster.",
        "parameters 1,000 → 600 −40%",
        "recurrent state of one sequence 2.0 → 1.0 KiB −50%",
        "optimizer's state 8.0 → 4.0 KiB",
        "largest relative error of a layer 12.50%",
        "1.2500 → 1.5000",
        "2.0e-03 nats",
        "750 ms",
        "metric uncut healed loss, nats 1.5000 1.2500 accuracy 0.7500 –",
        "layers.1.mixer 8 → 4 0.0625 0.1250 stock refit mean field",
        "Step 50, skipped : too few",
        "Step 150, taken back (N 8 → 4) : eval_loss was 1.0000 before the cut and 2.0000 after it",
        "base model me/model seed 7 training steps 200 machine a fine machine versions torch 2.13",
        "python train.py --fast",
        '"schedule": [ 100 ]',
    ],
)
def test_what_the_page_says(full, words):
    assert words in full[0].text


def test_its_pictures_lie_beside_it_and_are_described(full):
    page, folder = full
    files = {file.name for file in (folder / "report_pictures").iterdir()}
    assert files == {
        *("spectrum_1.png", "loss_around_cut_1.png", "criteria.png"),
        *("state_size.png", "loss.png", "step_time.png", "memory.png"),
    }
    assert all(Image.open(folder / "report_pictures" / file).size[0] > 800 for file in files)
    assert len(page.pictures) == len(files) and all(len(label) > 40 for label in page.pictures)
    assert any("8 at its beginning, 4 at its end" in label for label in page.pictures)
    assert any("600 ms at its beginning, 50 ms at its end" in label for label in page.pictures)
    assert any("at most 12.50%" in label for label in page.pictures)
    assert any("With 4 states: refit 0.0200, ghost 1.0000" in label for label in page.pictures)
    # Their text is of the page's color, which is another one on a dark ground.
    assert "currentColor" in page.source and "#1c2127" not in page.source.split("</style>")[1]


def test_it_is_a_page_for_everybody(full):
    page, _ = full
    assert page.all("html")[0]["lang"] == "en" and len(page.all("title")) == 1
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    levels = [int(heading[1]) for heading in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source
    ids = [attributes["id"] for tag, attributes in page.elements if "id" in attributes and tag in ("p", "table", "g")]
    assert len(ids) == len(set(ids)) and all(table["aria-labelledby"] in ids for table in page.all("table"))


def loaded(page):
    """What a browser would fetch, or run."""
    names = {"src", "srcset", "data", "action", "background", "poster"}
    fetched = [
        value
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in names or (name in ("href", "xlink:href") and tag != "a")
    ]
    outside = [value for value in fetched if not value.startswith(("#", "data:"))]
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    return [
        *outside,
        *handlers,
        *page.all("script"),
        *page.all("iframe"),
        *re.findall(r"url\((?!#|\"#|'#)", page.source),
    ]


def test_it_loads_nothing(full):
    assert not loaded(full[0])
    (policy,) = [meta["content"] for meta in full[0].all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def test_nothing_in_a_record_is_run(tmp_path):
    evil_layer = layer(EVIL, criterion=EVIL, refit=EVIL, realization=EVIL)
    page = report(
        tmp_path,
        cut(evil_layer, layer(EVIL + "2"), config={EVIL: EVIL}, tokens=EVIL, loss_before=EVIL, seconds={EVIL: EVIL}),
        skipped(reason=EVIL),
        cut(evil_layer, status=EVIL),
        versions={EVIL: EVIL},
        run={EVIL: EVIL, "command": EVIL, "steps": EVIL, "base_model": {EVIL: EVIL}},
        machine=EVIL,
        timeline=[{"step": 1, "loss": EVIL}, *timeline()],
        evaluations={EVIL: {EVIL: EVIL}},
        criteria={EVIL: [1, 0.5, EVIL]},
    )
    assert not loaded(page) and not page.all("img") and len(page.all("title")) == 1
    assert EVIL in page.text and "49" not in page.text


SECTIONS = ["Before and after", "Over the training", "Criteria side by side", "did not stay", "How it was made"]


@pytest.mark.parametrize(
    "cuts, headline, pictures",
    [
        ([], "Nothing was cut", 0),
        ([skipped()], "Nothing was cut", 0),
        ([skipped(), cut(*layers(1), status="undone by loading")], "Nothing was cut", 0),
        ([cut(*layers(1), step=None)], "State size 8 → 4", 1),
        ([cut(*layers(3, after=(2, 5)))], "State size 8 → 2–5", 1),
        ([cut(*layers(2, before=16, after=(8,)), step=10), cut(*layers(2), step=20)], "State size 16 → 4", 2),
        ([cut(layer(before=1, after=1, curve=[0, 0], relative_error=0))], "State size 1 → 1", 1),
    ],
)
def test_what_a_record_does_not_hold_is_left_out(cuts, headline, pictures, tmp_path):
    page = report(tmp_path, *cuts)
    assert f"{headline} ·" in page.text and len(page.pictures) == pictures
    others = any(entry["status"] != "cut" for entry in cuts)
    assert [name for name in SECTIONS if name in page.text] == (["did not stay"] if others else [])
    assert "None" not in page.text and "nan" not in page.text and "–%" not in page.text


def test_many_layers_and_many_cuts(tmp_path):
    page = report(tmp_path, *[cut(*layers(64, 256, (16, 24)), step=step) for step in (100, 200)])
    assert len(page.all("tr")) == 2 * 65
    long = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll long"]
    assert len(long) == 2 and all(attributes["tabindex"] == "0" for attributes in long)


def test_a_timeline_with_gaps(tmp_path):
    entries = [{"step": 1}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5, "step_seconds": 0.1}]
    page = report(tmp_path, cut(*layers(1), step=2), timeline=entries)
    assert "faster" not in page.text and "slower" not in page.text
    assert sum("over the training" in label for label in page.pictures) == 1


def test_a_page_elsewhere_replaces_an_older_one(tmp_path):
    Record([skipped()]).save(tmp_path)
    output = tmp_path / "new" / "page.html"
    assert write_report_page(tmp_path, output) == output and "too few" in output.read_text(encoding="utf-8")
    Record([cut(*layers(1))]).save(tmp_path)
    write_report_page(str(tmp_path), str(output))
    assert "too few" not in output.read_text(encoding="utf-8")
    assert (tmp_path / "new" / "page_pictures" / "spectrum_1.png").exists()
    assert not (tmp_path / "report.html").exists()


def test_the_record_of_a_training_run(tmp_path):
    cutter = CompreSSMCallback(config())
    trainer = build_trainer(TINY["mamba"].build(num_hidden_layers=1), tmp_path, [cutter], max_steps=4)
    trainer.train()
    page = report(tmp_path, *json.loads(json.dumps(cutter.history)))
    assert "State size 8 → 4" in page.text and "after step 3" in page.text and "refit" in page.text


def test_no_record(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"compressm\.json does not exist.*save_pretrained"):
        write_report_page(tmp_path)


@pytest.mark.parametrize(
    "broken, words",
    [
        ("{", "not a record"),
        ({"cuts": [{"status": "cut"}]}, "cut 1: it lists no layers"),
        ({"cuts": [cut({"name": "a"})]}, "cut 1: a layer without name, state_size_before or state_size_after"),
        ({"cuts": [cut(layer() | {"state_size_after": "4"})]}, "cut 1: a layer without"),
        ({"cuts": [cut(layer() | {"error_curve": {}})]}, "error_curve"),
        ({"cuts": [cut("a layer")]}, "cut 1: a layer without"),
        ({"cuts": [cut(layer(), step="soon")]}, "its step is 'soon'"),
        ({"cuts": [cut(layer(), seconds=[1])]}, "its seconds"),
        ({"cuts": [], "timeline": [{"loss": 1}]}, "timeline: entry 1 has no step"),
        ({"cuts": [], "timeline": {}}, "timeline is not a list"),
        ({"cuts": [], "run": "a run"}, "run is not a dict"),
        ({"cuts": [], "evaluations": {"uncut": 1}}, "evaluations: 'uncut'"),
        ({"cuts": [], "criteria": {"refit": 1}}, "criteria: 'refit'"),
    ],
)
def test_a_broken_record_is_refused_and_nothing_is_written(broken, words, tmp_path):
    content = broken if isinstance(broken, str) else json.dumps({"format_version": 1} | broken)
    (tmp_path / RECORD_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(RECORD_FILE)) as refused:
        write_report_page(tmp_path)
    assert words in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_FILE]

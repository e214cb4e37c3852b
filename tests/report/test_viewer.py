"""The page to scroll through scans, in a real browser without a network."""

import base64
import gzip
import io
import json
import re

import browser
import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import tiny_run

from bhsd_jax.datasets import label_maps
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report import niivue, notebook, viewer

SPACING = (5.0, 2.0, 2.0)
CLASSES = ("IPH", "SDH")
NOTICE = "Research use only."

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium on the PATH")
needs_niivue = pytest.mark.skipif(not niivue.available(), reason="the extra `viewer` is missing")


@pytest.mark.parametrize(
    ("values", "kind"), [((0.0, 3.5), "f"), ((-1000.4, 1500.6), "i"), ((0.0, 200_000.0), "f")]
)
def test_intensities_stay_as_they_are_but_for_tenths_of_hu(values, kind):
    image = np.array(values, np.float32).reshape(1, 1, 2)
    found = viewer.compact(image)
    assert found.dtype.kind == kind
    np.testing.assert_allclose(found.astype(np.float32), image, atol=0.5)


def canonical(array):
    """[x y z] in RAS order to [D H W]: upwards, to the back, to the left."""
    return np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1, ::-1])


def shown(name, place, reference=None, seed=0, **more):
    """A head with a made-up bleed in a box [x y z]; x grows to the patient's right."""
    image = tiny_run.head(seed, (60, 70, 12))
    label = np.zeros(image.shape, np.uint8)
    label[place] = 2
    if reference is not None:
        other = np.zeros_like(label)
        other[reference] = 1
        reference = canonical(other)
    ml = {"SDH": float((label == 2).sum() * 0.02)}
    return viewer.Shown(name, canonical(image), SPACING, canonical(label), reference, ml, **more)


LEFT = np.s_[12:20, 30:44, 4:7]  # of the patient, slices 5 to 7 from below
SCANS = (
    shown("first", LEFT, np.s_[10:22, 30:44, 3:7], dice=0.8),
    shown("</script><b>second", np.s_[40:44, 30:36, 8:9], np.s_[41:44, 30:36, 8:9], 1, dice=0.2),
    shown("third", np.s_[20:22, 20:22, 2:3], None, 2, flags=("slices of 9 mm",), review=0.7),
)
PAGE = viewer.Viewer("made up: cps", "3 scans", NOTICE, CLASSES, scans=3)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "viewer.html"
    assert viewer.write(path, PAGE, SCANS) == 3
    return path


@pytest.fixture(scope="module")
def tab(page, tmp_path_factory):
    """The page, open."""
    with browser.Browser(tmp_path_factory.mktemp("profile"), (1000, 640)) as opened:
        opened.open(page.as_uri())
        opened.wait(READY)
        opened.evaluate(f"{SORT.format('Largest first')}.click()")
        opened.wait(READY)
        yield opened


SORT = "[...document.querySelectorAll('#sort button')].find((b) => b.textContent === '{}')"
STATE = 'JSON.parse(document.body?.dataset.state ?? "{}")'
READY = f"{STATE}.ready || {STATE}.fault"


def press(tab, *keys):
    for key in keys:
        tab.press(key)
        tab.wait(READY)
    return tab.evaluate(STATE)


def pixels(tab, box=None):
    """RGB 0 to 255 of what is shown, or of an element."""
    image = matplotlib.image.imread(io.BytesIO(tab.screenshot()))[..., :3] * 255
    if box is None:
        return image
    place = tab.evaluate(
        f"(({{left, top, right, bottom}}) => [left, top, right, bottom])"
        f"(document.getElementById({json.dumps(box)}).getBoundingClientRect())"
    )
    left, top, right, bottom = (int(value) for value in place)
    return image[top:bottom, left:right]


def colored(image, name):
    """Where the color of a class shines through."""
    rgb = np.array([int(viewer.colors([name])[0][at : at + 2], 16) for at in (1, 3, 5)], float)
    hue = image - image.mean(-1, keepdims=True)
    wanted = rgb - rgb.mean()
    length = np.linalg.norm(hue, axis=-1)
    cosine = (hue @ wanted) / (length * np.linalg.norm(wanted) + 1e-9)
    return (cosine > 0.98) & (length > 30)


def test_no_two_classes_have_one_color():
    """BLAST-CT's extra-axial bleeds were drawn like those in the ventricles."""
    organs = tuple(f"organ {number}" for number in range(104))
    for classes in (CLASSES, label_maps.PRESETS["blast-ct"][1:], ("edema", "IPH"), organs):
        found = viewer.colors(classes)
        assert len(set(found)) == len(found) == len(classes)
        assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in found)
    assert viewer.colors(("EDH", "IPH")) == viewer.colors(("IPH", "EDH"))[::-1]


@needs_niivue
def test_the_page_holds_everything_and_nothing_can_break_out_of_it(page):
    text = page.read_text().replace(niivue.module(), "")
    assert text.count("</script>") == text.count("<script") == 10
    assert "<b>second" not in text
    for word in ("https://", "http://"):
        loads = re.findall(rf'<(?:script|link|img)[^>]*(?:src|href)="{word}', text)
        assert not loads
    (packed,) = re.findall(r'<script id="image-0" type="text/plain">(.*?)</script>', text)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), tiny_run.head(0, (60, 70, 12)))
    assert image.header.get_zooms() == (2, 2, 5)
    assert not bytes(image.header["descrip"]).strip(b"\0")


@needs_niivue
@needs_browser
def test_a_bleed_on_the_patients_left_is_on_the_right_of_the_page(tab):
    state = press(tab, "b", "b", "1", "a")
    assert (state["case"], state["view"], state["window"]) == ("first", "axial", "Brain")
    image = pixels(tab, "pane-prediction")
    rows, columns = np.nonzero(colored(image, "SDH"))
    assert rows.size > 500
    assert columns.min() > image.shape[1] / 2, "R is on the left, as a radiologist looks at it"
    marks = "[...document.querySelectorAll('#pane-prediction .marks .side')]"
    found = tab.evaluate(f"{marks}.map((one) => [one.textContent, one.offsetLeft, one.offsetTop])")
    places = {text: (left, top) for text, left, top in found}
    assert places["R"][0] < places["L"][0]
    assert places["A"][1] < places["P"][1]
    assert state["places"]["prediction"][2] in (4, 5, 6), "it opens where most of the bleed is"


@needs_niivue
@needs_browser
def test_the_scale_bar_is_as_long_as_it_says(tab):
    press(tab, "a")
    bar = tab.evaluate(
        "((one) => [one.textContent, one.getBoundingClientRect().width])"
        "(document.querySelector('#pane-prediction .marks .bar'))"
    )
    image = pixels(tab, "pane-prediction")
    columns = np.nonzero(colored(image, "SDH"))[1]
    width = columns.max() - columns.min() + 1  # the bleed is 8 voxels of 2 mm wide
    centimeters = int(bar[0].split()[0])
    # The colors of the outermost voxels are blended with what is beside them.
    assert 16 * bar[1] / (10 * centimeters) == pytest.approx(width, abs=4)


@needs_niivue
@needs_browser
def test_keys_and_buttons_change_what_is_shown(tab):
    press(tab, "a", "1")
    if not tab.evaluate(STATE)["bleeds"]:
        press(tab, "b")
    whole = colored(pixels(tab, "pane-prediction"), "SDH").sum()
    assert press(tab, "b")["bleeds"] is False
    assert colored(pixels(tab, "pane-prediction"), "SDH").sum() == 0
    press(tab, "b")
    assert press(tab, "o")["outline"] is True
    assert 0 < colored(pixels(tab, "pane-prediction"), "SDH").sum() < 0.7 * whole
    press(tab, "o")
    gray = pixels(tab, "pane-prediction").mean()
    assert press(tab, "4")["window"] == "Bone"
    assert pixels(tab, "pane-prediction").mean() < gray - 5, "brain is dark in the bone window"
    press(tab, "1")
    buttons = "[...document.querySelectorAll('#bleeds button')]"
    tab.evaluate(f"{buttons}.find((one) => one.textContent === 'SDH').click()")
    assert colored(pixels(tab, "pane-prediction"), "SDH").sum() == 0
    tab.evaluate(f"{buttons}.find((one) => one.textContent === 'SDH').click()")
    before = tab.evaluate(STATE)["places"]["prediction"]
    after = press(tab, "ArrowUp")["places"]["prediction"]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 1]
    for key, view in (("c", "coronal"), ("s", "sagittal"), ("m", "all")):
        assert press(tab, key)["view"] == view
    sides = "[...document.querySelectorAll('#pane-prediction .marks .side')]"
    assert len(tab.evaluate(f"{sides}.map((one) => one.textContent)")) == 12


@needs_niivue
@needs_browser
def test_the_reference_is_beside_the_prediction_and_moves_with_it(tab):
    state = press(tab, "a")
    assert state["case"] == "first"
    assert tab.evaluate("document.getElementById('pane-reference').hidden") is False
    assert colored(pixels(tab, "pane-reference"), "IPH").sum() > 500
    assert colored(pixels(tab, "pane-prediction"), "IPH").sum() == 0
    place = tab.evaluate(
        "((r) => [(r.left + r.right) / 2, (r.top + r.bottom) / 2])"
        "(document.getElementById('pane-reference').getBoundingClientRect())"
    )
    before = state["places"]
    wheel = {"x": place[0], "y": place[1], "deltaX": 0, "deltaY": 120}
    tab.call("Input.dispatchMouseEvent", type="mouseWheel", **wheel)
    moved = f"{STATE}.places.prediction[2] !== {before['prediction'][2]}"
    tab.wait(moved)
    places = tab.evaluate(STATE)["places"]
    assert places["reference"] == places["prediction"]
    assert press(tab, "r")["beside"] is False
    assert tab.evaluate("document.getElementById('pane-reference').hidden") is True
    press(tab, "r", "f")


@needs_niivue
@needs_browser
def test_scans_are_listed_in_the_order_asked_for(tab):
    names = "[...document.querySelectorAll('#cases .name')].map((one) => one.textContent)"
    assert tab.evaluate(names) == ["first", "</script><b>second", "third"]
    tab.evaluate(f"{SORT.format('By name')}.click()")
    tab.wait(READY)
    assert tab.evaluate(names) == ["</script><b>second", "first", "third"]
    tab.evaluate(f"{SORT.format('Worst first')}.click()")
    tab.wait(READY)
    assert tab.evaluate(names)[0] == "</script><b>second"
    assert tab.evaluate(STATE)["case"] == "</script><b>second"
    state = press(tab, "ArrowRight", "ArrowRight")
    assert state["case"] == "third"
    assert tab.evaluate("document.getElementById('pane-reference').hidden") is True
    assert "slices of 9 mm" in tab.evaluate("document.getElementById('cases').textContent")
    tab.evaluate(f"{SORT.format('Review first')}.click()")
    tab.wait(READY)
    assert tab.evaluate(names)[0] == "third"
    tab.evaluate(f"{SORT.format('Largest first')}.click()")
    tab.wait(READY)


@needs_niivue
@needs_browser
def test_of_scans_asked_for_one_after_the_other_the_last_alone_is_shown(tab):
    press(tab, "ArrowLeft", "ArrowLeft")
    first = press(tab)["shown"]
    tab.evaluate(
        "['Right', 'Right', 'Left', 'Right'].forEach((key) => "
        "document.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: `Arrow${key}`, bubbles: true })))"
    )
    tab.wait(READY)
    state = tab.evaluate(STATE)
    assert state["case"] == "third"
    assert state["shown"] == ["2.nii", "prediction.nii"] != first
    press(tab, "ArrowLeft", "ArrowLeft")


@needs_niivue
@needs_browser
def test_it_asks_for_nothing_and_complains_of_nothing(tab, page):
    press(tab, "m")
    assert tab.errors() == []
    asked = [url for url in tab.requests() if not url.startswith("data:")]
    assert set(asked) == {page.as_uri()}


@needs_niivue
def test_a_page_that_gets_too_large_has_the_first_scans_and_says_so(tmp_path):
    count = viewer.write(tmp_path / "viewer.html", PAGE, iter(SCANS), most_mb=0.01)
    assert count == 1
    assert "3 scans; 1 of them are on this page" in (tmp_path / "viewer.html").read_text()


def test_without_the_extra_one_line_says_which(monkeypatch, tmp_path):
    niivue.module.cache_clear()
    monkeypatch.setattr(niivue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install the extra `viewer`, in the repository"):
        viewer.write(tmp_path / "viewer.html", PAGE, SCANS)
    assert not list(tmp_path.iterdir())


def test_a_package_without_niivue_in_it_is_refused(monkeypatch, tmp_path):
    niivue.module.cache_clear()
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "widget.js").write_text('var o="' + "a" * 1_100_000 + '";')
    place = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(niivue.importlib.util, "find_spec", lambda name: place)
    with pytest.raises(UserError, match=r"widget\.js: holds no NiiVue.*ipyniivue 2\.4\.4"):
        niivue.module()
    niivue.module.cache_clear()


@needs_niivue
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ipywidgets
def test_the_notebooks_widget_holds_what_the_page_holds():
    found = notebook.widget(SCANS[0], PAGE)
    scan, bleeds = found.volumes
    assert (scan.cal_min, scan.cal_max) == (0, 80)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(bytes(scan.data)))
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), tiny_run.head(0, (60, 70, 12)))
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(bytes(bleeds.data)))
    assert (np.asanyarray(mask.dataobj)[LEFT] == 2).all()
    lut = np.asarray(bleeds.colormap_label.lut).reshape(-1, 4)
    assert lut[:3, 3].tolist() == [0, 255, 255]
    assert f"#{bytes(lut[2, :3].astype(np.uint8)).hex()}" == viewer.colors(PAGE.classes)[1]
    assert found.opts.is_radiological_convention

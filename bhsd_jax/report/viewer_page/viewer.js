// The page's own code; NiiVue's module stands above it in the same script, its names in scope.
{
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("page").textContent);
  const PLANES = { all: "All planes", axial: "Axial", coronal: "Coronal", sagittal: "Sagittal" };
  const SLICE = { axial: 0, coronal: 1, sagittal: 2 };
  const AXIS = { axial: 2, coronal: 1, sagittal: 0, all: 2 };
  const PANES = ["reference", "prediction"];
  // What stands at the left, the right, the top and the bottom of a plane: radiological convention.
  const SIDES = { 0: ["R", "L", "A", "P"], 1: ["R", "L", "S", "I"], 2: ["A", "P", "S", "I"] };
  const WIDE = [[0, 0, 0.62, 1], [0.63, 0, 0.37, 0.495], [0.63, 0.505, 0.37, 0.495]];
  const TALL = [[0, 0, 1, 0.63], [0, 0.64, 0.495, 0.36], [0.505, 0.64, 0.495, 0.36]];
  const state = {
    order: page.orders[0].key, index: 0, view: "all", window: page.windows[0].name,
    bleeds: true, off: [], outline: false, beside: true, ready: false,
  };
  const views = {};
  let loading = 0;

  const element = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const button = (parent, text, title, pressed, action) => {
    const made = element("button", text);
    made.title = title;
    made.type = "button";
    made.onclick = () => { action(); made.blur(); };
    made.refresh = () => {
      made.classList.toggle("on", pressed());
      made.setAttribute("aria-pressed", pressed());
    };
    $(parent).append(made);
    return made;
  };
  const ordered = () => {
    const { key, largest } = page.orders.find((one) => one.key === state.order);
    const sign = largest ? -1 : 1;
    const value = (one) => one[key] ?? (largest ? -Infinity : Infinity);
    return [...page.cases].sort((a, b) => sign * (value(a) - value(b)) || a.number - b.number);
  };
  const current = () => ordered()[state.index];
  const milliliters = (value) => `${value.toFixed(value < 10 ? 1 : 0)} mL`;

  const listCases = () => {
    $("cases").replaceChildren(...ordered().map((one, index) => {
      const item = element("li", undefined, index === state.index ? "on" : "");
      const top = element("div", undefined, "top");
      top.append(element("span", one.name, "name"), element("span", milliliters(one.total)));
      const bleeds = element("div", undefined, "bleeds");
      page.classes.forEach((kind) => {
        if (!one.ml[kind.name]) return;
        const text = element("span", `${kind.name} ${milliliters(one.ml[kind.name])}`);
        const chip = element("span", undefined, "chip");
        chip.style.background = kind.color;
        text.prepend(chip);
        bleeds.append(text);
      });
      if (!bleeds.childElementCount) bleeds.append(element("span", "no bleed drawn"));
      if (one.dice !== null) bleeds.append(element("span", `Dice ${one.dice.toFixed(2)}`));
      item.append(top, bleeds);
      one.flags.forEach((flag) => item.append(element("div", flag, "flag")));
      item.onclick = () => choose(index);
      return item;
    }));
    $("cases").children[state.index]?.scrollIntoView({ block: "nearest" });
  };

  const colors = () => {
    const shown = page.classes.map((one, index) =>
      state.bleeds && !state.off.includes(index) ? 255 : 0);
    const rgb = page.classes.map(({ color }) =>
      [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)));
    return {
      R: [0, ...rgb.map((c) => c[0])], G: [0, ...rgb.map((c) => c[1])],
      B: [0, ...rgb.map((c) => c[2])], A: [0, ...shown],
      labels: ["", ...page.classes.map((one) => one.name)],
    };
  };
  const extent = () => {
    const { low, high } = page.windows.find((one) => one.name === state.window);
    return low === null ? current().range : [low, high];
  };
  const paint = () => {
    PANES.forEach((name) => {
      const nv = views[name];
      if (nv.volumes.length > 1) {
        const mask = nv.volumes[1];
        mask.setColormapLabel(colors());
        mask.opacity = state.outline ? 0.95 : 0.55;
        mask.img = state.outline ? mask.edges : mask.whole;
      }
      if (nv.volumes.length) {
        [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = extent();
        nv.updateGLVolume();
      }
    });
  };
  const layOut = () => {
    $("pane-reference").hidden = !(state.beside && current()?.reference);
    PANES.forEach((name) => {
      const nv = views[name];
      if (state.view === "all") {
        const { clientWidth, clientHeight } = nv.canvas.parentElement;
        const places = clientWidth > 1.1 * clientHeight ? WIDE : TALL;
        nv.setCustomLayout(places.map((position, sliceType) => ({ sliceType, position })));
      } else {
        nv.clearCustomLayout();
        nv.setSliceType(SLICE[state.view]);
      }
      nv.resizeListener();
    });
  };
  const refresh = () => {
    document.querySelectorAll("button").forEach((one) => one.refresh?.());
    publish();
  };
  const publish = () => {
    const at = (nv) => (nv.volumes.length ? [...nv.frac2vox(nv.scene.crosshairPos)] : null);
    const places = Object.fromEntries(PANES.map((name) => [name, at(views[name])]));
    const shown = views.prediction.volumes.map((volume) => volume.name);
    const told = { ...state, case: current()?.name, places, shown };
    document.body.dataset.state = JSON.stringify(told); // for programs that look at the page
  };

  const unpack = async (id, name) => {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const [low, high] = extent();
    return NVImage.new(buffer, name, "gray", 1, null, low, high, true, 0.02, false, false, "",
      0, 0, NaN, NaN, false, null, 0, null);
  };
  // The rim of every bleed within its axial slice.
  const edgesOf = (labels, [across, down]) => {
    const found = new Uint8Array(labels.length);
    for (let at = 0; at < labels.length; at++) {
      const own = labels[at];
      if (!own) continue;
      const column = at % across, row = Math.floor(at / across) % down;
      const inside = column > 0 && column < across - 1 && row > 0 && row < down - 1 &&
        labels[at - 1] === own && labels[at + 1] === own &&
        labels[at - across] === own && labels[at + across] === own;
      if (!inside) found[at] = own;
    }
    return found;
  };
  const clear = (nv) => { while (nv.volumes.length) nv.removeVolume(nv.volumes[0]); };
  // Another scan may be asked for while this one is unpacked: then nothing of this one is shown.
  const fill = async (nv, one, masks, mine) => {
    const image = await unpack(`image-${one.number}`, `${one.number}.nii`);
    const mask = await unpack(`${masks}-${one.number}`, `${masks}.nii`);
    if (mine !== loading) return;
    mask.setColormapLabel(colors());
    mask.whole = mask.img;
    mask.edges = edgesOf(mask.img, one.shape);
    nv.addVolume(image);
    nv.addVolume(mask);
  };
  const jump = (one) => {
    PANES.forEach((name) => {
      const nv = views[name];
      if (!nv.volumes.length) return;
      nv.scene.crosshairPos = nv.vox2frac(one.center);
      nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
      nv.createOnLocationChange();
      nv.drawScene();
    });
  };
  const choose = async (index) => {
    const mine = ++loading;
    state.index = Math.min(Math.max(index, 0), page.cases.length - 1);
    state.ready = false;
    listCases();
    refresh();
    PANES.forEach((name) => clear(views[name])); // no picture stands under another scan's name
    const one = current();
    if (!one) return;
    layOut();
    await fill(views.prediction, one, "prediction", mine);
    if (mine !== loading) return;
    if (one.reference) await fill(views.reference, one, "reference", mine);
    if (mine !== loading) return;
    paint();
    jump(one);
    state.ready = true;
    refresh();
  };

  // Letters and a scale bar over every plane that is drawn; all sizes are of the screen.
  const annotate = (nv) => {
    const dpr = nv.uiData.dpr || 1;
    const marks = nv.canvas.parentElement.querySelector(".marks");
    const placed = (text, kind, left, top) => {
      const made = element("span", text, kind);
      made.style.left = `${left}px`;
      made.style.top = `${top}px`;
      marks.append(made);
      return made;
    };
    marks.replaceChildren();
    if (!nv.volumes.length) return;
    nv.screenSlices.forEach(({ axCorSag, leftTopWidthHeight }) => {
      const sides = SIDES[axCorSag];
      if (!sides) return;
      const [left, top, width, height] = leftTopWidthHeight.map((value) => value / dpr);
      placed(sides[0], "side", left + 12, top + height / 2);
      placed(sides[1], "side", left + width - 12, top + height / 2);
      if (height > 44) { // a stack of few slices is no higher
        placed(sides[2], "side", left + width / 2, top + 12);
        placed(sides[3], "side", left + width / 2, top + height - 12);
      }
      const at = [left + width / 2, top + height / 2];
      const [from, to] = [at, [at[0] + 20, at[1]]].map(([x, y]) =>
        nv.frac2mm(nv.canvasPos2frac([x * dpr, y * dpr])));
      const mm = Math.hypot(from[0] - to[0], from[1] - to[1], from[2] - to[2]) / 20;
      const cm = [5, 2, 1].find((one) => (10 * one) / mm < 0.5 * width);
      if (!(mm > 0) || !cm) return;
      const bar = placed(`${cm} cm`, "bar", left + 26, top + height - 30);
      bar.style.width = `${(10 * cm) / mm}px`;
    });
  };

  // The other pane shows the same place at the same size.
  let following = false;
  const follow = (name) => {
    const other = views[PANES.find((one) => one !== name)];
    const nv = views[name];
    if (following || !other || !nv.volumes.length || !other.volumes.length) return;
    following = true;
    other.scene.crosshairPos = [...nv.scene.crosshairPos];
    other.scene.pan2Dxyzmm = [...nv.scene.pan2Dxyzmm];
    other.drawScene();
    following = false;
  };

  const tell = (place) => {
    const one = current();
    if (!one || !place?.vox) return;
    const at = place.vox.map(Math.round);
    const slices = Object.entries(SLICE).map(([plane, type]) => {
      const axis = AXIS[plane];
      return `${plane} ${at[axis] + 1} of ${one.shape[axis]}`;
    });
    const value = place.values?.[0]?.value;
    const unit = page.unit ? ` ${page.unit}` : "";
    const found = place.values?.[1]?.value;
    const kind = found ? `, ${page.classes[Math.round(found) - 1]?.name ?? ""}` : "";
    const shown = value === undefined ? [] : [`${Math.round(value)}${unit}${kind}`];
    $("where").textContent = [...slices, ...shown].join(" · ");
  };

  const step = (count) => {
    const move = [0, 0, 0];
    move[AXIS[state.view]] = count;
    views.prediction.moveCrosshairInVox(...move);
  };
  const set = (name, value) => { state[name] = value; };
  const act = {
    view: (name) => { set("view", name); layOut(); refresh(); },
    window: (name) => { set("window", name); paint(); refresh(); },
    bleeds: () => { set("bleeds", !state.bleeds); paint(); refresh(); },
    bleed: (index) => {
      const off = state.off.includes(index);
      set("off", off ? state.off.filter((one) => one !== index) : [...state.off, index]);
      paint();
      refresh();
    },
    outline: () => { set("outline", !state.outline); paint(); refresh(); },
    beside: () => { set("beside", !state.beside); layOut(); refresh(); },
    order: (key) => { set("order", key); choose(0); },
  };
  const KEYS = {
    ArrowUp: () => step(1), ArrowDown: () => step(-1),
    PageUp: () => step(5), PageDown: () => step(-5),
    ArrowRight: () => choose(state.index + 1), ArrowLeft: () => choose(state.index - 1),
    n: () => choose(state.index + 1), p: () => choose(state.index - 1),
    m: () => act.view("all"), a: () => act.view("axial"), c: () => act.view("coronal"),
    s: () => act.view("sagittal"), b: act.bleeds, o: act.outline, r: act.beside,
    f: () => jump(current()),
  };
  page.windows.forEach((one, index) => { KEYS[index + 1] = () => act.window(one.name); });

  const build = () => {
    $("title").textContent = page.title;
    $("subtitle").textContent = page.subtitle;
    $("notice").textContent = page.notice;
    const letters = { all: "M", axial: "A", coronal: "C", sagittal: "S" };
    Object.entries(PLANES).forEach(([name, text]) =>
      button("views", text, `key ${letters[name]}`, () => state.view === name,
        () => act.view(name)));
    page.windows.forEach((one, index) =>
      button("windows", one.name, `${one.about}, key ${index + 1}`,
        () => state.window === one.name, () => act.window(one.name)));
    button("bleeds", "Bleeds", "all on or off, key B", () => state.bleeds, act.bleeds);
    page.classes.forEach((one, index) => {
      if (page.classes.length === 1) return;
      const made = button("bleeds", one.name, `${one.name} on or off`,
        () => state.bleeds && !state.off.includes(index), () => act.bleed(index));
      const chip = element("span", undefined, "chip");
      chip.style.background = one.color;
      made.prepend(chip);
    });
    button("more", "Outlines", "key O", () => state.outline, act.outline);
    if (page.cases.some((one) => one.reference)) {
      button("more", "Reference", "beside the prediction, key R", () => state.beside, act.beside);
    }
    page.orders.forEach((one) =>
      button("sort", one.title, "order of the list", () => state.order === one.key,
        () => act.order(one.key)));
    const help = [["↑ ↓", "slice"], ["← →", "scan"], ["1 – " + page.windows.length, "window"],
      ["M A C S", "planes"], ["B", "bleeds"], ["O", "outlines"], ["F", "largest bleed"]];
    if (page.cases.some((one) => one.reference)) help.push(["R", "reference"]);
    $("keys").append(...help.map(([key, what]) => {
      const made = element("span");
      made.append(element("kbd", key), ` ${what}`);
      return made;
    }));
  };
  const begin = async () => {
    build();
    const options = {
      isRadiologicalConvention: true, sagittalNoseLeft: true, isOrientationTextVisible: false,
      isRuler: false, isOrientCube: false, isColorbar: false, crosshairWidthUnit: "mm",
      crosshairWidth: 0.5, crosshairColor: [0.3, 0.63, 1, 0.5], crosshairGap: 12,
      backColor: [0, 0, 0, 1], dragAndDropEnabled: false, isNearestInterpolation: false,
      clipPlaneHotKey: "", cycleClipPlaneHotKey: "", viewModeHotKey: "", logLevel: "error",
      loadingText: "", multiplanarShowRender: 0,
    };
    for (const name of PANES) {
      $(`pane-${name}`).hidden = false; // a canvas needs a size to begin with
      views[name] = new Niivue({ ...options });
      await views[name].attachToCanvas($(`canvas-${name}`));
      views[name].onLocationChange = tell;
      const draw = views[name].drawScene.bind(views[name]);
      views[name].drawScene = (...given) => {
        const drawn = draw(...given);
        annotate(views[name]);
        follow(name);
        if (!following) publish();
        return drawn;
      };
      $(`canvas-${name}`).addEventListener("contextmenu", (event) => event.preventDefault());
    }
    window.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const found = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
      event.stopImmediatePropagation();
      if (!found) return;
      event.preventDefault();
      found();
    }, true);
    window.addEventListener("resize", layOut);
    await choose(0);
  };
  begin().catch((error) => {
    $("fault").hidden = false;
    $("fault").textContent =
      `This page needs a browser with WebGL 2, such as a current Firefox or Chrome. (${error})`;
    document.body.dataset.state = JSON.stringify({ fault: String(error) });
  });
}

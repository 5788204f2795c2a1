/* Three linked planes of one case. What is shown is said by `state`; `draw` paints it and nothing else does. */

(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const byId = (id) => document.getElementById(id);
  const VIEWS = {
    transverse: { across: 0, down: 1, through: 2, letters: ["R", "L", "A", "P"], ends: ["S", "I"] },
    coronal: { across: 0, down: 2, through: 1, letters: ["R", "L", "S", "I"], ends: ["A", "P"] },
    sagittal: { across: 1, down: 2, through: 0, letters: ["A", "P", "S", "I"], ends: ["R", "L"] },
  };
  const REGIONS = Object.keys(data.bits);
  const state = { entry: null, at: [0, 0, 0], image: null, reference: null, prediction: null, turn: 0 };
  const views = Object.entries(VIEWS).map(([name, view]) => ({
    name,
    ...view,
    canvas: byId(`view-${name}`),
    slider: byId(`slice-${name}`),
    output: byId(`place-${name}`),
  }));
  const caseSelect = byId("viewer-case");
  const runSelect = byId("viewer-run");
  const opacity = byId("viewer-opacity");
  const modality = () => root.querySelector("input[name=modality]:checked").value;
  const on = (id) => byId(id).checked;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /* ---------------------------------------------------------------- painting */
  const scratch = document.createElement("canvas");

  function stamp(target, width, height, fill, smooth) {
    scratch.width = width;
    scratch.height = height;
    const pen = scratch.getContext("2d");
    const pixels = pen.createImageData(width, height);
    fill(pixels.data);
    pen.putImageData(pixels, 0, 0);
    const onto = target.getContext("2d");
    onto.imageSmoothingEnabled = smooth;
    onto.imageSmoothingQuality = "high";
    onto.drawImage(scratch, 0, 0, target.width, target.height);
  }

  function strokeLoops(pen, loops, scaleX, scaleY) {
    pen.beginPath();
    for (const loop of loops) {
      for (let i = 0; i < loop.length; i += 2) {
        if (i === 0) pen.moveTo(loop[0] * scaleX, loop[1] * scaleY);
        else pen.lineTo(loop[i] * scaleX, loop[i + 1] * scaleY);
      }
      pen.closePath();
    }
    pen.stroke();
  }

  function drawOutlines(view, codes, width, height, dashed) {
    const pen = view.canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    pen.lineJoin = "round";
    for (const region of chosenRegions()) {
      const loops = volumes.loops(codes, width, height, data.bits[region]);
      for (const [colour, line] of [["rgba(0, 0, 0, 0.6)", 3.6], [data.colours[region], 1.8]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = line * ratio;
        pen.setLineDash(dashed ? [4 * ratio, 4 * ratio] : []);
        strokeLoops(pen, loops, view.canvas.width / width, view.canvas.height / height);
      }
    }
    pen.setLineDash([]);
  }

  function chosenRegions() {
    return REGIONS.filter((region) => on(`viewer-region-${region}`));
  }

  function drawFill(view, codes, width, height) {
    const regions = chosenRegions();
    const paint = (out) => {
      for (let i = 0; i < codes.length; i += 1) {
        // From the outermost inwards: the innermost region that is switched on gives the colour.
        for (const region of regions) {
          if ((codes[i] & data.bits[region]) === 0) continue;
          const [r, g, b] = data.rgb[region];
          out[4 * i] = r;
          out[4 * i + 1] = g;
          out[4 * i + 2] = b;
          out[4 * i + 3] = 115;
        }
      }
    };
    stamp(view.canvas, width, height, paint, false);
  }

  function drawGuides(view, width, height, scale) {
    const { canvas } = view;
    const pen = canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    const x = ((width - 0.5 - state.at[view.across]) * canvas.width) / width;
    const y = ((height - 0.5 - state.at[view.down]) * canvas.height) / height;
    if (on("viewer-crosshair")) {
      const gap = 9 * ratio;
      pen.strokeStyle = "rgba(120, 200, 255, 0.75)";
      pen.lineWidth = ratio;
      pen.beginPath();
      for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap],
        [x, y + gap, x, canvas.height]]) {
        pen.moveTo(x0, y0);
        pen.lineTo(x1, y1);
      }
      pen.stroke();
    }
    const write = (text, px, py, align, baseline) => {
      pen.textAlign = align;
      pen.textBaseline = baseline;
      pen.lineWidth = 3 * ratio;
      pen.strokeStyle = "#000";
      pen.strokeText(text, px, py);
      pen.fillStyle = "#ffffff";
      pen.fillText(text, px, py);
    };
    pen.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    const edge = 6 * ratio;
    const [left, right, top, bottom] = view.letters;
    write(left, edge, canvas.height / 2, "left", "middle");
    write(right, canvas.width - edge, canvas.height / 2, "right", "middle");
    write(top, canvas.width / 2, edge, "center", "top");
    write(bottom, canvas.width / 2, canvas.height - edge, "center", "bottom");
    const bar = 20 * scale;
    pen.fillStyle = "#ffffff";
    pen.fillRect(canvas.width - edge - bar, canvas.height - edge - 2 * ratio, bar, 2 * ratio);
    pen.font = `${11 * ratio}px system-ui, sans-serif`;
    write("2 cm", canvas.width - edge - bar / 2, canvas.height - edge - 4 * ratio, "center", "bottom");
  }

  function drawView(view) {
    const { canvas, across, down, through } = view;
    const { shape, spacing } = state.entry;
    const [width, height, index] = [shape[across], shape[down], state.at[through]];
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const high = Math.max(1, Math.round((wide * height * spacing[down]) / (width * spacing[across])));
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide;
      canvas.height = high;
    }
    const pen = canvas.getContext("2d");
    pen.globalAlpha = 1;
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, wide, high);
    const cut = (voxels) => volumes.plane(voxels, shape, across, down, through, index);
    if (state.image) {
      const grey = cut(state.image);
      const paint = (out) => {
        for (let i = 0; i < grey.length; i += 1) {
          out[4 * i] = grey[i];
          out[4 * i + 1] = grey[i];
          out[4 * i + 2] = grey[i];
          out[4 * i + 3] = 255;
        }
      };
      stamp(canvas, width, height, paint, true);
    }
    pen.globalAlpha = Number(opacity.value) / 100;
    if (state.prediction && on("viewer-prediction")) {
      const codes = cut(state.prediction);
      if (on("viewer-outline")) drawOutlines(view, codes, width, height, true);
      else drawFill(view, codes, width, height);
    }
    if (state.reference && on("viewer-reference")) drawOutlines(view, cut(state.reference), width, height, false);
    pen.globalAlpha = 1;
    drawGuides(view, width, height, wide / (width * spacing[across]));
    canvas.dataset.index = index;
    canvas.setAttribute("aria-label", `${view.name} slice ${index + 1} of ${shape[through]}, ${placeText(view)}`);
    view.slider.max = shape[through] - 1;
    view.slider.value = index;
    view.slider.setAttribute("aria-valuetext", `slice ${index + 1} of ${shape[through]}, ${placeText(view)}`);
    view.output.textContent = `${index + 1} / ${shape[through]} · ${placeText(view)}`;
  }

  /* Millimetres of the scanner along a plane's axis, with the letter of the side. */
  function placeText(view) {
    const row = state.entry.affine[view.through];
    const mm = row[0] * state.at[0] + row[1] * state.at[1] + row[2] * state.at[2] + row[3];
    return `${mm < 0 ? view.ends[1] : view.ends[0]} ${Math.abs(mm).toFixed(1)} mm`;
  }

  function draw() {
    if (!state.entry) return;
    views.forEach(drawView);
    byId("viewer-voxel").textContent = `At the crosshair: reference ${regionsAt(state.reference)}; `
      + `prediction ${regionsAt(state.prediction)}.`;
    root.dataset.drawn = Number(root.dataset.drawn || 0) + 1;
  }

  function regionsAt(voxels) {
    if (!voxels) return "not there";
    const [, ny, nz] = state.entry.shape;
    const code = voxels[(state.at[0] * ny + state.at[1]) * nz + state.at[2]];
    return REGIONS.filter((region) => code & data.bits[region]).join(" + ") || "none";
  }

  /* ---------------------------------------------------------------- what is shown */
  async function show(change = {}) {
    const turn = (state.turn += 1);
    root.setAttribute("aria-busy", "true");
    const entry = data.cases[caseSelect.selectedIndex];
    for (const input of root.querySelectorAll("input[name=modality]")) {
      input.disabled = !(input.value in entry.modalities);
      if (input.disabled && input.checked) root.querySelector(`input[value=${Object.keys(entry.modalities)[0]}]`).checked = true;
    }
    const wanted = [entry.modalities[modality()], entry.reference, entry.predictions[runSelect.value]];
    let read;
    try {
      read = await Promise.all(wanted.map(volumes.load));
    } catch (problem) {
      byId("viewer-status").textContent = `This browser could not unpack the voxels (${problem.message}).`;
      return;
    }
    if (turn !== state.turn) return; // something else was asked for meanwhile
    [state.image, state.reference, state.prediction] = read;
    if (entry !== state.entry || change.jump) {
      state.entry = entry;
      state.at = [...entry.focus];
      fitPlanes();
    }
    say();
    draw();
    root.removeAttribute("aria-busy");
    root.dataset.shown = `${entry.id} ${modality()} ${runSelect.value}`;
  }

  function fitPlanes() {
    const { shape, spacing } = state.entry;
    // One scale for the three planes: columns as wide as what they show.
    views.forEach((view) => {
      view.canvas.parentElement.style.flexGrow = shape[view.across] * spacing[view.across];
      view.canvas.style.aspectRatio = `${shape[view.across] * spacing[view.across]} / ${shape[view.down] * spacing[view.down]}`;
    });
  }

  function say() {
    const { steps, spacing, measured, id } = state.entry;
    const mm = (values) => values.map((v) => Number(v.toFixed(2))).join(" × ");
    byId("viewer-grid").textContent = steps.every((step) => step === 1)
      ? `Shown at full resolution (${mm(spacing)} mm).`
      : `Shown at ${mm(spacing)} mm; measured at full resolution (${mm(measured)} mm).`;
    const missing = [];
    if (!state.reference) missing.push("no reference");
    if (!state.prediction) missing.push(`no usable prediction by ${runSelect.value}`);
    const scores = scoresOf(id, runSelect.value);
    byId("viewer-status").textContent = [id, runSelect.value, scores, ...missing].filter(Boolean).join(" · ");
  }

  /* The scores stand in the table of cases, and are read from there. */
  function scoresOf(id, run) {
    const rows = [...document.querySelectorAll("#case-table tbody tr")];
    const mine = rows.filter((row) => row.dataset.case === id && row.dataset.run === run);
    const text = mine.map((row) => `${row.dataset.region} ${row.querySelector("[data-column=dice] .num").textContent}`);
    return text.length ? `Dice ${text.join(", ")}` : "";
  }

  function move(axis, to) {
    state.at[axis] = clamp(Math.round(to), 0, state.entry.shape[axis] - 1);
    draw();
  }

  function moveTo(view, event) {
    const box = view.canvas.getBoundingClientRect();
    const { shape } = state.entry;
    const place = (axis, share) => clamp(Math.floor(shape[axis] * (1 - share)), 0, shape[axis] - 1);
    state.at[view.across] = place(view.across, (event.clientX - box.left) / box.width);
    state.at[view.down] = place(view.down, (event.clientY - box.top) / box.height);
    draw();
  }

  /* ---------------------------------------------------------------- hands */
  const toggles = { r: "viewer-reference", p: "viewer-prediction", o: "viewer-outline", x: "viewer-crosshair" };

  function onKey(view, event) {
    if (!state.entry || event.ctrlKey || event.metaKey || event.altKey) return;
    const axis = view.through;
    const here = state.at[axis];
    const last = state.entry.shape[axis] - 1;
    const goals = { ArrowUp: here + 1, ArrowRight: here + 1, ArrowDown: here - 1, ArrowLeft: here - 1,
      PageUp: here + 10, PageDown: here - 10, Home: 0, End: last };
    const inputs = [...root.querySelectorAll("input[name=modality]")];
    if (event.key in goals) move(axis, goals[event.key]);
    else if (/^[1-4]$/.test(event.key) && inputs[event.key - 1] && !inputs[event.key - 1].disabled) {
      inputs[event.key - 1].checked = true;
      show();
    } else if (event.key.toLowerCase() in toggles) {
      const box = byId(toggles[event.key.toLowerCase()]);
      box.checked = !box.checked;
      draw();
    } else return;
    event.preventDefault();
  }

  views.forEach((view) => {
    const { canvas } = view;
    view.slider.addEventListener("input", () => move(view.through, Number(view.slider.value)));
    canvas.addEventListener("keydown", (event) => onKey(view, event));
    canvas.addEventListener("pointerdown", (event) => {
      if (!state.entry) return;
      canvas.focus({ preventScroll: true });
      if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
      moveTo(view, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (state.entry && event.pointerType === "mouse" && event.buttons & 1) moveTo(view, event);
    });
    // Only where the plane has the focus: the page must scroll past it otherwise.
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas || !state.entry || event.ctrlKey) return;
      event.preventDefault();
      move(view.through, state.at[view.through] - Math.sign(event.deltaY));
    }, { passive: false });
  });
  caseSelect.addEventListener("change", () => show());
  runSelect.addEventListener("change", () => show());
  root.querySelectorAll("input[name=modality]").forEach((input) => input.addEventListener("change", () => show()));
  root.querySelectorAll("input[type=checkbox]").forEach((input) => input.addEventListener("change", draw));
  opacity.addEventListener("input", () => {
    byId("viewer-opacity-text").textContent = `${opacity.value} %`;
    draw();
  });
  const step = (by) => {
    caseSelect.selectedIndex = clamp(caseSelect.selectedIndex + by, 0, data.cases.length - 1);
    show();
  };
  byId("viewer-previous").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  byId("viewer-tumour").addEventListener("click", () => show({ jump: true }));
  new ResizeObserver(draw).observe(root);
  window.matchMedia("print").addEventListener("change", draw);

  document.addEventListener("show-case", (event) => {
    const index = data.cases.findIndex((entry) => entry.id === event.detail.id);
    if (index < 0) return;
    caseSelect.selectedIndex = index;
    if ([...runSelect.options].some((option) => option.value === event.detail.run)) runSelect.value = event.detail.run;
    show({ jump: true });
    byId("viewer-heading").scrollIntoView({ block: "start" });
    views[0].canvas.focus({ preventScroll: true });
  });
  show();
})();

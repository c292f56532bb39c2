const $ = id => document.getElementById(id);
const SCALES = ["image_guidance_scale", "guidance_scale"];
const SLIDERS = [...SCALES, "num_inference_steps"];
const LARGEST = 2048;  // pixels per side; a larger picture is scaled down before it is sent
const SENT_AS_IT_IS = ["image/png", "image/jpeg", "image/webp"];
const PREVIEWS = 10;  // of one edit

// Scenes that the miniature editor knows. A test renders the captions and compares the pictures.
const EXAMPLES = [
  {caption: "a large red circle in the top left and a small yellow star in the bottom right, on a teal background",
   instructions: ["make it night", "make the background pink", "remove the star", "add a large green triangle in the bottom left"],
   png: "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAMAAABEpIrGAAAATlBMVEX/6w3n5SDh5CTd4yfO3zO+20Cg1FeY0l6X0l+Iz2t8zHRvyX5jxohgxYpfxYtUwpRKwJs1u6wzu60rubQmuLgusbFKmJlnfoGjSU7gEhoZd5YWAAAAkElEQVR42sXRSRKEIAwF0DjP4tBEuP9Fu1FLXRC+5cL+C1jwqhIS+oDQdmlmHQBs7C+GJbDYPYsfsD3CXmBOYHxA20u0B/AV8BMAS8Am8TfhoPCo8bJurPsfYBgAKAoAoigA2qauiKq6aQWgElqTKKnEmLn3bJR76BzoAk2WFMdUBkCaz3OeymDq3dlPLy3rCygaT6FwzKnIAAAAAElFTkSuQmCC"},
  {caption: "a large blue star in the top right and a large orange square in the bottom left, on a white background",
   instructions: ["make the background brown", "keep only the star", "add fog", "add a small green circle in the top left"],
   png: "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAMAAABEpIrGAAAAUVBMVEX////4+f/09f7m6v7k6P7Z3/3X3f3M0/zFzfy+yPu0v/ums/qVpfmPoPmJm/mFmPiFl/j/gABje/dfd/ZZcvZCX/U/XPU6WPQdQPMXOvIUOPLQ+G1qAAAAeElEQVR42u3OyQ5AMBSF4dLBVNRQ5bz/g4o0hoRLQsLG2dzF/yUtYzeXphegac67AMQpyIGcriGXDnCSh0dV2QHLBqv2IqhXUAeHT5i5G+oTme8Z+UvtgSZB60FLgh5dknToqR6jnE6JmABF5G9UsLdWbfaDb8HDjV72EalCQTQqAAAAAElFTkSuQmCC"},
  {caption: "a small green triangle in the bottom left, on a pink background, at night",
   instructions: ["turn on the light", "make the triangle bigger", "make the triangle a cross", "add a large yellow star in the top right"],
   png: "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgBAMAAACBVGfHAAAAJ1BMVEV1R5VzR5NwSI5nSIRiSH5VSHBJSGI8SVMwSUUrST8fSTESSiMGShRUbVJ0AAAATklEQVR42mNgGAVUACwOSBwmBgYG1gA0gWBTNIEAVlQBNgWmBBQBUQaGQBSBRAYGMWQB5gAGBlYDJAFWBgYGBoTFjAxMCgwMDP8eUOAxAJ64BcrBopV0AAAAAElFTkSuQmCC"},
  {caption: "a large yellow cross in the bottom right and a large purple circle in the top left, on a gray background, in fog",
   instructions: ["clear the fog", "turn it into night", "remove the circle", "make the background teal"],
   png: "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgBAMAAACBVGfHAAAAG1BMVEXd1FzZ0V+wroSWmZuXlpyYjqCZhKWbca6dXrf4lJ0WAAAAnklEQVR42pWPwQ3CMAxFn6F30nYBGjEAFfuzAgyAUhYg6QIQDg5KUlEhfPi2nqxvfzlR1wbohgI0cBgZzsXGdoT+WAALqCSw/1glIAZAVYF2U56t/4ja5wxmgJgBd4BXcdYBKgk8L/C4lllufjdV4fB+Eb+qJo9xojPVRghfX1/1iDMQg2TgAEf/22PdVCwOSzaVNoKYfzyAdgHEArwBKyUhhoq6498AAAAASUVORK5CYII="},
  {caption: "a small red star in the top left, a large purple circle in the top right and a large orange triangle in the bottom right, on a brown background",
   instructions: ["keep only the triangle", "make it foggy", "remove the star", "make the background teal"],
   png: "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAMAAABEpIrGAAAAhFBMVEX/gAD4fADxeAHmcwLfbwLOZgO8XQS1WQWqVAWjUAaZSweSRweAPgh5OgluNQltNAlsMwpnMQphLgrgEhrSFRjPFhfMFhfEGBa6GhWpHhOkHxKjHxKaIRGTIxCMFLKMJA9+HXtwJURpKSqFJg6DJg6CJw58KA12KQ1qLAtpLAtjLRFkLQu6JgjRAAAA10lEQVR42pXR2RaCIBRA0ZvlbIOgpVkOOOv//19JJpYCdR58kO26CIAkwfrrjpBOAEgaP0vJHNQ1W8/isWwGrlf2fTxFGPC8CaQMpC+QJ/cbxrd7ktP9xbM6Cqozpp2rrwnDDDqiCYb1oEE8gIoBFOMRLEcgFGHfxxF3kwhdwr4PL/zfbMvhWbaig5Ie9X+X9cN1y4FlScB2KwYGgCEChw3A5iAAGjzT+MABmsMF6guoPGDDmM0BuzfYrQMTpsw14CoMKO4K0GGWvgR7+Gi/AKfjRyfpdT8AfVlKiz/64CkAAAAASUVORK5CYII="},
];
const INSTRUCTIONS = ["make it night", "add fog", "make the background pink"];  // suggested for uploads

let defaults = null;  // the service's default settings and limits
let base = null, result = null;  // the picture that an edit starts from, and the last edit's result
const nodes = [];  // every picture so far, in order of creation
let loading = null;  // the promise of a chosen picture that is still being read
let running = null;  // the AbortController of the request in flight


// ---- status and errors

function setStatus(text) { $("status").textContent = text; }

function showError(where, text) {
  const field = $(where), place = $(`${where}_error`) ?? $("run_error");
  place.textContent = text;
  if (field?.matches("input")) { field.setAttribute("aria-invalid", "true"); field.addEventListener("input", () => clearErrors(where), {once: true}); }
  if ($("more").contains(place)) $("more").open = true;
}

function clearErrors(...places) {
  for (const place of places) { $(`${place}_error`).textContent = ""; $(place)?.removeAttribute("aria-invalid"); }
}

function clearAllErrors() { clearErrors(...[...document.querySelectorAll("main .error")].map(place => place.id.replace(/_error$/, ""))); }


// ---- the service

/** An error to show to the user. `param` names the field that is wrong, if any. */
class Problem extends Error {
  constructor(message, param = null) { super(message); this.param = param; }
}

/** GET `path`, or POST `body` as JSON. Throws a Problem, or an AbortError. */
async function call(path, body = null, signal = null) {
  for (;;) {
    const headers = {}, key = sessionStorage.getItem("key");
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The service can't be reached. Nothing is lost: check that it is running and try again.");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await problemOf(answer);
    await askForKey(key);
  }
}

async function problemOf(answer) {
  const error = await answer.json().then(body => body.error, () => null);
  if (answer.status === 429) {
    const seconds = Math.ceil(Number(answer.headers.get("Retry-After"))) || 5;
    const reason = error ? ` (${error.message})` : "";
    return new Problem(`The service is busy${reason}. Nothing is lost: try again in ${seconds} s.`);
  }
  if (!error) return new Problem(`The service failed (${answer.status}). Nothing is lost: try again.`);
  return new Problem(error.message, error.param?.split(".").at(-1));
}

/** Resolve once sessionStorage holds another key than `refused`. Throw a Problem when the dialog is closed. */
function askForKey(refused) {
  $("key_error").textContent = refused ? "Unknown key: check that it is complete, or ask for a new one." : "";
  $("key_dialog").showModal();
  return new Promise((resolve, reject) => {
    $("key_form").onsubmit = event => {
      event.preventDefault();
      if (!$("key").value.trim()) { $("key_error").textContent = "Paste your key."; return; }
      sessionStorage.setItem("key", $("key").value.trim());
      $("key_dialog").onclose = null;
      $("key_dialog").close();
      resolve();
    };
    $("key_dialog").onclose = () => reject(new Problem("This service needs a key: ask its operator for one and try again."));
  });
}

/** Yield [event, data] of a stream of server-sent events. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Problem("The connection was lost. Your pictures are kept: try again.");
    });
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map(line => line.split(/: (.*)/)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}


// ---- pictures

/** An image of an answer, {image, output_format}, as a Blob and as a URL. */
function toBlob({image, output_format}) { return new Blob([Uint8Array.from(atob(image), letter => letter.charCodeAt(0))], {type: `image/${output_format}`}); }
function toURL({image, output_format}) { return `data:image/${output_format};base64,${image}`; }

function toDataURL(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("The file can no longer be read: choose it again.", "image"));
    reader.readAsDataURL(blob);
  });
}

async function decoded(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  return picture;
}

/** Convert a file to a picture that the service accepts, at most LARGEST pixels per side. Throw a Problem. */
async function readable(file) {
  const url = URL.createObjectURL(file);
  try {
    const picture = await decoded(url), {naturalWidth: width, naturalHeight: height} = picture;
    if (!width || !height) throw new Problem("This picture has no size in pixels: save it as PNG and choose that file.");
    const shrink = Math.min(1, LARGEST / Math.max(width, height));
    if (shrink === 1 && SENT_AS_IT_IS.includes(file.type)) return {blob: file, note: ""};
    const canvas = Object.assign(document.createElement("canvas"), {width: Math.round(width * shrink) || 1, height: Math.round(height * shrink) || 1});
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
    const blob = await new Promise(resolve => canvas.toBlob(resolve, type, 0.95));
    return {blob, note: shrink < 1 ? `Scaled down from ${width} × ${height} to ${canvas.width} × ${canvas.height}.` : ""};
  } catch (error) {
    if (error instanceof Problem) throw error;
    const what = file.name ? `“${file.name}”` : "This";
    throw new Problem(`${what} can't be read as a picture: choose a PNG, JPEG or WebP file.`);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function choose(file, instructions = INSTRUCTIONS) { loading = load(file, instructions); }

async function load(file, instructions) {
  clearErrors("image");
  try {
    const {blob, note} = await readable(file);
    const focused = $("drop").contains(document.activeElement);  // which is hidden next
    show(await add(blob, null, {instructions}));
    if (focused) $("instruction").focus();
    setStatus(note || "Ready: describe the change.");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showError("image", error.message);
  }
}


// ---- history: a tree of pictures. The page shows one picture, or an edit from a picture's parent to it

/** Add a picture: an original, or the result of an edit of `parent`, described by the service's answer `made`. */
async function add(blob, parent, {made = null, instructions = parent.instructions} = {}) {
  const url = URL.createObjectURL(blob), picture = await decoded(url);
  const node = {blob, url, parent, made, instructions, width: picture.naturalWidth, height: picture.naturalHeight, next: null, choice: null};
  nodes.push(node);
  return node;
}

function show(from, to = null) {
  base = from;
  result = to;
  if (to) from.next = to;
  else if (from.parent) from.parent.next = from;
  drawPicture();
  drawChips();
  drawHistory();
}

const showEdit = node => show(node.parent ?? node, node.parent && node);
const undone = () => result ? [base] : base?.parent ? [base.parent] : null;
const redone = () => result ? result.next && [result, result.next] : base?.next ? [base, base.next] : null;

function undo() { if (undone()) { show(...undone()); setStatus("Undone."); } }
function redo() { if (redone()) { show(...redone()); setStatus("Redone."); } }

function further() {
  if (!result) return;
  show(result);
  setStatus("The next edit starts from this picture.");
  $("instruction").focus();
  $("instruction").select();
}

function drawHistory() {
  $("history").hidden = !nodes.length;
  $("undo").setAttribute("aria-disabled", !undone());
  $("redo").setAttribute("aria-disabled", !redone());
  const shown = result ?? base, focused = [...$("strip").querySelectorAll("button")].indexOf(document.activeElement);
  $("strip").replaceChildren(...nodes.map(node => {
    const button = thumbnail(node.url, node, node.made?.instruction ?? "original");
    button.setAttribute("aria-current", node === shown);
    button.onclick = () => { showEdit(node); setStatus(node.made ? `Shown: ${node.made.instruction}` : "Shown: an original"); };
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  const buttons = $("strip").querySelectorAll("button");
  buttons[focused]?.focus();
  const current = buttons[nodes.indexOf(shown)].parentElement;
  $("strip").scrollLeft = current.offsetLeft - $("strip").offsetLeft - $("strip").clientWidth / 2 + current.clientWidth / 2;
}

function thumbnail(url, {width, height}, text) {
  const button = document.createElement("button"), picture = new Image(), label = document.createElement("span");
  button.type = "button";
  button.className = "thumb";
  picture.src = url;
  picture.alt = "";
  picture.classList.toggle("pixels", isSmall(width, height));
  label.textContent = text;
  button.append(picture, label);
  return button;
}


// ---- the picture

const isSmall = (width, height) => Math.max(width, height) <= 128;

function drawPicture(draft = null) {
  const after = draft ?? result?.url, compared = Boolean(result && !draft);
  $("frame").style.setProperty("--aspect", base.width / base.height);
  $("drop").hidden = true;
  $("pair").hidden = $("another").hidden = false;
  $("pair").classList.toggle("compared", compared);
  $("before").src = base.url;
  $("before").alt = base.made ? `after “${base.made.instruction}”` : "the picture";
  if (after) $("after").src = after;
  $("after").alt = result ? `after “${result.made.instruction}”` : "preview of the edit";
  $("after").hidden = !after;
  for (const picture of [$("before"), $("after")]) picture.classList.toggle("pixels", isSmall(base.width, base.height));
  for (const part of ["compare", "handle", "tag_before", "tag_after"]) $(part).hidden = !compared;
  $("result").hidden = !compared;
  clearErrors("feedback");
  if (!compared) return;
  const {instruction, seed, output_format} = result.made;
  $("save").href = result.url;
  $("save").download = `${instruction.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "edited"}-${seed}.${output_format === "jpeg" ? "jpg" : output_format}`;
  for (const choice of ["up", "down"]) $(choice).setAttribute("aria-pressed", result.choice === choice);
}

function compareAt(percent) {
  $("compare").value = percent;
  const at = Number($("compare").value);
  $("compare").setAttribute("aria-valuetext", `${at} % before, ${100 - at} % after`);
  $("pair").style.setProperty("--at", `${at}%`);
  $("tag_before").style.opacity = at < 15 ? 0 : 1;
  $("tag_after").style.opacity = at > 85 ? 0 : 1;
}

function compareUnder(event) {
  const {left, width} = $("pair").getBoundingClientRect();
  compareAt(100 * (event.clientX - left) / width);
}

$("compare").oninput = () => compareAt($("compare").value);
$("pair").onpointerdown = event => {
  if (!result || event.button) return;
  $("pair").setPointerCapture(event.pointerId);
  compareUnder(event);
};
$("pair").onpointermove = event => { if ($("pair").hasPointerCapture(event.pointerId)) compareUnder(event); };


// ---- settings

function drawSliders() { for (const name of SLIDERS) $(`${name}_value`).textContent = name === "num_inference_steps" ? $(name).value : Number($(name).value).toFixed(1); }

function setSlider(name, value) {
  const slider = $(name);
  slider.max = Math.max(slider.max, value);
  slider.min = Math.min(slider.min, value);
  slider.value = value;
  clearErrors(name);
  drawSliders();
}

function settings() {
  const wanted = {instruction: $("instruction").value.trim(), negative_prompt: $("negative_prompt").value.trim()};
  for (const name of SLIDERS) wanted[name] = Number($(name).value);
  if ($("seed").value) wanted.seed = Number($("seed").value);
  return wanted;
}

function useSettings(made) {
  $("instruction").value = made.instruction;
  for (const name of SLIDERS) setSlider(name, made[name]);
  $("seed").value = made.seed;
  $("negative_prompt").value = made.negative_prompt ?? "";
  clearErrors("instruction", "seed", "negative_prompt");
  $("more").open = true;
  setStatus("Instruction, scales, steps and seed are set: editing again reproduces the picture.");
}

const drawnSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

function useDefaults() { for (const name of SLIDERS) setSlider(name, defaults[name]); $("seed").value = $("negative_prompt").value = ""; clearErrors("seed", "negative_prompt"); }

async function loadDefaults() {
  if (defaults) return;
  defaults = await (await call("v1/defaults")).json();
  $("num_inference_steps").max = defaults.limits.max_steps;
  $("model").textContent = `Model: ${defaults.model}, ${defaults.num_inference_steps} steps`;
  useDefaults();
}

function drawChips() {
  $("chips").replaceChildren(...(base?.instructions ?? []).map(text => {
    const chip = Object.assign(document.createElement("button"), {type: "button", textContent: text});
    chip.onclick = () => { $("instruction").value = text; clearErrors("instruction"); $("instruction").focus(); };
    return chip;
  }));
}


// ---- editing

/** Return whether an edit can start. Show an error at each field that is missing. */
async function canBegin() {
  await loading;
  if (running) { setStatus("An edit is already running: press Escape to cancel it."); return false; }
  clearAllErrors();
  if (!base) showError("image", "Choose a picture first, or one of the example scenes below.");
  if (!$("instruction").value.trim()) showError("instruction", "Describe the change, for example “make it night”.");
  if (!$("seed").checkValidity()) showError("seed", "The seed must be a whole number of at least 0; leave it empty for a random one.");
  const first = document.querySelector("main [aria-invalid=true]");
  first?.focus();
  if (first || !base) return false;
  try {
    await loadDefaults();
    return true;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showError("run", error.message);
    return false;
  }
}

/** Request edits of the shown picture and pass each event to `on[event](data)`. Show errors at `where`. */
async function run(edits, previewEvery, where, on) {
  if (running) return;  // Enter was pressed twice while a picture was being read
  const from = base, abort = new AbortController(), total = edits.length * edits[0].num_inference_steps, at = edits.map(() => 0);
  let ended = false;
  running = abort;
  $(where === "grid" ? "grid_error" : "image_error").after($("working"));  // next to the picture or grid that it fills
  setRunning(true);
  const known = {
    progress({index, step}) {
      at[index] = step;
      const made = at.reduce((sum, each) => sum + each);
      $("bar").max = total;
      $("bar").value = made;
      $("steps").textContent = `step ${made} of ${total}`;
    },
    error({message}) { showError(where, message); },
    done() { ended = true; },
  };
  try {
    const body = {image: await toDataURL(from.blob), edits, stream: true, preview_every: previewEvery};
    for await (const [event, data] of events(await call("v1/edits", body, abort.signal))) {
      known[event]?.(data);
      await on[event]?.(data, from);
    }
    if (!ended) throw new Problem("The connection was lost. Your pictures are kept: try again.");
  } catch (error) {
    if (error.name === "AbortError") setStatus("Cancelled. Nothing was changed.");
    else if (error instanceof Problem) { showError(error.param && $(`${error.param}_error`) ? error.param : where, error.message); setStatus(""); }
    else throw error;
  } finally {
    running = null;
    setRunning(false);
  }
}

function setRunning(yes) {
  if ($("working").contains(document.activeElement)) $("instruction").focus();
  for (const button of ["go", "make_grid"]) $(button).setAttribute("aria-disabled", yes);
  $("working").hidden = !yes;
  $("bar").removeAttribute("value");
  $("steps").textContent = "waiting in the queue";
  if (base) drawPicture();
}

async function edit() {
  if (!await canBegin()) return;
  const wanted = settings(), began = performance.now();
  setStatus(`Editing: ${wanted.instruction}`);
  $("frame").scrollIntoView({block: "nearest"});
  await run([wanted], Math.ceil(wanted.num_inference_steps / PREVIEWS), "run", {
    preview(preview, from) { if (base === from) drawPicture(toURL(preview)); },
    async result(made, from) {
      const node = await add(toBlob(made), from, {made: {...made, image: null}});
      compareAt(50);
      show(from, node);
      setStatus(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s: ${made.instruction}. Seed ${made.seed}.`);
    },
  });
}

function cancel() { running?.abort(); }


// ---- the grid

/** Return `count` values around a slider's own value, which is one of them, within its range. */
function around(name, count) {
  const slider = $(name), [low, high, fine, value] = [slider.min, slider.max, slider.step, slider.value].map(Number);
  const widest = (high - low) / (count - 1), wanted = name === "guidance_scale" ? value / 2 : 0.5;
  const step = Math.max(fine, Math.floor(Math.min(wanted, widest) / fine + 1e-9) * fine);
  const below = Math.min(Math.floor((value - low) / step + 1e-9), Math.max(1, count - 1 - Math.floor((high - value) / step + 1e-9)));
  return Array.from({length: count}, (_, k) => Number((value + (k - below) * step).toFixed(2)));
}

async function makeGrid() {
  if (!await canBegin()) return;
  const side = Number($("grid_side").value), wanted = settings();
  wanted.seed ??= drawnSeed();
  const [rows, columns] = SCALES.map(name => around(name, side));
  const edits = rows.flatMap(row => columns.map(column => ({...wanted, image_guidance_scale: row, guidance_scale: column})));
  const cells = drawGrid(rows, columns);
  let ready = 0;
  setStatus(`Making ${edits.length} edits: ${wanted.instruction}`);
  await run(edits, 0, "grid", {
    progress({index, step, steps}) { cells[index].style.setProperty("--done", `${100 * step / steps}%`); },
    result(made, from) {
      fillCell(cells[made.index], made, from);
      ready++;
      if (ready === edits.length) setStatus(`The grid is ready: ${wanted.instruction}. Seed ${wanted.seed}.`);
    },
  });
}

function drawGrid(rows, columns) {
  const cells = [], table = $("grid");
  table.hidden = false;
  table.style.setProperty("--aspect", base.width / base.height);
  table.replaceChildren();
  table.createCaption().className = "unseen";
  table.caption.textContent = "Edits by both scales: rows stay closer to the image, columns follow the text more";
  const head = table.insertRow();
  head.insertCell();
  const heading = (row, scope, symbol, value) => {
    const cell = document.createElement("th");
    cell.scope = scope;
    cell.innerHTML = `s<sub>${symbol}</sub> ${value}`;
    row.append(cell);
  };
  for (const column of columns) heading(head, "col", "T", column);
  for (const row of rows) {
    const line = table.insertRow();
    heading(line, "row", "I", row);
    for (const column of columns) {
      const button = Object.assign(document.createElement("button"), {type: "button", className: "cell", tabIndex: cells.length ? -1 : 0});
      button.setAttribute("aria-label", `s_I ${row}, s_T ${column}`);
      button.setAttribute("aria-disabled", true);
      line.insertCell().append(button);
      cells.push(button);
    }
  }
  table.onkeydown = event => {
    const at = cells.indexOf(event.target), x = at % columns.length;
    const to = {ArrowLeft: x ? at - 1 : at, ArrowRight: x < columns.length - 1 ? at + 1 : at, ArrowUp: at - columns.length, ArrowDown: at + columns.length}[event.key];
    if (at < 0 || !cells[to]) return;
    event.preventDefault();
    cells[at].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  };
  return cells;
}

function fillCell(cell, made, from) {
  const blob = toBlob(made), picture = new Image();
  picture.src = toURL(made);
  picture.alt = "";
  picture.classList.toggle("pixels", isSmall(from.width, from.height));
  cell.replaceChildren(picture);
  cell.setAttribute("aria-disabled", false);
  let node = null;
  cell.onclick = async () => {
    node ??= await add(blob, from, {made: {...made, image: null}});
    for (const other of $("grid").querySelectorAll(".cell")) other.setAttribute("aria-current", other === cell);
    for (const name of SCALES) setSlider(name, made[name]);
    show(from, node);
    setStatus(`Using s_I ${made.image_guidance_scale}, s_T ${made.guidance_scale}.`);
  };
}


// ---- feedback

async function rate(choice) {
  const node = result;
  if (!node || node.choice === choice) return;
  clearErrors("feedback");
  try {
    await call("v1/feedback", {edit_id: node.made.edit_id, choice});
    node.choice = choice;
    if (result === node) drawPicture();
    setStatus("Thank you, your feedback is saved.");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showError("feedback", error.message);
  }
}


// ---- clicks, drops, pastes and keys

$("form").onsubmit = event => { event.preventDefault(); edit(); };
$("cancel").onclick = cancel;
$("make_grid").onclick = makeGrid;
$("undo").onclick = undo;
$("redo").onclick = redo;
$("further").onclick = further;
$("reuse").onclick = () => useSettings(result.made);
$("up").onclick = () => rate("up");
$("down").onclick = () => rate("down");
$("dice").onclick = () => { $("seed").value = drawnSeed(); clearErrors("seed"); };
$("reset").onclick = () => { if (defaults) useDefaults(); };
$("another").onclick = () => $("file").click();
$("help").onclick = () => $("shortcuts").showModal();
$("close_help").onclick = () => $("shortcuts").close();
$("key_cancel").onclick = () => $("key_dialog").close();
for (const name of SLIDERS) $(name).oninput = drawSliders;

$("file").onchange = () => { if ($("file").files[0]) choose($("file").files[0]); $("file").value = ""; };
document.ondragover = event => { event.preventDefault(); $("frame").classList.add("over"); };
document.ondragleave = event => { if (!event.relatedTarget) $("frame").classList.remove("over"); };
document.ondrop = event => {
  event.preventDefault();
  $("frame").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) choose(file);
  else showError("image", "That is not a file: save the picture and drop the file, or copy the picture and paste it.");
};
document.onpaste = event => {
  const file = event.clipboardData.files[0];
  if (file) { event.preventDefault(); choose(file); }
};

const KEYS = {
  "/": () => $("instruction").focus(),
  o: () => $("file").click(),
  f: further,
  g: makeGrid,
  d: () => { if (result) $("save").click(); },
  "+": () => rate("up"),
  "-": () => rate("down"),
  "?": () => $("shortcuts").showModal(),
};

document.onkeydown = event => {
  if (document.querySelector("dialog[open]") || event.altKey) return;
  const typing = event.target.matches("input:not([type=range]), select"), key = event.key.toLowerCase();
  if (key === "escape") cancel();
  else if (event.ctrlKey || event.metaKey) {
    const action = key === "y" || (key === "z" && event.shiftKey) ? redo : key === "z" ? undo : null;
    if (!action || typing) return;
    event.preventDefault();
    action();
  } else if (!typing && KEYS[key] && $("single_keys").checked) {
    event.preventDefault();
    KEYS[key]();
  }
};


// ---- start

for (const {caption, instructions, png} of EXAMPLES) {
  const example = {image: png, output_format: "png"}, button = thumbnail(toURL(example), {width: 32, height: 32}, "");
  button.classList.add("example");
  button.setAttribute("aria-label", button.title = caption);
  button.onclick = () => choose(toBlob(example), instructions);
  $("examples").append(button);
}
drawSliders();
drawChips();
compareAt(50);
loadDefaults().catch(error => {
  if (!(error instanceof Problem)) throw error;
  showError("run", error.message);
});

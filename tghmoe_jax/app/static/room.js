// The page: opens a scan, asks, shows answers and what they rest on. Text is only ever set as text, never as markup.
import { Viewer } from "/views.js";
import { answerCard, element } from "/answers.js";
import { WebglViewer } from "/webgl.js";
import { gather, packed } from "/files.js";

const $ = (id) => document.getElementById(id);
const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"];
let token = "", facts = null, answers = [], shown = null;

// ---- the server -----------------------------------------------------------------------------------------------------

async function call(method, path, body) {
  const headers = { "x-session": token };
  if (body !== undefined && !(body instanceof Blob)) body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(`/api/${path}`, { method, headers, body });
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  if (response.ok) return response;
  let said = "the server refused the request.";
  try { said = (await response.json()).error; } catch { /* a text of the guard */ }
  throw new Error(said);
}

function upload(blob) { // XMLHttpRequest, since fetch tells nothing of the way
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `/api/upload?assume_hu=${$("assume").checked ? 1 : 0}`);
    request.setRequestHeader("x-session", token);
    request.upload.onprogress = (event) => {
      say(`The files are sent: ${Math.round((100 * event.loaded) / event.total)} %`);
      Object.assign($("progress"), { max: event.total, value: event.loaded });
    };
    request.onload = () => {
      let found = {};
      try { found = JSON.parse(request.responseText); } catch { /* below */ }
      if (request.status === 200) resolve(found);
      else reject(new Error(found.error || "the server refused the files."));
    };
    request.onerror = () => reject(new Error("the files did not arrive; the server refused them or has ended."));
    request.onabort = () => reject(new Error(""));
    current = request;
    request.send(blob);
  });
}

let current = null;
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function finished() {
  for (let wait = 100; ; wait = Math.min(wait * 1.5, 600)) {
    const job = await (await call("GET", "job")).json();
    if (job.state === "done") return job.result;
    if (job.state === "failed") throw new Error(job.error);
    if (job.state === "cancelled") throw new Error("");
    say(job.state === "waiting" ? `Waiting: ${job.place} before you` : `Working: ${job.step || "begins"}`);
    await pause(wait);
  }
}

// One request at a time; its error is shown, and what is done.
async function during(what, action) {
  $("error").textContent = "";
  $("working").hidden = false;
  $("progress").removeAttribute("value");
  document.querySelectorAll("button:not(#cancel), #file, #folder").forEach((one) => { one.disabled = true; });
  say(what);
  try {
    say((await action()) || "");
  } catch (error) {
    $("error").textContent = error.message && `Error: ${error.message}`;
    say(error.message ? "" : "Cancelled.");
  }
  current = null;
  $("working").hidden = true;
  document.querySelectorAll("button, #file, #folder").forEach((one) => { one.disabled = false; });
  $("close").disabled = !viewer.scan;
}

function say(text) { $("status").textContent = text; }

$("cancel").onclick = () => {
  if (current) current.abort();
  else call("DELETE", "job").catch(() => {});
};

// ---- opening --------------------------------------------------------------------------------------------------------

function took(result) {
  if (result.choices) {
    $("series").replaceChildren(...result.choices.map((label, i) => element("option", `${i + 1}: ${label}`, { value: i })));
    $("series-field").hidden = false;
    $("series").focus();
    return "Several scans were found; choose one.";
  }
  return show(result.scan);
}

async function show(scan) {
  const units = scan.unit === "HU" ? "HU" : "values of 0 to 1";
  const size = scan.stated ? `, voxels of ${scan.spacing.map((one) => one.toFixed(2)).join(" x ")} mm` : ", no spacing stated";
  $("scan").textContent = `Open: ${scan.kind}; ${scan.shape.join(" x ")} voxels (slices, rows, columns)${size}; ${units}` +
    (scan.affine ? "" : "; no orientation is stated, so no side is named");
  $("preset").replaceChildren(...Object.keys(scan.presets).map((name) => element("option", name.replace("_", " "), { value: name })));
  $("channel").replaceChildren(...scan.model.channels.map((name, i) => element("option", name.replace("_", " "), { value: i })));
  $("model").checked = false;
  $("channel").disabled = true;
  $("looking").hidden = $("asking").hidden = false;
  $("webgl-field").hidden = !(scan.volume && WebglViewer.possible());
  shown = null;
  presets = scan.presets;
  listOverlays();
  Object.assign(viewer, { model: false });
  choosePreset();
  await viewer.open(scan);
  return "The scan is open.";
}

let presets = {};
const viewer = new Viewer($("views"), async (query) => {
  try {
    const response = await call("GET", `slice?${query}`);
    return { type: response.headers.get("x-type"), buffer: await response.arrayBuffer() };
  } catch (error) {
    $("error").textContent = `Error: ${error.message}`;
    return null;
  }
}, (cross, pointer) => {
  $("cross").value = cross && `Crosshair: ${cross}`;
  if (pointer !== undefined) $("pointer").value = pointer;
});
viewer.onwindow = (centre, width, tell) => {
  if (tell) {
    $("centre").value = Number(centre.toFixed(2));
    $("width").value = Number(width.toFixed(2));
  }
  webgl.setWindow(centre, width);
};
viewer.onmove = () => { if (viewer.scan.affine) webgl.moveTo(viewer.mm(viewer.cross)); };

const webgl = new WebglViewer($("gl"), (mm) => viewer.moveTo(viewer.voxelOf(mm)));
$("webgl").onchange = () => {
  $("webgl-view").hidden = !$("webgl").checked;
  if (!$("webgl").checked) { webgl.close(); return; }
  during("The 3D views are loaded", async () => {
    await webgl.open(await (await call("GET", "volume")).arrayBuffer());
    webgl.setWindow(viewer.centre, viewer.width);
    viewer.onmove();
    return "The 3D views are there.";
  });
};

async function openFiles(list) {
  if (!list.length) return;
  $("series-field").hidden = true;
  await during("The files are sent", async () => {
    const blob = packed(list);
    if (blob.size > facts.limits.bytes) throw new Error(`the files have ${blob.size} bytes, more than the ${facts.limits.bytes} of this server.`);
    forget();
    await upload(blob);
    current = null;
    return took(await finished());
  });
}

function forget() {
  viewer.close();
  webgl.close();
  $("webgl").checked = false;
  $("webgl-view").hidden = true;
  $("looking").hidden = $("asking").hidden = true;
  $("scan").textContent = "";
}

for (const id of ["file", "folder"]) $(id).onchange = (event) => openFiles([...event.target.files]).then(() => { event.target.value = ""; });
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  openFiles(await gather(event.dataTransfer));
};
$("open-example").onclick = () => during("The example is opened", async () => {
  forget();
  $("series-field").hidden = true;
  await call("POST", "example", { number: Number($("example").value) });
  return took(await finished());
});
$("open-series").onclick = () => during("The scan is read", async () => {
  forget();
  await call("POST", "choose", { number: Number($("series").value) });
  return took(await finished());
});
$("close").onclick = () => during("The scan is closed", async () => {
  forget();
  $("series-field").hidden = true;
  await call("DELETE", "scan");
  return "The scan is closed and its files are removed.";
});

// ---- looking --------------------------------------------------------------------------------------------------------

function choosePreset() {
  const [centre, width] = presets[$("preset").value];
  viewer.setWindow(centre, width, true);
}

$("preset").onchange = choosePreset;
for (const id of ["centre", "width"]) {
  $(id).oninput = () => {
    const [centre, width] = [Number($("centre").value), Number($("width").value)];
    if (Number.isFinite(centre) && width > 0) viewer.setWindow(centre, width);
  };
}
$("model").onchange = $("channel").onchange = () => {
  $("channel").disabled = !$("model").checked;
  viewer.setModel($("model").checked, Number($("channel").value));
};

function listOverlays() {
  const found = [["", "none"]];
  if (shown && shown.parts) found.push(["regions", "evidence: regions"], ["slabs", "evidence: slabs"]);
  if (shown && shown.experts) shown.experts.layers.forEach((layer, i) => found.push([`layer${i}`, `experts of layer ${layer}`]));
  $("overlay").replaceChildren(...found.map(([value, name]) => element("option", name, { value })));
}

function drawOverlay() {
  const name = $("overlay").value, strength = Number($("strength").value) / 100;
  let boxes = [], legend = [], caption = "";
  if (name === "regions" || name === "slabs") {
    boxes = shown.parts[name].map((part, i) => ({ edges: part.edges, shade: part.shade, colour: "#ff2020",
      outline: name === "regions" && i === 0 }));
    caption = facts.captions.evidence;
  } else if (name) {
    const layer = Number(name.slice(5)), { edges, winner, load, experts } = shown.experts;
    const colour = (expert) => experts <= COLOURS.length ? COLOURS[expert] : `hsl(${(360 * expert) / experts} 90% 50%)`;
    winner[layer].forEach((slab, d) => slab.forEach((line, y) => line.forEach((expert, x) => {
      if (expert >= 0) boxes.push({ edges: [edges[0][d], edges[1][y], edges[2][x]], shade: 1, colour: colour(expert) });
    })));
    legend = load[layer].map((share, expert) => [colour(expert), `expert ${expert}: ${Math.round(100 * share)} % of the tokens`]);
    caption = facts.captions.experts;
  }
  $("caption").textContent = name ? `Of answer ${shown.number}. ${caption}` : "";
  $("legend").replaceChildren(...legend.map(([colour, text]) => {
    const item = element("li", text), mark = element("span", "");
    mark.style.background = colour;
    item.prepend(mark);
    return item;
  }));
  viewer.setOverlay(boxes, strength);
}

$("overlay").onchange = $("strength").oninput = drawOverlay;

function overlayOf(answer, name, edges) {
  if (answer.opening !== viewer.scan) {
    $("error").textContent = "Error: that answer is about a scan that is not open any more.";
    return;
  }
  shown = answer;
  listOverlays();
  $("overlay").value = name;
  drawOverlay();
  if (edges) viewer.moveTo(edges.map(([low, high]) => (low + high) / 2 - 0.5));
  $("looking").scrollIntoView();
  $("view-0").focus({ preventScroll: true });
}

// ---- asking ---------------------------------------------------------------------------------------------------------

$("report").onchange = () => {
  for (const id of ["question", "choices", "accuracy"]) $(id).disabled = $("report").checked;
};
$("question").onchange = () => {
  const known = facts.suggestions.find((one) => one.question === $("question").value);
  if (known) $("choices").value = known.choices.join(" | ");
};

$("form").onsubmit = (event) => {
  event.preventDefault();
  const choices = $("choices").value.split("|").map((one) => one.trim()).filter(Boolean);
  const accuracy = $("accuracy").value && !$("report").checked ? Number($("accuracy").value) / 100 : null;
  const asked = { question: $("question").value, choices: $("report").checked ? [] : choices, report: $("report").checked,
    evidence: $("evidence").checked, min_accuracy: accuracy };
  const which = $("checkpoint").value === "all" ? facts.checkpoints.map((_, i) => i) : [Number($("checkpoint").value)];
  during("The question is sent", async () => {
    for (const checkpoint of which) {
      await call("POST", "ask", { ...asked, checkpoint });
      const { answer } = await finished();
      answer.opening = viewer.scan;
      answers.push(answer);
      shown = answer;
      $("answered").hidden = false;
      $("answers").prepend(answerCard(answer, facts, overlayOf));
    }
    listOverlays();
    if (shown.parts) $("overlay").value = "regions";
    drawOverlay();
    if (which.length > 1) { $("beside").checked = true; $("beside").onchange(); }
    return `Answer ${shown.number}: ${shown.refusal || shown.text || "(no text)"}`;
  });
};

$("beside").onchange = () => $("answers").classList.toggle("beside", $("beside").checked);
document.querySelectorAll("[data-keep]").forEach((button) => {
  button.onclick = async () => {
    try {
      const form = button.dataset.keep, response = await call("GET", `keep?form=${form}`);
      const link = element("a", "", { href: URL.createObjectURL(await response.blob()), download: `answers.${form}` });
      link.click();
      URL.revokeObjectURL(link.href);
    } catch (error) { $("error").textContent = `Error: ${error.message}`; }
  };
});

// ---- beginning and end ----------------------------------------------------------------------------------------------

addEventListener("pagehide", () => {
  if (token) fetch("/api/session", { method: "DELETE", headers: { "x-session": token }, keepalive: true });
});
setInterval(() => { if (token) call("GET", "job").catch(() => {}); }, 300_000); // the page is still open
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

try {
  facts = await (await call("POST", "session")).json();
  token = facts.token;
  $("disclaimer").textContent = facts.disclaimer;
  $("example").replaceChildren(...facts.examples.map((label, i) => element("option", label, { value: i })));
  $("suggestions").replaceChildren(...facts.suggestions.map((one) => element("option", "", { value: one.question })));
  const names = facts.checkpoints.map((name, i) => element("option", name, { value: i }));
  if (names.length > 1) names.push(element("option", "all, side by side", { value: "all" }));
  $("checkpoint").replaceChildren(...names);
  document.body.dataset.ready = "yes";
} catch (error) {
  $("error").textContent = `Error: ${error.message}`;
}

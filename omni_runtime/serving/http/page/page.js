// Asks the server for a picture, shows it while it is made, and compares it with the one without a cache.
"use strict";
const form = document.getElementById("ask");
const at = (id) => document.getElementById(id);
const field = (name) => form.elements[name];
let model = null, running = null;

function say(text, error = "") {
  at("status").textContent = text;
  at("error").textContent = error;
}

function headers() {
  return field("key").value ? { Authorization: "Bearer " + field("key").value } : {};
}

async function asked(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.ok) return answer;
  if (answer.status === 401) at("key").hidden = false;
  let message = "the server answered with " + answer.status;
  try { message = (await answer.json()).error.message; } catch { /* no JSON */ }
  const error = new Error(message);
  error.status = answer.status;
  throw error;
}

// The model: what it can do

async function learn() {
  try {
    const ready = await fetch("/ready");
    if (!ready.ok) {
      at("about").textContent = "The model is " + ((await ready.json()).status === "loading" ? "being loaded." : "not ready.");
      setTimeout(learn, 1000);
      return;
    }
    model = (await (await asked("/v1/models")).json()).data[0].omni;
  } catch (error) {
    at("about").textContent = error.status === 401 ? "This server needs an API key." : "The server does not answer.";
    if (error.status !== 401) setTimeout(learn, 3000);
    return;
  }
  at("about").textContent = "Makes " + (model.makes === "video" ? "videos" : "pictures") +
    (model.references === "needed" ? " from a prompt and reference pictures." : " from a prompt.");
  field("size").placeholder = model.defaults.size || "auto";
  field("steps").placeholder = model.defaults.steps || "";
  at("references").hidden = model.references === "none";
  field("image").required = model.references === "needed";
  const names = Object.keys(model.methods);
  field("method").replaceChildren(...["none", ...names].map((name) => new Option(name === "none" ? "no cache" : name, name)));
  field("method").value = model.cache_backend || names[0] || "none";
  chosen();
}

function chosen() {
  const method = field("method").value;
  at("method-about").textContent = (model && model.methods[method]) || "";
  at("compare").hidden = !model || method === "none" || model.makes === "video";
}

// A figure: a picture, its bar of steps, and what it took

function begin(id, title) {
  const figure = at(id);
  figure.hidden = false;
  figure.querySelector(".frame").replaceChildren();
  figure.querySelector(".bar").replaceChildren();
  caption(figure, title, "");
  at("legend").hidden = false;
  return figure;
}

function caption(figure, title, text, link) {
  const head = document.createElement("b");
  head.textContent = title;
  figure.querySelector("figcaption").replaceChildren(head, text + " ", ...(link ? [link] : []));
}

function show(figure, source, name, size) {
  const frame = figure.querySelector(".frame");
  const image = frame.querySelector("img") || frame.appendChild(document.createElement("img"));
  image.alt = name;
  image.src = source;
  const [width, height] = size.split("x").map(Number);
  frame.style.setProperty("--ratio", width / height);
  image.className = width < 256 ? "small" : "";
}

function steps(figure, total) {
  const bar = figure.querySelector(".bar");
  if (bar.childElementCount !== total)
    bar.replaceChildren(...Array.from({ length: total }, () => document.createElement("i")));
  return bar;
}

function told(bar) {
  const count = (kind) => bar.querySelectorAll("." + kind).length;
  bar.setAttribute("aria-label", `of ${bar.childElementCount} steps, ${count("computed")} computed, ${count("skipped")} skipped`);
}

function mark(figure, event) {
  const bar = steps(figure, event.steps);
  bar.children[event.step].className = event.computed ? "computed" : "skipped";
  told(bar);
}

function finish(figure, title, omni, source, file) {
  const bar = steps(figure, omni.steps);
  [...omni.mask].forEach((one, step) => { bar.children[step].className = one === "1" ? "computed" : "skipped"; });
  told(bar);
  const link = document.createElement("a");
  link.href = source;
  link.download = file;
  link.textContent = "Save";
  caption(figure, title, `${omni.seconds.toFixed(2)} s, ${omni.computed} of ${omni.steps} steps computed, seed ${omni.seed}.`, link);
}

// Asking

function values() {
  const given = { prompt: field("prompt").value };
  for (const name of ["size", "steps", "seed"]) {
    const value = field(name).value.trim().replace("×", "x");
    if (value) given[name] = name === "size" ? value : Number(value);
  }
  given.cache_backend = field("method").value;
  return given;
}

function request(path, given, signal) {
  const files = at("references").hidden ? [] : [...field("image").files];
  if (!files.length && path !== "/v1/videos")
    return asked(path, { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(given) });
  const body = new FormData();
  for (const [name, value] of Object.entries(given)) body.append(name, value);
  for (const file of files) body.append(path === "/v1/videos" ? "input_reference" : "image[]", file);
  return asked(files.length && path !== "/v1/videos" ? "/v1/images/edits" : path, { method: "POST", signal, body });
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

async function picture(signal) {
  const given = { ...values(), stream: true, progress: true, partial_images: 3 };
  given.compare = field("compare").checked && !at("compare").hidden;
  const answer = await request("/v1/images/generations", given, signal);
  const title = given.cache_backend === "none" ? "no cache" : given.cache_backend;
  const made = begin("made", title);
  const other = given.compare ? begin("reference", "no cache") : null;
  let facts = null, finished = false;
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const source = event.b64_json && "data:image/" + (event.output_format || "png") + ";base64," + event.b64_json;
    if (event.type === "omni.step") mark(event.reference ? other : made, event);
    else if (event.type.endsWith(".partial_image")) show(event.reference ? other : made, source, "unfinished: " + given.prompt, event.size);
    else if (event.type.endsWith(".completed")) {
      facts = event.omni;
      show(made, source, given.prompt, event.size);
      finish(made, title, facts, source, `picture-${facts.seed}.png`);
      say(other ? "The picture is made. Now without a cache." : "The picture is made.");
      finished = !other;
    } else if (event.type === "omni.reference") {
      show(other, source, given.prompt + ", without a cache", event.size);
      finish(other, "no cache", event.omni, source, `picture-${facts.seed}-no-cache.png`);
      const near = event.identical ? "Identical pictures" : `PSNR ${event.psnr.toFixed(1)} dB`;
      at("verdict").textContent = `${near}, ${(event.omni.seconds / facts.seconds).toFixed(2)}× as fast`;
      say("Both pictures are made.");
      finished = true;
    }
  }
  if (!finished) throw new Error("the server ended the answer");
}

async function clip(signal) {
  let job = await (await request("/v1/videos", values(), signal)).json();
  const path = "/v1/videos/" + encodeURIComponent(job.id);
  const made = begin("made", job.omni.method || field("method").value);
  try {
    while (job.status === "queued" || job.status === "in_progress") {
      say(`${job.progress} % of the video is made.`);
      await new Promise((done) => setTimeout(done, 500));
      job = await (await asked(path, { signal })).json();
    }
  } catch (error) {
    fetch(path, { method: "DELETE", headers: headers() });
    throw error;
  }
  if (job.error) throw new Error(job.error.message);
  const blob = await (await asked(path + "/content", { signal })).blob();
  const source = URL.createObjectURL(blob);
  if (job.omni.format === "mp4") {
    const video = Object.assign(document.createElement("video"), { src: source, controls: true, loop: true, muted: true, autoplay: true });
    video.setAttribute("aria-label", job.prompt);
    made.querySelector(".frame").replaceChildren(video);
  } else show(made, source, job.prompt, job.size);
  finish(made, job.omni.method || "no cache", job.omni, source, `video-${job.omni.seed}.${job.omni.format}`);
  say("The video is made.");
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  at("reference").hidden = true;
  at("verdict").textContent = "";
  say("The server is at work.");
  try {
    if (!model) await learn();
    await (model && model.makes === "video" ? clip : picture)(running.signal);
  } catch (error) {
    say("", error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").disabled = true;
  }
});
at("stop").addEventListener("click", () => running && running.abort());
field("method").addEventListener("change", chosen);
field("key").addEventListener("change", learn);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
learn();

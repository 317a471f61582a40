// Page of ivlx chat. The server keeps the conversation; this file shows it.
"use strict";

const $ = (id) => document.getElementById(id);
const HEADERS = { "X-Ivlx": "1" };
const SIDES = { asked: [340, 260, 130], waiting: [200, 130, 90] }; // pixels: widest, highest, largest tile

let about = null;
let conversation = null; // its name at the server
let state = { pictures: [], waiting: 0, turns: 0 };
let busy = false;
let uploads = Promise.resolve();
let failed = null; // error of an upload since the last question
let cancelled = false; // whether a question that waits for uploads was stopped

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...HEADERS, ...options.headers } });
  } catch {
    throw new Error("the server does not answer; is ivlx chat still running?");
  }
  if (!response.ok) {
    const reply = await response.json().catch(() => ({}));
    throw new Error(reply.error || `the server answers ${response.status}`);
  }
  return response;
}

const own = (path) => `conversations/${conversation}/${path}`;
const post = async (path, body) => (await call(path, { method: "POST", body })).json();

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message || String(error) : "";
}

// ------------------------------------------------------------------------------------ pictures

// The picture as the model sees it: stretched to its grid, cut, the thumbnail beside it.
function cutPicture(picture, address, sides) {
  const [widest, highest, largest] = sides;
  const thumbnails = picture.thumbnail ? 1 : 0;
  const side = Math.floor(Math.min(largest, (widest - 60) / (picture.cols + thumbnails * 0.6), highest / picture.rows));
  const parts = element("div", "parts");
  const grid = element("div", "cut");
  grid.style.gridTemplate = `repeat(${picture.rows}, ${side}px) / repeat(${picture.cols}, ${side}px)`;
  for (let row = 0; row < picture.rows; row++) {
    for (let column = 0; column < picture.cols; column++) {
      const tile = element("span");
      tile.style.backgroundImage = `url("${address}")`;
      tile.style.backgroundSize = `${picture.cols * side}px ${picture.rows * side}px`;
      tile.style.backgroundPosition = `-${column * side}px -${row * side}px`;
      grid.append(tile);
    }
  }
  parts.append(grid);
  if (picture.thumbnail) {
    const small = element("div", "thumbnail");
    small.title = "thumbnail of the whole picture";
    small.style.backgroundImage = `url("${address}")`;
    small.style.width = small.style.height = `${Math.max(28, Math.floor(side * 0.6))}px`;
    parts.append(small);
  }
  return parts;
}

function figureOf(picture, number, sides) {
  const figure = element("figure");
  // The number alone may be another picture's after Undo, and the browser remembers what it has loaded.
  figure.append(cutPicture(picture, own(`pictures/${number}?${picture.digest}`), sides));
  const caption = element("figcaption");
  const name = element("b", "", picture.name);
  name.title = picture.name;
  const tokens = picture.shallow === picture.deep ? `${picture.deep}` : `${picture.shallow} → ${picture.deep}`;
  caption.append(name, `${picture.width} × ${picture.height} pixels`, element("br"),
    `${picture.cut.replace(" x ", " × ")}`, element("br"), `${tokens} visual tokens`);
  figure.append(caption);
  return figure;
}

function showWaiting() {
  const box = $("waiting");
  box.replaceChildren();
  const first = state.pictures.length - state.waiting;
  for (let number = first; number < state.pictures.length; number++) {
    const figure = figureOf(state.pictures[number], number, SIDES.waiting);
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.title = "Remove";
    remove.setAttribute("aria-label", `Remove ${state.pictures[number].name}`);
    remove.addEventListener("click", () =>
      attempt(async () => update(await (await call(own(`pictures/${number}`), { method: "DELETE" })).json())));
    figure.append(remove);
    box.append(figure);
  }
  box.hidden = !state.waiting;
}

function update(reply) {
  state = { pictures: reply.pictures, waiting: reply.waiting, turns: reply.turns };
  showWaiting();
  show();
}

async function attempt(action) {
  problem(null);
  try {
    await action();
  } catch (error) {
    problem(error);
  }
}

// One after the other, so that pictures keep the order in which they were given.
function addFiles(files) {
  const chosen = [...files];
  problem(null);
  if (!busy) failed = null; // shown before, and now other files were chosen
  for (const file of chosen) {
    uploads = uploads.then(async () => {
      try {
        if (file.size > about.max_bytes) {
          throw new Error(`${file.name}: ${Math.round(file.size / 1048576)} MiB, at most ${about.max_bytes >> 20} MiB are taken`);
        }
        update(await post(own(`pictures?name=${encodeURIComponent(file.name)}`), file));
      } catch (error) {
        failed = error;
        problem(error);
      }
    });
  }
  return uploads;
}

// -------------------------------------------------------------------------------- conversation

function show() {
  $("welcome").hidden = state.turns > 0 || busy;
  $("undo").disabled = busy || !state.turns;
  $("reset").disabled = busy || !(state.turns || state.waiting);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

function addQuestion(text, pictures, first) {
  const block = element("article", "question");
  if (pictures.length) {
    const row = element("div", "pictures");
    pictures.forEach((picture, index) => row.append(figureOf(picture, first + index, SIDES.asked)));
    block.append(row);
  }
  block.append(element("div", "text", text));
  $("log").append(block);
  return block;
}

function addAnswer() {
  const block = element("article", "answer running");
  block.append(element("div", "text"));
  $("log").append(block);
  return block;
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 120;
}

function follow(change) {
  const stay = atEnd();
  change();
  if (stay) $("log").scrollTop = $("log").scrollHeight;
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function settings() {
  return {
    max_new_tokens: $("max-new-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    system: $("system").value,
  };
}

// Whether a question can be asked after all uploads; otherwise the user sees why, and may ask again.
async function uploaded() {
  let last;
  do {
    last = uploads;
    await last;
  } while (last !== uploads);
  if (failed) problem(`${failed.message}; send again to ask without this picture`);
  const ready = !failed && !cancelled && $("question").value.trim();
  failed = null;
  return ready;
}

function stop() {
  cancelled = true;
  return attempt(() => post(own("stop")));
}

async function ask() {
  if (busy || !$("question").value.trim()) return;
  busy = true; // at once, or a second Enter during an upload would ask twice
  cancelled = false;
  show();
  const question = await uploaded();
  if (!question) {
    busy = false;
    show();
    return;
  }
  problem(null);
  const first = state.pictures.length - state.waiting;
  const asked = addQuestion(question, state.pictures.slice(first), first);
  const answer = addAnswer();
  const text = answer.querySelector(".text");
  $("question").value = "";
  grow();
  $("waiting").hidden = true;
  $("log").scrollTop = $("log").scrollHeight;
  let finished = false;
  try {
    const response = await call(own("ask"), { method: "POST", body: JSON.stringify({ question, ...settings() }) });
    for await (const item of linesOf(response)) {
      if (item.error) throw new Error(item.error);
      follow(() => {
        if (item.text) text.append(item.text);
        if (item.done) {
          finished = true;
          finish(answer, item.done);
          state = { pictures: item.pictures, waiting: item.waiting, turns: item.turns };
        }
      });
    }
    if (!finished) throw new Error("the answer broke off; is ivlx chat still running?");
  } catch (error) {
    asked.remove();
    answer.remove();
    $("question").value = question;
    grow();
    problem(error);
  }
  busy = false;
  showWaiting();
  show();
  $("question").focus();
}

function finish(answer, done) {
  const text = answer.querySelector(".text");
  text.textContent = done.answer || "(no text)";
  text.classList.toggle("empty", !done.answer);
  answer.classList.remove("running");
  answer.append(element("p", "figures", done.line.replaceAll(" | ", " · ").replace("->", "→")));
}

async function undo() {
  const reply = await post(own("undo"));
  for (const kind of ["answer", "question"]) [...document.querySelectorAll(`.${kind}`)].pop()?.remove();
  if (!$("question").value) $("question").value = reply.question;
  grow();
  update(reply);
  $("question").focus();
}

async function start() {
  conversation = (await post("conversations")).id;
  failed = null;
  document.querySelectorAll("article").forEach((block) => block.remove());
  update({ pictures: [], waiting: 0, turns: 0 });
  $("question").focus();
}

// ---------------------------------------------------------------------------------------- page

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function pasted(event) {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  addFiles(files);
}

function listenToDrops() {
  let depth = 0;
  const carries = (event) => [...event.dataTransfer.types].includes("Files");
  const shown = (event, change) => {
    if (!carries(event)) return;
    event.preventDefault();
    depth = Math.max(0, depth + change);
    $("drop").hidden = !depth;
  };
  addEventListener("dragenter", (event) => shown(event, 1));
  addEventListener("dragleave", (event) => shown(event, -1));
  addEventListener("dragover", (event) => shown(event, 0));
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    addFiles(event.dataTransfer.files);
  });
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  $("files").addEventListener("change", () => {
    addFiles($("files").files);
    $("files").value = "";
  });
  $("stop").addEventListener("click", stop);
  $("undo").addEventListener("click", () => attempt(undo));
  $("reset").addEventListener("click", () => attempt(start));
  $("settings-button").addEventListener("click", () => {
    $("settings").hidden = !$("settings").hidden;
    $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && busy) stop();
  });
  addEventListener("paste", pasted);
  listenToDrops();
}

attempt(async () => {
  about = await (await call("about")).json();
  await start(); // before anything can be given: a picture belongs to a conversation
  listen();
  const folder = about.source.split(/[\\/]/).filter(Boolean).pop();
  $("name").textContent = `${about.name} · ${folder}`;
  document.title = `${folder} · ivlx chat`;
  $("facts").textContent = about.short;
  $("facts").title = about.lines.join("\n");
  $("more-facts").textContent = about.lines.join(" · ");
  $("system").value = about.system;
  $("max-new-tokens").value = about.sampling.max_new_tokens;
  $("temperature").value = about.sampling.temperature;
});

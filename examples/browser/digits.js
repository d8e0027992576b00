// The page and its worker: this file is loaded as both. The page keeps what is typed and shows pictures. The worker
// loads the model and draws one digit at a time, so that the page stays responsive.
"use strict";

const RUNTIME = "ort.wasm.bundle.min.mjs"; // onnxruntime-web
const WASM = "ort-wasm-simd-threaded.wasm";
const MODEL = "sampler.onnx";
const SIZE = 28; // pixels of a digit's side
const PIXELS = SIZE * SIZE;

if (typeof document === "undefined") runWorker();
else runPage();

// ---- the worker ----------------------------------------------------------------------------------------------------

async function runWorker() {
  let session;
  let ort;

  /** Return the bytes of a file of this folder; report how many have come. */
  async function download(name, progress) {
    const response = await fetch(name);
    if (!response.ok) throw new Error(`${name} is missing (status ${response.status}).`);
    // A compressed answer tells its compressed length, which says nothing about the bytes that come out.
    const length = response.headers.get("Content-Encoding") ? NaN : Number(response.headers.get("Content-Length"));
    const chunks = [];
    let loaded = 0;
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      chunks.push(part.value);
      loaded += part.value.length;
      progress(name, loaded, length || NaN);
    }
    return new Uint8Array(await new Blob(chunks).arrayBuffer());
  }

  async function load() {
    const files = {};
    const progress = (name, loaded, total) => {
      files[name] = { loaded, total };
      const sum = (key) => Object.values(files).reduce((before, file) => before + file[key], 0);
      const known = Object.keys(files).length === 2;
      postMessage({ type: "progress", loaded: sum("loaded"), total: known ? sum("total") : NaN });
    };
    const [runtime, wasm, model] = await Promise.all([
      import(`./${RUNTIME}`).catch(() => { throw new Error(`${RUNTIME} is missing or not supported here.`); }),
      download(WASM, progress),
      download(MODEL, progress),
    ]);
    ort = runtime;
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
    ort.env.wasm.wasmBinary = wasm;
    session = await ort.InferenceSession.create(model);
    postMessage({ type: "ready" });
  }

  onmessage = async ({ data: { key, digit, noise } }) => {
    try {
      const start = performance.now();
      const { images, latents } = await session.run({
        noise: new ort.Tensor("float32", noise, [1, 1, SIZE, SIZE]),
        class_labels: new ort.Tensor("int64", [BigInt(digit)], [1]),
      });
      // Frames in [0, 1]: the noise, x_t after each step but the last, and the image. Latents are about [-1, 1].
      const frames = [...noise, ...latents.data.subarray(0, -PIXELS)].map((value) => value / 2 + 0.5);
      const film = Uint8ClampedArray.from([...frames, ...images.data], (value) => 255 * value);
      postMessage({ type: "digit", key, film, milliseconds: performance.now() - start });
    } catch (error) {
      postMessage({ type: "problem", message: `The model could not draw. ${error.message}` });
    }
  };

  load().catch((error) => {
    postMessage({ type: "problem", message: `The model could not be loaded. ${error.message}` });
  });
}

// ---- the page ------------------------------------------------------------------------------------------------------

/** Return a digit's noise, standard normal. The same seed and stream give the same noise in every browser. */
function normal(seed, stream) {
  let state = Math.imul(seed + 1, 0x9e3779b1) ^ Math.imul(stream + 1, 0x85ebca6b);
  const uniform = () => { // mulberry32, in (0, 1)
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return (((bits ^ (bits >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  const gaussian = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()); // Box and Muller
  return Float32Array.from({ length: PIXELS }, gaussian);
}

/** Return the noise at an angle of the circle through two pictures of noise. It is standard normal at every angle. */
function noiseAt(seed, position, degrees) {
  const radians = (degrees % 360) * Math.PI / 180;
  const [start, quarter] = [normal(seed, 2 * position), normal(seed, 2 * position + 1)];
  return start.map((value, i) => Math.cos(radians) * value + Math.sin(radians) * quarter[i]);
}

function runPage() {
  const at = (id) => document.getElementById(id);
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const [picture, status, progress, text, seed, angle, steps] =
    ["picture", "status", "progress", "text", "seed", "angle", "steps"].map(at);
  const drawn = new Map(); // key of a digit -> its film, the frames one after the other, one byte a pixel
  let cells = []; // of what is typed: { digit, position, key, film, canvas }, or {} for a gap
  let ready = false; // whether the model is loaded
  let inFlight = null; // key of the digit that the worker draws
  let last = -1; // index of the cell that was drawn last
  let frames = 0; // of a film: the noise and the picture after each step
  let shown = 0; // index of the frame in the large picture
  let milliseconds = [];
  let timer = null;

  function problem(message) {
    at("problem").textContent = message;
    at("problem").hidden = false;
    status.textContent = "";
    progress.hidden = true;
    picture.setAttribute("aria-busy", "false");
  }

  if (location.protocol === "file:") {
    return problem("Open this page through a web server, for example python -m http.server in its folder: browsers"
      + " load no model from a file.");
  }
  if (typeof WebAssembly !== "object" || typeof Worker !== "function") {
    return problem("This browser has no WebAssembly, or it is switched off, so the model cannot run here.");
  }

  const worker = new Worker("digits.js");
  worker.onerror = () => problem("The model could not start in this browser. A newer browser may help.");
  worker.onmessage = ({ data }) => {
    if (data.type === "problem") return problem(data.message);
    if (data.type === "progress") return showProgress(data);
    if (data.type === "ready") {
      ready = progress.hidden = true;
      return askForNext();
    }
    inFlight = null;
    milliseconds.push(data.milliseconds);
    performance.measure("digit", { start: performance.now() - data.milliseconds, duration: data.milliseconds });
    drawn.set(data.key, data.film);
    if (drawn.size > 500) drawn.delete(drawn.keys().next().value);
    if (!frames) makeSteps(data.film.length / PIXELS);
    takeDrawn();
    askForNext();
  };

  function showProgress({ loaded, total }) {
    const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
    if (total) progress.value = loaded / total;
    else progress.removeAttribute("value");
    status.textContent = `Loading the model: ${megabytes(loaded)}${total ? ` of ${megabytes(total)}` : ""} MB`;
  }

  /** Make the cells of what is typed. A digit keeps its picture until the new one is drawn. */
  function update() {
    const old = cells.filter((cell) => cell.canvas);
    let position = 0;
    cells = Array.from(text.value, (character) => {
      if (!/[0-9]/.test(character)) return {};
      const canvas = old[position]?.canvas ?? make("canvas", { width: SIZE, height: SIZE });
      const key = [character, position, seed.valueAsNumber, angle.valueAsNumber % 360].join();
      const film = old[position]?.film ?? null;
      return { digit: Number(character), position: position++, key, film, canvas };
    });
    // Digits between gaps are a group, so that a line breaks at a gap.
    const groups = [[]];
    for (const { canvas } of cells) canvas ? groups.at(-1).push(canvas) : groups.push([]);
    picture.replaceChildren(...groups.filter((group) => group.length).map((group) => {
      const element = make("div");
      element.append(...group);
      return element;
    }));
    picture.classList.toggle("long", cells.length > 8);
    picture.setAttribute("aria-label", position ? `Handwritten digits: ${text.value}` : "No digits yet");
    angle.setAttribute("aria-valuetext", `${angle.value} degrees`);
    takeDrawn();
    askForNext();
  }

  /** Give the cells the pictures that are drawn already, and show them. */
  function takeDrawn() {
    for (const cell of cells) {
      if (cell.canvas) cell.film = drawn.get(cell.key) ?? cell.film;
    }
    show();
  }

  const waiting = (cell) => cell.canvas && !drawn.has(cell.key);

  /** Have the next digit drawn, in turn, so that none starves while the slider moves. */
  function askForNext() {
    const count = cells.filter((cell) => cell.canvas).length;
    const left = cells.filter(waiting).length;
    picture.setAttribute("aria-busy", String(left > 0));
    at("download").disabled = left > 0 || !count;
    at("play").disabled = !frames || !count;
    if (!left) {
      if (milliseconds.length) {
        const middle = milliseconds.sort((a, b) => a - b)[milliseconds.length >> 1];
        status.textContent = `Drawn in ${Math.round(middle)} ms a digit.`;
      } else if (ready && !count) status.textContent = "Type digits to draw.";
      milliseconds = [];
      return;
    }
    if (!ready || inFlight !== null) return;
    const order = cells.map((_, i) => (last + 1 + i) % cells.length);
    last = order.find((i) => waiting(cells[i]));
    const { key, digit, position } = cells[last];
    inFlight = key;
    status.textContent = "Drawing";
    worker.postMessage({ key, digit, noise: noiseAt(seed.valueAsNumber, position, angle.valueAsNumber) });
  }

  /** Return one frame of a film as black ink, opaque where the digit is white in MNIST. */
  function inked(film, frame) {
    const image = new ImageData(SIZE, SIZE);
    for (let i = 0; i < PIXELS; i++) image.data[4 * i + 3] = film[frame * PIXELS + i];
    return image;
  }

  /** Draw one frame of all digits side by side. */
  function drawRow(canvas, frame) {
    const places = [];
    let width = 0;
    for (const cell of cells) {
      if (cell.film) places.push([cell.film, width]);
      width += cell.canvas ? SIZE : SIZE / 2;
    }
    Object.assign(canvas, { width: Math.max(width, 1), height: SIZE });
    for (const [film, left] of places) canvas.getContext("2d").putImageData(inked(film, frame), left, 0);
  }

  function show() {
    for (const { canvas, film } of cells) {
      if (!canvas) continue;
      const context = canvas.getContext("2d");
      if (film) context.putImageData(inked(film, shown), 0, 0);
      else context.clearRect(0, 0, SIZE, SIZE);
    }
    steps.querySelectorAll("canvas").forEach(drawRow);
  }

  /** Make a line for each frame: a choice of what the large picture shows, and the frame. */
  function makeSteps(count) {
    frames = count;
    shown = count - 1;
    for (let frame = 0; frame < count; frame++) {
      const label = make("label");
      const input = make("input", { type: "radio", name: "step", checked: frame === shown });
      const name = make("span", { textContent: frame ? `Step ${frame}` : "Noise" });
      input.addEventListener("change", () => { stop(); choose(frame); });
      label.append(input, name, make("canvas"));
      steps.append(label);
    }
  }

  function choose(frame) {
    shown = frame;
    steps.querySelectorAll("input")[frame].checked = true;
    show();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    at("play").textContent = "Play";
  }

  at("play").addEventListener("click", () => {
    if (timer !== null) return stop();
    at("play").textContent = "Stop";
    choose(0);
    timer = setInterval(() => {
      choose(shown + 1);
      if (shown === frames - 1) stop();
    }, 500);
  });

  at("download").addEventListener("click", () => {
    const row = make("canvas");
    drawRow(row, shown);
    const scale = 8;
    const large = make("canvas", { width: scale * row.width, height: scale * row.height });
    const context = large.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, large.width, large.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(row, 0, 0, large.width, large.height);
    large.toBlob((blob) => {
      const download = `${text.value.replace(/[^0-9]+/g, "-")}-seed-${seed.value}.png`;
      const link = make("a", { download, href: URL.createObjectURL(blob) });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }, "image/png");
  });

  at("new").addEventListener("click", () => {
    seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
    update();
  });
  // A seed that is no whole number in range is not drawn; the browser marks the field.
  for (const input of [text, seed, angle]) {
    input.addEventListener("input", () => { if (seed.checkValidity() && seed.value) update(); });
  }
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  update();
}

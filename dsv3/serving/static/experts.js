// Beside an answer: which experts its tokens used, layer by layer, the drafts kept, and the speed.

import { make } from "./elements.js";

const CELL = 11, GAP = 1, LABEL = 46;

export function speedOf(timings, usage) {
  if (!timings) return "";
  const written = usage.completion_tokens;
  const parts = [`${written} token${written === 1 ? "" : "s"}`, `${timings.tokens_per_second.toFixed(1)} tokens/s`];
  if (timings.first_token_seconds !== null) parts.push(`first after ${timings.first_token_seconds.toFixed(2)} s`);
  if (timings.drafts_made) parts.push(`${timings.drafts_kept} of ${timings.drafts_made} drafts kept`);
  const cached = usage.prompt_tokens_details?.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens reused`);
  return parts.join(" · ");
}

// tokens: [{text, experts: [layer][k]}]; model: its card of /v1/models.
export function expertsPanel(tokens, model) {
  const used = tokens.filter((token) => token.experts.length);
  if (!used.length) return null;
  const names = model.expert_layers.map((name) => name.replace("layers.", "layer "));
  const load = names.map(() => new Array(model.experts).fill(0));
  for (const token of used) token.experts.forEach((chosen, layer) => chosen.forEach((expert) => load[layer][expert]++));
  const canvas = make("canvas", { role: "img" });
  canvas.setAttribute("aria-label", `Tokens of each expert, ${names.length} layers by ${model.experts} experts`);
  const words = make("p", { class: "quiet", role: "status" });
  const strip = make("div", { class: "tokens", tabIndex: 0, role: "group" });
  strip.setAttribute("aria-label", "Tokens; the arrow keys choose one");
  const spans = tokens.map((token) => make("span", {}, shown(token.text)));
  strip.append(...spans);
  let chosen = -1;

  function choose(place) {
    spans[chosen]?.removeAttribute("class");
    chosen = place;
    spans[chosen]?.setAttribute("class", "chosen");
    draw(canvas, names, load, tokens[chosen]?.experts ?? []);
    words.textContent = place < 0 ? "The stronger the colour, the more of this answer's tokens. Choose a token to see its experts." :
      `${shown(tokens[place].text)}: ` +
      tokens[place].experts.map((ids, i) => `${names[i]}: ${[...ids].sort((a, b) => a - b).join(", ")}`).join("; ");
  }

  strip.addEventListener("pointerover", (event) => {
    const place = spans.indexOf(event.target);
    if (place >= 0) choose(place);
  });
  strip.addEventListener("pointerleave", () => choose(-1));
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.min(tokens.length - 1, Math.max(0, chosen + step)));
  });
  const panel = make("details", { class: "experts" }, make("summary", {}, "Experts"), strip, canvas, words);
  panel.addEventListener("toggle", () => {
    if (!panel.open) return;
    choose(chosen);
    panel.scrollIntoView({ block: "nearest" });
  });
  return panel;
}

function shown(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function draw(canvas, names, load, chosen) {
  const style = getComputedStyle(canvas);
  const count = load[0].length;
  const room = canvas.parentElement.clientWidth - LABEL;
  const columns = Math.max(8, Math.min(count, Math.floor(room / (CELL + GAP))));
  const lines = Math.ceil(count / columns); // of each layer
  const height = lines * (CELL + GAP) + 5;
  const width = LABEL + columns * (CELL + GAP);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = load.length * height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${load.length * height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px sans-serif";
  pen.textBaseline = "top";
  load.forEach((of_layer, layer) => {
    pen.fillStyle = style.color;
    pen.globalAlpha = 1;
    pen.fillText(names[layer], 0, layer * height);
    const most = Math.max(1, ...of_layer);
    of_layer.forEach((tokens, expert) => {
      const x = LABEL + (expert % columns) * (CELL + GAP);
      const y = layer * height + Math.floor(expert / columns) * (CELL + GAP);
      pen.globalAlpha = 0.1 + 0.9 * (tokens / most);
      pen.fillStyle = style.getPropertyValue("--accent");
      pen.fillRect(x, y, CELL, CELL);
      if (!chosen[layer]?.includes(expert)) return;
      pen.globalAlpha = 1;
      pen.lineWidth = 2;
      pen.strokeStyle = style.getPropertyValue("--mark");
      pen.strokeRect(x + 1, y + 1, CELL - 2, CELL - 2);
    });
  });
}

// Texts under way: one stream for each model, shown as it comes.

import { make } from "./elements.js";
import { expertsPanel, speedOf } from "./experts.js";
import { markdown } from "./markdown.js";
import { stream } from "./server.js";

// An answer on the page, and what is known of it. `show(text)`: the element of its text.
export class AnswerView {
  constructor(name, show = (text) => make("div", { class: "text" }, markdown(text))) {
    this.show = show;
    this.text = "";
    this.tokens = [];
    this.body = show("");
    this.below = make("div", { class: "below" });
    this.element = make("article", { class: "answer" }, make("h3", {}, name), this.body, this.below);
    this.isDrawn = true;
  }

  add(text) {
    this.text += text;
    if (!this.isDrawn) return;
    this.isDrawn = false;
    requestAnimationFrame(() => this.draw()); // once a frame, however fast tokens come
  }

  draw() {
    this.isDrawn = true;
    const body = this.show(this.text);
    this.body.replaceWith(body);
    this.body = body;
  }

  // model: its card of /v1/models; null where its experts are not known.
  finish(speed, problem, model) {
    this.draw();
    const panel = model && expertsPanel(this.tokens, model);
    if (speed) this.below.append(make("p", { class: "quiet" }, speed));
    if (problem) this.below.append(make("p", { class: "problem" }, problem));
    if (panel) this.below.append(panel);
  }
}

// As `stream`, without the oldest turns of a conversation that the model's context does not hold.
async function* streamFitting(path, body, signal, onForgotten) {
  for (let forgotten = 0; ; ) {
    try {
      yield* stream(path, body, signal);
      return;
    } catch (error) {
      const first = body.messages?.[0].role === "system" ? 1 : 0;
      if (error.code !== "context_length_exceeded" || (body.messages?.length ?? 0) < first + 3) throw error;
      body.messages.splice(first, 2);
      onForgotten((forgotten += 1));
    }
  }
}

// Streams one answer into its view; returns {text, speed, problem}. It is kept as far as it came, whatever ends it.
export async function write(view, path, body, signal, model) {
  let speed = "", problem = "", isCut = false, forgotten = 0;
  try {
    for await (const event of streamFitting(path, body, signal, (turns) => (forgotten = turns))) {
      const choice = event.choices[0];
      view.add(choice?.delta?.content ?? choice?.text ?? "");
      view.tokens.push(...(choice?.tokens ?? []));
      if (event.usage) speed = speedOf(event.timings, event.usage);
      if (choice?.finish_reason === "length") isCut = true;
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
  }
  if (!view.text && !problem) speed += " · an empty answer";
  if (forgotten) speed += ` · without the ${forgotten} oldest turns, which the context does not hold`;
  if (isCut) speed += " · cut at its greatest length";
  view.finish(speed, problem, model);
  return { text: view.text, speed, problem };
}
